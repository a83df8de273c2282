"""Native kernels for edgelearn: a whole round of on-device training in one call.

What a network computes is a `Plan`, what the fleet's devices hold is a `Data`; `Plan.fit` trains
many devices at once and gives one update per device. It holds no random state: shuffles follow
from seeds (`permutation`), and results don't depend on the number of threads.
"""

from edgelearn_native._core import (
    Data,
    Plan,
    finite_rows,
    isas,
    mix,
    permutation,
    weighted_sum,
)

__all__ = ["Data", "Plan", "finite_rows", "isas", "mix", "permutation", "weighted_sum"]
__version__ = "0.1.1"
