"""Whether devices can be trained as one stack: hooks under `torch.func.vmap` beside one by one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from edgelearn.continual.memory import Memory
from edgelearn.continual.strategy import ClientStrategy
from edgelearn.scenario.samples import Batch
from edgelearn.testing.calls import Call, call
from edgelearn.testing.subject import Broken, Skipped

_RTOL = 1e-4


def compare_stacked(strategy: ClientStrategy, hook: str, calls: list[Call]) -> None:
    """Compare a hook under `torch.func.vmap` over devices with the same, one by one."""
    rows = _as_rows(calls)
    alone = [
        _named(call(strategy, hook, _from_row(made, row)))
        for made, row in zip(calls, rows, strict=True)
    ]
    stack = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    try:
        together = _stacked_results(strategy, hook, calls[0], stack)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
        raise Skipped(
            f"it will run device by device, since `{hook}` can't be stacked ({reason}). To allow "
            "it, do without .item(), float(tensor), `if tensor:` and writing into tensors"
        ) from None
    for k, own in enumerate(alone):
        for name, expected in own.items():
            found = together[name][k]
            number, wanted = found.double(), expected.double()  # of any dtype, bool too
            size = float(wanted.abs().max()) if wanted.numel() else 0.0
            if found.shape != expected.shape or not torch.allclose(
                number, wanted, rtol=_RTOL, atol=1e-6 * max(1.0, size), equal_nan=True
            ):
                raise Broken(
                    f"`{hook}` gives device {k} another {name} in a stack of {len(alone)} devices "
                    f"({_brief(found)}) than alone ({_brief(expected)}); expected the same within "
                    f"{_RTOL:g}. Use torch operations on the inputs alone, without a branch on "
                    "whether they succeed"
                )


def _as_rows(calls: list[Call]) -> list[dict[str, Tensor]]:
    """Return the tensors among each call's inputs by name; batches cut to a common length."""
    batches = [made.inputs["batch"] for made in calls if "batch" in made.inputs]
    length = min(map(len, batches), default=0)
    rows = []
    for made in calls:
        row: dict[str, Tensor] = {}
        for name, value in made.inputs.items():
            if isinstance(value, Tensor):
                row[name] = value
            elif isinstance(value, Memory):
                row |= {f"{name}.{key}": tensor for key, tensor in value.items()}
            elif isinstance(value, Batch):
                parts = {"x": value.x, "y": value.y, "weight": value.weight, "mask": value.mask}
                row |= {f"{name}.{k}": t[:length] for k, t in parts.items() if t is not None}
                if value.places is not None:
                    present = len(value) - value.num_past
                    row[f"{name}.places"] = value.places[: max(0, length - present)]
        rows.append(row)
    if any(row.keys() != rows[0].keys() for row in rows):
        raise Skipped(
            "it will run device by device, since `extend` gives some devices batches with weights "
            "or masks and others without"
        )
    return rows


def _from_row(made: Call, row: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the inputs of a call with the tensors of a row in their places."""
    inputs: dict[str, Any] = {}
    for name, value in made.inputs.items():
        if isinstance(value, Tensor):
            inputs[name] = row[name]
        elif isinstance(value, Memory):
            inputs[name] = Memory({key: row[f"{name}.{key}"] for key in value}, value.store)
        elif isinstance(value, Batch):
            parts = (row.get(f"{name}.{part}") for part in ("weight", "mask", "places"))
            inputs[name] = Batch(row[f"{name}.x"], row[f"{name}.y"], *parts)
        else:
            inputs[name] = value
    return inputs


def _stacked_results(
    strategy: ClientStrategy, hook: str, made: Call, stack: dict[str, Tensor]
) -> dict[str, Tensor]:
    with warnings.catch_warnings(), torch.set_grad_enabled(hook == "loss"):
        warnings.simplefilter("ignore")  # vmap warns of slow fallbacks
        if hook != "loss":

            def apply(row: dict[str, Tensor]) -> dict[str, Tensor]:
                return _named(call(strategy, hook, _from_row(made, row)))

            results: dict[str, Tensor] = vmap(apply)(stack)
            return results

        def loss(params: Tensor, rest: dict[str, Tensor]) -> Tensor:
            inputs = _from_row(made, {**rest, "params": params})
            value: Tensor = strategy.loss(*inputs.values())
            return value

        rest = {name: tensor for name, tensor in stack.items() if name != "params"}
        gradients, values = vmap(grad_and_value(loss))(stack["params"], rest)
        return {"value": values, "gradient": gradients}


def _named(result: Any) -> dict[str, Tensor]:
    if isinstance(result, tuple):
        return {"value": result[0], "gradient": result[1]}
    return dict(result) if isinstance(result, Memory) else {"result": result}


def _brief(tensor: Tensor) -> str:
    flat = tensor.flatten()
    return f"{float(flat[0]):.6g}{', ...' if flat.numel() > 1 else ''}" if flat.numel() else "none"
