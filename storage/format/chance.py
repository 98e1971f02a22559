"""Random numbers of an entry: each a pure function of its seed, its use and an absolute position.

Philox4x64-10 (Salmon et al. 2011), whose blocks are counted, so that any of them is computed by itself: what is drawn
does not depend on shards, batches, workers or devices. The uses have keys of their own, so that none repeats the
numbers of another. NumPy guarantees the stream of a bit generator, unlike those of the distributions on top of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The uses of chance: the upper halves of keys, of which the seed is the lower one.
DRAWING = 0  # of ids, one number a position (`teachers.reduction.varopt`)
ROUNDING = 1  # of sampled log-probs to a code above or below
SHRINKING = 2  # of a stored row to fewer ids
ROUNDING_AGAIN = 3  # as ROUNDING, in an entry made from another
PIVOTAL = 1 << 32  # of ids in their first interval by the pivotal method; one more for each further one

_WORDS = 4  # of a block


def words(seed: int, use: int, start: int, stop: int) -> NDArray[np.uint64]:
    """64 random bits for each of the absolute positions `start .. stop`: word ``position % 4`` of block
    ``position // 4``, as NumPy counts the blocks."""
    generator = np.random.Philox(key=seed + (use << 64), counter=start // _WORDS)
    return generator.random_raw(stop - start + start % _WORDS)[start % _WORDS :]


def uniforms(seed: int, use: int, start: int, stop: int, columns: int) -> NDArray[np.float64]:
    """Numbers in 0 .. 1, float64 [T, columns], for the absolute positions `start .. stop`, whole blocks for each."""
    width = -(-columns // _WORDS) * _WORDS
    rows = words(seed, use, start * width, stop * width).reshape(stop - start, width)[:, :columns]
    return (rows >> np.uint64(11)).astype(np.float64) * 2.0**-53
