"""A client strategy to start from: a complete file that runs, with comments."""

from __future__ import annotations

import builtins
import keyword
import re
import sys
from importlib import resources
from pathlib import Path
from string import Template

from edgelearn.errors import PluginError

# Names that the file imports, and files that would hide what it imports.
_TAKEN = (
    "Batch",
    "ClientStrategy",
    "Experience",
    "Facts",
    "FlatModel",
    "Generator",
    "Memory",
    "SampleSpec",
    "Samples",
    "Tensor",
    "TensorSpec",
)
_HIDING = {"edgelearn", "flwr", "numpy", "torch", *sys.stdlib_module_names}


def write_strategy(name: str, directory: Path) -> Path:
    """Write a working strategy, with comments, to start from.

    Args:
        name: Its name, such as my-strategy, my_strategy or MyStrategy.
        directory: The folder that it goes to.

    Returns:
        The new file, named in snake_case; the class in it is `class_name(name)`.

    Raises:
        PluginError: If the name can't be one, or there is such a file already.
    """
    chosen, path = class_name(name), directory / f"{module_name(name)}.py"
    template = resources.files("edgelearn.testing").joinpath("strategy.py.txt")
    text = Template(template.read_text(encoding="utf-8")).substitute(
        class_name=chosen, file=path.name
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise PluginError(
            f"{path} is there already, and is left as it is; choose another name"
        ) from None
    except OSError as error:
        raise PluginError(f"{path} can't be written: {error}") from error
    return path


def class_name(name: str) -> str:
    """Return the name of the class: my-strategy, my_strategy and MyStrategy are MyStrategy.

    Raises:
        PluginError: If the name can't be one.
    """
    if not re.fullmatch(r"[A-Za-z]\w*(-\w+)*", name, re.ASCII):
        raise PluginError(
            f"{name!r} can't be the name of a class: letters, digits, - and _ are allowed, a "
            "letter first, such as my-strategy"
        )
    chosen = "".join(word[:1].upper() + word[1:] for word in re.split(r"[-_]+", name))
    if keyword.iskeyword(chosen) or hasattr(builtins, chosen) or chosen in _TAKEN:
        raise PluginError(f"{name!r} can't be the name of a class: {chosen} is taken; try another")
    return chosen


def module_name(name: str) -> str:
    """Return the name of the file, without .py: my-strategy and MyStrategy are my_strategy.

    Raises:
        PluginError: If the name can't be one.
    """
    chosen = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name(name))
    chosen = chosen.lower()
    if keyword.iskeyword(chosen) or chosen in _HIDING:
        raise PluginError(
            f"{name!r} can't be the name of a plug-in: {chosen}.py would hide Python's own; "
            "try another"
        )
    return chosen
