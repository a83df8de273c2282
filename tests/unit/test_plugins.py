from __future__ import annotations

import importlib.metadata
import os
import sys

import pytest

from edgelearn import plugins
from edgelearn.continual.replay import Replay
from edgelearn.errors import Fault, PluginError


def write(path, text):
    path.write_text(text)
    return path


def install(folder, name, entry_points):
    """Put a package's metadata into a folder, at another time than what is there already."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    write(info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    write(info / "entry_points.txt", entry_points)
    later = folder.stat().st_mtime_ns + 2_000_000_000
    os.utime(folder, ns=(later, later))


def test_built_ins_are_entry_points():
    assert {"naive", "replay", "ewc"} <= set(plugins.names(plugins.CLIENT_STRATEGIES))
    assert {"digits", "fashion-mnist", "mnist"} <= set(plugins.names(plugins.DATASETS))
    assert {"mlp", "cnn"} <= set(plugins.names(plugins.MODELS))
    assert plugins.names(plugins.MODELS) == tuple(sorted(plugins.names(plugins.MODELS)))
    assert plugins.names("edgelearn.no_such_group") == ()


def test_a_name_and_module_class_lead_to_the_same_class():
    assert plugins.resolve("replay", plugins.CLIENT_STRATEGIES) is Replay
    reference = "edgelearn.continual.replay:Replay"
    assert plugins.resolve(reference, plugins.CLIENT_STRATEGIES) is Replay


def test_an_unknown_name_gives_the_nearest_and_all():
    with pytest.raises(PluginError) as error:
        plugins.resolve("replya", plugins.CLIENT_STRATEGIES)
    message = str(error.value)
    assert "unknown name 'replya' among the client strategies" in message
    assert "did you mean 'replay'?" in message
    assert "ewc" in message
    assert "naive" in message
    assert "module:Class" in message


def test_an_unknown_name_in_an_empty_group():
    with pytest.raises(PluginError, match="none"):
        plugins.resolve("x", "edgelearn.no_such_group")


def test_a_class_from_a_file(tmp_path, monkeypatch):
    write(tmp_path / "mine.py", "class Mine:\n    pass\n")
    found = plugins.resolve(f"{tmp_path}/mine.py:Mine", plugins.CLIENT_STRATEGIES)
    assert found.__name__ == "Mine"
    # Loading it again, or by a relative path, gives the same class: isinstance must go on working.
    monkeypatch.chdir(tmp_path)
    assert plugins.resolve("mine.py:Mine", plugins.CLIENT_STRATEGIES) is found


def test_files_of_the_same_name_are_kept_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "mine.py", f"WHERE = {folder!r}\n")
    found = [plugins.resolve(f"{tmp_path}/{f}/mine.py:WHERE", plugins.MODELS) for f in "ab"]
    assert found == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise RuntimeError('not today')", "RuntimeError: not today"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
    ],
)
def test_a_broken_file_says_why_and_leaves_nothing_behind(tmp_path, text, expected):
    path = write(tmp_path / "broken.py", text)
    before = set(sys.modules)
    with pytest.raises(PluginError, match=expected) as error:
        plugins.resolve(f"{path}:X", plugins.MODELS)
    assert str(path) in str(error.value)
    assert not {m for m in set(sys.modules) - before if "broken" in m}
    # The user mends the file and tries again.
    write(path, "X = 1\n# longer than before, so that the bytecode cache is not believed\n")
    assert plugins.resolve(f"{path}:X", plugins.MODELS) == 1


def test_a_missing_file(tmp_path):
    with pytest.raises(PluginError, match=r"no file .*nowhere.py"):
        plugins.resolve(f"{tmp_path}/nowhere.py:X", plugins.MODELS)


@pytest.mark.parametrize("place", ["~nobody-here/x.py", "a\0b.py", "a" * 5000 + ".py"])
def test_what_can_be_no_path(place):
    with pytest.raises(PluginError, match="no file"):
        plugins.resolve(f"{place}:X", plugins.MODELS)


def test_a_missing_attribute_gives_the_nearest(tmp_path):
    path = write(tmp_path / "mine.py", "class StayClose:\n    pass\n")
    with pytest.raises(PluginError, match=r"has no 'StayClosed' .did you mean 'StayClose'"):
        plugins.resolve(f"{path}:StayClosed", plugins.MODELS)
    with pytest.raises(PluginError, match=r"has no 'Replya' .did you mean 'Replay'"):
        plugins.resolve("edgelearn.continual.replay:Replya", plugins.MODELS)


@pytest.mark.parametrize("reference", [":Class", "module:", ":"])
def test_a_half_reference(reference):
    with pytest.raises(PluginError, match="expected module:Class"):
        plugins.resolve(reference, plugins.MODELS)


@pytest.mark.parametrize("module", ["no_such_module_at_all", "edgelearn.nothing_here", ".relative"])
def test_a_module_that_cannot_be_imported(module):
    with pytest.raises(PluginError, match="cannot be imported") as error:
        plugins.resolve(f"{module}:X", plugins.MODELS)
    assert module in str(error.value)


def test_a_module_that_fails_while_it_is_imported(tmp_path, monkeypatch):
    write(tmp_path / "edgelearn_test_failing.py", "raise ValueError('bad day')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="ValueError: bad day"):
        plugins.resolve("edgelearn_test_failing:X", plugins.MODELS)


def test_an_entry_point_that_cannot_be_loaded(tmp_path, monkeypatch):
    write(tmp_path / "edgelearn_test_failing_entry.py", "raise ValueError('bad day')")
    monkeypatch.syspath_prepend(tmp_path)
    install(
        tmp_path,
        "failing",
        "[g]\nbad = edgelearn_test_failing_entry:X\ngone = edgelearn.continual.replay:Nothing\n",
    )
    with pytest.raises(PluginError, match=r"'bad' \(edgelearn_test_failing_entry:X\).*bad day"):
        plugins.resolve("bad", "g")
    with pytest.raises(PluginError, match=r"'gone' .* cannot be loaded"):
        plugins.resolve("gone", "g")


def test_what_is_installed_meanwhile_is_found_and_nothing_is_looked_up_twice(tmp_path, monkeypatch):
    looked_up = []
    real = importlib.metadata.entry_points

    def counted(*, group):
        looked_up.append(group)
        return real(group=group)

    monkeypatch.setattr(importlib.metadata, "entry_points", counted)
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.names("edgelearn.test") == ()
    install(tmp_path, "first", "[edgelearn.test]\none = edgelearn.plugins:resolve\n")
    for _ in range(3):
        assert plugins.names("edgelearn.test") == ("one",)
        assert plugins.resolve("one", "edgelearn.test") is plugins.resolve
    assert looked_up == ["edgelearn.test"] * 2
    install(tmp_path, "second", "[edgelearn.test]\ntwo = edgelearn.plugins:names\n")
    assert plugins.names("edgelearn.test") == ("one", "two")


# -- arguments -------------------------------------------------------------------------------------


class Exact:
    def __init__(self, *, strength: float = 1.0, mode: str = "online") -> None:
        pass


class Bare:
    pass


class Loose:
    def __init__(self, **kwargs) -> None:
        pass


def test_each_argument_that_a_class_does_not_take_is_a_fault():
    assert plugins.argument_faults(Exact, {"mode": 1, "strength": 2}, "client.args") == []
    assert plugins.argument_faults(Exact, {}, "client.args") == []
    assert plugins.argument_faults(Exact, {"strenght": 1, "mode": 2, "x": 3}, "client.args") == [
        Fault(
            "client.args",
            "strenght",
            "Exact does not take it (did you mean 'strength'?); allowed: strength, mode",
        ),
        Fault("client.args", "x", "Exact does not take it; allowed: strength, mode"),
    ]


def test_classes_that_take_nothing_or_anything():
    assert plugins.argument_faults(Bare, {"x": 1}, "t") == [
        Fault("t", "x", "Bare does not take it; allowed: nothing")
    ]
    assert plugins.argument_faults(Loose, {"x": 1}, "t") == []
