from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

class Data:
    """A data set that all devices share, by reference: don't change its arrays while it lives.

    A sample's input is `stored * scale - shift`. An id is `domain * N + index`; a domain takes
    feature f from features `domain_index[domain, :, f]`, weighted unless there is one tap.

    Args:
        x: Stored samples [N, ...], uint8 or float32.
        y: Labels [N].
        scale: Factor of stored numbers.
        shift: Subtracted after scaling.
        domain_index: [D, taps, F].
        domain_weight: [D, taps, F].
        task_masks: Classes allowed beside each label [C, C].

    Raises:
        ValueError: If an array has another shape or type, or an index is out of range.
    """

    def __init__(
        self,
        x: NDArray[np.uint8] | NDArray[np.float32],
        y: NDArray[np.int64],
        scale: float = 1.0,
        shift: float = 0.0,
        domain_index: NDArray[np.int64] | None = None,
        domain_weight: NDArray[np.float32] | None = None,
        task_masks: NDArray[np.bool_] | None = None,
    ) -> None: ...
    def __len__(self) -> int: ...

class Plan:
    """What a network computes, and where its tensors are in the flat parameters [P].

    Layers are tuples, with tensors laid out as in torch and a bias offset of -1 for none::

        ("conv2d", weight_offset, bias_offset, out_channels, kernel_h, kernel_w, pad_h, pad_w)
        ("relu",)
        ("maxpool2d", 2)
        ("flatten",)
        ("linear", weight_offset, bias_offset, out_features)

    Args:
        input_shape: (C, H, W) or (D,).
        num_params: P.
        layers: In order; the last is linear and gives the logits [B, C].
        isa: Instruction set, one of `isas()`. By default what the environment variable
            EDGELEARN_NATIVE_ISA says, else the best.

    Raises:
        ValueError: For what no kernel computes.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_params: int,
        layers: Iterable[tuple[str | int, ...]],
        isa: str | None = None,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_params(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    def fit(
        self,
        data: Data,
        params: NDArray[np.float32],
        updates: NDArray[np.float32],
        *,
        ids: NDArray[np.int32],
        starts: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        draw_seeds: NDArray[np.uint64] | None = None,
        epochs: int,
        batch_size: int,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        proximal_mu: float = 0.0,
        curvature: NDArray[np.uint64] | None = None,
        anchor: NDArray[np.uint64] | None = None,
        curvature_size: int = 0,
        strength: float = 0.0,
        charge: NDArray[np.float32] | None = None,
        replay_ids: NDArray[np.int32] | None = None,
        replay_starts: NDArray[np.int64] | None = None,
        replay_batch: int = 0,
        replay_share: float = -1.0,
        logits: NDArray[np.float32] | None = None,
        distill_weight: float = 0.0,
        num_threads: int = 1,
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Train K devices, each from `params` on its own samples, by SGD on cross-entropy.

        Args:
            data: The samples.
            params: The global model [P].
            updates: Receives each device's weights minus the global ones [K, P].
            ids: Samples of all devices; device k has ids[starts[k]:starts[k + 1]].
            starts: [K + 1].
            seeds: Of the shuffles [K]: epoch e takes the order
                permutation(mix(seed + (e + 1) * 0x9E3779B97F4A7C15), n).
            draw_seeds: Of what is replayed [K].
            epochs: Passes over a device's samples.
            batch_size: Samples per step; the last batch of an epoch may be shorter.
            lr: Learning rate.
            momentum: As in torch.optim.SGD.
            weight_decay: As in torch.optim.SGD.
            proximal_mu: FedProx: pull to the global model, in the gradient.
            curvature: Addresses of float32 vectors [T] with F of the implicit pull
                theta += lr * strength * F / (1 + lr * strength * F) * (anchor - theta) after each
                step, or 0 for none [K]. The caller keeps the vectors alive.
            anchor: Addresses of float32 vectors [T] to pull to [K].
            curvature_size: T; elements from there on are not pulled.
            strength: Of the pull.
            charge: Path integrals [K, T]: a step from theta to theta' (the pull included) adds
                -g (theta' - theta) to a device's row, g the gradient with FedProx's term and
                without weight decay. Elements that belong to no tensor stay.
            replay_ids: Stored samples of all devices, as `ids`. A step draws one number q below
                2**62 from torch's CPU generator and appends permutation(q, held)[:count].
            replay_starts: [K + 1].
            replay_batch: Samples replayed per step; 0 replays as many as arrive.
            replay_share: Part of the loss that replayed samples get; negative weighs all alike.
            logits: Stored logits [len(replay_ids), C] that replayed samples stay close to.
            distill_weight: Weight of the mean squared distance to them.
            num_threads: Threads; results don't depend on it.

        Returns:
            Mean loss over steps (0 without any), steps, and samples passed with the replayed
            ones [K]. A device that diverged has NaN or infinity in its update.

        Raises:
            ValueError: If an argument has another shape or type, or a value is out of range.
        """

    def forward(
        self,
        data: Data,
        params: NDArray[np.float32],
        ids: NDArray[np.int32],
        out_logits: NDArray[np.float32],
        num_threads: int = 1,
        batch_size: int = 64,
    ) -> None:
        """Write the logits of samples into `out_logits` [n, C]."""

    def fisher(
        self,
        data: Data,
        params: NDArray[np.float32],
        ids: NDArray[np.int32],
        starts: NDArray[np.int64],
        out: NDArray[np.float32],
        max_samples: int = 0,
        num_threads: int = 1,
    ) -> None:
        """Write each device's empirical Fisher into `out` [K, T].

        It is the mean of squared per-example gradients over the device's first `max_samples`
        samples (0: all), and zero for a device without any.
        """

def isas() -> list[str]:
    """Return the instruction sets that this processor supports, the best last."""

def mix(x: int) -> int:
    """Return the finalizer of splitmix64 of a 64-bit number."""

def permutation(seed: int, n: int) -> NDArray[np.int64]:
    """Return positions 0..n-1 in the order of mix(seed + (i + 1) * 0x9E3779B97F4A7C15)."""

def weighted_sum(
    updates: NDArray[np.float32],
    weights: NDArray[np.float64] | NDArray[np.float32],
    out: NDArray[np.float32],
    num_threads: int = 1,
) -> None:
    """Write the weighted sum of rows [K, P] into `out` [P]; rows of weight 0 are not read."""

def finite_rows(
    updates: NDArray[np.float32],
    finite: NDArray[np.bool_],
    norms: NDArray[np.float64],
    num_threads: int = 1,
) -> None:
    """Write for each row [K, P] whether it is finite, and its L2 norm."""
