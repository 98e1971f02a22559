"""The distillation loss with the teachers' whole distributions at hand: teachers that run beside the student.

Legend: `B` windows, `T` positions of a window, `P` = B·T positions, `r` rows of one chunk, `V` vocabulary, `W` columns
of the student's head (W >= V), `tau` the temperature. Everything is in nats.

What a cache saves is measured against this, and what it stores is compared with it: the same loss, with every id of
every position. The teachers' logits come in chunks of rows, each of which is turned at once into its part of the loss
and of the gradient, so that a batch's logits are held once, the student's, and never the teachers'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from storage.errors import InputError
from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss, LossSums
from student.loss.divergences import Divergence
from student.loss.student_logprobs import check_batch
from student.loss.teacher_targets import Member

LIVE = "live"
"""The name under which live teachers stand in logs and reports, whatever they are."""


class LogitSource(Protocol):
    """Teachers in memory, as one.

    provenance   what tells these teachers from others, by name
    columns      of their logits, at least V
    """

    @property
    def provenance(self) -> Mapping[str, str]: ...

    @property
    def columns(self) -> int: ...

    def __call__(self, windows: Tensor) -> Iterator[Tensor]:
        """Logits float32 [r, columns] of all positions of the windows int64 [B, T], in order, chunk by chunk."""
        ...


class DenseLoss(DistillationLoss):
    """``alpha * CE + (1 - alpha) * tau**2 * D(softmax(z_teacher / tau), softmax(z_student / tau))``, every id counted.

    The other fields of the objective mean what they mean for stored targets
    (`student.loss.distillation.DistillationLoss`); there is no tail to treat. Called with the student's logits [P, W],
    labels int64 [P], the windows int64 [B, T] that both read, and position weights [P] or None; returns `LossSums`,
    whose one divergence is called `live`. `loss_sum` is differentiable in the logits, once.

    Raises InputError for teachers that cannot score every id, and what DistillationLoss raises.
    """

    def __init__(
        self, source: LogitSource, vocabulary_size: int, alpha: float, temperature: float, **options: Any
    ) -> None:
        if source.columns < vocabulary_size:
            raise InputError(
                f"the live teachers' heads have {source.columns} columns, the vocabulary {vocabulary_size} ids: they "
                "must be able to score every id"
            )
        member = Member(LIVE, 1.0, None, vocabulary_size)
        super().__init__(vocabulary_size, alpha, temperature, [member], **options)
        self._source = source
        self._divergence = Divergence(self.objective.loss, self.objective.mixing)

    def meaning(self, name: str) -> str:
        """What the reported divergence is, in a few words."""
        del name
        return "of the teachers' whole distributions"

    def of_windows(
        self, logits: Tensor, labels: Tensor, windows: Tensor, position_weights: Tensor | None = None
    ) -> LossSums:
        """The sums of one batch; see the class."""
        check_batch(logits, labels, self.vocabulary_size)
        trained = labels != NOT_TRAINED
        of_label, of_teacher, in_window = self._scale(labels)
        weights = torch.ones_like(labels, dtype=torch.float32) if position_weights is None else position_weights
        weights = weights * trained
        by_label = weights * (self.alpha * of_label) * (1.0 if in_window is None else in_window)
        by_teacher = weights * ((1.0 - self.alpha) * self.temperature**2 * of_teacher)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        gradient = None
        if logits.requires_grad and torch.is_grad_enabled():
            # Of a 16-bit head in float32: what is small here is multiplied by the scaler only afterwards.
            gradient = torch.empty_like(logits, dtype=dtype)
        total, cross_entropy, divergence = (logits.new_zeros((), dtype=dtype) for _ in range(3))
        start = 0
        for z_teacher in self._source(windows) if self.members else _nothing(logits):
            rows = slice(start, start + len(z_teacher))
            z = logits[rows].detach().to(dtype)
            z.requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                ce, by_row, chosen = self._rows(z, labels[rows], z_teacher)
                part = (by_label[rows] * ce + by_teacher[rows] * chosen * by_row).sum()
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(part, z)[0]
            total = total + part.detach()
            cross_entropy = cross_entropy + (ce.detach() * trained[rows]).sum()
            divergence = divergence + (by_row.detach() * trained[rows]).sum()
            start = rows.stop
        assert start == len(labels), "one row of the teachers' logits for each of the student's"
        loss_sum: Tensor = total
        if gradient is not None:
            loss_sum = _WithGradient.apply(logits, total, gradient)  # type: ignore[no-untyped-call]
        return LossSums(cross_entropy, {LIVE: divergence} if self.members else {}, loss_sum, trained.sum())

    def _rows(self, z: Tensor, labels: Tensor, z_teacher: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Cross-entropy [r], divergence [r], and where the divergence counts, bool [r] or 1."""
        v, tau = self.vocabulary_size, self.temperature
        ce = z.logsumexp(1) - z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        if not self.members:
            return ce, torch.zeros_like(ce), 1.0
        # From their largest logit, normalisers are small numbers, which round finely.
        z_teacher = z_teacher[:, :v].to(z.dtype)
        log_p = torch.log_softmax(z_teacher / tau, 1)
        log_q = torch.log_softmax(z / tau, 1)[:, :v]
        nothing = log_p.new_full((len(log_p),), -math.inf)
        by_row = self._divergence((log_p, nothing), (log_q, nothing))
        least = self.objective.min_entropy
        if least is None:
            return ce, by_row, 1.0
        log_p = log_p if tau == 1.0 else torch.log_softmax(z_teacher, 1)
        return ce, by_row, -(log_p.exp() * log_p).nansum(1) >= least


def _nothing(logits: Tensor) -> Iterator[Tensor]:
    """A chunk for all rows where no step asks the teachers."""
    yield logits.new_empty((len(logits), 0))


class _WithGradient(torch.autograd.Function):
    """A number whose gradient by the logits has been worked out already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * by_value).to(ctx.dtype), None, None
