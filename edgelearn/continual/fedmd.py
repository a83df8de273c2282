"""FedMD: devices of different networks learn from each other by their answers, not by weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from edgelearn.compress.distill import soft_distillation
from edgelearn.continual.local import Passage
from edgelearn.continual.memory import Declaration, Memory, SampleSpec, TensorSpec
from edgelearn.continual.mode import evaluating
from edgelearn.continual.strategy import ClientStrategy, Facts, supervised_loss
from edgelearn.errors import Fault, ScenarioError
from edgelearn.params import FlatModel
from edgelearn.scenario.samples import EMPTY, Batch

LOSSES = ("l1", "kl")
_ROWS = 256  # that are answered at once


@final
class FedMD(ClientStrategy):
    r"""Exchange logits on public samples; each device keeps a network of its own, of any shape.

    All devices have the same public samples x_1, ..., x_n (`[data] public`). What travels is
    Z [n, C], and nothing of any network. In a round a device

    1. *digests*: takes the consensus Z that the server sends and trains its network f towards it,
       mean_i |f(x_i) - Z_i| (`l1`), or T^2 KL(softmax(Z_i / T) || softmax(f(x_i) / T)) (`kl`),
    2. *revisits* its own samples: the steps of any strategy, so that replay and penalties can be
       joined to it (`fedmd+replay`),
    3. sends its logits f(x_i).

    The server's strategy makes the next consensus of them: with FedAvg their mean, weighted by the
    devices' samples. Before its first round a device can learn the public samples with their labels
    (`transfer_epochs`), then its own. There is no consensus until a round has ended.

    Reference: Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", NeurIPS
    workshop 2019, arXiv:1910.03581, algorithm 1, with the mean absolute error of logits and Adam of
    the authors' code. We differ: devices answer at the end of a round in place of the beginning of
    the next, which is the same but for what consolidation changes; devices count by their samples
    in place of alike; all public samples in each round, in their order, in place of a new random
    choice of them; transfer learning is by epochs and not to convergence; running statistics of
    batch norm stay as they are, and dropout is off, on public samples.

    Args:
        digest_epochs: Passes over the public samples in a round, at least 0; with 0 a device
            learns alone.
        digest_lr: Adam's step size on public samples, above 0.
        digest_batch: Public samples in a step, at least 1.
        loss: "l1" or "kl".
        temperature: T of "kl", above 0.
        transfer_epochs: Passes over the public samples with their labels, before anything else; at
            least 0.
    """

    keeps_network = True

    def __init__(
        self,
        *,
        digest_epochs: int = 1,
        digest_lr: float = 1e-3,
        digest_batch: int = 32,
        loss: str = "l1",
        temperature: float = 2.0,
        transfer_epochs: int = 0,
    ) -> None:
        for name, value, least in (
            ("digest_epochs", digest_epochs, 0),
            ("digest_batch", digest_batch, 1),
            ("transfer_epochs", transfer_epochs, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; at least {least} is allowed")
        for name, number in (("digest_lr", digest_lr), ("temperature", temperature)):
            if not number > 0:
                raise ValueError(f"{name} is {number}; above 0 is allowed")
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; allowed: {', '.join(LOSSES)}")
        self.digest_epochs = digest_epochs
        self.digest_lr = digest_lr
        self.digest_batch = digest_batch
        self.distance = loss
        self.temperature = temperature
        self.transfer_epochs = transfer_epochs

    def declare(self, model: FlatModel, facts: Facts) -> Declaration:  # noqa: ARG002
        """Declare the public samples, whether transfer learning is done, and samples trained on."""
        return {
            "public": SampleSpec(_num_public(facts), is_public=True),
            "begun": TensorSpec((1,), torch.bool),
            "passed": TensorSpec((1,), torch.int64, is_kept=False),
        }

    def shares(self, model: FlatModel, facts: Facts) -> Mapping[str, TensorSpec]:  # noqa: ARG002
        """Declare the logits."""
        return {"logits": TensorSpec((_num_public(facts), facts.num_classes))}

    def enter(self, model: FlatModel, params: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Learn the public samples: their labels, once, and the consensus, if there is one."""
        consensus = model.layout.shared(params)["logits"]
        public = _public(memory)
        if public is None:  # nobody has given the device any
            return params, memory
        passed = 0
        if self.transfer_epochs and not bool(memory["begun"]):

            def by_labels(logits: Tensor, rows: slice) -> Tensor:
                mask = None if public.mask is None else public.mask[rows]
                return supervised_loss(logits, Batch(public.x[rows], public.y[rows], None, mask))

            params = self._learned(model, params, public, self.transfer_epochs, by_labels)
            passed += self.transfer_epochs * len(public)
        if self.digest_epochs and bool(consensus.any()):

            def by_consensus(logits: Tensor, rows: slice) -> Tensor:
                return self._distance(logits, consensus[rows])

            params = self._learned(model, params, public, self.digest_epochs, by_consensus)
            passed += self.digest_epochs * len(public)
        return params, memory.replace(
            begun=torch.ones_like(memory["begun"]), passed=torch.tensor([passed])
        )

    def leave(self, passage: Passage, memory: Memory) -> tuple[Tensor, Memory]:
        """Answer the public samples."""
        public = _public(memory)
        if public is None:
            return passage.local, memory
        model, local = passage.model, passage.local.clone()
        with evaluating(model.module), torch.no_grad():
            logits = torch.cat([model(passage.local, x) for x in torch.split(public.x, _ROWS)])
        model.layout.shared(local)["logits"].copy_(logits)
        return local, memory

    def num_beside(self, memory: Memory) -> int:
        """Return how many public samples were trained on; answering them counts a third."""
        return int(memory["passed"]) + len(memory["public"]) // 3

    def _distance(self, logits: Tensor, consensus: Tensor) -> Tensor:
        if self.distance == "l1":
            return F.l1_loss(logits, consensus)
        return soft_distillation(logits, consensus, temperature=self.temperature).mean()

    def _learned(
        self,
        model: FlatModel,
        params: Tensor,
        public: Batch,
        epochs: int,
        loss_of: Callable[[Tensor, slice], Tensor],
    ) -> Tensor:
        """Return parameters [P] after some passes over the public samples."""
        num_trained = model.layout.num_trained
        leaf = params[:num_trained].clone().requires_grad_()
        rest = params[num_trained:]
        groups: list[dict[str, Any]] = [{"params": [leaf]}]
        optimizer = torch.optim.Adam(groups, lr=self.digest_lr)
        with evaluating(model.module), torch.enable_grad():
            for start in list(range(0, len(public), self.digest_batch)) * epochs:
                rows = slice(start, start + self.digest_batch)
                logits = model(torch.cat([leaf, rest]), public.x[rows])
                (leaf.grad,) = torch.autograd.grad(loss_of(logits, rows), leaf)
                optimizer.step()
        return torch.cat([leaf.detach(), rest])


def _num_public(facts: Facts) -> int:
    if not facts.num_public:
        message = "fedmd exchanges answers to public samples, and there are none: set it above 0"
        raise ScenarioError("data", [Fault("data", "public", message)])
    return facts.num_public


def _public(memory: Memory) -> Batch | None:
    """Return the public samples; None where a device has not been given any."""
    ids = memory["public"]
    return memory.store.batch(ids) if bool((ids != EMPTY).all()) else None
