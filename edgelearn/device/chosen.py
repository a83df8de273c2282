"""Which parameters of a network a device trains: all, its last layers, biases, norms, or by name.

What is not chosen stays as the server sent it: it takes no step, and a step keeps nothing for it.

Reference: Lin, Zhu, Chen, Wang, Gan, Han, "On-Device Training Under 256KB Memory", NeurIPS 2022,
arXiv:2206.15472, whose sparse update trains the biases of some layers and the weights of a few.
Which ones, the paper searches by their contribution to accuracy within a memory budget; here the
scenario names them, and tensors are chosen whole, not by channel. Biases alone are TinyTL's lite
variant without its residual modules (Cai, Gan, Zhu, Han, NeurIPS 2020, arXiv:2007.11622).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from edgelearn.errors import nearest
from edgelearn.params import FlatModel
from edgelearn.scenario.spec import ALL

# Layers that normalize; those of the first kind keep statistics of what they have seen.
WITH_STATISTICS = nn.modules.batchnorm._NormBase
NORMS = (WITH_STATISTICS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def chosen(model: FlatModel, train: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the tensors that take steps, in the order of the layout.

    Args:
        model: The network.
        train: "all"; "last:N", the N last modules that own parameters, in the order in which the
            network registers them; "bias", of all layers; "norm", weights and biases of layers
            that normalize; or names of tensors and of modules, with all that is in them.

    Raises:
        ValueError: If there is nothing of the kind, or a name leads nowhere.
    """
    layout = model.layout
    names = layout.names[: layout.num_trained_tensors]
    if train == ALL:
        return names
    if not isinstance(train, str):
        return _named(names, train)
    if train == "bias":
        found = [name for name in names if name.rpartition(".")[2] == "bias"]
    elif train == "norm":
        found = [name for name in names if isinstance(_owner(model, name), NORMS)]
    else:
        count = int(train.removeprefix("last:"))
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        if count > len(owners):
            raise ValueError(f"got {train!r}; the network has {len(owners)} layers with parameters")
        last = owners[len(owners) - count :]
        found = [name for name in names if name.rpartition(".")[0] in last]
    if not found:
        raise ValueError(f"got {train!r}; the network has no such parameters")
    return tuple(found)


def settle(model: FlatModel, names: Sequence[str]) -> None:
    """Put layers with statistics that train nothing into eval mode.

    Whoever freezes such a layer wants what it does to stay as it is: it normalizes by the
    statistics that the server sent, and does not change them. Other layers stay in training mode.
    """
    trained = set(names)
    for name, layer in _with_statistics(model):
        prefix = f"{name}." if name else ""
        if not any(f"{prefix}{leaf}" in trained for leaf in ("weight", "bias")):
            layer.eval()


def mixes_samples(model: FlatModel, names: Sequence[str], *, is_all: bool) -> bool:
    """Whether a sample's output depends on the others of its batch, in training.

    Args:
        model: The network.
        names: Tensors that take steps.
        is_all: Whether that is all; then no layer is put into eval mode.
    """
    trained = set(names)
    return any(
        is_all or any(f"{name}.{leaf}".lstrip(".") in trained for leaf in ("weight", "bias"))
        for name, layer in _with_statistics(model)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    )


def _with_statistics(model: FlatModel) -> list[tuple[str, nn.Module]]:
    modules = model.module.named_modules()
    return [(name, layer) for name, layer in modules if isinstance(layer, WITH_STATISTICS)]


def _owner(model: FlatModel, name: str) -> nn.Module:
    return model.module.get_submodule(name.rpartition(".")[0])


def _named(names: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    found = set()
    for item in wanted:
        within = [name for name in names if name == item or name.startswith(f"{item}.")]
        if not within:
            modules = [name.rpartition(".")[0] for name in names]
            close = nearest(item, (*names, *filter(None, modules)))
            raise ValueError(f"{item!r} is no layer or tensor that is trained{close}")
        found.update(within)
    return tuple(name for name in names if name in found)
