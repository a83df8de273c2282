"""The only source of randomness: every generator is recomputed from what it is for.

A run stores no random state. Who needs random numbers names the purpose and the coordinates
(round, device, ...), and gets a generator that depends on these and the run's seed alone. So a
resumed run, another number of workers, and another machine draw the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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


_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


def mix(word: int) -> int:
    """Scramble a 64-bit word: the finalizer of SplitMix64.

    Reference: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014,
    figure 18 (variant 13 of Stafford). Three lines in any language, so that a compiled engine
    draws what this module draws.
    """
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def split(seed: int, index: int) -> int:
    """Return the seed at a place in the sequence that belongs to `seed`; both 64 bits."""
    return mix((seed + (index + 1) * _GOLDEN) & _WORD)


def split_all(seed: int | NDArray[np.uint64], indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return `split(seed, index)` for each index; the two are broadcast."""
    steps = indices.astype(np.uint64) + np.uint64(1)
    word = np.asarray(seed, np.uint64) + steps * np.uint64(_GOLDEN)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: NDArray[np.uint64] = word ^ (word >> np.uint64(31))
    return out


def permutation(seed: int, count: int) -> NDArray[np.int64]:
    """Return a random order of 0..count-1: positions sorted by their words in the sequence.

    Example:
        >>> permutation(1, 5).tolist()
        [4, 3, 0, 1, 2]
    """
    return np.argsort(split_all(seed, np.arange(count)), kind="stable")


def subset(seed: int, size: int, count: int) -> NDArray[np.int64]:
    """Return the first `count` of `permutation(seed, size)`, ascending, without sorting the rest.

    Example:
        >>> subset(3, 1000, 3).tolist() == sorted(permutation(3, 1000)[:3].tolist())
        True
    """
    if count == 0:
        return np.arange(0)
    words = split_all(seed, np.arange(size))
    last = np.partition(words, count - 1)[count - 1]
    chosen = words < last
    chosen[np.flatnonzero(words == last)[: count - int(chosen.sum())]] = True  # the first of equals
    return np.flatnonzero(chosen)


def permutations(seeds: NDArray[np.uint64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `permutation(seed, count)` of each row [K, longest]; behind it, the places left."""
    places = np.arange(int(counts.max(initial=0)))
    words = split_all(seeds[:, None], places[None])
    words[places >= counts[:, None]] = _WORD  # they sort behind all others
    return np.argsort(words, axis=1, kind="stable")


def numpy_generator(seed: int, purpose: str, *coordinates: int) -> np.random.Generator:
    """Return a NumPy generator for one purpose; see `derive`."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, *coordinates)))


def torch_generator(seed: int, purpose: str, *coordinates: int) -> torch.Generator:
    """Return a torch CPU generator for one purpose; see `derive`."""
    import torch  # here, because the command line starts without it

    return torch.Generator().manual_seed(derive(seed, purpose, *coordinates))
