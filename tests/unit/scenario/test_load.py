from __future__ import annotations

import copy
import pickle

import pytest

from edgelearn.errors import ScenarioError
from edgelearn.scenario.load import built_in, find, from_dict, load, to_toml
from edgelearn.scenario.spec import Scenario

GOOD = """\
name = "toy"

[data]
dataset = "digits"

[model]
name = "mlp"
args = { hidden = [8] }

[fleet]
num_devices = 6
cohort = 3

[stream]
kind = "class-incremental"
num_experiences = 5
rounds_per_experience = 2

[client]
strategy = "naive"
lr = 0.05
"""


def faults_of(raw, **kwargs):
    """Return {(table, key): message} of a scenario that must be refused."""
    with pytest.raises(ScenarioError) as error:
        from_dict(raw, **kwargs)
    faults = {(f.table, f.key): f.message for f in error.value.faults}
    assert len(faults) == len(error.value.faults), "one fault is reported once"
    return faults


def only_fault(raw, **kwargs):
    faults = faults_of(raw, **kwargs)
    assert len(faults) == 1, faults
    return next(iter(faults.items()))


def write(tmp_path, text):
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return path


# -- good files ------------------------------------------------------------------------------------


def test_a_file_and_the_defaults(tmp_path, raw):
    scenario = load(write(tmp_path, GOOD))
    assert scenario == from_dict(raw)
    assert scenario.client.epochs == 1
    assert scenario.partition.kind == "iid"
    assert scenario.model.args == {"hidden": (8,)}
    assert scenario.num_rounds == 10


def test_a_whole_number_is_a_number(raw):
    raw["client"]["lr"] = 1
    lr = from_dict(raw).client.lr
    assert lr == 1.0
    assert type(lr) is float


def test_a_scenario_cannot_be_changed(raw):
    scenario = from_dict(raw)
    with pytest.raises(AttributeError):
        scenario.client.lr = 1.0
    with pytest.raises(TypeError):
        scenario.model.args["hidden"] = (1,)
    hash(scenario)


def test_a_scenario_can_be_sent_to_a_worker(raw):
    raw["client"]["args"] = {"nested": {"a": [1]}}
    scenario = from_dict(raw)
    for twin in (pickle.loads(pickle.dumps(scenario)), copy.deepcopy(scenario)):
        assert twin == scenario
        assert twin.digest == scenario.digest
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(scenario)).model.args["hidden"] = (1,)


def test_loading_leaves_its_arguments_alone(raw):
    before = copy.deepcopy(raw)
    from_dict(raw, overrides={"model.args.hidden": [4], "client.args.x": 1, "seed": 3})
    assert raw == before


# -- bad files -------------------------------------------------------------------------------------


def test_six_faults_are_six_faults_with_their_lines(tmp_path):
    text = GOOD.replace('name = "toy"', 'name = "toy"\nsede = 1')  # 1: unknown key
    text = text.replace('"digits"', '"digitz"')  # 2: unknown name
    text = text.replace("cohort = 3", "cohort = 7")  # 3: more than the fleet
    text = text.replace('"class-incremental"', '"class-incrementl"')  # 4: not a choice
    text = text.replace("num_experiences = 5", "num_experiences = 0")  # 5: below the minimum
    text = text.replace("lr = 0.05", "")  # 6: missing
    with pytest.raises(ScenarioError) as error:
        load(write(tmp_path, text))
    found = {(f.line, f.table, f.key) for f in error.value.faults}
    assert found == {
        (2, "", "sede"),
        (5, "data", "dataset"),
        (13, "fleet", "cohort"),
        (16, "stream", "kind"),
        (17, "stream", "num_experiences"),
        (20, "client", "lr"),  # what is missing is reported at its table
    }
    message = str(error.value)
    assert f"{tmp_path / 'scenario.toml'}: 6 faults" in message
    assert "line 2: sede: unknown key (did you mean 'seed'?)" in message
    assert "got 'class-incrementl' (did you mean 'class-incremental'?); allowed:" in message
    assert "domain-incremental" in message
    assert "got 0; at least 1 is allowed" in message
    assert "got 7; at most 6 is allowed" in message
    assert "unknown name 'digitz' (did you mean 'digits'?)" in message
    assert "[client] lr: is missing (local learning rate)" in message


