"""How numbers are stored: widths of token ids, rounding of floats, and codes for log-probs.

Legend: `T` positions, `K` stored ids per position, `V` vocabulary size.

A row of log-probs, sorted in descending order, is stored as its first value `top` and whole numbers::

    steps_i = round((top - logprob_i) / step)            steps_0 = 0, steps never decrease
    codes_i = steps_i - steps_{i-1}                      uint16, codes_0 = 0
    logprob_i = top - step * cumsum(codes)_i             the reader's arithmetic

The sum is rounded, never each difference: rounding the differences one by one lets their errors add up along the row.
`top` in the first line is the *stored* (mantissa-rounded) value, so that its own rounding does not shift the row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DEFAULT_STEP_NATS = 1 / 32
MIN_STEP_NATS = 1 / 128
MAX_STEP_NATS = 1.0
DEFAULT_SAMPLED_STEP_NATS = 1 / 2
# Of the numbers per position in version 2, each a code of 16 bits.
DEFAULT_VALUE_STEP_NATS = 1 / 256
MIN_VALUE_STEP_NATS = 1 / 1024
MAX_UINT16 = 65_535
# Of an exact log-prob: far more than float32 and a rounded mantissa add to log 1.
ROUNDING_NATS = 1e-3
# Of a mass that is one less a sum of probabilities, at most, where their normaliser was summed in float32.
FLOAT32_MASS_ERROR = 2.0**-15


def token_id_dtype(vocabulary_size: int) -> str:
    """The zarr name of the narrowest id type whose maximum is free to be the fill value.

    >>> token_id_dtype(65_535), token_id_dtype(65_536)
    ('uint16', 'uint32')
    """
    return "uint16" if vocabulary_size <= MAX_UINT16 else "uint32"


def logprob_floor(step_nats: float) -> float:
    """The lowest log-prob (nats) that is stored: -2000, or as far as one uint16 code reaches.

    exp of it is 0 in float64 at the default step and below the least normal float32 at any allowed one, so
    flooring changes no probability that a loss could see. A logit of -inf is stored as this value.
    """
    return -min(2000.0, float(np.floor(MAX_UINT16 * step_nats)) - 1)


def round_mantissa(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Round float32 to `bits` explicit mantissa bits, to nearest, ties to even.

    The relative error is at most 2**-(bits + 1). The zeros at the low end of the mantissa make the values
    compressible. NaN and infinities pass unchanged.
    """
    values = np.asarray(values, dtype=np.float32)
    if bits >= 23:
        return values
    drop = 23 - bits
    pattern = values.view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    odd = (pattern >> np.uint32(drop)) & np.uint32(1)
    rounded = (pattern + half + odd) & ~np.uint32((1 << drop) - 1)
    return np.where(np.isfinite(values), rounded, pattern).astype(np.uint32).view(np.float32)


def encode_logprobs(
    logprobs: NDArray[np.float32], top_logprob: NDArray[np.float32], kept: NDArray[np.uint16], step_nats: float
) -> NDArray[np.uint16]:
    """Codes [T, K] uint16 of log-probs [T, K] float32, of which the first `kept` descend along each row.

    `top_logprob` [T] is the value that will be stored for column 0. Columns from `kept` on get code 0. The
    decoded value differs from the given one by at most `step_nats / 2` in columns 1..kept-1, and by the
    rounding of `top_logprob` in column 0.
    """
    valid = np.arange(logprobs.shape[1]) < kept[:, None]
    top = top_logprob[:, None].astype(np.float64)
    distance = np.subtract(top, logprobs, out=np.zeros(logprobs.shape), where=valid) / step_nats
    steps = np.rint(distance).clip(min=0.0)
    steps[:, 0] = 0.0
    # Rows are sorted, so this only carries the last valid value over the unused columns (code 0 there).
    steps = np.maximum.accumulate(steps, axis=1)
    codes = np.diff(steps, axis=1, prepend=0.0)
    if codes.size and codes.max() > MAX_UINT16:
        raise OverflowError(
            f"two neighbouring log-probs are {codes.max() * step_nats:g} nats apart, more than the "
            f"{MAX_UINT16 * step_nats:g} nats that one uint16 code holds: floor them at logprob_floor() first"
        )
    return codes.astype(np.uint16)


def decode_logprobs(
    codes: NDArray[np.uint16], top_logprob: NDArray[np.float32], step_nats: float
) -> NDArray[np.float32]:
    """Log-probs [T, K] float32 in nats: ``top - step * cumsum(codes)``."""
    steps = np.cumsum(codes, axis=1, dtype=np.uint32)
    return top_logprob[:, None] - np.float32(step_nats) * steps.astype(np.float32)
