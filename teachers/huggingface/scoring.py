"""Float32 logits of chosen rows from a causal language model: the fast path, the general path, and their choice.

Legend: `B` windows, `C` tokens per window, `R` scored rows, `r` rows of one chunk, `H` hidden size.

fast     ``hidden = backbone(windows)[rows]``, then ``hidden @ weight.T + bias`` for as many rows at a time as
         the byte budget allows. Rows that are not requested never get logits.
general  ``model(windows).logits[rows]``, for models that scale or soft-cap the logits after the head, or whose parts
         cannot be called separately.

On both paths the head's product has float32 output, whatever the backbone's dtype, wherever the output layer is a
plain Linear. Rounded to bfloat16, a logit of 20 is off by up to 0.06 nats, and logits tie at the border of the
top-k in most rows; the product costs the same.

A self-test decides: on a few random windows both paths must agree, also with the hidden states scaled up until
the logits reach hundreds, where a soft cap or a factor shows in any model, trained or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from student.loss.documents import model_inputs
from student.loss.output_layer import tolerance_of
from student.models.logit_agreement import MASKED, agree, amplification, amplified, difference, replaced_forward
from teachers.huggingface.output_layer import Head, head_of

# The change, relative to the largest logit, that one rounding of the logits to the dtype and another order of
# summation may cause.
TOLERANCE = {name: tolerance_of(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}


class FastPath:
    """The backbone, then the head on the requested rows."""

    kind: Literal["fast", "general"] = "fast"
    float32 = True

    def __init__(self, backbone: Any, head: Head) -> None:
        self._backbone = backbone
        self.head = head

    def in_order(self, order: Tensor) -> FastPath:
        """The path with its columns in another order, int64 [C]."""
        return FastPath(self._backbone, self.head.in_order(order))

    def hidden(self, windows: Tensor, positions: Tensor | None = None) -> Tensor:
        """The last hidden states of all positions, [B * C, H]."""
        hidden: Tensor = self._backbone(**model_inputs(windows, positions)).last_hidden_state
        return hidden.flatten(0, 1)

    def score(
        self, windows: Tensor, rows: Tensor, columns: int, budget_bytes: int, positions: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields the logits [r, C] of the scored rows, r of them at a time within the budget, in order."""
        with torch.inference_mode():
            hidden = self.hidden(windows, positions)
            # With layers on several devices, the hidden states are on the last one.
            hidden = hidden.index_select(0, rows.to(hidden.device)).to(self.head.device)  # [R, H]
        step = rows_per_chunk(columns, budget_bytes)
        for start in range(0, len(rows), step):
            # Entered per chunk: a mode held across a yield would leak into the caller's code.
            with torch.inference_mode():
                logits = self.head(hidden[start : start + step])
            yield logits


