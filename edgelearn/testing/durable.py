"""Whether memory survives being stored: in a fleet's file, and in the store of a real device."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from edgelearn.device.fleet_store import RecordFile, RecordLayout
from edgelearn.device.state import DeviceState, Fit
from edgelearn.device.store import DeviceStore, Stored
from edgelearn.errors import StateError
from edgelearn.testing.calls import same
from edgelearn.testing.subject import Broken, Subject
from edgelearn.testing.toy import ENCODING, ToyDevice, toy_owned, toy_store

_ADVICE = "All that a strategy remembers has to be in its declared tensors"


def expect_durable(subject: Subject) -> None:
    """Store a device's state after one experience, read it, and learn the next one from it.

    Raises:
        Broken: If anything differs from a device that was never stored, by a single bit.
    """
    device = subject.new_device()
    state, params = subject.state_after_one(device)
    simulated = subject.fit(state, params, device, 1)
    with tempfile.TemporaryDirectory(prefix="edgelearn-check-") as name:
        folder = Path(name)
        read = _through_fleet_file(folder / "devices.bin", subject, state, device)
        _expect_same("a simulated fleet's file", simulated, subject.fit(read, params, device, 1))
        real = _life_of_a_real_device(subject, device, None)
        restored = _life_of_a_real_device(subject, device, folder)
        _expect_same("a real device's store", real, restored)
    if not same(real.update, simulated.update):
        raise Broken(
            "a real device, which keeps no samples but those named in a SampleSpec, learned "
            "otherwise than a simulated one; expected the same bits. Declare kept samples as "
            "SampleSpec, and do not compute with their ids: the same sample has another id there"
        )


def _through_fleet_file(
    path: Path, subject: Subject, state: DeviceState, device: ToyDevice
) -> DeviceState:
    layout = RecordLayout.of(subject.learner.declaration)
    RecordFile.create(path, layout, 2)
    file = RecordFile(path, layout, 2)
    file.write(1, 1, state.memory)
    read = file.read(1, 1, device.store)
    for name, value in state.memory.items():
        if not same(value, read[name]):
            raise Broken(f"memory {name!r} came back from a fleet's file changed. {_ADVICE}")
    return replace(state, memory=read)


def _expect_same(place: str, expected: Fit, found: Fit) -> None:
    if not same(found.update, expected.update):
        raise Broken(
            f"restored from {place}, training went on with other bits; expected the same. {_ADVICE}"
        )


def _life_of_a_real_device(subject: Subject, like: ToyDevice, folder: Path | None) -> Fit:
    """Learn both experiences with samples of its own; what is not kept is forgotten in between.

    Args:
        subject: The strategy.
        like: The device whose samples arrive.
        folder: Where the state is stored and read in between; None goes on without.
    """
    learner, store = subject.learner, toy_store()
    device = toy_owned(like, store, 0)
    state, params = subject.state_after_one(device)
    store.retain(learner.held_ids(state, device.samples(1)))
    if folder is not None:
        disk = DeviceStore(folder, digest="toy")
        disk.save(Stored(state, store), learner.declaration)
        stored = disk.load(learner.declaration, ENCODING)
        if stored is None:
            raise StateError(f"{folder}: nothing came back from the device's store")
        state, store = stored.state, stored.samples
    return subject.fit(state, params, toy_owned(like, store, 1), 1)
