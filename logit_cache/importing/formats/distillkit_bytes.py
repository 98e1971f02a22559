"""The bytes of DistillKit's rows: exact log-probs, a fitted curve with quantised residuals for the others, packed ids.

Legend: `R` rows, `k` ids of a row, of which `exact_k` have exact log-probs, `n = k - exact_k`, `b` bits of an id.

A row of `compressed_logprobs` holds exact_k numbers, a coefficient for each term, and for each bin of residuals its
scale and its elements; a row of `bytepacked_indices` k ids. Elements are packed from the highest bit of a byte on, and
padded to whole bytes. With t = 0 .. n - 1, or the same numbers scaled to 0 .. 1::

    value of rank exact_k + t = sum of coefficient_i * term_i(t) + residual    term_i: t**i, sqrt(t) or exp(t)
    residual = scale * (q - 2**(bits - 1)), of one bit scale * (2 q - 1), beyond the bins 0

With delta encoding all of these are differences along the row. Files of the legacy form hold the parts as numbers:
`packed_indices` in words of 64 bits, from the lowest bit on, none across two words; terms x**-i (or x**i) of
x = 1 .. n, and sqrt(x) last.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["float64", "float32", "float16", "bfloat16"]
_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_Count = Annotated[int, Field(ge=0, le=1 << 20)]


class _Settings(BaseModel):
    """What is not needed to read the bytes is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Bin(_Settings):
    scale_dtype: Dtype
    element_bits: Annotated[int, Field(ge=1, le=64)]
    num_elements: _Count

    @property
    def bytes(self) -> int:
        return _BYTES[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


class Settings(_Settings):
    """Of the current form."""

    d: Annotated[int, Field(ge=2, le=1 << 31)]
    k: Annotated[int, Field(ge=1, le=1 << 16)]
    exact_k: _Count
    exact_dtype: Dtype = "float32"
    polynomial_terms: tuple[int | Literal["sqrt", "exp"], ...] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is larger than k {self.k}")
        return self

    @property
    def id_bits(self) -> int:
        return math.ceil(math.log2(self.d))

    @property
    def id_bytes(self) -> int:
        return -(-self.id_bits * self.k // 8)

    @property
    def value_bytes(self) -> int:
        terms = len(self.polynomial_terms or ()) * _BYTES[self.term_dtype]
        return self.exact_k * _BYTES[self.exact_dtype] + terms + sum(each.bytes for each in self.residual_bins)


class LegacySettings(_Settings):
    """Of the legacy form."""

    vocab_size: Annotated[int, Field(ge=2, le=1 << 31)]
    k: Annotated[int, Field(ge=1, le=1 << 16)]
    exact_k: _Count
    polynomial_degree: _Count
    with_sqrt_term: bool = False
    invert_polynomial: bool = True

    @property
    def id_bits(self) -> int:
        return math.ceil(math.log2(self.vocab_size))

    @property
    def words(self) -> int:
        return -(-self.k // (64 // self.id_bits))

    @property
    def coefficients(self) -> int | None:
        """Of a row; any number where all values are exact."""
        return self.polynomial_degree + 1 + self.with_sqrt_term if self.k > self.exact_k else None


def _numbers(data: NDArray[np.uint8], dtype: Dtype) -> NDArray[np.float64]:
    """[R, count] from their bytes [R, count * size], little-endian."""
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        found = (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        found = data.view(np.dtype(dtype).newbyteorder("<"))
    return found.astype(np.float64)


def _unpacked(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint64]:
    """Elements uint64 [R, count] of `bits` bits each, from the highest bit of a byte on."""
    single = np.unpackbits(data, axis=1)[:, : bits * count].reshape(len(data), count, bits)
    found = np.zeros((len(data), count), dtype=np.uint64)
    for place in range(bits):
        found = (found << np.uint64(1)) | single[:, :, place]
    return found


def unpacked_ids(data: NDArray[np.uint8], settings: Settings) -> NDArray[np.int64]:
    """Ids int64 [R, k] of rows uint8 [R, id_bytes]."""
    return _unpacked(data, settings.id_bits, settings.k).astype(np.int64)


def packed_ids(ids: NDArray[np.int64], settings: Settings) -> NDArray[np.uint8]:
    """Rows uint8 [R, id_bytes] of ids [R, k]."""
    places = np.arange(settings.id_bits)[::-1]
    single = ((ids[:, :, None] >> places) & 1).astype(np.uint8)
    return np.packbits(single.reshape(len(ids), settings.k * settings.id_bits), axis=1)


def decoded_values(data: NDArray[np.uint8], settings: Settings) -> NDArray[np.float64]:
    """Numbers float64 [R, k] of rows uint8 [R, value_bytes]; not finite from a rank on that the writer did not have."""
    at = settings.exact_k * _BYTES[settings.exact_dtype]
    exact = _numbers(data[:, :at], settings.exact_dtype)
    n = settings.k - settings.exact_k
    terms = len(settings.polynomial_terms or ()) * _BYTES[settings.term_dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = _curve(_numbers(data[:, at : at + terms], settings.term_dtype), settings, n)
        at += terms
        done = 0
        for each in settings.residual_bins:
            residuals = _residuals(data[:, at : at + each.bytes], each)[:, : max(0, n - done)]
            fitted[:, done : done + residuals.shape[1]] += residuals
            at, done = at + each.bytes, done + each.num_elements
        whole = np.concatenate([exact, fitted], axis=1)
        return np.cumsum(whole, axis=1) if settings.delta_encoding else whole


def _curve(coefficients: NDArray[np.float64], settings: Settings, n: int) -> NDArray[np.float64]:
    """Numbers [R, n] of coefficients [R, terms]. Residuals are what the writer's own sum left, so that one of two
    bytes is rounded as it was there."""
    import torch

    terms = _terms(settings, n)
    if _BYTES[settings.term_dtype] > 2:
        return coefficients @ terms
    dtype = getattr(torch, settings.term_dtype)
    products = torch.from_numpy(coefficients).to(dtype)[:, :, None] * torch.from_numpy(terms).float().to(dtype)
    found: NDArray[np.float64] = products.sum(1).double().numpy()
    return found


def _terms(settings: Settings, n: int) -> NDArray[np.float64]:
    """[terms, n]"""
    t = np.linspace(0.0, 1.0, n) if settings.normalize_t else np.arange(n, dtype=np.float64)
    named = {"sqrt": np.sqrt, "exp": np.exp}
    rows = [named[term](t) if isinstance(term, str) else t**term for term in settings.polynomial_terms or ()]
    return np.array(rows).reshape(len(rows), n)


def _residuals(data: NDArray[np.uint8], each: Bin) -> NDArray[np.float64]:
    size = _BYTES[each.scale_dtype]
    scale = _numbers(data[:, :size], each.scale_dtype)
    q = _unpacked(data[:, size:], each.element_bits, each.num_elements).astype(np.float64)
    return scale * (2 * q - 1 if each.element_bits == 1 else q - 2.0 ** (each.element_bits - 1))


def legacy_ids(words: NDArray[np.uint64], settings: LegacySettings) -> NDArray[np.int64]:
    """Ids int64 [R, k] of words uint64 [R, words]."""
    bits, each = settings.id_bits, 64 // settings.id_bits
    shifts = (np.arange(each) * bits).astype(np.uint64)
    found = (words[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)
    return found.reshape(len(words), -1)[:, : settings.k].astype(np.int64)


def legacy_values(exact: NDArray[Any], coefficients: NDArray[Any], settings: LegacySettings) -> NDArray[np.float64]:
    """Numbers float64 [R, k] of exact ones [R, exact_k] and coefficients [R, terms]."""
    n = settings.k - settings.exact_k
    if n == 0:
        return exact.astype(np.float64)
    x = np.arange(1, n + 1, dtype=np.float64)
    sign = -1.0 if settings.invert_polynomial else 1.0
    rows = [x ** (sign * power) for power in range(settings.polynomial_degree + 1)]
    if settings.with_sqrt_term:
        rows.append(np.sqrt(x))
    fitted = coefficients.astype(np.float64) @ np.array(rows)
    return np.concatenate([exact.astype(np.float64), fitted], axis=1)
