"""Held-out evaluation: cross-entropy, calibration and distance to the teachers, from sums that add up.

Legend: `P` positions of a batch (flattened), `V` vocabulary, `W` columns of the model's head (W >= V), `B` bins.

Every figure is a ratio of sums over positions. The sums are kept in float64 and divided once, so that neither the
batch size nor the number of processes changes a result; processes exchange their sums as one flat tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from storage.errors import Diverged, InputError
from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.labels import NOT_TRAINED
from student.loss.chunk.logit_chunk import row_slices
from student.loss.distillation import forward_kl
from student.loss.documents import DocumentReader, model_inputs
from student.loss.objective import TEACHER_CROSS_ENTROPY, Tail
from student.loss.student_logprobs import check_batch
from student.loss.teacher_targets import Member, targets_of
from student.report import HeldOutKL, HeldOutReport
from student.target_batch import StoredBatch, TargetBatch

BINS = 15

# Evaluation needs no backward pass, so a few megabytes of float32 at a time are enough, whatever the batch.
_CHUNK_LOGITS = {"elsewhere": 1 << 24}
# Logits that one forward pass may return, at most, where the batch size is ours to choose.
BATCH_LOGITS = 1 << 26


class HeldOutSums:
    """The sums behind a `HeldOutReport`; `add` batches, merge processes through `tensor` and `load`, then `result`.

    ECE is ``sum_b n_b / N * |correct_b / n_b - confidence_b / n_b|`` over 15 bins of equal width (lower end
    excluded) of the confidence q(top-1) (Guo et al. 2017). Top-1 is taken among the columns below V, its
    probability from the same softmax over all W columns as the cross-entropy. `members` are the teachers whose
    targets come with the batches; their weights are not used. The KL to a teacher is at temperature 1, a mean over the
    positions that have targets: with a sample of the tail an estimate without bias of the dense one, below it with a
    bucket, and not measured where the entry does not know the tail.
    """

    def __init__(self, vocabulary_size: int, members: Sequence[Member] = ()) -> None:
        self.vocabulary_size = vocabulary_size
        self.members = tuple(member for member in members if figure_of(member))
        self._not_measured = {member.name: _why_not(member) for member in members if not figure_of(member)}
        sizes = [1, 1, 3 * BINS, 3 * len(self.members)]
        self._sums = torch.zeros(sum(sizes), dtype=torch.float64)  # the others are views of it
        self._tokens, self._nats, bins, kl = torch.split(self._sums, sizes)
        self._bins = bins.view(3, BINS)  # count, sum of confidence, number correct
        self._kl = kl.view(3, len(self.members))  # nats, positions with a bucket, positions with targets

    @torch.no_grad()
    def add(
        self, logits: Tensor, labels: Tensor, targets: Mapping[str, StoredBatch | TargetBatch] | None = None
    ) -> None:
        """Add a batch: logits [P, W], labels int64 [P] (-100: not scored), and each member's targets.

        Raises InputError when the shapes do not fit or a member's targets are missing.
        """
        check_batch(logits, labels, self.vocabulary_size)
        by_member = [targets_of(member, targets, labels) for member in self.members]
        for cut in row_slices(logits, _CHUNK_LOGITS):
            self._add_rows(logits[cut], labels[cut], [each[cut] for each in by_member])

    def _add_rows(self, logits: Tensor, labels: Tensor, by_member: Sequence[TargetBatch]) -> None:
        scored = labels != NOT_TRAINED
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        lse = torch.logsumexp(z, 1)
        nats = lse - z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        top, guess = z[:, : self.vocabulary_size].max(1)
        # Vectors of [P] are copied to the CPU and summed there in float64, which some devices lack.
        keep = scored.cpu()
        confidence = _kept((top - lse).exp(), keep)
        correct = _kept(guess == labels, keep)
        self._tokens += keep.sum()
        self._nats += _kept(nats, keep).sum()
        # The confidence of logits that are no numbers has no bin; the cross-entropy shows them.
        bins = (confidence.nan_to_num() * BINS).ceil().sub(1).clamp(0, BINS - 1).to(torch.int64)
        for row, values in zip(self._bins, (torch.ones_like(confidence), confidence, correct), strict=True):
            row.index_add_(0, bins, values)
        for column, (member, targets) in enumerate(zip(self.members, by_member, strict=True)):
            tail: Tail = "sampled" if member.sampled_at == 1.0 else "bucket"
            kl = forward_kl(z, targets, member, 1.0, scored, tail)
            self._kl[0, column] += _kept(kl, keep).sum()
            there = targets.kept > 0
            bucketed = there & (targets.kept < member.vocabulary_size) & (tail == "bucket")
            self._kl[1, column] += _kept(bucketed, keep).sum()
            self._kl[2, column] += _kept(there, keep).sum()

    def tensor(self) -> Tensor:
        """All sums, flat float64 on the CPU; the sum of several processes' tensors is the tensor of their union."""
        return self._sums.clone()

    def load(self, sums: Tensor) -> None:
        """Replace the sums by those of a tensor that `tensor` returned, or of several added together."""
        if sums.shape != self._sums.shape:
            raise InputError(
                f"held-out sums with {len(self.members)} teachers are {len(self._sums)} numbers, got "
                f"{list(sums.shape)}: all processes must evaluate against the same teachers"
            )
        self._sums.copy_(sums.detach())

    def result(self, bytes_per_token: float | None = None) -> HeldOutReport:
        """The figures. Raises InputError when no position was scored, Diverged where the cross-entropy is not finite.

        bytes_per_token: bytes of UTF-8 text per token of the held-out stream, for bits per byte.
        """
        tokens = int(self._tokens)
        if not tokens:
            raise InputError(
                "no held-out position was scored: the stream is shorter than one window, or nothing in it is trained on"
            )
        cross_entropy = float(self._nats) / tokens
        if not math.isfinite(cross_entropy):
            raise Diverged(f"the held-out cross-entropy is {cross_entropy}: the model's logits are not finite")
        _, confidence, correct = self._bins
        by_member = list(zip(self.members, *self._kl, strict=True))
        empty = {member.name: "it has no targets of a scored position" for member, *_, rows in by_member if not rows}
        return HeldOutReport(
            tokens=tokens,
            cross_entropy=cross_entropy,
            perplexity=float(torch.tensor(cross_entropy, dtype=torch.float64).exp()),
            bits_per_byte=cross_entropy / math.log(2) / bytes_per_token if bytes_per_token else None,
            ece=float((correct - confidence).abs().sum()) / tokens,
            accuracy=float(correct.sum()) / tokens,
            kl={
                member.name: HeldOutKL(
                    nats=float(nats) / float(positions),
                    lower_bound=bool(rows > 0),
                    cross_entropy=_is_cross_entropy(member),
                )
                for member, nats, rows, positions in by_member
                if positions
            },
            kl_not_measured=self._not_measured | empty,
        )


