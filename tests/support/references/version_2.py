"""Entries of version 2 decoded from their arrays alone, row by row, by the arithmetic that `storage.format` states.

Nothing of the package is used: `arrays` are whatever a reader of Zarr gives, `record` the JSON of the entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

NONE, MINUS_INFINITY, NO_ID_CERTAIN = -32_768, -32_767, 32_766


def value(code: int, step: float) -> float:
    """A number of a position from its code."""
    return {NONE: math.nan, MINUS_INFINITY: -math.inf}.get(code, step * code)


def masses(code: int, step: float) -> tuple[float, float]:
    """Log of the mass of the certain ids, and of that outside them."""
    if code in (NONE, MINUS_INFINITY, NO_ID_CERTAIN):
        return {NONE: (math.nan, math.nan), MINUS_INFINITY: (0.0, -math.inf), NO_ID_CERTAIN: (-math.inf, 0.0)}[code]
    odds = step * code
    return -np.logaddexp(0.0, odds), -np.logaddexp(0.0, -odds)


def decoded_row(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    """The `ids` of a row, their `logprobs` (NaN: not stored), and its numbers by name, those that there are."""
    encoding, kept, certain = record["encoding"], int(arrays["kept"][row]), int(arrays["certain"][row])
    stored = {name: values[row] for name, values in arrays.items()}
    raw = stored["ids"].astype(np.int64)
    ids = [*raw[:certain].tolist(), *np.cumsum(raw[certain:kept]).tolist()]
    if encoding["kind"] == "float32":
        sampled = stored["sampled_logprobs"][certain:kept] if "sampled_logprobs" in stored else [math.nan] * kept
        logprobs = [*stored["certain_logprobs"][:certain], *sampled[: kept - certain]]
        names = ("log_tail", "log_tail_half", "label_logprob", "entropy")
        return {"ids": ids, "logprobs": logprobs, **{n: float(stored[n]) for n in names if n in stored}}
    step, found = encoding["step_nats"], {}
    log_head = 0.0
    if "mass_code" in stored:
        log_head, found["log_tail"] = masses(int(stored["mass_code"]), step)
    for name, array in (
        ("log_tail_half", "half_tail_code"),
        ("label_logprob", "label_code"),
        ("entropy", "entropy_code"),
    ):
        if array in stored:
            found[name] = value(int(stored[array]), encoding["value_step_nats"])
    below = -step * np.cumsum(stored["certain_codes"][:certain], dtype=np.int64)
    logprobs = [*(log_head - math.log(np.exp(below).sum()) + below)] if certain else []
    if "sampled_codes" in stored and kept > certain:
        temperature = record["targets"]["temperature"]
        outside = found["log_tail"] if temperature == 1 else found["log_tail_half"]
        reference = temperature * (outside - math.log(kept - certain)) + step
        logprobs += [*(reference - encoding["sampled_step_nats"] * stored["sampled_codes"][certain:kept])]
    else:
        logprobs += [math.nan] * (kept - certain)
    return {"ids": ids, "logprobs": logprobs, **found}
