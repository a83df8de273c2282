"""State of one real device: a directory with one file that is either whole or the former one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edgelearn.continual.memory import Declaration, Memory, check, kept, passing
from edgelearn.continual.strategy import Update
from edgelearn.device.state import DeviceState
from edgelearn.errors import StateError
from edgelearn.files import exclusive, write_atomic
from edgelearn.scenario.samples import Encoding, OwnedSamples

_FORMAT = "edgelearn-device-2"
_LOCK_WAIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a device last sent after training, to be sent once more if it is asked once more.

    A server that died after the device had answered asks again when its run is resumed. To train
    again would move the device's memory twice.

    Attributes:
        server_round: The round.
        question: Fingerprint of the global parameters that came with the instruction.
        update: What was sent.
    """

    server_round: int
    question: str
    update: Update


@dataclass(frozen=True, slots=True)
class Stored:
    """A device's state with the samples that it keeps, and where it is in its stream.

    Attributes:
        state: Memory and progress.
        samples: The device's own samples.
        pending: Ids of the samples of each experience that is not consolidated yet, by position:
            [n], int32, in the order in which they arrived.
        answer: What the device last sent after training; None if nothing yet.
    """

    state: DeviceState
    samples: OwnedSamples
    pending: Mapping[int, Tensor] = field(default_factory=dict)
    answer: Answer | None = None


class DeviceStore:
    """Durable state of one device, bound to the run that it belongs to.

    A device keeps the memory of one run: the first save of a later run replaces that of the former.
    """

    def __init__(self, directory: Path, *, digest: str, run: str = "") -> None:
        """Name the place; nothing is read or written yet.

        Args:
            directory: The device's own folder.
            digest: Of the scenario.
            run: Which run of it; those that begin with a time are known to be older or younger.
        """
        self._path, self._digest, self._run = directory / "state.safetensors", digest, run

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes of this device out: one may still be at work for a dead run."""
        return exclusive(self._path.parent / "lock", wait_s=_LOCK_WAIT_S)

    def save(self, stored: Stored, declaration: Declaration) -> None:
        """Replace the stored state; a crash leaves the former one.

        Of what a memory holds, that is stored which the declaration says is kept.
        """
        memory = stored.state.memory
        tensors = {f"memory.{name}": memory[name] for name in kept(declaration)}
        tensors |= {f"pending.{position}": ids for position, ids in stored.pending.items()}
        tensors["samples.x"] = stored.samples.x
        tensors["samples.y"] = stored.samples.y
        tensors["samples.used"] = stored.samples.used.to(torch.uint8)
        progress = [stored.state.begun, stored.state.consolidated]
        tensors["progress"] = torch.tensor(progress, dtype=torch.int64)
        metadata = {"format": _FORMAT, "digest": self._digest, "run": self._run}
        if (answer := stored.answer) is not None:
            tensors |= {f"answer.{name}": value for name, value in answer.update.arrays.items()}
            metadata["answer"] = json.dumps(
                [answer.server_round, answer.question, dict(answer.update.metrics)]
            )
        # Copies: safetensors refuses tensors that share memory, which a strategy's may.
        tensors = {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        metadata["fingerprint"] = _fingerprint(tensors, metadata)
        write_atomic(self._path, save(tensors, metadata))

    def load(self, declaration: Declaration, encoding: Encoding) -> Stored | None:
        """Load the state, or None if this device has none of this run yet.

        Raises:
            StateError: If it is damaged, or belongs to another scenario or to a later run.
        """
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise StateError(f"{self._path}: damaged or truncated: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise StateError(
                f"{self._path}: damaged, or not the state of a device ({_FORMAT} expected)"
            )
        if metadata.pop("fingerprint", None) != _fingerprint(tensors, metadata):
            raise StateError(f"{self._path}: damaged: its fingerprint is not that of its content")
        if metadata["run"] != self._run:
            if _is_later(metadata["run"], self._run):
                raise StateError(
                    f"{self._path}: the device has moved on to the run {metadata['run']}; it takes "
                    f"no more part in {self._run}"
                )
            return None
        if metadata["digest"] != self._digest:
            raise StateError(
                f"{self._path}: the state belongs to the scenario {metadata['digest']}, "
                f"this run's is {self._digest}"
            )
        # Clones: what comes out of the file is mapped, and samples are erased in place.
        samples = OwnedSamples.restore(
            tensors["samples.x"].clone(),
            tensors["samples.y"].clone(),
            tensors["samples.used"],
            encoding,
        )
        memory = Memory({**_with_prefix("memory.", tensors), **passing(declaration)}, samples)
        check(memory, declaration)
        begun, consolidated = tensors["progress"].tolist()
        pending = {int(p): ids for p, ids in _with_prefix("pending.", tensors).items()}
        answer = None
        if "answer" in metadata:
            server_round, question, metrics = json.loads(metadata["answer"])
            update = Update(_with_prefix("answer.", tensors), metrics)
            answer = Answer(server_round, question, update)
        return Stored(DeviceState(memory, begun, consolidated), samples, pending, answer)


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _fingerprint(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the fingerprint of what a file holds; safetensors itself checks only its length."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_later(run: str, than: str) -> bool:
    """Whether a run is known to have begun after another one."""
    dated = re.compile(r"\d{8}T\d{6}")
    return bool(dated.match(run) and dated.match(than)) and run > than
