# edgelearn: `make` prints this help. Each target sets up what it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
READY  := $(VENV)/.ready

# Tests start many processes, which need not compile edgelearn anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types golden bench bench-engines e2e docs clean

help: ## Print this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv and install edgelearn with all extras

# The kernels are built beside the installation, and modules compiled on all cores, which pip does on
# one; compileall also tries templates that are no Python, so what it says does not count.
$(READY): pyproject.toml $(wildcard native/pyproject.toml native/CMakeLists.txt native/src/*.* native/src/simd/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "edgelearn needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing edgelearn into $(VENV) (a few minutes, once) ..."
	@if command -v c++ > /dev/null; then \
		rm -rf $(VENV)/native; $(PIP) wheel --no-deps --wheel-dir $(VENV)/native ./native & kernels=$$!; \
	else echo "No C++ compiler: edgelearn works without its compiled kernels, only slower."; fi; \
	$(PIP) install --no-compile --editable '.[all,dev]' || exit; \
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib; \
	if [ -n "$$kernels" ]; then \
		wait $$kernels && $(PIP) install --no-deps --force-reinstall $(VENV)/native/*.whl; fi
	@touch $(READY)

demo: $(READY) ## Simulate a fleet that learns without forgetting, and one that forgets
	$(BIN)/edgelearn run split-digits
	$(BIN)/edgelearn compare split-digits --client naive,replay

test: $(READY) ## Run the tests, the linters and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types || { echo "mypy found faults: see above"; exit 1; }; exit $$tests

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
