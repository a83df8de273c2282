"""The runtime onnxruntime: integer kernels, same answers, re-quantization, refusals."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgelearn
from edgelearn.compress.quantize import quantize_weight
from edgelearn.errors import ExtraMissingError, ScenarioError
from edgelearn.params import FlatModel
from edgelearn.runtime.int8 import Int8Runtime
from edgelearn.runtime.network import UnsupportedError
from edgelearn.runtime.network_reader import read_network
from edgelearn.runtime.observers import MinMax, ranges_of
from edgelearn.runtime.protocol import make_runtime
from edgelearn.runtime.qdq import points_of, quantized_numbers
from edgelearn.scenario.models import cnn, mlp
from edgelearn.scenario.world import World, build

onnx = pytest.importorskip("onnx")
engine = pytest.importorskip("onnxruntime")
from edgelearn.runtime.onnxruntime import (  # noqa: E402
    OnnxPredictor,
    OnnxRuntime,
    exact_here,
    exact_weight_bits,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed)) * 2 - 0.5


def made(build_module: Any, *, seed: int = 0) -> FlatModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FlatModel(build_module())
    model.module.eval()
    return model


def moved(model: FlatModel, seed: int = 0) -> Tensor:
    """Parameters at which a batch norm does something."""
    params = model.initial()
    return params + 0.2 * torch.rand(len(params), generator=seeded(seed))


def serve(
    model: FlatModel, params: Tensor, x: Tensor, runtime: OnnxRuntime | None = None
) -> OnnxPredictor:
    found = (runtime or OnnxRuntime(weight_bits=8)).prepare(model, params).calibrated(x)
    assert isinstance(found, OnnxPredictor)
    return found


class Residual(nn.Module):
    """Every kind of operator that is supported."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.depthwise = nn.Conv2d(6, 6, 3, padding="same", groups=6)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.last = nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding=(1, 2))
        self.relu6, self.average = nn.ReLU6(), nn.AdaptiveAvgPool2d(1)
        self.drop, self.flat, self.nothing = nn.Dropout(), nn.Flatten(), nn.Identity()
        self.head = nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = F.relu(x + self.norm(self.depthwise(x)))
        x = F.avg_pool2d(F.max_pool2d(x, 3, stride=2, padding=1), 2, stride=1, padding=1)
        x = self.nothing(self.average(self.relu6(self.last(x))))
        return self.head(self.drop(self.flat(x)))  # type: ignore[no-any-return]


