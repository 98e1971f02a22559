"""Codes, mantissa rounding and id widths against float64, with hostile rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.format.encoding import (
    DEFAULT_STEP_NATS,
    decode_logprobs,
    encode_logprobs,
    logprob_floor,
    round_mantissa,
    token_id_dtype,
)


def encode_row(logprobs: np.ndarray, step: float = DEFAULT_STEP_NATS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.sort(logprobs.astype(np.float32), axis=1)[:, ::-1]
    top = round_mantissa(rows[:, 0].copy(), 12)
    kept = np.full(len(rows), rows.shape[1], dtype=np.uint16)
    return rows, top, encode_logprobs(rows, top, kept, step)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("step", [1 / 128, 1 / 32, 1 / 16, 1.0])
def test_error_is_at_most_half_a_step_however_long_the_row(step: float) -> None:
    logprobs = log_softmax(np.random.default_rng(0).normal(size=(50, 4096)) * 3)
    rows, top, codes = encode_row(logprobs, step)
    decoded = decode_logprobs(codes, top, step)
    # float32 holds values up to ~20 nats with an error of 1e-6; half a step is at least 4e-3.
    assert np.abs(decoded[:, 1:] - rows[:, 1:]).max() <= step / 2 + 2e-6
    assert np.array_equal(decoded[:, 0], top)
    assert (codes[:, 0] == 0).all()


def test_very_sharp_and_very_flat_rows() -> None:
    sharp = np.full((1, 1000), np.log(1e-6 / 999))
    sharp[0, 17] = np.log1p(-1e-6)
    sharper = np.full((1, 1000), -1500.0)
    sharper[0, 3] = -1e-30
    flat = np.full((1, 1000), -np.log(1000.0))
    for logprobs in (sharp, sharper, flat):
        rows, top, codes = encode_row(logprobs)
        decoded = decode_logprobs(codes, top, DEFAULT_STEP_NATS)
        assert np.abs(decoded - rows).max() <= DEFAULT_STEP_NATS / 2 + 1e-4
        assert np.abs(decoded[0, 0] - rows[0, 0]) <= abs(float(rows[0, 0])) * 2**-13
    rows, top, codes = encode_row(flat)
    assert (codes == 0).all()


def test_the_floor_fits_into_one_code_and_its_exp_is_nothing() -> None:
    for step in (1 / 128, 1 / 64, 1 / 32, 1.0):
        floor = logprob_floor(step)
        logprobs = np.array([[0.0, floor]], dtype=np.float32)
        _, _, codes = encode_row(logprobs, step)
        assert codes[0, 1] == round(-floor / step)
        assert np.exp(np.float32(floor)) == 0.0


def test_rows_that_no_code_can_hold_are_an_error_and_not_a_wrapped_number() -> None:
    with pytest.raises(OverflowError, match="floor"):
        encode_row(np.array([[0.0, -3000.0]]))


def test_columns_beyond_kept_get_code_zero() -> None:
    rows = np.array([[-0.5, -1.0, -9.0, -np.inf], [-0.1, -3.0, -4.0, -5.0]], dtype=np.float32)
    codes = encode_logprobs(rows, rows[:, 0].copy(), np.array([2, 4], dtype=np.uint16), 1 / 32)
    assert codes.tolist() == [[0, 16, 0, 0], [0, 93, 32, 32]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.integers(8, 22))
def test_mantissa_rounding_is_to_nearest_and_clears_the_low_bits(values: list[float], bits: int) -> None:
    x = np.array(values, dtype=np.float32)
    rounded = round_mantissa(x, bits)
    assert not (rounded.view(np.uint32) & np.uint32((1 << (23 - bits)) - 1))[np.isfinite(rounded)].any()
    normal = np.isfinite(rounded) & (np.abs(x) > 1e-37)
    error = np.abs(rounded[normal].astype(np.float64) - x[normal])
    assert (error <= np.abs(x[normal].astype(np.float64)) * 2.0 ** -(bits + 1)).all()


def test_mantissa_rounding_keeps_nan_infinity_and_all_bits_when_asked() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1 / 3], dtype=np.float32)
    assert np.array_equal(round_mantissa(x, 12)[:3], x[:3], equal_nan=True)
    assert np.array_equal(round_mantissa(x, 23), x, equal_nan=True)


def test_ids_leave_the_maximum_free_for_the_fill_value() -> None:
    assert token_id_dtype(65_535) == "uint16"
    assert token_id_dtype(65_536) == "uint32"
    assert token_id_dtype(200_000) == "uint32"
