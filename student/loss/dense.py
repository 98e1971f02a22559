"""``alpha * CE + (1 - alpha) * tau**2 * D(p, q)`` with live teachers, which run beside the student: every id counts.

Legend: `B` windows, `T` positions of a window, `P` = B·T positions, `r` rows of one chunk, `V` vocabulary, `W` columns
of the student's LM head (W >= V), `tau` the temperature. Everything is in nats.

The savings of a cache and the error of its stored targets are measured against this loss, in which every id of every
position counts. The teachers' logits come in chunks of rows, each of which is turned at once into its part of the loss
and of the gradient, so that only the student's logits of a batch are held whole, never the teachers'.
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
"""The name of the live teachers in logs and reports, whichever models they are."""


class LogitSource(Protocol):
    """Teachers in memory, combined into one.

    provenance   the identity of the teachers as named strings: combination, weights, configurations, dtypes
    columns      of their logits, at least V
    """

    @property
    def provenance(self) -> Mapping[str, str]: ...

    @property
    def columns(self) -> int: ...

    def packs(self, length: int) -> bool:
        """Whether documents may share windows of so many tokens: each has the logits that it has alone."""
        ...

    def __call__(self, windows: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        """Logits float32 [r, columns] of all positions of the windows int64 [B, T], in order, chunk by chunk.

        positions: int64 [B, T], where several documents share a window.
        """
        ...


class DenseLoss(DistillationLoss):
    """``alpha * CE + (1 - alpha) * tau**2 * D(softmax(z_teacher / tau), softmax(z_student / tau))``, every id counted.

    The other fields of the objective have the same meaning as for stored targets (`DistillationLoss`); there is no
    tail to treat. Called with the student's logits [P, W], labels int64 [P], position weights [P] or None, and the
    windows int64 [B, T] that both read; returns `LossSums`, whose one divergence is called `live`. `loss_sum` is
    differentiable in the logits, once.

    Raises InputError for teachers that cannot score every id, and wherever `DistillationLoss` does.
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
        self._divergence = self.objective.divergence

    def meaning(self, name: str) -> str:
        del name
        return "of the teachers' whole distributions"

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        targets: object = None,
        position_weights: Tensor | None = None,
        windows: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> LossSums:
        """The sums of one batch; the class states shapes and errors. Stored targets are not read."""
        if windows is None:
            raise InputError("live teachers read the windows of a batch themselves: give its input_ids")
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
            # float32 also for a 16-bit head: small values are multiplied by the loss scaler only afterwards.
            gradient = torch.empty_like(logits, dtype=dtype)
        total, cross_entropy, divergence = (logits.new_zeros((), dtype=dtype) for _ in range(3))
        start = 0
        # One chunk without columns, where no step needs the teachers.
        for z_teacher in self._source(windows, positions) if self.members else [logits.new_empty((len(logits), 0))]:
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
        count, names = trained.sum(), [member.name for member in self.members]
        by_member = dict.fromkeys(names, divergence)
        return LossSums(cross_entropy, by_member, loss_sum, count, dict.fromkeys(names, count), logits.new_zeros(0, 3))

    def _rows(self, z: Tensor, labels: Tensor, z_teacher: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Cross-entropy [r], divergence [r], and where the divergence counts, bool [r] or 1."""
        v, tau = self.vocabulary_size, self.temperature
        ce = z.logsumexp(1) - z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        if not self.members:
            return ce, torch.zeros_like(ce), 1.0
        # Relative to the largest logit, normalisers are small numbers, which round finely.
        z_teacher = z_teacher[:, :v].to(z.dtype)
        log_p = torch.log_softmax(z_teacher / tau, 1)
        log_q = torch.log_softmax(z / tau, 1)[:, :v]
        nothing = log_p.new_full((len(log_p),), -math.inf)
        by_row = Divergence(self._divergence, self.current.mixing)((log_p, nothing), (log_q, nothing))
        least = self.objective.min_entropy
        if least is None:
            return ce, by_row, 1.0
        log_p = log_p if tau == 1.0 else torch.log_softmax(z_teacher, 1)
        return ce, by_row, -(log_p.exp() * log_p).nansum(1) >= least


class _WithGradient(torch.autograd.Function):
    """A scalar with a precomputed gradient by the logits."""

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