def test_a_syntax_error_has_a_line(tmp_path):
    with pytest.raises(ScenarioError, match=r"line 4: syntax: .*line 4") as error:
        load(write(tmp_path, GOOD.replace('dataset = "digits"', "dataset = digits")))
    assert len(error.value.faults) == 1


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "scenario.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScenarioError, match="cannot be read"):
        load(path)


def test_an_unknown_table(tmp_path):
    text = GOOD + "[strem]\nx = 1\n"
    with pytest.raises(ScenarioError, match=r"line 22: strem: unknown table .did you mean .stream"):
        load(write(tmp_path, text))


@pytest.mark.parametrize("table", ["data", "model", "fleet", "stream", "client"])
def test_a_missing_table(raw, table):
    del raw[table]
    assert only_fault(raw) == (("", table), f"the table [{table}] is missing")


@pytest.mark.parametrize("table", ["partition", "server", "runtime", "evaluate"])
def test_a_table_that_may_be_missing(raw, table):
    assert table not in raw
    raw[table] = {}
    from_dict(raw)


def test_everything_is_missing():
    faults = faults_of({})
    assert set(faults) == {("", k) for k in ("name", "data", "model", "fleet", "stream", "client")}


@pytest.mark.parametrize(
    ("table", "key", "value", "expected"),
    [
        ("fleet", "cohort", True, "expected a whole number, got True"),
        ("fleet", "cohort", 2.0, "expected a whole number, got 2.0"),
        ("fleet", "cohort", "3", "expected a whole number, got '3'"),
        ("fleet", "cohort", 0, "got 0; at least 1 is allowed"),
        ("fleet", "num_devices", 10_000_001, "at most 10000000 is allowed"),
        ("fleet", "profiles", 3, "expected a table, got 3"),
        ("client", "lr", True, "expected a number, got True"),
        ("client", "lr", "0.1", "expected a number, got '0.1'"),
        ("client", "lr", float("inf"), "got inf; a finite number is expected"),
        ("client", "lr", float("nan"), "got nan; a finite number is expected"),
        ("client", "lr", 10**400, "expected a number"),
        ("client", "lr", 0, "got 0.0; must be above 0"),
        ("client", "lr", -1, "got -1.0; must be above 0"),
        ("client", "momentum", 1.5, "got 1.5; at most 1 is allowed"),
        ("client", "strategy", "replya", "(did you mean 'replay'?); allowed: "),
        ("client", "strategy", 3, "expected a text, got 3"),
        ("client", "args", [1], "expected a table, got [1]"),
        ("data", "download", 1, "expected true or false, got 1"),
        ("model", "name", "mlpp", "unknown name 'mlpp' (did you mean 'mlp'?)"),
        ("model", "name", "nowhere.py:net", "no file "),
        ("model", "name", "~nobody-here/x.py:net", "no file "),
        ("server", "strategy", "~nobody-here/x.py:net", "no file "),
        ("runtime", "name", "int9", "(did you mean 'int8'?)"),
        ("runtime", "recalibrate", "on-drfit", "(did you mean 'on-drift'?); allowed: always, on"),
        ("wire", "codec", "int4+lmza", "(did you mean 'int4+lzma'?); allowed: none, "),
        ("wire", "codec", "topk", "behind one of them +lzma"),
        ("evaluate", "num_devices", 7, "got 7; at most 6 is allowed"),
        ("fleet", "cohort", 7, "got 7; at most 6 is allowed"),
        ("stream", "order", "perdevice", "did you mean 'per-device'?"),
    ],
)
def test_a_wrong_value(raw, table, key, value, expected):
    raw.setdefault(table, {})[key] = value
    where, message = only_fault(raw)
    assert where == (table, key)
    assert expected in message