def figure_of(member: Member) -> str | None:
    """The name under which evaluations log a teacher's figure; None where there is none."""
    if _why_not(member):
        return None
    return f"{TEACHER_CROSS_ENTROPY if _is_cross_entropy(member) else 'kl'}_{member.name}"


def _why_not(member: Member) -> str:
    """Why a KL to a teacher's targets is not known; empty where it is."""
    if "ids" in member.absent:
        return "its entry holds the log-probs of the text's own tokens alone"
    if "tail" in member.absent:
        return "its entry does not know the mass outside its ids"
    if member.sampled_at not in (None, 1.0) and "sampled-logprobs" in member.absent:
        return f"its ids were sampled for temperature {member.sampled_at:g}, and their log-probs are not stored"
    return ""


def _is_cross_entropy(member: Member) -> bool:
    return member.sampled_at == 1.0 and not member.knows_constant


@torch.no_grad()
def held_out(
    model: nn.Module,
    windows: DistillationWindows,
    batch_windows: int = 64,
    advance: Callable[[int], None] | None = None,
) -> HeldOutReport:
    """Figures of a model over every labelled position of a cache once, as training reports them; no trainer needed.

    windows: those of the cache, at a fixed offset; the KL is measured to the teachers whose targets they read.
    batch_windows at most go through the model at once, fewer where B·T·W is large. `advance` is called with the number
    of windows done. Raises the errors of `HeldOutSums`.
    """
    device = next(model.parameters()).device
    rows = max(1, min(batch_windows, BATCH_LOGITS // (windows.input_tokens * head_columns(model))))
    sums = HeldOutSums(windows.vocabulary_size, [Member.of(name, windows.entries[name]) for name in windows.teachers])
    was_training = model.training
    model.eval()
    reader = DocumentReader(model)
    for start in range(0, len(windows), rows):
        batch = collate(windows[start : start + rows])
        positions = batch.get("position_ids")
        ids, positions = batch["input_ids"].to(device), None if positions is None else positions.to(device)
        logits = reader(lambda *read: model(**model_inputs(*read)).logits, ids, positions)
        sums.add(logits.flatten(0, 1), batch["labels"].flatten().to(device), batch["targets"])
        if advance is not None:
            advance(len(batch["labels"]))
    model.train(was_training)
    return sums.result(bytes_per_token(windows))


def bytes_per_token(windows: DistillationWindows) -> float | None:
    """Bytes of UTF-8 text per token of a stream; None where the bytes of the scored positions are not known."""
    corpus = windows.record.corpus
    known = corpus.text_bytes > 0 and not corpus.has_loss_mask
    return corpus.text_bytes / corpus.positions if known else None


@torch.no_grad()
def next_token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """``log softmax(logits)[label]`` of each row: float64 [P] on the CPU, 0 where the label is -100.

    logits [P, W], labels int64 [P]. Softmax over all W columns in float32 (float64 for logits of that type), a few
    rows at a time.
    """
    parts = []
    for rows in row_slices(logits, _CHUNK_LOGITS):
        z, label = logits[rows].to(torch.promote_types(logits.dtype, torch.float32)), labels[rows]
        found = z.gather(1, label.clamp(min=0)[:, None])[:, 0] - z.logsumexp(1)
        parts.append(found.masked_fill(label == NOT_TRAINED, 0.0).cpu().to(torch.float64))
    return torch.cat(parts)


@torch.no_grad()
def head_columns(model: nn.Module) -> int:
    """W: the columns of a model's logits, found by running one token."""
    # Any id but the padding id, of which some models warn.
    token = 1 if getattr(getattr(model, "config", None), "pad_token_id", None) == 0 else 0
    ids = torch.full((1, 1), token, device=next(model.parameters()).device)
    return int(model(input_ids=ids, use_cache=False).logits.shape[-1])


def _kept(values: Tensor, keep: Tensor) -> Tensor:
    """The scored entries of [P], on the CPU in float64."""
    return values.cpu().to(torch.float64)[keep]
