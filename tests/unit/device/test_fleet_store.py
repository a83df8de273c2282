"""The state of a simulated fleet: two generations, transactions, and damage that is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.device.fleet_store import UNWRITTEN, FleetStore, RecordFile, RecordLayout, Tables
from edgelearn.device.state import DeviceState
from edgelearn.errors import StateError

DECLARATION: Declaration = {
    "buffer": SampleSpec(5),
    "fisher": TensorSpec((3, 7)),
    "seen": TensorSpec((4,), torch.int64),
    "flags": TensorSpec((2, 2), torch.bool),
    "half": TensorSpec((3,), torch.bfloat16),
    "one": TensorSpec((), torch.float64),
    "none": TensorSpec((0,)),
}


def state(seed: int, *, begun: int = 1, consolidated: int = 0) -> DeviceState:
    generator = torch.Generator().manual_seed(seed)
    return DeviceState(
        Memory(
            {
                "buffer": torch.randint(-1, 100, (5,), generator=generator, dtype=torch.int32),
                "fisher": torch.randn(3, 7, generator=generator),
                "seen": torch.randint(0, 2**40, (4,), generator=generator),
                "flags": torch.rand(2, 2, generator=generator) > 0.5,
                "half": torch.randn(3, generator=generator).bfloat16(),
                "one": torch.randn((), generator=generator, dtype=torch.float64),
                "none": torch.zeros(0),
            }
        ),
        begun,
        consolidated,
    )


def assert_same(one: DeviceState, other: DeviceState) -> None:
    assert (one.begun, one.consolidated) == (other.begun, other.consolidated)
    assert_same_memory(one.memory, other.memory)


def assert_same_memory(one: Memory, other: Memory) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


def put(store: FleetStore, device: int, value: DeviceState) -> None:
    _, slot = store.slots(device)
    store.written(device, store.file.write(device, slot, value.memory))
    store.progress[device] = value.begun, value.consolidated


def get(store: FleetStore, device: int) -> DeviceState:
    slot, _ = store.slots(device)
    assert slot != UNWRITTEN
    begun, consolidated = store.progress[device].tolist()
    return DeviceState(store.file.read(device, slot, None), begun, consolidated)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "devices.bin"


# -- records ---------------------------------------------------------------------------------------


def test_records_do_not_overlap_and_lie_on_cache_lines() -> None:
    layout = RecordLayout.of(DECLARATION)
    places = [*zip(layout.offsets, DECLARATION.values(), strict=True)]
    assert all(offset % 64 == 0 for offset in layout.offsets)
    ends = [offset + spec.stored_bytes for offset, spec in places]
    assert all(end <= start for end, start in zip(ends, layout.offsets[1:], strict=False))
    assert ends[-1] <= layout.size


def test_every_dtype_and_shape_comes_back_bit_by_bit(path: Path) -> None:
    layout = RecordLayout.of(DECLARATION)
    RecordFile.create(path, layout, 3)
    file = RecordFile(path, layout, 3)
    written = {
        (d, s): state(10 * d + s, begun=d + 1, consolidated=s) for d in range(3) for s in (0, 1)
    }
    for (device, slot), value in written.items():
        file.write(device, slot, value.memory)
    for (device, slot), value in written.items():
        assert_same_memory(file.read(device, slot, None), value.memory)


def test_what_is_read_is_a_copy(path: Path) -> None:
    layout = RecordLayout.of(DECLARATION)
    RecordFile.create(path, layout, 1)
    file = RecordFile(path, layout, 1)
    file.write(0, 0, state(1).memory)
    read = file.read(0, 0, None)
    file.write(0, 0, state(2).memory)
    assert_same_memory(read, state(1).memory)
    read["fisher"].add_(1)
    assert_same_memory(file.read(0, 0, None), state(2).memory)


def test_tensors_with_gradients_or_strides_can_be_written(path: Path) -> None:
    layout = RecordLayout.of({"a": TensorSpec((3, 2))})
    RecordFile.create(path, layout, 1)
    file = RecordFile(path, layout, 1)
    value = torch.arange(6.0).view(2, 3).T.requires_grad_()
    file.write(0, 0, Memory({"a": value}))
    assert torch.equal(file.read(0, 0, None)["a"], value.detach())


def test_a_memory_is_rewritten_in_part(path: Path) -> None:
    layout = RecordLayout.of(DECLARATION)
    RecordFile.create(path, layout, 3)
    file, old, new = RecordFile(path, layout, 3), state(1).memory, state(2).memory
    file.write(1, 0, old)
    part = {name: new[name] for name in ("fisher", "half")}
    for write_slot in (1, 0):  # to the other slot, and in place
        checksum = file.rewrite(1, 0, write_slot, part)
        assert checksum == file.checksum(1, write_slot)
        assert_same_memory(file.read(1, write_slot, None), old.replace(**part))
    file.rewrite(2, UNWRITTEN, 0, part)
    assert_same_memory(file.read(2, 0, None), Memory.initial(DECLARATION).replace(**part))
    assert not file.read(0, 0, None)["fisher"].any()


def test_another_process_sees_what_was_written(path: Path) -> None:
    layout = RecordLayout.of(DECLARATION)
    RecordFile.create(path, layout, 2)
    one, other = RecordFile(path, layout, 2), RecordFile(path, layout, 2)
    checksum = one.write(1, 0, state(4).memory)
    assert_same_memory(other.read(1, 0, None), state(4).memory)
    assert other.checksum(1, 0) == checksum


def test_a_fleet_that_did_nothing_costs_no_disk(path: Path) -> None:
    layout = RecordLayout.of({"fisher": TensorSpec((10_000,))})
    RecordFile.create(path, layout, 1000)
    assert path.stat().st_size == 2 * 1000 * layout.size
    assert path.stat().st_blocks * 512 < 2**20


# -- transactions ----------------------------------------------------------------------------------


def test_a_new_device_has_nothing_to_read(path: Path) -> None:
    store = FleetStore(path, DECLARATION, 2)
    assert store.slots(1) == (UNWRITTEN, 0)


def test_within_a_transaction_a_device_reads_what_it_wrote(path: Path) -> None:
    store = FleetStore(path, DECLARATION, 2)
    put(store, 1, state(1))
    assert_same(get(store, 1), state(1))
    put(store, 1, state(2))
    assert_same(get(store, 1), state(2))
    assert store.slots(0) == (UNWRITTEN, 0)


def test_two_generations_take_turns(path: Path) -> None:
    store = FleetStore(path, DECLARATION, 1)
    slots = []
    for seed in range(4):
        put(store, 0, state(seed))
        slots.append(store.slots(0)[0])
        live, checksums, _ = store.commit()
        assert live[0] == slots[-1]
        assert checksums[0] == store.file.checksum(0, slots[-1])
        assert_same(get(store, 0), state(seed))
    assert slots == [0, 1, 0, 1]


def test_uncommitted_writes_are_invisible_to_who_reopens_with_the_old_tables(path: Path) -> None:
    store = FleetStore(path, DECLARATION, 3)
    put(store, 0, state(1))
    put(store, 1, state(2))
    tables = store.commit()
    put(store, 0, state(3))  # these are lost in a crash
    put(store, 0, state(4))
    put(store, 2, state(5))
    again = FleetStore(path, DECLARATION, 3, tables)
    assert_same(get(again, 0), state(1))
    assert_same(get(again, 1), state(2))
    assert again.slots(2) == (UNWRITTEN, 0)


def test_a_crash_between_commit_and_checkpoint_leaves_the_old_tables_readable(path: Path) -> None:
    store = FleetStore(path, DECLARATION, 1)
    put(store, 0, state(1))
    tables = store.commit()
    put(store, 0, state(2))
    store.commit()  # but these tables never reached a checkpoint
    assert_same(get(FleetStore(path, DECLARATION, 1, tables), 0), state(1))


def test_after_reopening_one_can_go_on(path: Path) -> None:
    store = FleetStore(path, DECLARATION, 2)
    put(store, 0, state(1))
    tables = store.commit()
    put(store, 0, state(2))
    again = FleetStore(path, DECLARATION, 2, tables)
    put(again, 0, state(3))
    put(again, 1, state(4))
    third = FleetStore(path, DECLARATION, 2, again.commit())
    assert_same(get(third, 0), state(3))
    assert_same(get(third, 1), state(4))


def test_tables_are_copies(path: Path) -> None:
    store = FleetStore(path, DECLARATION, 1)
    put(store, 0, state(1))
    live, checksums, _ = store.commit()
    live[0], checksums[0] = 1, 0
    assert store.slots(0) == (0, 1)
    tables = store.commit()
    put(store, 0, state(2))
    store.commit()
    assert tables[0][0] == 0


def test_a_fleet_that_remembers_nothing_still_knows_how_far_it_is(path: Path) -> None:
    store = FleetStore(path, {}, 2)
    put(store, 1, DeviceState(Memory({}), 3, 2))
    found = get(FleetStore(path, {}, 2, store.commit()), 1)
    assert (found.begun, found.consolidated, len(found.memory)) == (3, 2, 0)


# -- damage ----------------------------------------------------------------------------------------


def committed(path: Path) -> tuple[FleetStore, Tables]:
    store = FleetStore(path, DECLARATION, 3)
    for device in range(3):
        put(store, device, state(device))
    return store, store.commit()


@pytest.mark.parametrize("offset", [0, 8, 64, 130])
def test_a_damaged_record_is_named_with_its_device(path: Path, offset: int) -> None:
    store, tables = committed(path)
    with path.open("r+b") as file:
        place = 2 * 1 * store.layout.size + offset
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(StateError, match=r"devices\.bin: the state of device 1 is damaged"):
        FleetStore(path, DECLARATION, 3, tables)


def test_damage_in_a_slot_that_is_not_live_does_not_matter(path: Path) -> None:
    store, tables = committed(path)
    with path.open("r+b") as file:
        file.seek((2 * 1 + 1) * store.layout.size)
        file.write(b"torn by a crash")
    assert_same(get(FleetStore(path, DECLARATION, 3, tables), 1), state(1))


def test_a_truncated_file_is_named(path: Path) -> None:
    _, tables = committed(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(StateError, match=rf"devices\.bin: .* {size - 1} bytes, expected {size}"):
        FleetStore(path, DECLARATION, 3, tables)


def test_a_missing_file_is_named(path: Path) -> None:
    _, tables = committed(path)
    path.unlink()
    with pytest.raises(StateError, match=r"devices\.bin: .* missing"):
        FleetStore(path, DECLARATION, 3, tables)


def test_tables_of_another_fleet_are_refused(path: Path) -> None:
    _, tables = committed(path)
    with pytest.raises(StateError, match="the checkpoint has 3 devices, the fleet 4"):
        FleetStore(path, DECLARATION, 4, tables)


def test_a_file_of_another_strategy_is_refused(path: Path) -> None:
    _, tables = committed(path)
    with pytest.raises(StateError, match="damaged or of another run"):
        FleetStore(path, {"anchor": TensorSpec((1000,))}, 3, tables)


def test_a_torn_write_is_forgotten_with_what_came_before_it_in_the_round(tmp_path: Path) -> None:
    declaration = {"seen": TensorSpec((3,))}
    store = FleetStore(tmp_path / "devices.bin", declaration, 2)

    def put(value: float) -> None:
        memory = Memory({"seen": torch.full((3,), value)})
        store.written(0, store.file.write(0, store.slots(0)[1], memory))
        store.progress[0] = int(value), 0

    put(1.0)
    store.commit()
    put(2.0)
    store.file.write(0, store.slots(0)[1], Memory({"seen": torch.full((3,), 9.0)}))
    store.revert(0)  # the process died in that second write
    tables = store.commit()
    again = FleetStore(tmp_path / "devices.bin", declaration, 2, tables)
    assert again.file.read(0, again.slots(0)[0], None)["seen"].tolist() == [1.0, 1.0, 1.0]
    assert again.progress[0].tolist() == [1, 0]


def test_a_device_moves_on_without_writing_its_memory(path: Path) -> None:
    store = FleetStore(path, DECLARATION, 2)
    put(store, 0, state(1))
    tables = store.commit()
    store.progress[0] = 2, 1
    later = FleetStore(path, DECLARATION, 2, store.commit())
    assert later.slots(0) == store.slots(0) == (0, 1)
    assert later.progress.tolist() == [[2, 1], [0, 0]]
    assert FleetStore(path, DECLARATION, 2, tables).progress.tolist() == [[1, 0], [0, 0]]
