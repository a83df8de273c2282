# edgelearn: `make` prints this help. Each target sets up what it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types golden bench bench-engines e2e docs clean

help: ## Print this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv and install edgelearn with all extras

$(READY): pyproject.toml $(wildcard native/pyproject.toml native/CMakeLists.txt native/src/*.* native/src/simd/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "edgelearn needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing edgelearn into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all,dev]'
	@if command -v c++ > /dev/null; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check ./native; \
	else echo "No C++ compiler: edgelearn works without its compiled kernels, only slower."; fi
	@touch $(READY)

demo: $(READY) ## Simulate a fleet that learns without forgetting, and one that forgets
	$(BIN)/edgelearn run split-digits
	$(BIN)/edgelearn compare split-digits --client naive,replay

test: $(READY) ## Run the tests, the linters and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## Lint and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/lint-imports

types: $(READY) ## Check types
	$(BIN)/mypy

golden: $(READY) ## Rewrite the golden runs (a change of results: say why in CHANGELOG.md)
	EDGELEARN_REWRITE_GOLDEN=1 $(BIN)/python -m pytest tests/golden

bench: $(READY) ## Measure, and rewrite docs/benchmarks.md
	$(BIN)/python benchmarks/demo.py

bench-engines: $(READY) ## Measure the engines beside Flower, pfl and Avalanche (hours)
	$(BIN)/python benchmarks/engines.py

e2e: $(READY) ## Run only the end-to-end tests (real processes, real Flower server)
	$(BIN)/python -m pytest tests/e2e

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