class GeneralPath:
    """The model's own forward on as many windows at a time as the budget allows, at least one.

    float32: whether its logits are free of the dtype's rounding. order: of the columns of the logits that it yields,
    int64 [C], where it is not the model's; layers after the head may be made for that one, so logits are copied.
    """

    kind: Literal["fast", "general"] = "general"

    def __init__(self, model: Any, float32: bool, order: Tensor | None = None) -> None:
        self._model = model
        self.float32 = float32
        self._order = order
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def in_order(self, order: Tensor) -> GeneralPath:
        return GeneralPath(self._model, self.float32, order)

    def score(
        self, windows: Tensor, rows: Tensor, columns: int, budget_bytes: int, positions: Tensor | None = None
    ) -> Iterator[Tensor]:
        context = windows.shape[1]
        at_once = max(1, budget_bytes // (4 * context * columns))
        step = rows_per_chunk(columns, budget_bytes)
        on_host = rows.cpu()
        for first in range(0, len(windows), at_once):
            wanted = on_host[(on_host >= first * context) & (on_host < (first + at_once) * context)]
            if not len(wanted):
                continue
            position = wanted % context
            # Overlapping windows score their last positions only; the other logits need not be computed.
            last = context - int(position.min())
            with torch.inference_mode():
                here = slice(first, first + at_once)
                own = None if positions is None else positions[here]
                logits = self.own_logits(windows[here], last if self._keeps_last else None, own)
                last = int(logits.shape[1])  # all positions, from a model without logits_to_keep
                local = (wanted // context - first) * last + position - (context - last)
                local, logits = local.to(logits.device), logits.flatten(0, 1)
            for start in range(0, len(local), step):
                with torch.inference_mode():
                    chunk = logits.index_select(0, local[start : start + step]).float()
                    if self._order is not None:
                        chunk = chunk.index_select(1, self._order.to(chunk.device))
                yield chunk

    def own_logits(self, windows: Tensor, last: int | None, positions: Tensor | None = None) -> Tensor:
        return forward(self._model, windows, last, positions)


ScoringPath = FastPath | GeneralPath


def forward(model: Any, windows: Tensor, last: int | None = None, positions: Tensor | None = None) -> Tensor:
    """The model's own logits [B, C, columns], or of the `last` positions only, in the dtype of its output.

    No attention mask is passed: what pads a window stands behind it, where a causal model does not look.
    """
    keep = {} if last is None else {"logits_to_keep": last}
    logits: Tensor = model(**model_inputs(windows, positions), **keep).logits
    return logits


def is_causal(model: Any, windows: Tensor, logits: Tensor, dtype: str) -> bool:
    """Whether logits stay the same when later tokens change. BERT's do not, even in a causal model class.

    logits: the model's own for the windows, float32 [B, C, columns].
    """
    half = windows.shape[1] // 2
    if not half:
        return True
    changed = torch.cat([windows[:, :half], windows[:, half:].flip(0).roll(1, 1)], dim=1)
    with torch.inference_mode():
        now = forward(model, changed).float()
    # Most models' logits do not change by a bit; the margin is for mixtures of experts, which group a batch's tokens.
    return agree(now[:, :half], logits[:, :half], 4 * TOLERANCE[dtype])


def choose_path(model: Any, windows: Tensor, logits: Tensor, dtype: str) -> tuple[ScoringPath, str | None]:
    """The fast path and None if it reproduces the model's logits, else the general path and the reason.

    logits: the model's own for the windows, float32 [B, C, columns]. dtype: the model's, by name. For the general
    path the output layer is made to return float32, if the rest of the model accepts that.
    """
    tolerance = TOLERANCE[dtype]
    linear = None

    def differ(own: Tensor, expected: Tensor) -> str | None:
        return None if agree(own, expected, tolerance) else f"differ by {difference(own, expected)}"

    try:
        linear, backbone = model.get_output_embeddings(), model.base_model
        # Subclasses of Linear are quantised or adapted layers with another product.
        if type(linear) is not nn.Linear:
            problem = f"its output layer is a {type(linear).__name__}, not a plain Linear"
        elif backbone is model:
            problem = "it has no backbone that can be called by itself"
        else:
            fast = FastPath(backbone, head_of(linear))
            found = disagreement(model, linear, fast, windows, logits, differ)
            if found is None:
                return fast, None
            problem = found
    except Exception as error:  # architectures and remote code fail in ways of their own; the other path remains
        problem = f"the fast path failed ({type(error).__name__}: {error!s:.200})"
    float32 = dtype == "float32"
    if not float32 and type(linear) is nn.Linear:
        float32 = _make_float32(model, linear, windows, logits, tolerance)
    return GeneralPath(model, float32), problem


def disagreement(
    model: Any,
    linear: nn.Linear,
    fast: FastPath,
    windows: Tensor,
    logits: Tensor,
    differ: Callable[[Tensor, Tensor], str | None],
) -> str | None:
    """How the fast path differs from the model's own logits; None where it does not.

    differ: of the path's logits and the model's, words for their difference, or None.
    """
    with torch.inference_mode():
        hidden = fast.hidden(windows)
        found = differ(fast.head(hidden).reshape(*windows.shape, -1).to(logits.device), logits)
        if found is not None:
            return f"backbone and head alone {found}"
        factor = amplification(float(logits.masked_fill(logits.abs() > -MASKED, 0.0).abs().max()))
        with amplified(linear, factor):
            expected = forward(model, windows).float()
        found = differ(fast.head(hidden * factor).reshape(*windows.shape, -1).to(logits.device), expected)
    return found and f"with hidden states times {factor:g}, backbone and head {found}"


def _make_float32(model: Any, linear: nn.Linear, windows: Tensor, logits: Tensor, tolerance: float) -> bool:
    """Make the output layer return float32; undone, and False, if the rest of the model does not accept that."""
    with replaced_forward(linear, head_of(linear)) as replacement:
        try:
            with torch.inference_mode():
                now = forward(model, windows)
            replacement.stays = now.dtype == torch.float32 and agree(now, logits, tolerance)
        except Exception:  # layers after the head may require the model's dtype
            replacement.stays = False
    return replacement.stays


def rows_per_chunk(columns: int, budget_bytes: int) -> int:
    """The number of rows of `columns` float32 logits that fit the budget: at least 1, a multiple of 64 where 64 fit.

    The multiple keeps the matrix product of a full chunk on its fastest shapes.

    >>> rows_per_chunk(16_000, 64 << 20), rows_per_chunk(250_000, 1 << 20)
    (1024, 1)
    """
    rows = max(1, budget_bytes // (4 * columns))
    return rows - rows % 64 if rows >= 64 else rows
