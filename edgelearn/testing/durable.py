"""Whether memory survives being stored: in a fleet's file, and in the store of a real device."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from edgelearn.device.fleet_store import RecordFile, RecordLayout
from edgelearn.device.learner import DeviceState, Fit
from edgelearn.device.store import DeviceStore, Stored
from edgelearn.testing.calls import same
from edgelearn.testing.subject import Broken, Subject
from edgelearn.testing.toy import ENCODING, ToyDevice, toy_owned, toy_store


def _through_fleet_store(
    folder: Path, subject: Subject, state: DeviceState, device: ToyDevice
) -> DeviceState:
    layout = RecordLayout.of(subject.learner.declaration)
    RecordFile.create(folder / "devices.bin", layout, 2)
    file = RecordFile(folder / "devices.bin", layout, 2)
    file.write(1, 1, state)
    return file.read(1, 1, device.store)


def _expect_same_future(
    subject: Subject,
    state: DeviceState,
    restored: DeviceState,
    params: Tensor,
    device: ToyDevice,
    expected: Fit,
    where: str,
) -> None:
    for name, value in state.memory.items():
        if not same(value.detach(), restored.memory[name]):
            raise Broken(
                f"memory {name!r} came back from {where} changed; expected the same bits. Keep "
                "plain tensors of the declared dtype"
            )
    found = subject.fit(restored, params, device, 1)
    if not (same(dict(found.update.arrays), dict(expected.update.arrays))):
        raise Broken(
            f"restored from {where}, training went on with other bits; expected the same. All that "
            "a strategy remembers has to be in its declared tensors"
        )


def _through_device_store(folder: Path, subject: Subject, like: ToyDevice, simulated: Fit) -> None:
    going_on = _life_of_a_real_device(subject, like, None)
    restored = _life_of_a_real_device(subject, like, folder)
    if not same(dict(going_on.update.arrays), dict(restored.update.arrays)):
        raise Broken(
            "restored from a device's store, training went on with other bits; expected the same. "
            "All that a strategy remembers has to be in its declared tensors"
        )
    if not same(dict(going_on.update.arrays), dict(simulated.update.arrays)):
        raise Broken(
            "a real device, which keeps no sample but those named in a SampleSpec, learned "
            "differently from a simulated one; expected the same bits. Declare kept samples as "
            "SampleSpec, and do not compute with their ids: the same sample has another id there"
        )


def _life_of_a_real_device(subject: Subject, like: ToyDevice, folder: Path | None) -> Fit:
    """Train on both experiences with a store of its own, which forgets what is not kept."""
    store: OwnedSamples = toy_store()
    device = toy_owned(like, store, 0)
    state, params = subject.state_after_one(device)
    store.retain(subject.learner.held_ids(state, device.samples(1)))
    if folder is not None:
        disk = DeviceStore(folder, digest="toy")
        disk.save(Stored(state, store, device.ids[1]))
        stored = disk.load(subject.learner.declaration, ENCODING)
        assert stored is not None
        state, store = stored.state, stored.samples
    return subject.fit(state, params, toy_owned(like, store, 1), 1)
