"""Random numbers of an entry: each a pure function of its seed, its use and an absolute position.

Philox4x64-10 (Salmon et al. 2011), whose blocks are counted, so that any of them is computed by itself: what is drawn
does not depend on shards, batches, workers or devices. The uses have keys of their own, so that none repeats the
numbers of another. NumPy guarantees the stream of a bit generator, unlike those of the distributions on top of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The uses of chance. Ids are drawn with the first (`teachers.reduction.varopt`).
DRAWING = 0
ROUNDING = 1  # of sampled log-probs to a code above or below
SHRINKING = 2  # of a stored row to fewer ids
ROUNDING_AGAIN = 3  # as ROUNDING, in an entry made from another

_WORDS = 4  # of a block


def uniforms(seed: int, use: int, start: int, stop: int, columns: int) -> NDArray[np.float64]:
    """Numbers in 0 .. 1, float64 [T, columns], for the absolute positions `start .. stop`."""
    blocks = -(-columns // _WORDS)
    words = np.random.Philox(key=seed + (use << 64), counter=start * blocks).random_raw(
        (stop - start) * blocks * _WORDS
    )
    rows = words.reshape(stop - start, blocks * _WORDS)[:, :columns]
    return (rows >> np.uint64(11)).astype(np.float64) * 2.0**-53
