"""Networks that differ between devices, and samples that all devices have."""

from __future__ import annotations

import tomllib
from typing import Any

import numpy as np
import pytest
import torch

from edgelearn.device.profile import assign
from edgelearn.errors import ScenarioError
from edgelearn.scenario.load import from_dict, to_toml
from edgelearn.scenario.world import World, build

SMALL = {"name": "mlp", "args": {"hidden": [3]}}


def held(world: World) -> list[str]:
    """Return the network of each device."""
    return [world.kinds.of_device(device).variant for device in range(6)]


def made(raw: dict[str, Any], variants: dict[str, Any], **fleet: Any) -> World:
    raw["model"]["variants"] = variants
    raw["fleet"] |= fleet
    return build(from_dict(raw))


def test_shares_deal_networks_out_over_the_fleet(raw: dict[str, Any]) -> None:
    variants = {"a": {**SMALL, "share": 0.5}, "b": {**SMALL, "share": 1 / 3}}
    world = made(raw, variants)
    assert sorted(held(world)) == ["", "a", "a", "a", "b", "b"]
    assert held(build(world.scenario)) == held(world)
    others = [held(made({**raw, "seed": seed}, variants)) for seed in range(1, 5)]
    assert any(other != held(world) for other in others)


def test_shares_of_one_leave_nothing_to_the_network_of_the_table(raw: dict[str, Any]) -> None:
    world = made(raw, {"a": {**SMALL, "share": 0.3}, "b": {**SMALL, "share": 0.7}})
    assert sorted(set(held(world))) == ["a", "b"]


def test_profiles_say_who_holds_which(raw: dict[str, Any]) -> None:
    shares = {"sensor-hub": 1.0, "phone-mid": 2.0}
    world = made(raw, {"a": {**SMALL, "profile": "sensor-hub"}}, profiles=shares)
    profiles = assign(shares, 6, world.scenario.seed)
    assert held(world) == ["a" if p.name == "sensor-hub" else "" for p in profiles]
    assert held(world).count("a") == 2


def test_without_variants_all_hold_the_same(raw: dict[str, Any]) -> None:
    assert held(build(from_dict(raw))) == [""] * 6


def test_each_network_begins_with_values_of_its_own(raw: dict[str, Any]) -> None:
    world = made(raw, {"a": {**SMALL, "share": 0.5}, "b": {**SMALL, "share": 0.5}})
    base, a, b = (world.model(name) for name in ("", "a", "b"))
    assert (base.layout.size, a.layout.size) == (610, 64 * 3 + 3 + 3 * 10 + 10)
    assert torch.equal(a.initial(), world.model("a").initial())
    assert not torch.equal(a.initial(), b.initial())


def test_a_network_whose_arguments_are_wrong_is_named(raw: dict[str, Any]) -> None:
    world = made(raw, {"a": {"name": "mlp", "args": {"hiden": [3]}, "share": 0.5}})
    with pytest.raises(ScenarioError, match=r"model\.variants\.a.*hiden"):
        world.model("a")


@pytest.mark.parametrize(
    ("variants", "fault"),
    [
        ({"a": SMALL}, "give one of share, above 0, and profile"),
        ({"a": {**SMALL, "share": 0.5, "profile": "phone-mid"}}, "give one of share"),
        (
            {"a": {**SMALL, "profile": "phone-low"}},
            "'phone-low' is no profile of the fleet.*phone-mid",
        ),
        ({"a": {**SMALL, "share": 0.6}, "b": {**SMALL, "share": 0.6}}, "sum to 1.2; at most 1"),
        ({"a": {**SMALL, "share": 1.5}}, "got 1.5; at most 1 is allowed"),
        ({"a": {"name": "mpl", "share": 0.5}}, "unknown name 'mpl'.*did you mean"),
        ({"a": {"share": 0.5}}, "model.variants.a.*name.*missing"),
        ({"a": {**SMALL, "shares": 0.5}}, "unknown key.*did you mean"),
        ({"a": "mlp"}, "expected a table, got 'mlp'"),
        ("mlp", "expected a table of tables, got 'mlp'"),
    ],
)
def test_what_is_wrong_about_variants(raw: dict[str, Any], variants: Any, fault: str) -> None:
    raw["model"]["variants"] = variants
    with pytest.raises(ScenarioError, match=fault):
        from_dict(raw)


def test_all_variants_go_by_the_same(raw: dict[str, Any]) -> None:
    raw["fleet"]["profiles"] = {"phone-mid": 1.0}
    raw["model"]["variants"] = {
        "a": {**SMALL, "share": 0.5},
        "b": {**SMALL, "profile": "phone-mid"},
    }
    with pytest.raises(ScenarioError, match="all have to go by the same"):
        from_dict(raw)
    raw["model"]["variants"]["a"] = {**SMALL, "profile": "phone-mid"}
    with pytest.raises(ScenarioError, match="which 'a' has already"):
        from_dict(raw)


def test_variants_survive_a_file_and_change_the_digest(raw: dict[str, Any]) -> None:
    plain = from_dict(raw)
    raw["model"]["variants"] = {"very small": {**SMALL, "share": 0.25}}
    scenario = from_dict(raw)
    assert scenario.digest != plain.digest
    assert from_dict(tomllib.loads(to_toml(scenario))) == scenario
    changed = from_dict(raw, overrides={"model.variants.very small.share": 0.5})
    assert changed.model.variants["very small"].share == 0.5
    assert changed.digest != scenario.digest


# -- the public set --------------------------------------------------------------------------------


def test_public_samples_are_no_devices_own(raw: dict[str, Any]) -> None:
    raw["data"] |= {"public": 50, "max_train": 300}
    raw["partition"] = {"kind": "dirichlet", "alpha": 0.1}
    world = build(from_dict(raw))
    assert len(world.public) == len(set(world.public.tolist())) == 50
    assert world.public.dtype == torch.int32
    owned = np.concatenate(world.train_parts)
    assert sorted([*owned.tolist(), *world.public.tolist()]) == list(range(300))
    held = torch.cat([world.train_samples(d, p).ids for d in range(6) for p in range(5)])
    assert not set(held.tolist()) & set(world.public.tolist())
    labels = world.train.labels(world.public)
    assert len(set(labels.tolist())) == 10, "it is drawn from all classes"


def test_public_samples_come_with_the_seed(raw: dict[str, Any]) -> None:
    raw["data"]["public"] = 50
    one, same = (build(from_dict(raw)).public for _ in range(2))
    other = build(from_dict({**raw, "seed": 1})).public
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_devices_have_to_have_something_of_their_own(raw: dict[str, Any]) -> None:
    raw["data"] |= {"public": 300, "max_train": 300}
    with pytest.raises(ScenarioError, match="got 300; there are 300 training samples"):
        build(from_dict(raw))
