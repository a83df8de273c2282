"""FedProx on the device: a pull towards the global parameters, with any server strategy."""

from __future__ import annotations

import math
from typing import final

from edgelearn.continual.strategy import ClientStrategy


@final
class FedProx(ClientStrategy):
    r"""Keep local parameters close to the global ones while a device trains.

    The local objective is f_k(theta) + (mu / 2) |theta - theta_global|^2, so each step's gradient
    gets mu (theta - theta_global). Devices whose data differ then drift apart less.

    The same as Flower's server strategy `FedProx` with `proximal_mu = mu`; there the server sends
    mu with each instruction, here the device knows it. So it joins other client strategies
    (`lwf+fedprox`, `replay+fedprox`) and any server strategy. It is declared, so every engine runs
    it; where both are asked for, their mu add up.

    Reference: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous
    Networks", MLSys 2020, arXiv:1812.06127, equation 2. We differ: every device takes its full
    number of local epochs, there are no partial solutions of stragglers.

    Args:
        mu: Strength of the pull, at least 0; 0 is FedAvg. The paper tries 0.001, 0.01,
            0.1 and 1.
    """

    def __init__(self, *, mu: float = 0.1) -> None:
        if not (mu >= 0 and math.isfinite(mu)):
            raise ValueError(f"mu is {mu}; at least 0 is allowed, and finite")
        self.mu = mu

    def proximity(self) -> float:
        """Declare mu."""
        return self.mu