@pytest.mark.parametrize("value", [3, "text", [1]])
def test_a_value_where_a_table_belongs(raw, value):
    raw["stream"] = value
    where, message = only_fault(raw)
    assert where == ("", "stream")
    assert message == f"expected a table, got {value!r}"


@pytest.mark.parametrize("share", [0, -1, True, "half", float("nan"), float("inf")])
def test_shares_of_profiles(raw, share):
    raw["fleet"]["profiles"] = {"pi": 0.5, "phone": share}
    (table, key), message = only_fault(raw)
    assert (table, key) == ("fleet.profiles", "phone")
    assert repr(share) in message


def test_an_argument_that_no_file_can_hold(tmp_path):
    text = GOOD.replace("lr = 0.05", "lr = 0.05\nargs.since = 2020-01-01\nargs.deep = [[nan]]")
    with pytest.raises(ScenarioError) as error:
        load(write(tmp_path, text))
    assert [(f.line, f.table, f.key) for f in error.value.faults] == [
        (22, "client.args", "since"),
        (23, "client.args", "deep"),
    ]
    assert "datetime.date(2020, 1, 1)" in str(error.value)


def test_lines_of_inline_tables_dotted_and_quoted_keys(tmp_path):
    text = GOOD.replace("cohort = 3", 'cohort = 3\n"deadline_s" = -1\nprofiles."a/b.toml" = 0')
    text = text.replace('[data]\ndataset = "digits"', "[ data ] # here\n'dataset' = 3")
    text = text.replace("hidden = [8]", "hidden = [inf]")
    text = text.replace("[client]", "partition.alpha = 0\n[client]")
    with pytest.raises(ScenarioError) as error:
        load(write(tmp_path, text))
    assert {(f.line, f.table, f.key) for f in error.value.faults} == {
        (4, "data", "dataset"),
        (13, "fleet", "deadline_s"),
        (14, "fleet.profiles", "a/b.toml"),
        (8, "model.args", "hidden"),
        (21, "stream", "partition"),  # unknown there
    }


def test_a_plug_in_file_is_found_and_named_absolutely(tmp_path, raw, monkeypatch):
    (tmp_path / "mine.py").write_text("class Mine: pass\n")
    monkeypatch.chdir(tmp_path)
    raw["client"]["strategy"] = "mine.py:Mine"
    assert from_dict(raw).client.strategy == f"{tmp_path}/mine.py:Mine"


# -- overrides -------------------------------------------------------------------------------------


def test_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    scenario = load(path, {"client.lr": 0.5, "model.args.hidden": [3, 4], "partition.alpha": 2})
    assert scenario.client.lr == 0.5
    assert scenario.model.args["hidden"] == (3, 4)
    assert scenario.partition.alpha == 2.0


def test_an_override_can_mend_a_file(tmp_path):
    path = write(tmp_path, GOOD.replace("lr = 0.05", "lr = -1"))
    assert load(path, {"client.lr": 0.5}).client.lr == 0.5


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("client.lrr", 1, "[client] lrr: unknown key (did you mean 'lr'?); allowed: strategy"),
        ("clinet.lr", 1, "clinet: unknown table (did you mean 'client'?); allowed: name"),
        ("sed", 1, "sed: unknown key (did you mean 'seed'?); allowed: name"),
        ("client.lr", -1, "[client] lr: got -1.0; must be above 0"),
        ("fleet.cohort", 7, "[fleet] cohort: got 7; at most 6 is allowed"),
        ("client", 3, "client: expected a table, got 3"),
        ("client.args", 3, "[client] args: expected a table, got 3"),
        ("client.args.since", float("nan"), "[client.args] since: got nan"),
    ],
)
def test_a_bad_override_is_named(tmp_path, name, value, expected):
    with pytest.raises(ScenarioError) as error:
        load(write(tmp_path, GOOD), {name: value})
    assert len(error.value.faults) == 1
    assert f"\n  {expected}" in str(error.value)
    assert str(error.value).endswith(f"(from --set {name})")
    assert error.value.faults[0].line is None


