"""HeteroFL's server side as a Flower strategy: each number is averaged over those who hold it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

import edgelearn.federated._flwr_compat  # noqa: F401 - before flwr
from edgelearn.errors import RunError

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.serverapp.strategy import FedAvg  # isort: skip


class HeteroFL(FedAvg):
    r"""FedAvg over devices that hold sub-models of different widths.

    Device k holds a part H_k of the global parameters and has n_k samples. Of a cohort S

        theta_i <- sum_{k in S: i in H_k} n_k theta_{k,i} / sum_{k in S: i in H_k} n_k,

    and theta_i stays as it is where nobody in the cohort holds it (Diao, Ding, Tarokh, "HeteroFL:
    Computation and Communication Efficient Federated Learning for Heterogeneous Clients", ICLR
    2021, arXiv:2010.01264, equation 3 and below, where all devices weigh alike; samples are
    FedAvg's weights).

    A reply says itself what its device holds: every array in it is the leading block of the global
    array of the same name, so nothing has to be known of devices here. Where all replies hold the
    whole model, FedAvg's own code aggregates them. Who is sent which part is the business of what
    carries the messages; edgelearn's round loop does it, in simulation and on a SuperLink, for
    evaluation and consolidation too.

    Arguments are FedAvg's.
    """

    _whole: ArrayRecord | None = None  # what the replies of a round are blocks of

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose a cohort as FedAvg does, and keep the parameters for what nobody will send."""
        self._whole = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average each number over the replies that have it.

        Raises:
            RunError: If a reply holds anything but leading blocks of the global arrays.
        """
        found, whole = list(replies), self._whole
        self._whole = None
        parts = [reply for reply in found if reply.has_content()]
        if whole is None or all(_shapes(_arrays(reply)) == _shapes(whole) for reply in parts):
            return super().aggregate_train(server_round, found)
        totals = {name: np.zeros(array.shape) for name, array in whole.items()}
        weights = {name: np.zeros(array.shape) for name, array in whole.items()}
        for reply in parts:
            (metrics,) = reply.content.metric_records.values()
            weight = metrics[self.weighted_by_key]
            for name, block, values in _blocks(_arrays(reply), whole):
                totals[name][block] += weight * values
                weights[name][block] += weight
        contents = [reply.content for reply in parts]
        arrays = {
            name: _mean(array.numpy(), totals[name], weights[name]) for name, array in whole.items()
        }
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return ArrayRecord({name: Array(values) for name, values in arrays.items()}), metrics


Block = tuple[slice, ...]


def _mean(
    old: NDArray[np.float32], total: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float32]:
    mean = old.astype(np.float64)
    np.divide(total, weight, out=mean, where=weight > 0)
    return mean.astype(old.dtype)


def _arrays(reply: Message) -> ArrayRecord:
    (arrays,) = reply.content.array_records.values()
    return arrays


def _shapes(arrays: ArrayRecord) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _blocks(
    arrays: ArrayRecord, whole: ArrayRecord
) -> Iterable[tuple[str, Block, NDArray[np.float32]]]:
    """Yield each array of a reply with its place in the global array of the same name."""
    if set(arrays) != set(whole):
        raise RunError("a reply's arrays have other names than the global model's")
    for name, array in arrays.items():
        values, full = array.numpy(), whole[name].shape
        if len(values.shape) != len(full) or any(
            own > all_ for own, all_ in zip(values.shape, full, strict=True)
        ):
            raise RunError(
                f"a reply's {name!r} has the shape {tuple(values.shape)}, which is no leading "
                f"block of {tuple(full)}"
            )
        yield name, tuple(map(slice, values.shape)), values
