"""The only source of randomness: every generator is recomputed from what it is for.

A run stores no random state. Who needs random numbers names the purpose and the coordinates
(round, device, ...), and gets a generator that depends on these and the run's seed alone. So a
resumed run, another number of workers, and another machine draw the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, *coordinates: int) -> int:
    """Derive an independent 63-bit seed.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, such as "shuffle".
        *coordinates: Where they are used, such as round and device.

    Returns:
        An integer in [0, 2**63), equal for equal arguments on every machine.

    Example:
        >>> derive(0, "shuffle", 1, 2) == derive(0, "shuffle", 1, 2)
        True
        >>> derive(0, "shuffle", 1, 2) == derive(0, "shuffle", 2, 1)
        False
    """
    text = ":".join([str(int(seed)), purpose, *(str(int(c)) for c in coordinates)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, purpose: str, *coordinates: int) -> np.random.Generator:
    """Return a NumPy generator for one purpose; see `derive`."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, *coordinates)))


def torch_generator(seed: int, purpose: str, *coordinates: int) -> torch.Generator:
    """Return a torch CPU generator for one purpose; see `derive`."""
    import torch  # here, because the command line starts without it

    return torch.Generator().manual_seed(derive(seed, purpose, *coordinates))