def test_an_override_below_a_value(tmp_path):
    with pytest.raises(ScenarioError, match="got 'naive'; only a table has a 'x' to set"):
        load(write(tmp_path, GOOD), {"client.strategy.x": 1})


def test_faults_of_overrides_and_of_the_file_come_together(tmp_path):
    path = write(tmp_path, GOOD.replace("lr = 0.05", "lr = -1"))
    with pytest.raises(ScenarioError) as error:
        load(path, {"client.lrr": 1, "sed": 1, "client.strategy.x": 1})
    assert len(error.value.faults) == 4


# -- round trip and digest -------------------------------------------------------------------------

ODD = {
    "name": 'quote " back \\ line \n tab \t bell \a del \x7f umlaut \u00fc',
    "seed": 2**62,
    "fleet": {
        "num_devices": 3,
        "cohort": 3,
        "profiles": {"clients/profiles/pi 4.toml": 0.25, "ph.one": 1e-7, "": 1.0, "a": 3},
    },
    "client": {
        "strategy": "naive",
        "lr": 1e-300,
        "args": {
            "empty": {},
            "list": [],
            "deep": {"a b": {"x": [[1, 2.5], ["y", True]], "none": {}}},
            "tables": [{"a.b": 1, "c": {"d": []}}, {}],
            "big": 1e22,
            "negative": -0.0,
            "flag": False,
        },
    },
}


@pytest.mark.parametrize("odd", [False, True])
def test_toml_round_trip(tmp_path, raw, odd):
    if odd:
        raw.update(copy.deepcopy(ODD))
    scenario = from_dict(raw)
    path = tmp_path / "again.toml"
    path.write_text(to_toml(scenario), encoding="utf-8")
    again = load(path)
    assert again == scenario
    assert again.digest == scenario.digest
    assert to_toml(again) == to_toml(scenario)


def test_dictionary_round_trip(raw):
    raw.update(copy.deepcopy(ODD))
    scenario = from_dict(raw)
    assert from_dict(scenario.as_dict()) == scenario
    assert scenario.as_dict()["client"]["args"] == ODD["client"]["args"]


OTHER = {  # another valid value for each key of a scenario
    "name": "other",
    "title": "x",
    "seed": 1,
    "data.dataset": "mnist",
    "data.root": "/x",
    "data.download": True,
    "data.max_train": 1,
    "data.max_test": 1,
    "data.public": 9,
    "model.name": "cnn",
    "model.args": {"hidden": [9]},
    "fleet.num_devices": 7,
    "fleet.cohort": 4,
    "fleet.profiles": {"a": 1.0},
    "fleet.deadline_s": 1.0,
    "partition.kind": "shards",
    "partition.alpha": 1.0,
    "partition.shards_per_device": 3,
    "stream.kind": "task-incremental",
    "stream.num_experiences": 2,
    "stream.rounds_per_experience": 3,
    "stream.order": "per-device",
    "stream.shuffle_classes": True,
    "stream.transform": "rotate",
    "fleet.late_share": 0.1,
    "fleet.leaving_share": 0.1,
    "stream.max_shift": 2,
    "stream.num_domains": 2,
    "stream.drift": "gradual",
    "stream.blur": 0.1,
    "stream.blur_reach": "all",
    "stream.disjoint_share": 0.5,
    "stream.cumulative": True,
    "stream.online": True,
    "stream.boundaries": "detected",
    "stream.detector": "adwin",
    "labels.noise": 0.1,
    "labels.missing": 0.1,
    "labels.per_class": 1,
    "labels.delay": 1,
    "client.strategy": "ewc",
    "client.args": {"x": 1},
    "client.epochs": 2,
    "client.steps": 5,
    "client.batch_size": 11,
    "client.optimizer": "adam",
    "client.lr": 0.06,
    "client.momentum": 0.9,
    "client.weight_decay": 0.1,
    "client.train": "last:1",
    "client.accumulate": 2,
    "client.checkpoint": True,
    "server.strategy": "FedAdam",
    "server.args": {"x": 1},
    "server.max_update_norm": 3.0,
    "wire.codec": "int8",
    "wire.args": {"x": 1},
    "runtime.name": "float",
    "runtime.args": {"x": 1},
    "runtime.num_calibration": 3,
    "runtime.recalibrate": "on-drift",
    "evaluate.every_rounds": 2,
    "evaluate.num_devices": 1,
    "compress.pipeline": "prune(0.5) | quantize",
}


