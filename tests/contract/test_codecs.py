"""Every installed codec keeps the contract; each way of breaking it is found."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from edgelearn import plugins
from edgelearn.compress.codec import Codec, Piece, make_codec
from edgelearn.errors import PluginError, ScenarioError
from edgelearn.fleet.simulate import simulate
from edgelearn.params import Layout
from edgelearn.testing.codecs import check_codec
from edgelearn.testing.toy import toy_scenario

ARGUMENTS = [
    ("int8", {"block": 5}),
    ("int4", {"block": 1}),
    ("int4", {"block": 10_000}),
    ("top-k", {"share": 0.01, "values": "int8"}),
    ("top-k", {"share": 1.0, "feedback": False}),
    ("random-k", {"share": 0.3, "feedback": False}),
    ("random-k", {"share": 0.5, "values": "int8", "feedback": False}),
    ("random-k", {"share": 0.01, "values": "int8", "feedback": True}),
    ("random-k", {"share": 0.2, "values": "int4", "block": 16}),
    ("random-k", {"share": 0.1, "values": "int4", "feedback": True}),
    ("top-k", {"share": 0.1, "values": "int4", "block": 3}),
    ("top-k", {"share": 0.02, "feedback": False, "rescale": True}),
    ("top-k", {"share": 0.1, "values": "int8", "feedback": False, "rescale": True}),
    ("int4+lzma", {}),
    ("random-k+lzma", {"share": 0.2, "values": "int4"}),
    ("top-k+lzma", {"share": 0.1, "values": "int8"}),
]


@pytest.mark.parametrize("name", plugins.names(plugins.CODECS))
def test_installed_codecs_keep_the_contract(name: str) -> None:
    codec = make_codec(name, {})
    assert codec is not None
    assert check_codec(codec) == []


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_they_keep_it_with_any_arguments(name: str, arguments: dict[str, object]) -> None:
    codec = make_codec(name, arguments)
    assert codec is not None
    assert check_codec(codec) == []


def test_all_that_should_be_there_are() -> None:
    assert {"float16", "int8", "int4", "top-k", "random-k"} <= set(plugins.names(plugins.CODECS))


class Plain(Codec):
    def pieces(self, layout):
        return {"values": Piece((layout.size,), torch.float32)}

    def encode(self, layout, update, generator):
        return {"values": update.clone()}

    def decode(self, layout, message):
        return message["values"].clone()

    def error(self, layout, update):
        return torch.zeros(layout.size)


class Coarse(Plain):
    def decode(self, layout, message):
        return message["values"] * 1.001


class Biased(Coarse):
    is_unbiased = True

    def error(self, layout, update):
        return 0.01 * update.abs()


class Undeclared(Plain):
    def encode(self, layout, update, generator):
        return {"values": update.clone(), "more": update.clone()}


class OtherDtype(Plain):
    def encode(self, layout, update, generator):
        return {"values": update.double()}


class Destroys(Plain):
    def encode(self, layout, update, generator):
        update += 1
        return {"values": update.clone()}

    def error(self, layout, update):
        return torch.full((layout.size,), 2.0)


class Draws(Plain):
    def encode(self, layout, update, generator):
        return {"values": update * (1 + 1e-9 * torch.rand(())) + torch.rand(layout.size)}

    def error(self, layout, update):
        return torch.full((layout.size,), 2.0)


class Overwrites(Plain):
    def decode(self, layout, message):
        return message["values"].mul_(1.5)

    def error(self, layout, update):
        return update.abs()


class Raises(Plain):
    def encode(self, layout, update, generator):
        raise KeyError("x")


BROKEN = {
    Coarse: "more than the stated",
    Biased: "it says that it is unbiased",
    Undeclared: "does not declare",
    OtherDtype: "is not (591,) torch.float32",
    Destroys: "changed the update",
    Draws: "gave two messages",
    Overwrites: "changed the message",
    Raises: "it raised KeyError",
}


def test_one_that_sends_what_it_gets_is_sound() -> None:
    assert check_codec(Plain()) == []


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_contract_is_found(kind: type[Codec]) -> None:
    findings = check_codec(kind())
    assert any(BROKEN[kind] in finding for finding in findings), findings


def test_a_layout_of_ones_own() -> None:
    assert check_codec(Plain(), Layout(("w",), ((2,),), 1)) == []


OWN = """
    import torch

    from edgelearn.compress.codec import Codec, Piece


    class Sign(Codec):
        \"\"\"A bit's worth in a byte: the sign, and the mean magnitude.\"\"\"

        def __init__(self, scale: float = 1.0) -> None:
            if scale <= 0:
                raise ValueError(f"scale is {scale}; above 0 is allowed")
            self.scale = scale

        @property
        def keeps_residual(self):
            return True

        def pieces(self, layout):
            return {
                "signs": Piece((layout.size,), torch.int8),
                "mean": Piece((1,), torch.float32),
            }

        def encode(self, layout, update, generator):
            return {
                "signs": update.sign().to(torch.int8),
                "mean": self.scale * update.abs().mean().reshape(1),
            }

        def decode(self, layout, message):
            return message["signs"] * message["mean"]

        def error(self, layout, update):
            return update.abs().maximum(self.scale * update.abs().mean())


    def no_codec():
        pass
"""


def test_ones_own_codec_travels_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(OWN))
    codec = make_codec(f"{path}:Sign", {})
    assert codec is not None
    assert check_codec(codec) == []
    plain, own = (
        simulate(toy_scenario(wire=wire), federation="faithful").rounds
        for wire in ({}, {"codec": f"{path}:Sign", "args": {"scale": 0.5}})
    )
    assert all(line["outcomes"]["ok"] == 4 for line in own)
    assert own[0]["bytes_up"] < plain[0]["bytes_up"]
    with pytest.raises(ScenarioError, match="above 0 is allowed"):
        make_codec(f"{path}:Sign", {"scale": 0})
    with pytest.raises(ScenarioError, match="does not take it"):
        make_codec(f"{path}:Sign", {"scal": 1.0})
    with pytest.raises(PluginError, match="not a Codec"):
        make_codec(f"{path}:no_codec", {})
