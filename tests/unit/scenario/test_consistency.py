"""Options that contradict each other, or have no effect beside others, are faults at once."""

from __future__ import annotations

import tomllib

import pytest

from edgelearn.errors import ScenarioError
from edgelearn.scenario.load import from_dict, load, to_toml

DOMAINS = {"stream.kind": "domain-incremental"}


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"client.train": "last:0"}, "train: got 'last:0'.*; allowed: all, bias, norm, last:N"),
        ({"client.train": "biases"}, "did you mean 'bias'"),
        ({"client.train": []}, "train: got an empty list"),
        ({"client.train": ["0", 1]}, "train: got 1 in a list of texts"),
        ({"client.train": 1}, "train: expected a text, got 1"),
        ({"client.accumulate": 11}, "accumulate: got 11; a batch of 10 has at most"),
        ({"stream.num_domains": 2}, "num_domains: got 2; only a domain-incremental"),
        ({"stream.drift": "gradual"}, "drift: got 'gradual'; only a domain-incremental"),
        ({**DOMAINS, "stream.num_domains": 6}, "num_domains: got 6; at most 5"),
        ({**DOMAINS, "stream.drift": "recurring"}, "num_domains: got 0; .* 2 to 4"),
        ({**DOMAINS, "stream.drift": "recurring", "stream.num_domains": 5}, "got 5; .* 2 to 4"),
        ({**DOMAINS, "stream.drift": "gradual", "stream.order": "per-device"}, "random order"),
        ({**DOMAINS, "stream.drift": "gradual", "stream.blur": 0.1}, "blur: got 0.1; gradual"),
        ({"stream.kind": "new-instances", "stream.blur": 0.1}, "blur: got 0.1; new instances"),
        ({"stream.num_experiences": 1, "stream.blur": 0.1}, "blur: got 0.1; one experience"),
        ({"stream.blur": 1.1}, "blur: got 1.1; at most 1"),
        ({"stream.blur_reach": "all"}, "blur_reach: got 'all'; blur is 0"),
        ({"stream.disjoint_share": 0.5}, "disjoint_share: got 0.5; blur is 0"),
        (
            {**DOMAINS, "stream.blur": 0.1, "stream.disjoint_share": 0.5},
            "disjoint_share: got 0.5; every domain",
        ),
        ({"stream.online": True, "stream.cumulative": True}, "cumulative: got true"),
        ({"stream.max_shift": 1}, "max_shift: got 1; the order is 'shared'"),
        ({"stream.max_shift": 5, "stream.order": "staggered"}, "max_shift: got 5; at most 4"),
        ({"stream.detector_args": {"x": 1}}, "detector_args: boundaries are told"),
        ({"stream.boundaries": "detected", "stream.cumulative": True}, "come again"),
        ({"labels.delay": 5}, "delay: got 5; the stream has 5 positions"),
        ({"server.args": {"proximal_mu": "x"}}, "proximal_mu: got 'x'; a number from 0"),
        ({"server.args": {"proximal_mu": True}}, "proximal_mu: got True; a number from 0"),
        ({"server.args": {"proximal_mu": -0.1}}, "proximal_mu: got -0.1; a number from 0"),
        ({"fleet.late_share": 0.5, "stream.num_experiences": 1}, "late_share: got 0.5; one"),
        ({"fleet.leaving_share": 0.5, "stream.num_experiences": 1}, "leaving_share: got 0.5; one"),
        (
            {"fleet.late_share": 0.6, "fleet.leaving_share": 0.6, "stream.num_experiences": 2},
            "leaving_share: got 0.6; with late_share",
        ),
    ],
)
def test_what_does_not_go_together(raw, overrides, fault):
    with pytest.raises(ScenarioError, match=fault) as caught:
        from_dict(raw, overrides=overrides)
    assert len(caught.value.faults) == 1


def test_all_faults_are_reported_at_once(raw):
    overrides = {
        "stream.num_domains": 2,
        "stream.blur_reach": "all",
        "stream.max_shift": 1,
        "labels.delay": 9,
        "labels.noise": 2,
        "fleet.cohort": 99,
    }
    with pytest.raises(ScenarioError) as caught:
        from_dict(raw, overrides=overrides)
    found = {(fault.table, fault.key) for fault in caught.value.faults}
    assert found == {tuple(key.split(".")) for key in overrides}


@pytest.mark.parametrize(
    "overrides",
    [
        {**DOMAINS, "stream.num_domains": 5},
        {**DOMAINS, "stream.num_domains": 1},
        {**DOMAINS, "stream.num_domains": 4, "stream.drift": "recurring"},
        {**DOMAINS, "stream.drift": "gradual", "stream.order": "staggered"},
        {"stream.max_shift": 4, "stream.order": "staggered"},
        {"stream.blur": 1.0, "stream.blur_reach": "all", "stream.disjoint_share": 1.0},
        {"stream.boundaries": "detected", "stream.detector_args": {"threshold": 4.0}},
        {"labels.delay": 4, "labels.noise": 1.0, "labels.missing": 1.0},
        {"fleet.late_share": 0.5, "fleet.leaving_share": 0.5, "stream.num_experiences": 2},
    ],
)
def test_what_is_just_allowed(raw, overrides):
    scenario = from_dict(raw, overrides=overrides)
    assert from_dict(tomllib.loads(to_toml(scenario))) == scenario


def test_a_list_of_layers_travels_through_toml(raw, tmp_path):
    scenario = from_dict(raw, overrides={"client.train": ["1.bias", "3"], "client.accumulate": 2})
    assert scenario.client.train == ("1.bias", "3")
    path = tmp_path / "again.toml"
    path.write_text(to_toml(scenario))
    assert load(path) == scenario


def test_later_options_are_in_the_digest_only_where_they_are_set(raw):
    """So that runs from before they existed can be gone on with."""
    plain = from_dict(raw)
    small = {"small": {"name": "mlp", "args": {"hidden": [3]}, "share": 0.5}}
    for key, default, other in (
        ("client.train", "all", "bias"),
        ("client.accumulate", 1, 2),
        ("client.checkpoint", False, True),
        ("data.public", 0, 10),
        ("fleet.width", {}, {"phone-mid": 0.5}),
        ("fleet.runtime_args", {}, {"phone-mid": {"weight_bits": 4}}),
        ("model.variants", {}, small),
        ("runtime.recalibrate", "always", "on-drift"),
    ):
        assert from_dict(raw, overrides={key: default}).digest == plain.digest
        assert from_dict(raw, overrides={key: other}).digest != plain.digest
    assert load("split-digits").digest == "9b71dab60b63b635", "as in edgelearn 0.1"