DOMAINS = {"stream.kind": "domain-incremental"}
NEEDS = {  # what else has to hold for another value of a key to be valid
    "stream.max_shift": {"stream.order": "staggered"},
    "stream.num_domains": DOMAINS,
    "stream.drift": DOMAINS,
    "stream.blur_reach": {"stream.blur": 0.1},
    "stream.disjoint_share": {"stream.blur": 0.1},
}


def keys_of(plain, prefix=""):
    for key, value in plain.items():
        if isinstance(value, dict) and key not in ("args", "profiles"):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_value_changes_the_digest(raw):
    scenario = from_dict(raw)
    keys = set(keys_of(scenario.as_dict()))
    assert keys <= set(OTHER), f"give another value for {keys - set(OTHER)}"
    machine = {"data.root", "data.download"}  # where data lies has no effect on the result
    for key in machine:
        assert from_dict(raw, overrides={key: OTHER[key]}).digest == scenario.digest
    keys -= machine
    digests = set()
    for key in keys:
        needed = NEEDS.get(key, {})
        without, found = ({**needed, **more} for more in ({}, {key: OTHER[key]}))
        digests.add(from_dict(raw, overrides=found).digest)
        assert from_dict(raw, overrides=without).digest != from_dict(raw, overrides=found).digest
    assert len(digests | {scenario.digest}) == len(keys) + 1


def test_of_a_plugin_file_the_content_counts_and_not_the_path(raw, tmp_path):
    digests = []
    for folder, content in (("a", "X = 1"), ("b", "X = 1"), ("c", "X = 2")):
        path = tmp_path / folder / "mine.py"
        path.parent.mkdir()
        path.write_text(content)
        digests.append(from_dict(raw, overrides={"client.strategy": f"{path}:X"}).digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_does_not_depend_on_the_order_of_keys(raw):
    turned = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in raw.items()}
    turned = dict(reversed(turned.items()))
    assert from_dict(turned).digest == from_dict(raw).digest


# -- where scenarios lie ---------------------------------------------------------------------------


def test_built_in_scenarios_load():
    assert built_in()
    for name, path in built_in().items():
        scenario = load(name)
        assert isinstance(scenario, Scenario)
        assert scenario.name == name
        assert find(name) == path
        assert load(path) == scenario


@pytest.mark.parametrize("source", ["~nobody-here/x", "a\0b", "a" * 5000, "", "."])
def test_what_can_be_no_path_is_no_scenario(source):
    with pytest.raises(ScenarioError, match="neither a file nor a built-in scenario"):
        load(source)


def test_an_unknown_scenario_gives_the_nearest():
    name = next(iter(built_in()))
    for source in (name + "s", f"scenarios/{name}s.toml"):
        with pytest.raises(ScenarioError) as error:
            load(source)
        assert f"did you mean {name!r}?" in str(error.value)
        assert "neither a file nor a built-in scenario" in str(error.value)
