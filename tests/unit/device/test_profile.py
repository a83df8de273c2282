"""Profiles: built in and one's own, their faults, and how they are dealt out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from edgelearn.device.profile import Profile, assign, folder, load_profile
from edgelearn.errors import ScenarioError
from edgelearn.scenario.kinds import DEFAULT_KIND

GOOD = """
memory_mib = 64
train_gflops = 0.5
downlink_mbps = 8
uplink_mbps = 4.0
power_w = 2.0
radio_j_per_mb = 0.5
"""

HUB = Profile(
    name="hub",
    memory_mib=64,
    train_gflops=0.5,
    downlink_mbps=8,
    uplink_mbps=4,
    power_w=2,
    radio_j_per_mb=0.5,
)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "hub.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", sorted(folder().glob("*.toml")), ids=lambda p: p.stem)
def test_built_in_profiles_load(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.name == path.stem
    assert 0 < profile.availability <= 1


def test_the_default_is_built_in() -> None:
    assert load_profile(DEFAULT_KIND).name == DEFAULT_KIND


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    assert load_profile(write(tmp_path, GOOD)) == HUB


def test_modelled_times_and_energy() -> None:
    assert HUB.train_s(1e9) == pytest.approx(2.0)
    assert HUB.transfer_s(bytes_down=1_000_000, bytes_up=500_000) == pytest.approx(1.0 + 1.0)
    assert HUB.energy_j(train_s=3.0, num_bytes=2_000_000) == pytest.approx(6.0 + 1.0)


def test_all_faults_of_a_profile_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("memory_mib = 64", "memory_mb = 64").replace("0.5", "-1", 1)
    text = text.replace("power_w = 2.0", 'power_w = "2"') + "availability = 1.5\n"
    with pytest.raises(ScenarioError) as caught:
        load_profile(write(tmp_path, text))
    faults = {fault.key: fault.message for fault in caught.value.faults}
    assert set(faults) == {"memory_mb", "memory_mib", "train_gflops", "power_w", "availability"}
    assert "did you mean 'memory_mib'?" in faults["memory_mb"]
    assert faults["memory_mib"] == "is missing"
    assert "got -1; expected a number above 0" in faults["train_gflops"]
    assert "got '2'" in faults["power_w"]
    assert "at most 1" in faults["availability"]


@pytest.mark.parametrize("value", ["0", "nan", "true", "[1]"])
def test_numbers_that_cannot_be(tmp_path: Path, value: str) -> None:
    text = GOOD.replace("uplink_mbps = 4.0", f"uplink_mbps = {value}")
    with pytest.raises(ScenarioError, match="uplink_mbps"):
        load_profile(write(tmp_path, text))


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(ScenarioError, match=r"phone-middd: no such profile \(did you mean"):
        load_profile("phone-middd")


def test_a_file_that_is_not_toml_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="syntax"):
        load_profile(write(tmp_path, "memory_mib = = 3"))
    (tmp_path / "hub.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_profile(str(tmp_path / "hub.toml"))


# -- dealing out -----------------------------------------------------------------------------------


def names(shares: dict[str, float], num_devices: int, seed: int = 0) -> list[str]:
    return [profile.name for profile in assign(shares, num_devices, seed)]


def test_without_shares_all_devices_are_alike() -> None:
    assert names({}, 5) == [DEFAULT_KIND] * 5


@pytest.mark.parametrize("num_devices", [10, 100, 1000])
def test_shares_are_kept(num_devices: int) -> None:
    shares = {"phone-low": 0.5, "phone-mid": 0.3, "sensor-hub": 0.2}
    counts = Counter(names(shares, num_devices))
    assert counts == {name: round(share * num_devices) for name, share in shares.items()}


def test_shares_need_not_sum_to_one() -> None:
    assert Counter(names({"phone-low": 3, "phone-mid": 1}, 8)) == {"phone-low": 6, "phone-mid": 2}


def test_a_fleet_of_any_size_is_dealt_out_completely() -> None:
    shares = {"phone-low": 1 / 3, "phone-mid": 1 / 3, "sensor-hub": 1 / 3}
    for num_devices in range(1, 20):
        counts = Counter(names(shares, num_devices))
        assert sum(counts.values()) == num_devices
        assert max(counts.values()) - min(counts.get(name, 0) for name in shares) <= 1


def test_the_assignment_follows_the_seed_and_not_the_order_of_the_table() -> None:
    shares = {"phone-low": 0.5, "sensor-hub": 0.5}
    assert names(shares, 40) == names(dict(reversed(shares.items())), 40)
    assert names(shares, 40) != names(shares, 40, seed=1)
    assert names(shares, 40) != sorted(names(shares, 40))


def test_a_profile_of_ones_own_can_be_dealt_out(tmp_path: Path) -> None:
    assert assign({write(tmp_path, GOOD): 1.0}, 2, 0) == (HUB, HUB)