NETWORKS = {
    "mlp": (lambda: mlp(input_shape=(1, 12, 12), num_classes=5), (1, 12, 12)),
    "cnn": (lambda: cnn(input_shape=(1, 12, 12), num_classes=5, hidden=16), (1, 12, 12)),
    "residual": (Residual, (1, 12, 12)),
    "a layer alone": (lambda: nn.Linear(9, 4), (9,)),
    "logits of a convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3), nn.Flatten()
        ),
        (2, 8, 8),
    ),
    "one after pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (2, 8, 8),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_graph_computes_the_network(name: str) -> None:
    factory, shape = NETWORKS[name]
    model = made(factory)
    params, x = moved(model), rand(20, *shape)
    found = serve(model, params, x, OnnxRuntime(weight_bits=32))(x)
    torch.testing.assert_close(found, model(params, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_int8_graph_comes_close_to_the_network(name: str) -> None:
    factory, shape = NETWORKS[name]
    model = made(factory)
    params, x = moved(model), rand(200, *shape)
    found, expected = serve(model, params, x)(x), model(params, x)
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_it_answers_as_the_int8_runtime_does(name: str) -> None:
    """The same integers, but for a rounding of a code at a tie."""
    factory, shape = NETWORKS[name]
    model = made(factory)
    params, x, new = moved(model), rand(50, *shape), rand(300, *shape, seed=1)
    expected = Int8Runtime().prepare(model, params).calibrated(x)(new)
    found = serve(model, params, x)(new)
    assert float((found - expected).abs().max()) < 2e-3 * float(expected.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_engine_computes_every_layer_in_integers(name: str, tmp_path: Path) -> None:
    """No layer is left to float arithmetic: an engine falls back without a word."""
    factory, shape = NETWORKS[name]
    model = made(factory)
    artefact = serve(model, moved(model), rand(20, *shape)).artefact
    options = engine.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    engine.InferenceSession(artefact, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    in_float = {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "Add", "Mul"}
    assert not in_float & set(kinds)
    layers = [m for m in model.module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(kind in ("QLinearConv", "QGemm") for kind in kinds) == len(layers)


# -- re-quantization -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_requantized_in_place_is_a_fresh_export_bit_for_bit(name: str) -> None:
    factory, shape = NETWORKS[name]
    model, runtime = made(factory), OnnxRuntime(weight_bits=8)
    old, new, x = moved(model, 1), moved(model, 2), rand(30, *shape)
    first = serve(model, old, x, runtime)
    second = serve(model, new, x, runtime)
    assert runtime.template(model, shape) is runtime.template(model, shape)  # made once
    assert second.artefact == serve(model, new, x).artefact != first.artefact
    assert torch.equal(second(x), serve(model, new, x)(x))
    assert serve(model, old, x, runtime).artefact == first.artefact
    assert len(second.artefact) == len(first.artefact) == second.model_bytes


def test_what_is_served_does_not_follow_the_parameters() -> None:
    model, x = made(lambda: nn.Linear(6, 3)), rand(9, 6)
    params = model.initial()
    prepared = OnnxRuntime().prepare(model, params)
    expected = prepared.calibrated(x)(x)
    params.zero_()
    assert torch.equal(prepared.calibrated(x)(x), expected)


def test_batch_norm_is_folded_on_copies() -> None:
    model = made(Residual)
    params, x = moved(model), rand(20, 1, 12, 12)
    kept, module = params.clone(), {k: v.clone() for k, v in model.module.state_dict().items()}
    serve(model, params, x)
    assert torch.equal(params, kept)
    assert all(torch.equal(v, module[k]) for k, v in model.module.state_dict().items())


def test_initializers_keep_torch_names_and_integers_are_stored() -> None:
    model = made(lambda: cnn(input_shape=(1, 12, 12), num_classes=5))
    params, x = moved(model), rand(20, 1, 12, 12)
    graph = onnx.load_from_string(serve(model, params, x).artefact).graph
    found = {slot.name: onnx.numpy_helper.to_array(slot) for slot in graph.initializer}
    views = model.layout.views(params)
    for name, view in views.items():
        assert found[name].shape == view.shape
        assert found[name].dtype == (np.int8 if name.endswith("weight") else np.int32)
        back = found[name].astype(np.float64)
        scale = (found | products(graph))[f"{name}.scale"].reshape(-1, *[1] * (view.dim() - 1))
        assert np.abs(back * scale - view.numpy()).max() <= scale.max() * 0.501


def products(graph: Any) -> dict[str, Any]:
    """The scales that a graph forms, by the name of what they belong to."""
    found = {slot.name: onnx.numpy_helper.to_array(slot) for slot in graph.initializer}
    made = {
        node.output[0]: np.multiply(*(found[name] for name in node.input))
        for node in graph.node
        if node.op_type == "Mul"
    }
    users = [node.input for node in graph.node if node.op_type == "DequantizeLinear"]
    return {f"{names[0]}.scale": made[names[1]] for names in users if names[1] in made}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_scale_of_a_bias_is_formed_bit_for_bit(name: str) -> None:
    factory, shape = NETWORKS[name]
    model = made(factory)
    prepared = OnnxRuntime(weight_bits=8).prepare(model, moved(model))
    template, folded, weights = prepared._made(shape)
    ranges = ranges_of(partial(template.observe, folded), rand(20, *shape), MinMax())
    numbers = quantized_numbers(template, folded, weights, ranges, is_calibrated=True)
    found = products(onnx.load_from_string(template.artefact(numbers)).graph)
    assert found.keys() == {key for key in numbers if key.endswith("bias.scale")}
    for key, scale in found.items():
        assert np.array_equal(scale, numbers[key])


@pytest.mark.parametrize("name", NETWORKS)
def test_beside_codes_a_channel_has_a_scale_and_a_bias(name: str) -> None:
    factory, shape = NETWORKS[name]
    model = made(factory)
    graph = onnx.load_from_string(serve(model, moved(model), rand(20, *shape)).artefact).graph
    layers = [m for m in model.module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    codes = sum(layer.weight.numel() for layer in layers)
    channels = sum(len(layer.weight) for layer in layers)
    zeros = sum({len(layer.weight) for layer in layers if isinstance(layer, nn.Linear)})
    stored = sum(len(slot.raw_data) for slot in graph.initializer)
    points = points_of(read_network(model, shape))
    clips = 8 * any(node.op_type == "Clip" for node in graph.node)
    assert stored == codes + 8 * channels + zeros + 5 * len(points) + clips


def test_int8_of_the_small_cnn_has_little_more_than_a_quarter_of_the_bytes() -> None:
    model = made(lambda: cnn(input_shape=(1, 28, 28), num_classes=10))
    params, x = model.initial(), rand(2, 1, 28, 28)
    int8, exact = (
        serve(model, params, x, OnnxRuntime(weight_bits=bits)).model_bytes for bits in (8, 32)
    )
    assert exact < 4 * len(params) + 1000  # it is not made larger either
    assert int8 <= 0.265 * exact


class Passing(nn.Module):
    """What is clipped twice, and an answer that others take as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.relu(F.relu6(x) + self.last(x))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("factory", [Passing, lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU())])
def test_the_last_value_is_the_answer_whatever_makes_it(factory: Any, bits: int) -> None:
    model, x = made(factory), rand(40, 6)
    expected = model(model.initial(), x)
    found = serve(model, model.initial(), x, OnnxRuntime(weight_bits=bits))(x)
    assert float((found - expected).abs().max()) <= 0.03 * float(expected.abs().max())


def test_weights_of_seven_bits_have_codes_up_to_64() -> None:
    model, x = made(lambda: nn.Linear(30, 5)), rand(20, 30)
    sizes = {}
    for bits, largest in ((7, 64), (8, 127)):
        predict = serve(model, model.initial(), x, OnnxRuntime(weight_bits=bits))
        graph = onnx.load_from_string(predict.artefact).graph
        codes = {s.name: onnx.numpy_helper.to_array(s) for s in graph.initializer}["weight"]
        assert np.abs(codes.astype(int)).max() == largest
        assert np.array_equal(codes, quantize_weight(model.module.weight, largest=largest)[0])  # type: ignore[arg-type]
        error = (predict(x) - model(model.initial(), x)).abs().max()
        sizes[bits] = float(error)
    assert sizes[8] < sizes[7] < 0.05


@pytest.mark.parametrize(
    ("machine", "flags", "bits"),
    [
        ("x86_64", "avx2 fma", 7),
        ("AMD64", "", 7),  # nothing is known
        ("x86_64", "avx2 avx_vnni", 8),
        ("x86_64", "avx512f avx512_vnni", 8),
        ("aarch64", "", 8),
        ("arm64", "", 8),
    ],
)
def test_range_is_reduced_where_sums_of_pairs_saturate(machine: str, flags: str, bits: int) -> None:
    assert exact_weight_bits(machine, flags) == bits


# -- calibration -----------------------------------------------------------------------------------


def test_without_calibration_each_input_has_its_own_range() -> None:
    model = made(lambda: mlp(input_shape=(8,), num_classes=3, hidden=(6,)))
    params, x = moved(model), rand(4, 8) * torch.tensor([[0.1], [1.0], [30.0], [5.0]])
    predict = OnnxRuntime(weight_bits=8).prepare(model, params).calibrated(x[:0])
    expected = torch.cat([serve(model, params, row)(row) for row in x.split(1)])
    assert torch.equal(predict(x), expected)
    assert predict.model_bytes == serve(model, params, x).model_bytes
    assert predict(x[:0]).shape == (0, 3)


def test_an_input_of_a_range_too_small_for_the_bias_is_answered() -> None:
    model = made(lambda: mlp(input_shape=(8,), num_classes=3, hidden=(6,)))
    params, x = moved(model), 1e-9 * rand(4, 8)
    found = OnnxRuntime(weight_bits=8).prepare(model, params).calibrated(x[:0])(x)
    expected = model(params, x)
    assert float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_inputs_of_zeros_only_are_answered() -> None:
    model = made(lambda: mlp(input_shape=(8,), num_classes=3, hidden=(6,)))
    predict = serve(model, model.initial(), torch.zeros(4, 8))
    assert predict(torch.zeros(2, 8)).isfinite().all()
    assert predict(torch.zeros(0, 8)).shape == (0, 3)


def test_ranges_are_taken_where_values_stop_passing_on() -> None:
    model = made(NETWORKS["one after pooling"][0])
    network = read_network(model, (2, 8, 8))
    first, second = points_of(network)
    assert first.name == network.input
    assert len(second.carried) == 4  # convolution, pooling, ReLU, flattening
    assert second.carried[-1] == network.operators[-1].inputs[0]


# -- accuracy --------------------------------------------------------------------------------------


def trained(model: FlatModel, world: World) -> Tensor:
    everything = world.train.batch(torch.arange(len(world.train.y)))
    params = model.initial().requires_grad_()
    optimizer = torch.optim.Adam([params], lr=0.01)
    for step in range(150):
        chosen = torch.randperm(len(everything.y), generator=seeded(step))[:128]
        loss = F.cross_entropy(model(params, everything.x[chosen]), everything.y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return params.detach()


@pytest.fixture(scope="module")
def world() -> World:
    return build(edgelearn.load("split-digits", model={"name": "cnn", "args": {}}))


@pytest.fixture(scope="module")
def served(world: World) -> tuple[FlatModel, Tensor]:
    model = world.model()
    params = trained(model, world)
    model.module.eval()
    return model, params


@pytest.mark.parametrize("bits", [8, 7])
def test_trained_on_digits_it_gives_the_answers_of_the_int8_runtime(
    world: World, served: tuple[FlatModel, Tensor], bits: int
) -> None:
    """All of them: with as many bits of a weight, both compute with the same integers."""
    if bits > exact_here():
        pytest.skip("this processor's kernels don't multiply 8-bit weights exactly")
    model, params = served
    calibration = world.train.batch(torch.arange(64)).x
    test = world.test.batch(torch.arange(len(world.test.y)))
    reference = Int8Runtime(weight_bits=bits).prepare(model, params).calibrated(calibration)
    expected = reference(test.x).argmax(1)
    found = serve(model, params, calibration, OnnxRuntime(weight_bits=bits))(test.x).argmax(1)
    assert float((expected == test.y).float().mean()) > 0.93
    assert int((found != expected).sum()) == 0


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.deep = nn.Sequential(depthwise, nn.BatchNorm2d(32), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.deep(self.wide(x)))  # type: ignore[no-any-return]


def mobile() -> nn.Module:
    first = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(*first, nn.MaxPool2d(2), Inverted(), Inverted(), *last)


def test_a_residual_network_trained_on_digits_gives_the_int8_runtime_s_answers(
    world: World,
) -> None:
    """Norms are folded, sums and averages are of codes, in both."""
    train, test = (w.batch(torch.arange(len(w.y))) for w in (world.train, world.test))
    model = made(mobile)
    model.module.train()
    optimizer = torch.optim.Adam(model.module.parameters(), lr=0.02)
    for step in range(150):
        chosen = torch.randperm(len(train.y), generator=seeded(step))[:96]
        loss = F.cross_entropy(model.module(train.x[chosen]), train.y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.module.eval()
    kept = {k: v for k, v in model.module.state_dict().items() if k in model.layout.names}
    params = model.layout.flatten(kept)
    with torch.no_grad():
        reference = Int8Runtime(weight_bits=7).prepare(model, params).calibrated(train.x[:64])
        expected = reference(test.x).argmax(1)
    runtime = OnnxRuntime(weight_bits=7)
    found = serve(model, params, train.x[:64], runtime)(test.x).argmax(1)
    assert float((expected == test.y).double().mean()) > 0.9
    assert int((found != expected).sum()) <= 1  # a tie


def test_a_run_is_served_by_it(raw: dict[str, Any]) -> None:
    raw["runtime"] = {"name": "onnxruntime", "args": {"weight_bits": 8}}
    raw["stream"] |= {"num_experiences": 2, "rounds_per_experience": 1}
    records = {}
    for name, args in (("onnxruntime", {"weight_bits": 8}), ("int8", {})):
        raw["runtime"] = {"name": name, "args": args}
        records[name] = edgelearn.simulate(edgelearn.scenario.load.from_dict(raw))
    found, expected = (records[name].scores().average_accuracy for name in records)
    assert abs(found - expected) < 0.01
    assert records["onnxruntime"].run["runtime"] == "onnxruntime"


# -- refusals --------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))  # type: ignore[no-any-return]


class Deciding(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Sharpened(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Doubled(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2  # type: ignore[no-any-return]


class Tapped(nn.Module):
    """What a norm takes is used beside it, so it can't be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + self.norm(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("factory", "named"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "LayerNorm at '1'"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), "Tanh at '1'"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), "BatchNorm .* at '0'"),
        (lambda: nn.Sequential(Sharpened(4, 2)), "tensor used outside .* at '0.weight'"),
        (Doubled, "mul at 'mul'"),
        (Tapped, "BatchNorm .* at 'norm'"),
        (Twice, "second use of a layer at 'layer'"),
        (Deciding, "can't be followed: TraceError"),
    ],
)
def test_an_operator_that_is_not_supported_is_named(factory: Any, named: str) -> None:
    model = made(factory)
    with pytest.raises(UnsupportedError, match=named):
        OnnxRuntime().prepare(model, model.initial()).calibrated(torch.rand(3, 4))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape((x.shape[0], -1)),
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, start_dim=1),
    ],
)
def test_every_way_of_flattening_is_read(flatten: Any) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(flatten(x))  # type: ignore[no-any-return]

    model, x = made(Network), rand(20, 2, 3)
    found = serve(model, model.initial(), x)(x)
    assert float((found - model(model.initial(), x)).abs().max()) < 0.02


@pytest.mark.parametrize("shape", [(-1, 3), (3, -1)])
def test_another_reshape_is_refused(shape: tuple[int, int]) -> None:
    class Network(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(*shape))  # type: ignore[no-any-return]

    model = made(Network)
    with pytest.raises(UnsupportedError, match="reshape at 'reshape'"):
        OnnxRuntime().prepare(model, model.initial()).calibrated(torch.rand(3, 4))


def test_a_run_with_such_a_network_fails_before_its_first_round(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "wave.py"
    path.write_text(
        "from torch import nn\n"
        "def wave(*, input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))\n"
    )
    raw["model"] = {"name": f"{path}:wave"}
    raw["runtime"] = {"name": "onnxruntime"}
    rounds: list[Any] = []
    scenario = edgelearn.scenario.load.from_dict(raw)
    with pytest.raises(ScenarioError, match="Tanh at '2'"):
        edgelearn.simulate(scenario, on_round=rounds.append)
    assert not rounds


def test_linear_over_places_is_refused() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(6, 2)))
    with pytest.raises(UnsupportedError, match="Linear on values of 3 dimensions at '0'"):
        OnnxRuntime().prepare(model, model.initial()).calibrated(torch.rand(3, 2, 4))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_extra_there_is_one_clear_error(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExtraMissingError, match=r"'edgelearn\[onnxruntime\]'") as caught:
        make_runtime("onnxruntime", {})
    assert caught.value.package == package


def test_it_is_found_by_name_and_checks_its_arguments() -> None:
    assert isinstance(make_runtime("onnxruntime", {"weight_bits": 7}), OnnxRuntime)
    for bits in (False, 8.0, "8"):
        with pytest.raises(ScenarioError, match=f"weight_bits is {bits!r}; allowed"):
            make_runtime("onnxruntime", {"weight_bits": bits})
    with pytest.raises(ScenarioError, match="weight_bits is 4; allowed"):
        make_runtime("onnxruntime", {"weight_bits": 4})
