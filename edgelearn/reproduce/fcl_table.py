"""The table of federated continual learning at equal memory."""

from __future__ import annotations

from edgelearn.reproduce.fcl import METHODS, run
from edgelearn.reproduce.table import Row, Table

# Method, the one that it is said to be above, and who says so.
_CLAIMS = (
    ("FedAvg+ER", "FedAvg", "Re-Fed's paper and others"),
    ("FedLwF", "FedEWC", "TARGET's paper and others"),
    ("Re-Fed", "FedAvg+ER", "Re-Fed's paper"),
    ("FOT", "FedAvg", "FOT's paper, with labels of experiences"),
    ("FedSSI", "FedEWC", "FedSSI's paper"),
    ("TARGET on device", "FedLwF", "TARGET's paper, where the server makes the samples"),
)


def accuracy(*, seed: int, method: str) -> dict[str, float]:
    """Return a method's numbers, shares in percent; see `fcl.run`."""
    found = run(method, seed)
    return {
        name: value if name.startswith("bytes") else 100 * value for name, value in found.items()
    }


TABLE = Table(
    name="federated-continual",
    title="Federated continual learning at equal memory",
    about=(
        "Class-incremental Fashion-MNIST (6,000 images, 5 experiences of 2 classes) on ten devices "
        "with Dirichlet 0.5, all in each of 5 rounds an experience; CNN with 13,242 parameters; "
        "each device may store as much as two vectors of parameters (103 KiB). Float model, ACC at "
        "the end. The papers' data sets (CIFAR-100, Tiny-ImageNet) and networks (ResNet-18) are "
        "out of reach on a CPU, so numbers can't be compared, only orders: differences are taken "
        "seed by seed, and decided where their 95 % interval is on one side."
    ),
    rule=(
        "what is not a method's default was chosen with another seed on training images that no "
        "reported run uses, half of them held out; learning rate, rounds and epochs are the same "
        "for all and were not tuned."
    ),
    rows=(
        *(
            Row(
                method=method,
                setting="class-incremental",
                run=accuracy,
                arguments={"method": method},
                metric="accuracy",
            )
            for method in METHODS
        ),
        *(
            Row(
                method=f"{method} - {other}",
                setting="class-incremental",
                run=accuracy,
                arguments={"method": method},
                versus={"method": other},
                metric="accuracy",
                reference=0.0,
                bound="at least",
                published=f"above ({who})",
            )
            for method, other, who in _CLAIMS
        ),
    ),
    minutes=6.0,
    num_seeds=3,
)
