"""Any strategy or plug-in of Avalanche as a client strategy: `avalanche:EWC`.

`train()` of Avalanche is cut in three, since an experience lasts many rounds here. A device

- *begins* an experience once: `before_training`, `before_training_exp`,
- trains in each *round* from the global parameters: the epochs and nothing else,
- *ends* it once, on the final global parameters: `after_training_exp`, `after_training`.

To call `train()` in each round instead adds an anchor to EWC in every round: measured, five times
the state, three times the work, and accuracy at chance.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from torch import Generator, Tensor, nn

from edgelearn.continual import avalanche
from edgelearn.continual.avalanche_session import Account, Recipe, Session, at_work
from edgelearn.continual.local import LocalTask, Trained
from edgelearn.continual.memory import Declaration, Memory, TensorSpec
from edgelearn.continual.strategy import ClientStrategy, Facts
from edgelearn.errors import Fault, ScenarioError, StrategyError
from edgelearn.params import FlatModel
from edgelearn.plugins import AVALANCHE
from edgelearn.scenario.samples import Samples
from edgelearn.scenario.spec import ClientSpec
from edgelearn.seeds import derive

_HEAD = 40  # bytes: five int64
_SIZES = ("mem_size", "memory_size", "patterns_per_exp", "patterns_per_experience")


@final
class AvalancheStrategy(ClientStrategy):
    """Runs a strategy or plug-in of Avalanche on a device.

    Between rounds a device keeps what the strategy's objects hold (plug-ins, counters, buffers with
    their samples) as bytes, in a tensor of a declared size. They are **pickled**, and read by the
    device that wrote them, from its own memory; they are never sent. Nothing that comes from the
    server or from another device is unpickled.

    What differs from Avalanche alone:

    - Each round begins with the global parameters. What a plug-in does to the network when an
      experience begins (GDumb and FromScratchTraining reset it) is overwritten by them.
    - The optimizer is new in each round, as for every client strategy.
    - Endless loaders (AGEM, MIR) begin anew in each round.
    - An experience that the device did not train on leaves no trace: plug-ins rely on a step
      between its begin and its end.
    - The network keeps its shape: layers that grow can't be averaged.
    - In task-incremental streams logits of other tasks are masked, in the network itself.
    - Where an experience comes in parts (online streams, boundaries that nobody tells), what takes
      in samples when it begins (ER_ACE, GDumb, Cumulative) takes in each part as it comes.

    docs/avalanche.md lists what works. Reference: see `edgelearn.continual.avalanche`.

    Args:
        name: Name of the strategy or plug-in, or `module:Class`, `file.py:Class` of one's own.
        arguments: Its own arguments.
        beside: Plug-ins to run beside it, each with its arguments, by name.
        state_kib: Room for the state on a device, in KiB, at least 0; 0 is room for 2 T + 8 copies
            of the network, where T is the number of experiences, and for the samples that the
            arguments ask for (200 if they don't say).

    Raises:
        ValueError: If `state_kib` is below 0.
    """

    def __init__(
        self,
        name: str,
        *,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        beside: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        state_kib: int = 0,
    ) -> None:
        if state_kib < 0:
            raise ValueError(f"state_kib is {state_kib}; at least 0 is allowed")
        self.name = name
        self.arguments = dict(arguments)
        self.beside = {key: dict(values) for key, values in beside.items()}
        self.state_kib = state_kib

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:
        """Declare the room for the state."""
        if self.state_kib:
            return {"state": TensorSpec((1024 * self.state_kib,), torch.uint8)}
        networks = (2 * facts.num_experiences + 8) * 4 * model.layout.size
        samples = self._num_samples(facts) * 4 * facts.sample_bytes  # as float32
        return {"state": TensorSpec((2**16 + networks + samples,), torch.uint8)}

    def _num_samples(self, facts: Facts) -> int:
        found = 0
        for values in (self.arguments, *self.beside.values()):
            for key in _SIZES:
                repeats = facts.num_experiences if key.startswith("patterns") else 1
                found += repeats * int(values.get(key, 0))
        return found or 200

    def fit(self, task: LocalTask) -> Trained:
        """Train for a round, from the global parameters; first begin the experience if it is new.

        Raises:
            StrategyError: If the state is larger than the room for it, or if an experience comes in
                parts and the strategy counts its samples when it begins.
        """
        state, shown = _State.unpack(task.memory["state"]), task.samples.fingerprint
        if not state.seed:
            state = _State(derive(task.seed, "begin") | 1, state.before, spec=task.spec)
        session = self._begin(state, task.model, task.params, task.samples)
        if state.shown not in (0, shown):  # more of the experience has arrived
            self._check_parts()
            with at_work(derive(task.seed, "arrival")):
                session.go_on(state.now)
        with at_work(derive(task.seed, "round")):
            params = session.train(task.params, task.proximal_mu)
        state = dataclasses.replace(state, now=session.freeze(), spec=task.spec, shown=shown)
        done = session.account
        loss = done.loss / done.num_steps if done.num_steps else 0.0
        memory = self._remember(task.memory, state)
        return Trained(params, memory, loss, done.num_steps, done.num_samples)

    def finish(
        self,
        model: FlatModel,
        params: Tensor,
        data: Samples,
        memory: Memory,
        generator: Generator,
    ) -> Memory:
        """End the experience, if it has begun, on the final global parameters [T]."""
        state = _State.unpack(memory["state"])
        if not state.seed or len(data) == 0:
            return memory
        session = self._begin(state, model, params, data)
        with at_work(int(torch.randint(2**62, (), generator=generator))):
            session.end(params)
        return self._remember(memory, _State(before=session.freeze()))

    def _begin(self, state: _State, model: FlatModel, params: Tensor, data: Samples) -> Session:
        """Bring a strategy to where it was, by beginning the experience as it was begun.

        What that makes and nobody can store (loaders, views of data) is there again; what it did to
        the state is undone by the state itself.
        """
        assert state.spec is not None  # an experience that has begun has been trained on
        with at_work(state.seed):
            session = Session(self._recipe(), model, state.spec, data.batch())
            session.thaw(state.before)
            session.load(params)
            session.begin()
            session.thaw(state.now)
        return session

    def _check_parts(self) -> None:
        for name in (self.name, *self.beside):
            if name in avalanche.COUNTS:
                raise StrategyError(
                    f"{AVALANCHE}{name} counts the samples of an experience when it begins, but "
                    "more have come since: it needs stream.online = false and "
                    "stream.boundaries = 'told'"
                )

    def _recipe(self) -> Recipe:
        reference = f"{AVALANCHE}{self.name}"
        beside = [(avalanche.find(k, reference), values) for k, values in self.beside.items()]
        return Recipe(avalanche.find(self.name, reference), self.arguments, beside)

    def _remember(self, memory: Memory, state: _State) -> Memory:
        packed, room = state.pack(), len(memory["state"])
        if len(packed) > room:
            raise StrategyError(
                f"{AVALANCHE}{self.name} has {-(-len(packed) // 1024):,} KiB to remember and room "
                f"for {room // 1024:,}: give state_kib in [client.args] that many, and more where "
                "a method keeps something of each experience"
            )
        tensor = torch.zeros(room, dtype=torch.uint8)
        tensor[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        return memory.replace(state=tensor)


@dataclass(frozen=True, slots=True)
class _State:
    """What a device keeps between rounds.

    Attributes:
        seed: With which the current experience was begun; 0 if none is.
        before: The strategy before that, frozen; empty if it is new.
        now: The strategy as it is; empty if it is as before.
        spec: How it trains.
        shown: Fingerprint of the samples that it last trained on; 0 if it has not.
    """

    seed: int = 0
    before: bytes = b""
    now: bytes = b""
    spec: ClientSpec | None = None
    shown: int = 0

    def pack(self) -> bytes:
        spec = b""
        if self.spec is not None:
            values = dataclasses.asdict(dataclasses.replace(self.spec, args={}))
            spec = json.dumps(values).encode()
        now = b"" if self.now == self.before else self.now
        head = [self.seed, self.shown, len(spec), len(self.before), len(now)]
        return np.array(head, "<i8").tobytes() + spec + self.before + now

    @classmethod
    def unpack(cls, tensor: Tensor) -> _State:
        raw = tensor.numpy().tobytes()
        seed, shown, *sizes = (int(n) for n in np.frombuffer(raw[:_HEAD], "<i8"))
        ends = [_HEAD + sum(sizes[:k]) for k in range(len(sizes) + 1)]
        spec, before, now = (raw[a:b] for a, b in pairwise(ends))
        trained_by = ClientSpec(**json.loads(spec)) if spec else None
        return cls(seed, before, now or before, trained_by, shown)


def make(reference: str, arguments: Mapping[str, Any], table: str) -> AvalancheStrategy:
    """Build a client strategy from what begins with `avalanche:`.

    Args:
        reference: `avalanche:` and a name of Avalanche's, `module:Class` or `file.py:Class`.
        arguments: Those of the class, `state_kib`, and `plugins`: a table of plug-ins to run
            beside it, each with a table of arguments.
        table: Where the arguments stand, for errors.

    Raises:
        PluginError: If nothing stands at the place.
        ScenarioError: If there is none of that name, it does not work here, or it does not take
            the arguments.
    """
    name = reference.removeprefix(AVALANCHE)
    own = {k: v for k, v in arguments.items() if k not in ("state_kib", "plugins")}
    beside, state_kib = arguments.get("plugins", {}), arguments.get("state_kib", 0)
    faults = avalanche.argument_faults(avalanche.find(name, reference), own, table)
    if not isinstance(state_kib, int) or state_kib < 0:
        faults.append(
            Fault(table, "state_kib", f"is {state_kib!r}; a whole number from 0 is allowed")
        )
    if not isinstance(beside, Mapping) or not all(isinstance(v, Mapping) for v in beside.values()):
        message = "must be a table of plug-ins, each with a table of arguments"
        raise ScenarioError(reference, [*faults, Fault(table, "plugins", message)])
    for key, values in beside.items():
        kind = avalanche.find(key, reference)
        if not avalanche.is_plugin(kind):
            faults.append(Fault(f"{table}.plugins", key, "is a strategy, not a plug-in"))
        faults += avalanche.argument_faults(kind, values, f"{table}.plugins.{key}")
    if faults:
        raise ScenarioError(reference, faults)
    strategy = AvalancheStrategy(name, arguments=own, beside=beside, state_kib=state_kib)
    if ":" in name:  # what it asks of the network is not known
        return strategy
    network = nn.Sequential(nn.Linear(1, 1))
    try:
        with at_work(0):
            strategy._recipe().build(network, ClientSpec(strategy=reference, lr=1.0), Account())
    except (AssertionError, TypeError, ValueError) as error:
        raise ScenarioError(reference, [Fault("client", "args", str(error))]) from error
    return strategy
