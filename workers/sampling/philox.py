"""Random numbers that have no state: each is a function of a seed and a position.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11), the seed as key and the
position as counter. It computes with integers only, so its numbers are the same on every platform.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = "NDArray[Any]"
"""uint64; NumPy's types do not say that it stays so beside Python's integers."""

_U32 = 0xFFFFFFFF


def uniforms(seeds_B: Words, positions_B: Words) -> NDArray[np.float64]:
    """The random numbers in [0, 1) of the tokens at these positions of rows that are sampled under these seeds."""
    zeros_B = np.zeros_like(seeds_B)
    counter = (positions_B & _U32, positions_B >> 32, zeros_B, zeros_B)
    words = philox4x32(counter, (seeds_B & _U32, seeds_B >> 32))
    return np.asarray(((words[0] << 32 | words[1]) >> 11) * 2.0**-53, np.float64)


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Four random words of 32 bits, of a counter and a key in such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & _U32, p0 >> 32 ^ c3 ^ k1, p0 & _U32
        k0, k1 = k0 + 0x9E3779B9 & _U32, k1 + 0xBB67AE85 & _U32
    return c0, c1, c2, c3
