"""The native kernels against torch autograd, and what they promise beyond it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

edgelearn_native: Any = pytest.importorskip(
    "edgelearn_native", reason="needs `pip install ./native`"
)

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
ISAS = edgelearn_native.isas()


def conv(i: int, o: int, k: int, *, pad: int = 0, bias: bool = True) -> nn.Module:
    return nn.Conv2d(i, o, k, padding=pad, bias=bias)


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(shape: tuple[int, ...], *layers: nn.Module, classes: int = 5) -> nn.Sequential:
    body = nn.Sequential(*layers, nn.Flatten())
    features = body(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


R, P2 = nn.ReLU, lambda: nn.MaxPool2d(2)

NETWORKS: dict[str, tuple[tuple[int, ...], Any]] = {
    "linear": ((7,), lambda: mlp(7, 3)),
    "tiny": ((64,), lambda: mlp(64, 32, 10)),
    "odd": ((13,), lambda: mlp(13, 17, 1, 9, 5)),
    "deep": ((20,), lambda: mlp(20, 33, 31, 16, 15, 18, 4)),
    "no-bias": ((19,), lambda: mlp(19, 23, 6, bias=False)),
    "wide": ((1100,), lambda: mlp(1100, 37, 70)),
    "no-relu": ((9,), lambda: nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 3))),
    "image-mlp": ((2, 3, 5), lambda: nn.Sequential(nn.Flatten(), *mlp(30, 11, 4))),
    "conv1": ((1, 5, 7), lambda: cnn((1, 5, 7), conv(1, 3, 1), R())),
    "conv3-pool": ((3, 9, 11), lambda: cnn((3, 9, 11), conv(3, 10, 3, pad=1), R(), P2())),
    "pool-relu": ((2, 8, 6), lambda: cnn((2, 8, 6), conv(2, 17, 3), P2(), R())),
    "conv5x2": (
        (1, 14, 13),
        lambda: cnn((1, 14, 13), conv(1, 6, 5, pad=2), R(), P2(), conv(6, 20, 5, pad=2), R(), P2()),
    ),
    "no-pool": ((2, 7, 7), lambda: cnn((2, 7, 7), conv(2, 33, 3), R(), conv(33, 5, 2), R())),
    "no-relu-conv": ((1, 6, 6), lambda: cnn((1, 6, 6), conv(1, 4, 3), P2(), conv(4, 3, 1))),
    "no-bias-conv": (
        (4, 6, 9),
        lambda: cnn((4, 6, 9), conv(4, 8, 4, pad=3, bias=False), R(), P2()),
    ),
    "conv7": ((1, 15, 9), lambda: cnn((1, 15, 9), conv(1, 16, 7, pad=3), R(), P2())),
    "tall-kernel": (
        (3, 10, 10),
        lambda: cnn((3, 10, 10), nn.Conv2d(3, 7, (9, 2), padding=(4, 1)), R(), P2()),
    ),
    "many-channels": ((50, 5, 4), lambda: cnn((50, 5, 4), conv(50, 40, 3, pad=1), R(), P2())),
}


def layers_of(module: nn.Sequential) -> list[tuple[Any, ...]]:
    layers: list[tuple[Any, ...]] = []
    at = 0
    for layer in module:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight, at = at, at + layer.weight.numel()
            bias = -1
            if layer.bias is not None:
                bias, at = at, at + layer.bias.numel()
            if isinstance(layer, nn.Linear):
                layers.append(("linear", weight, bias, layer.out_features))
            else:
                layers.append(
                    ("conv2d", weight, bias, layer.out_channels, *layer.kernel_size, *layer.padding)
                )
        elif isinstance(layer, nn.ReLU):
            layers.append(("relu",))
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(("maxpool2d", 2))
        else:
            layers.append(("flatten",))
    return layers


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def permutation(seed: int, n: int) -> np.ndarray:
    keys = np.array([mix((seed + (i + 1) * GOLDEN) & MASK) for i in range(n)], dtype=np.uint64)
    return np.argsort(keys, kind="stable")


@dataclass
class Fleet:
    """A network, a data set, and devices that hold some of it."""

    shape: tuple[int, ...]
    module: nn.Sequential
    held: list[list[int]]
    num_samples: int = 60
    stored: Any = np.float32
    domains: int = 0
    taps: int = 1
    masks: Tensor | None = None
    replay: list[list[int]] | None = None
    extra: int = 0  # elements of the vector that belong to no tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(5)
        self.parameters = list(self.module.parameters())
        with torch.no_grad():
            flat = torch.cat([p.reshape(-1) for p in self.parameters])
        self.size = len(flat)
        self.params = torch.cat([flat, torch.ones(self.extra)]).numpy()
        self.classes = self.module[-1].out_features
        n = self.num_samples
        self.y = torch.randint(0, self.classes, (n,), generator=g)
        x = torch.randn((n, *self.shape), generator=g)
        self.scale, self.shift = 0.9, 0.1
        if self.stored == np.uint8:
            x = torch.randint(0, 256, (n, *self.shape), generator=g, dtype=torch.uint8)
            self.scale, self.shift = 1 / 255 / 0.4, 0.9
        self.x = x
        features = x[0].numel()
        self.index = self.weight = None
        if self.domains:
            taps = (self.domains, self.taps, features)
            self.index = torch.randint(0, features, taps, generator=g)
            self.weight = torch.rand(taps, generator=g) / self.taps
        self.data = edgelearn_native.Data(
            self.x.numpy(),
            self.y.numpy(),
            self.scale,
            self.shift,
            None if self.index is None else self.index.numpy(),
            None if self.weight is None else self.weight.numpy(),
            None if self.masks is None else self.masks.numpy(),
        )
        count = len(self.held)
        self.seeds = np.arange(count, dtype=np.uint64) * np.uint64(0xDEADBEEF12345677)
        self.draw_seeds = np.arange(count, dtype=np.uint64) * np.uint64(9876543210123) + np.uint64(
            7
        )

    @staticmethod
    def ragged(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        starts = np.cumsum([0] + [len(row) for row in rows]).astype(np.int64)
        return np.array([i for row in rows for i in row], dtype=np.int32), starts

    def plan(self, isa: str | None = None) -> Any:
        return edgelearn_native.Plan(self.shape, len(self.params), layers_of(self.module), isa=isa)

    def fit(self, isa: str | None = None, num_threads: int = 1, **changes: Any) -> Any:
        ids, starts = self.ragged(self.held)
        options = {"epochs": 2, "batch_size": 4, "lr": 0.05, **self.options, **changes}
        if self.replay is not None:
            options["replay_ids"], options["replay_starts"] = self.ragged(self.replay)
        updates = np.full((len(self.held), len(self.params)), np.nan, dtype=np.float32)
        results = self.plan(isa).fit(
            self.data,
            self.params,
            updates,
            ids=ids,
            starts=starts,
            seeds=self.seeds,
            draw_seeds=self.draw_seeds,
            num_threads=num_threads,
            **options,
        )
        return updates, *results

    def inputs(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        at = torch.tensor(ids, dtype=torch.int64)
        x = self.x[at % self.num_samples]
        if self.index is not None and self.weight is not None:
            domain = at // self.num_samples
            flat = x.reshape(len(at), -1)
            if self.taps == 1:
                flat = flat.gather(1, self.index[domain, 0])
            else:
                out = torch.zeros(flat.shape)
                for t in range(self.taps):
                    out += self.weight[domain, t] * flat.gather(1, self.index[domain, t])
                if self.stored == np.uint8:
                    out.round_()
                flat = out.to(x.dtype)
            x = flat.view_as(x)
        x = x.to(torch.float32, copy=True).mul_(self.scale).sub_(self.shift)
        return x, self.y[at % self.num_samples]

    def cross_entropy(self, z: Tensor, y: Tensor) -> Tensor:
        if self.masks is not None:
            z = z.masked_fill(~self.masks[y], float("-inf"))
        return F.cross_entropy(z, y, reduction="none")

    def load(self, flat: np.ndarray) -> None:
        at = 0
        with torch.no_grad():
            for p in self.parameters:
                p.copy_(torch.from_numpy(flat[at : at + p.numel()]).view_as(p))
                at += p.numel()

    def reference(
        self,
        *,
        pull: tuple[Tensor, Tensor] | None = None,
        logits: Tensor | None = None,
        charge: np.ndarray | None = None,
    ) -> tuple[np.ndarray, list[float], list[int], list[int]]:
        """Train every device with autograd and torch.optim.SGD; path integrals go to `charge`."""
        options = {"epochs": 2, "batch_size": 4, "lr": 0.05, **self.options}
        lr, batch_size = options["lr"], options["batch_size"]
        mu = options.get("proximal_mu", 0.0)
        updates = np.zeros((len(self.held), len(self.params)), dtype=np.float32)
        losses, steps, passed = [], [], []
        replay_at = 0
        for k, held in enumerate(self.held):
            self.load(self.params)
            start = [p.detach().clone() for p in self.parameters]
            optimizer = torch.optim.SGD(
                self.parameters,
                lr=lr,
                momentum=options.get("momentum", 0.0),
                weight_decay=options.get("weight_decay", 0.0),
            )
            draws = torch.Generator().manual_seed(int(self.draw_seeds[k]))
            total, count, seen = 0.0, 0, 0
            stored = self.replay[k] if self.replay is not None else []
            for epoch in range(options["epochs"]):
                seed = mix((int(self.seeds[k]) + (epoch + 1) * GOLDEN) & MASK)
                order = permutation(seed, len(held))
                for begin in range(0, len(held), batch_size):
                    ids = [held[i] for i in order[begin : begin + batch_size]]
                    n, m = len(ids), 0
                    picks = np.zeros(0, dtype=np.int64)
                    if stored:
                        m = min(options.get("replay_batch", 0) or n, len(stored))
                        key = int(torch.randint(0, 2**62, (), generator=draws))
                        picks = permutation(key, len(stored))[:m]
                        ids = ids + [stored[i] for i in picks]
                    x, y = self.inputs(ids)
                    z = self.module(x)
                    weight = torch.full((n + m,), 1 / (n + m))
                    share = options.get("replay_share", -1.0)
                    if m and share >= 0:
                        weight[:n], weight[n:] = (1 - share) / n, share / m
                    loss = (self.cross_entropy(z, y) * weight).sum()
                    if m and logits is not None:
                        near = (z[n:] - logits[replay_at + torch.from_numpy(picks)]).square()
                        loss = loss + options["distill_weight"] * near.mean()
                    optimizer.zero_grad()
                    loss.backward()
                    for p, p0 in zip(self.parameters, start, strict=True):
                        assert p.grad is not None
                        p.grad += mu * (p.detach() - p0)
                    before = [(p.detach().clone(), p.grad.clone()) for p in self.parameters]
                    optimizer.step()
                    if pull is not None:
                        self.pull(*pull, lr * options["strength"])
                    if charge is not None:
                        at = 0
                        for p, (p0, g0) in zip(self.parameters, before, strict=True):
                            more = (g0.double() * (p0.double() - p.detach())).reshape(-1)
                            charge[k, at : at + len(more)] += more.numpy()
                            at += len(more)
                    total, count, seen = total + loss.item(), count + 1, seen + n + m
            replay_at += len(stored)
            flat = torch.cat([p.detach().reshape(-1) for p in self.parameters]).numpy()
            updates[k, : self.size] = flat - self.params[: self.size]
            losses.append(total / count if count else 0.0)
            steps.append(count)
            passed.append(seen)
        self.load(self.params)
        return updates, losses, steps, passed

    @torch.no_grad()
    def pull(self, curvature: Tensor, anchor: Tensor, strength: float) -> None:
        at = 0
        for p in self.parameters:
            end = min(at + p.numel(), len(curvature))
            if end > at:
                f, a = curvature[at:end], anchor[at:end]
                w = strength * f / (1 + strength * f)
                p.view(-1)[: end - at] += w * (a - p.view(-1)[: end - at])
            at += p.numel()


def fleet(network: str = "tiny", **changes: Any) -> Fleet:
    torch.manual_seed(3)
    shape, make = NETWORKS[network]
    held = changes.pop("held", [list(range(11)), [], [5], list(range(20, 28)), [9, 9, 3, 40, 59]])
    return Fleet(shape, make(), held, **changes)


def assert_close(native: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    for row, other in zip(native, expected, strict=True):
        assert np.linalg.norm(row - other) <= tolerance * np.linalg.norm(other)


def assert_equal_training(f: Fleet, isa: str, *, reference: Any = None, **changes: Any) -> None:
    updates, loss, steps, passed = f.fit(isa, **changes)
    expected = reference or f.reference()
    assert_close(updates, expected[0])
    assert loss == pytest.approx(expected[1], rel=1e-5, abs=1e-7)
    assert steps.tolist() == expected[2]
    assert passed.tolist() == expected[3]


isas = pytest.mark.parametrize("isa", ISAS)


@isas
@pytest.mark.parametrize("network", NETWORKS)
def test_trains_as_autograd_does(network: str, isa: str) -> None:
    assert_equal_training(fleet(network), isa)


@isas
@pytest.mark.parametrize("network", ["odd", "conv5x2"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 10, 33])
def test_trains_with_any_batch_size(network: str, batch_size: int, isa: str) -> None:
    held = [list(range(34)), [1, 2]]
    f = fleet(network, held=held, options={"batch_size": batch_size, "epochs": 1})
    assert_equal_training(f, isa)


@isas
@pytest.mark.parametrize("network", ["odd", "conv5x2", "no-bias-conv"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"proximal_mu": 0.5},
        {"momentum": 0.8, "weight_decay": 0.05, "proximal_mu": 0.3, "epochs": 3},
    ],
    ids=str,
)
def test_optimizer_terms(network: str, options: dict[str, Any], isa: str) -> None:
    assert_equal_training(fleet(network, options=options), isa)


@isas
@pytest.mark.parametrize("network", ["deep", "conv5x2"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("missing", [0, 40])
def test_implicit_pull(network: str, options: dict[str, Any], missing: int, isa: str) -> None:
    f = fleet(network, extra=3, options={"strength": 30.0, **options})
    length = f.size - missing
    g = torch.Generator().manual_seed(1)
    curvature, anchor = torch.rand(length, generator=g), torch.randn(length, generator=g)
    count = len(f.held)
    addresses = {
        "curvature": np.full(count, curvature.data_ptr(), dtype=np.uint64),
        "anchor": np.full(count, anchor.data_ptr(), dtype=np.uint64),
        "curvature_size": length,
    }
    reference = f.reference(pull=(curvature, anchor))
    assert_equal_training(f, isa, reference=reference, **addresses)
    free = f.fit(isa)[0]
    addresses["curvature"][0] = addresses["anchor"][0] = 0
    updates = f.fit(isa, **addresses)[0]
    assert_close(updates[:1], free[:1], 1e-6)
    assert_close(updates[1:], reference[0][1:])


@isas
@pytest.mark.parametrize("network", ["odd", "deep", "no-bias", "conv5x2"])
@pytest.mark.parametrize("is_pulled", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.5, "weight_decay": 0.1, "proximal_mu": 0.3, "epochs": 3}],
    ids=str,
)
def test_path_integral(network: str, options: dict[str, Any], is_pulled: bool, isa: str) -> None:
    f = fleet(network, extra=3, options={"lr": 0.2, "strength": 3.0, **options})
    g, count, addresses, pull = torch.Generator().manual_seed(1), len(f.held), {}, None
    if is_pulled:
        pull = torch.rand(f.size, generator=g), torch.randn(f.size, generator=g)
        addresses = {
            name: np.full(count, vector.data_ptr(), dtype=np.uint64)
            for name, vector in zip(("curvature", "anchor"), pull, strict=True)
        }
        addresses["curvature_size"] = f.size
    so_far = torch.rand(count, f.size + 1, generator=g).numpy()
    charge, expected = so_far.copy(), so_far[:, : f.size].astype(np.float64)
    reference = f.reference(pull=pull, charge=expected)
    assert_equal_training(f, isa, reference=reference, charge=charge, **addresses)
    assert np.array_equal(charge[:, f.size :], so_far[:, f.size :])  # of no tensor
    grown = charge[:, : f.size] - so_far[:, : f.size]
    for k, (row, other) in enumerate(zip(grown, expected - so_far[:, : f.size], strict=True)):
        assert np.linalg.norm(row - other) <= 1e-4 * np.linalg.norm(other) + 1e-6, k
        assert row.any() == bool(f.held[k])
    others = so_far.copy()
    f.fit(isa, num_threads=3, charge=others, **addresses)
    assert np.array_equal(others, charge)


@isas
def test_a_pull_at_nothing_is_none(isa: str) -> None:
    f = fleet("odd", options={"strength": 3.0})
    nothing, anchor = torch.zeros(f.size), torch.randn(f.size)
    addresses: dict[str, Any] = {"curvature_size": f.size}
    for name, vector in (("curvature", nothing), ("anchor", anchor)):
        addresses[name] = np.full(len(f.held), vector.data_ptr(), dtype=np.uint64)
    assert np.array_equal(f.fit(isa, **addresses)[0], f.fit(isa)[0])


REPLAY = [[30, 31, 32, 33, 34, 35, 36], [1], [50, 51], [], list(range(40, 60))]


@isas
@pytest.mark.parametrize("network", ["tiny", "conv3-pool"])
@pytest.mark.parametrize("share", [-1.0, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("replay_batch", [0, 1, 5])
def test_replay(network: str, share: float, replay_batch: int, isa: str) -> None:
    options = {"replay_share": share, "replay_batch": replay_batch}
    assert_equal_training(fleet(network, replay=REPLAY, options=options), isa)


@isas
@pytest.mark.parametrize("share", [-1.0, 0.5])
def test_stored_logits(share: float, isa: str) -> None:
    f = fleet("tiny", replay=REPLAY, options={"replay_share": share, "distill_weight": 0.7})
    logits = torch.randn(sum(map(len, REPLAY)), f.classes)
    assert_equal_training(f, isa, reference=f.reference(logits=logits), logits=logits.numpy())


@isas
@pytest.mark.parametrize("network", ["tiny", "conv3-pool"])
@pytest.mark.parametrize("stored", [np.uint8, np.float32])
@pytest.mark.parametrize(("domains", "taps"), [(0, 1), (3, 1), (2, 4)])
def test_domains_and_types(network: str, stored: Any, domains: int, taps: int, isa: str) -> None:
    held = [[0, 7, 59, 12, 9], [33, 20]]
    if domains:
        held = [[i + 60 * (i % domains) for i in range(13)], [59 + 60 * (domains - 1)]]
    f = fleet(network, held=held, stored=stored, domains=domains, taps=taps)
    assert_equal_training(f, isa)


@isas
def test_task_masks(isa: str) -> None:
    task = torch.arange(10) // 4
    f = fleet("tiny", masks=task[:, None] == task[None, :], replay=REPLAY)
    assert_equal_training(f, isa)


@isas
def test_no_devices_and_no_samples(isa: str) -> None:
    updates, loss, steps, passed = fleet("tiny", held=[]).fit(isa, num_threads=3)
    assert len(updates) == len(loss) == len(steps) == len(passed) == 0
    f = fleet("tiny", held=[[], [1, 2]])
    assert (f.fit(isa, epochs=0)[0] == 0).all()
    logits = np.empty((0, f.classes), np.float32)
    f.plan(isa).forward(f.data, f.params, np.empty(0, np.int32), logits)


@isas
def test_certain_predictions_train(isa: str) -> None:
    f = fleet("tiny", options={"lr": 0.01})
    f.params = f.params * 60
    assert_equal_training(f, isa)


@isas
def test_elements_of_no_tensor_stay(isa: str) -> None:
    updates = fleet("odd", extra=5).fit(isa)[0]
    assert (updates[:, -5:] == 0).all()


@isas
def test_tensors_at_any_offset(isa: str) -> None:
    f = fleet("tiny")
    params = f.params
    order = [(2048, 32), (0, 2048), (2080, 320), (2400, 10)]  # bias first, and a gap between
    moved, offsets, at = [], {}, 0
    for begin, size in order:
        offsets[begin] = at + 1
        moved += [np.zeros(1, np.float32), params[begin : begin + size]]
        at += size + 1
    layers = [("linear", offsets[0], offsets[2048], 32), ("relu",)]
    layers += [("linear", offsets[2080], offsets[2400], 10)]
    plan = edgelearn_native.Plan((64,), at, layers, isa=isa)
    ids, starts = f.ragged(f.held)
    updates = np.empty((len(f.held), at), np.float32)
    arguments = {"ids": ids, "starts": starts, "seeds": f.seeds}
    plan.fit(f.data, np.concatenate(moved), updates, **arguments, epochs=2, batch_size=4, lr=0.05)
    expected = f.fit(isa)[0]
    for begin, size in order:
        part = updates[:, offsets[begin] : offsets[begin] + size]
        assert np.array_equal(part, expected[:, begin : begin + size])
        assert (updates[:, offsets[begin] - 1] == 0).all()


@isas
@pytest.mark.parametrize("network", ["tiny", "conv5x2"])
def test_bits_do_not_depend_on_threads(network: str, isa: str) -> None:
    held = [list(range(k % 7, k % 7 + (k * 5) % 13)) for k in range(20)]
    options = {"momentum": 0.5, "replay_share": 0.5}
    f = fleet(network, held=held, replay=[row[::2] for row in held], options=options)
    first = f.fit(isa, num_threads=1)
    for num_threads in (2, 3, 8):
        for one, other in zip(first, f.fit(isa, num_threads=num_threads), strict=True):
            assert one.tobytes() == other.tobytes()


@isas
@pytest.mark.parametrize("network", ["odd", "conv5x2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_device_is_alone(network: str, value: float, isa: str) -> None:
    held = [list(range(10)), list(range(10, 20)), list(range(20, 30))]
    f = fleet(network, held=held)
    clean = f.fit(isa)[0]
    f.x[15] = value
    updates = f.fit(isa)[0]
    assert not np.isfinite(updates[1]).all()
    assert np.array_equal(updates[[0, 2]], clean[[0, 2]])
    finite, norms = np.empty(3, dtype=bool), np.empty(3)
    edgelearn_native.finite_rows(updates, finite, norms)
    assert finite.tolist() == [True, False, True]
    assert norms[0] == pytest.approx(np.linalg.norm(updates[0].astype(np.float64)), rel=1e-12)


@isas
@pytest.mark.parametrize("network", NETWORKS)
def test_forward(network: str, isa: str) -> None:
    f = fleet(network)
    ids = [3, 0, 59, 7, 7, 21, 30]
    logits = np.full((len(ids), f.classes), np.nan, np.float32)
    with torch.no_grad():
        expected = f.module(f.inputs(ids)[0]).numpy()
    for batch_size, num_threads in ((64, 1), (3, 2), (1, 8)):
        f.plan(isa).forward(
            f.data, f.params, np.array(ids, np.int32), logits, num_threads, batch_size
        )
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@isas
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("max_samples", [0, 3])
def test_fisher(network: str, max_samples: int, isa: str) -> None:
    f = fleet(network, held=[list(range(9)), [], [40]], extra=2)
    ids, starts = f.ragged(f.held)
    out = np.full((3, f.size + 2), np.nan, np.float32)
    f.plan(isa).fisher(f.data, f.params, ids, starts, out, max_samples, 2)
    expected = np.zeros_like(out)
    for k, held in enumerate(f.held):
        chosen = held[:max_samples] if max_samples else held
        for i in chosen:
            x, y = f.inputs([i])
            grads = torch.autograd.grad(f.cross_entropy(f.module(x), y).sum(), f.parameters)
            flat = torch.cat([g.reshape(-1) for g in grads])
            expected[k, : f.size] += flat.square().numpy() / len(chosen)
    assert_close(out, expected)
    short = np.full((3, f.size - 5), np.nan, np.float32)
    f.plan(isa).fisher(f.data, f.params, ids, starts, short, max_samples, 1)
    assert np.array_equal(short, out[:, : f.size - 5])


@isas
def test_fisher_of_many_samples(isa: str) -> None:
    f = fleet("tiny", held=[list(range(60))])
    whole, parts = np.empty((1, f.size), np.float32), np.empty((60, f.size), np.float32)
    ids = np.arange(60, dtype=np.int32)
    f.plan(isa).fisher(f.data, f.params, ids, np.array([0, 60]), whole)
    f.plan(isa).fisher(f.data, f.params, ids, np.arange(61), parts)
    np.testing.assert_allclose(whole[0], parts.mean(0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 33, 100, 1000, 4097])
def test_permutation(n: int) -> None:
    for seed in (0, 1, MASK, 0x123456789ABCDEF):
        native = edgelearn_native.permutation(seed, n)
        assert native.dtype == np.int64
        assert np.array_equal(native, permutation(seed, n))


def test_mix() -> None:
    for x in (0, 1, 2**63, MASK, GOLDEN):
        assert edgelearn_native.mix(x) == mix(x)


def test_few_of_many_stored_samples_are_drawn_as_torch_would() -> None:
    replay = [list(range(60)) * 40]
    options = {"batch_size": 1, "replay_batch": 3, "epochs": 20}
    assert_equal_training(
        fleet("linear", held=[list(range(30))], replay=replay, options=options), ISAS[-1]
    )


def test_more_draws_than_the_generator_has_state() -> None:
    options = {"batch_size": 1, "replay_batch": 1, "epochs": 40, "lr": 0.001}
    f = fleet("linear", held=[list(range(20))], replay=[list(range(30))], options=options)
    assert_equal_training(f, ISAS[-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weighted_sum(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    updates = rng.standard_normal((7, 20_011), dtype=np.float32)
    updates[3] = np.nan
    weights = rng.random(7).astype(dtype)
    weights[3] = 0
    out = np.empty(20_011, np.float32)
    edgelearn_native.weighted_sum(updates, weights, out)
    kept = [k for k in range(7) if k != 3]
    expected = weights[kept].astype(np.float64) @ updates[kept].astype(np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for num_threads in (2, 3, 8):
        again = np.empty_like(out)
        edgelearn_native.weighted_sum(updates, weights, again, num_threads)
        assert again.tobytes() == out.tobytes()


def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
import multiprocessing, numpy as np, edgelearn_native as native
updates, weights = np.ones((4, 100_000), np.float32), np.ones(4)
def total():
    out = np.empty(100_000, np.float32)
    native.weighted_sum(updates, weights, out, 3)
    assert (out == 4).all()
total()
child = multiprocessing.get_context("fork").Process(target=total)
child.start(); child.join(20)
assert child.exitcode == 0, child.exitcode
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_isa_is_chosen_by_the_environment() -> None:
    code = "import edgelearn_native as n; print(n.Plan((2,), 4, [('linear', 0, -1, 2)]).isa)"

    def run(isa: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "EDGELEARN_NATIVE_ISA": isa}
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )

    for isa in ISAS:
        assert run(isa).stdout.strip() == isa
    assert "EDGELEARN_NATIVE_ISA" in run("mmx").stderr
    assert edgelearn_native.Plan((2,), 4, [("linear", 0, -1, 2)], isa="portable").isa == "portable"


LINEAR = ("linear", 0, -1, 2)


@pytest.mark.parametrize(
    ("shape", "size", "layers", "message"),
    [
        ((4,), 8, [], "last layer"),
        ((4,), 8, [LINEAR, ("relu",)], "last layer"),
        ((4,), 7, [LINEAR], "of 7 parameters"),
        ((4,), 8, [("linear", -3, -1, 2)], "takes elements"),
        ((4,), 10, [("linear", 0, -2, 2)], "takes elements"),
        ((4,), 8, [("linear", 0, 4, 2)], "share element 4"),
        ((4,), 8, [("linear", 0, -1)], "2 arguments"),
        ((4,), 8, [("linear", 0, -1, 0)], "out_features"),
        ((4,), 8, [("relu",), LINEAR], "before it"),
        ((4,), 8, [("dropout",), LINEAR], "unknown"),
        ((4,), 8, [("linear", 0, -1, 2.5)], "not an integer"),
        ((4,), 8, [()], "name"),
        ((4,), 8, ["linear"], "name"),
        ((2, 2), 8, [LINEAR], "dimensions"),
        ((0,), 8, [LINEAR], "size of 0"),
        ((4,), 0, [LINEAR], "num_params"),
        ((1, 2, 2), 8, [LINEAR], "flattened"),
        ((4,), 8, [("conv2d", 0, -1, 1, 1, 1, 0, 0), LINEAR], "(C, H, W)"),
        ((1, 2, 2), 50, [("conv2d", 0, -1, 1, 3, 3, 0, 0), LINEAR], "larger than the image"),
        ((1, 2, 2), 50, [("maxpool2d", 2), ("flatten",), LINEAR], "must follow"),
        ((1, 2, 2), 50, [("conv2d", 0, -1, 1, 1, 1, 0, 0), ("maxpool2d", 3)], "must be 2"),
        ((1, 1, 2), 50, [("conv2d", 0, -1, 1, 1, 1, 0, 0), ("maxpool2d", 2)], "nothing"),
    ],
)
def test_plans_that_are_refused(shape: Any, size: int, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        edgelearn_native.Plan(shape, size, layers)


def test_an_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match="offer portable"):
        edgelearn_native.Plan((4,), 8, [LINEAR], isa="mmx")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": -1}, "epochs"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"momentum": -0.1}, "momentum"),
        ({"num_threads": 0}, "num_threads"),
        ({"curvature": np.zeros(5, np.uint64)}, "both curvature"),
        (
            {
                "curvature": np.zeros(5, np.uint64),
                "anchor": np.zeros(5, np.uint64),
                "curvature_size": 10**6,
            },
            "curvature_size",
        ),
        ({"charge": np.zeros((4, 3), np.float32)}, "charge has shape"),
        ({"charge": np.zeros((5, 3))}, "charge must be float32"),
        ({"charge": np.zeros((5, 10**5), np.float32)}, "charge has more columns"),
        ({"replay_ids": np.zeros(5, np.int32)}, "both replay"),
        ({"logits": np.zeros((5, 10), np.float32)}, "need replay"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fleet("tiny").fit(**changes)


def test_arrays_that_are_refused() -> None:
    f = fleet("tiny")
    ids, starts = f.ragged(f.held)
    good = {"ids": ids, "starts": starts, "seeds": f.seeds}
    updates = np.empty((5, f.size), np.float32)

    def fit(params: Any = f.params, updates: Any = updates, **changes: Any) -> None:
        f.plan().fit(f.data, params, updates, **{**good, **changes}, epochs=1, batch_size=2, lr=0.1)

    fit()
    replay = {"replay_starts": starts, "draw_seeds": f.seeds}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("params must be float32", {"params": f.params.astype(np.float64)}),
        ("params has shape", {"params": f.params[1:]}),
        ("params must be C-contiguous", {"params": np.zeros(2 * f.size, np.float32)[::2]}),
        ("updates has shape", {"updates": updates[:, 1:]}),
        ("updates must be C-contiguous", {"updates": np.zeros((f.size, 5), np.float32).T}),
        ("ids must be int32", {"ids": ids.astype(np.int64)}),
        ("ids has the id 60", {"ids": np.full_like(ids, 60)}),
        ("ids has the id -1", {"ids": np.full_like(ids, -1)}),
        ("starts has shape", {"starts": starts[1:]}),
        ("starts must not decrease", {"starts": starts[::-1].copy()}),
        ("starts must not decrease", {"starts": starts + 1}),
        ("seeds has shape", {"seeds": f.seeds[1:]}),
        ("replay_ids has the id", {**replay, "replay_ids": np.full_like(ids, 60)}),
        ("replay needs draw_seeds", {"replay_starts": starts, "replay_ids": ids}),
        ("replay_share", {**replay, "replay_ids": ids, "replay_share": 1.5}),
    ]
    for message, changes in bad:
        with pytest.raises(ValueError, match=message):
            fit(**changes)
    locked = updates.copy()
    locked.flags.writeable = False
    with pytest.raises((TypeError, ValueError)):
        fit(updates=locked)


def test_data_that_is_refused() -> None:
    x, y = np.zeros((4, 3), np.float32), np.zeros(4, np.int64)
    make = edgelearn_native.Data
    index = np.zeros((1, 1, 3), np.int64)
    bad: list[tuple[str, tuple[Any, ...]]] = [
        ("uint8 or float32", (x.astype(np.float64), y)),
        ("y must be int64", (x, y.astype(np.int32))),
        ("y has shape", (x, y[1:])),
        ("x has shape", (x[:, 0].copy(), y)),
        ("domain_index has 3", (x, y, 1.0, 0.0, index + 3)),
        ("domain_index has shape", (x, y, 1.0, 0.0, index[:, :, 1:].copy())),
        ("need domain_weight", (x, y, 1.0, 0.0, np.zeros((1, 2, 3), np.int64))),
        ("task_masks has shape", (x, y, 1.0, 0.0, None, None, np.zeros((2, 3), bool))),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=message):
            make(*arguments)
    plan = edgelearn_native.Plan((3,), 6, [LINEAR])
    out = np.empty((1, 2), np.float32)
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="features"):
        plan.forward(make(np.zeros((4, 5), np.float32), y), np.zeros(6, np.float32), one, out)
    with pytest.raises(ValueError, match="labels"):
        plan.fisher(
            make(x, y + 2),
            np.zeros(6, np.float32),
            one,
            np.array([0, 1]),
            np.empty((1, 6), np.float32),
        )
