"""The inputs of a training run: its caches, opened and checked once, and the windows and losses of a job over them.

Opening is a step of its own, so that the jobs of a sweep share the opened caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from storage import LogitCache
from storage.errors import IdentityMismatch, IncompleteCache, InputError
from storage.format.manifest.entry import TeacherEntry
from storage.format.sealing import digest
from storage.progress import Log, silent
from student.data.entries import usable_sources
from student.data.rollouts import check_rollouts
from student.data.windows import DistillationWindows
from student.evaluation.held_out import figure_of
from student.job import StudentJob
from student.loss.dense import DenseLoss, LogitSource
from student.loss.distillation import DistillationLoss
from student.loss.members import tail_of
from student.loss.objective import LIGHTNING_OPD, Objective
from student.loss.teacher_targets import Member
from student.models.configuration import stated_columns
from student.models.tokenizer import model_folder, read_tokenizer
from student.report import FIGURES, LiveTeachers


@dataclass(frozen=True)
class Caches:
    """The caches of a job, opened and checked once; the jobs of a sweep share them.

    The windows' V is the ids that the student has too. remarks: lines for the log about ids that are left out.
    """

    windows: DistillationWindows
    eval_windows: DistillationWindows | None
    eval_members: tuple[Member, ...]
    not_measured: dict[str, str]
    provenance: dict[str, str]
    remarks: tuple[str, ...] = ()

    def same_sampler(self) -> bool:
        """Whether the held-out text is rollouts of the model that made those which are trained on."""
        ours, theirs = (
            None if windows is None else windows.record.corpus.rollouts for windows in (self.windows, self.eval_windows)
        )
        return ours is not None and theirs is not None and ours.digests == theirs.digests

    def check_figure(self, field: str, given: str, more: Sequence[str] = ()) -> None:
        """Raise InputError unless evaluations measure the figure that a field names; `more` are measured too."""
        by_teacher = [figure for member in self.eval_members if (figure := figure_of(member)) is not None]
        known = [*FIGURES, *by_teacher, *more]
        asked = given.removeprefix("eval_")
        if asked not in known:
            why = self.not_measured.get(asked.removeprefix("kl_"))
            note = f" ({why})" if why else ""
            raise InputError(f"{field} {given!r} is not measured{note}; there is: {', '.join(known)}")


@dataclass(frozen=True)
class Data:
    """The checked inputs of a job, and the job with its open alpha filled in.

    eval_loss is a string where the run's loss cannot be measured on the held-out text: the reason.
    """

    job: StudentJob
    caches: Caches
    windows: DistillationWindows
    loss: DistillationLoss
    eval_windows: DistillationWindows | None
    eval_loss: DistillationLoss | str
    provenance: dict[str, str]
    live: LiveTeachers | None = None


def open_caches(job: StudentJob) -> Caches:
    """Open the caches of a job and check that they, their entries and its windows fit together."""
    names = [teacher.name for teacher in job.teachers]
    sources = {teacher.name: teacher.sources for teacher in job.teachers if teacher.sources}
    windows = DistillationWindows(
        job.cache, names, job.window_tokens, job.offset, job.seed, job.isolate_documents, job.bos_each_window, sources,
        packs_documents(job), job.available,
    )  # fmt: skip
    remarks = [f"teacher {teacher.name} teaches{teacher.in_documents}" for teacher in job.teachers if teacher.sources]
    windows = _for_student(job, windows, remarks.append)
    provenance = {"cache": digest(windows.record)}
    provenance |= {f"cache/{name}": digest(entry) for name, entry in windows.entries.items()}
    eval_windows: DistillationWindows | None = None
    eval_members: tuple[Member, ...] = ()
    not_measured: dict[str, str] = {}
    if job.eval_cache is not None:
        eval_windows, not_measured = _check_eval(job, windows)
        eval_windows = _for_student(job, eval_windows, silent)  # the same ids differ
        eval_members = tuple(
            Member.of(name, entry, sources=sources.get(name)) for name, entry in eval_windows.entries.items()
        )
        provenance["eval_cache"] = digest(eval_windows.record)
        provenance |= {f"eval_cache/{name}": digest(entry) for name, entry in eval_windows.entries.items()}
    return Caches(windows, eval_windows, eval_members, not_measured, provenance, tuple(remarks))


def packs_documents(job: StudentJob) -> bool:
    """Whether isolated documents share the windows of a job."""
    return job.loss_scale != "babyllama" if job.pack_documents is None else job.pack_documents


def _for_student(job: StudentJob, windows: DistillationWindows, log: Log) -> DistillationWindows:
    """The windows over the ids that the student has too.

    A student of another tokenizer than the text's is refused: what it learnt would be other words.
    """
    folder = model_folder(job.model)
    tokenizer = None if folder is None else read_tokenizer(folder, job.model)
    vocabulary = None if tokenizer is None else tokenizer.get_vocab()
    return windows.within(stated_columns(job.model), job.model, log, vocabulary, windows.vocabulary_size)


def job_inputs(caches: Caches, job: StudentJob, live: LogitSource | None = None) -> Data:
    """The losses and the windows of a job over caches opened for it, or for a job of other windows and loss.

    live: the job's live teachers, if it has any.
    """
    if job.loss_scale == "babyllama" and caches.windows.begin_id is not None:
        raise InputError(
            f"{job.cache}: --loss-scale babyllama leaves out a window's last label, which has no fixed row where "
            f"windows begin with BOS: take --loss-scale token, or windows without BOS (no --bos-each-window)"
        )
    if job.loss == LIGHTNING_OPD:
        check_rollouts(caches.windows, job.model, job.window_tokens)
    windows, eval_windows = caches.windows.cut(job.window_tokens, job.offset), caches.eval_windows
    if eval_windows is not None:
        eval_windows = eval_windows.cut(job.window_tokens, "fixed")
    entries = windows.entries
    members = [
        Member.of(teacher.name, entries[teacher.name], teacher.weight, teacher.sources) for teacher in job.teachers
    ]
    if job.leaves_alpha_open and all(_is_unbiased(member, entries[member.name], job) for member in members):
        # The cross-entropy would only add the noise of a single label; with a bucket it reduces the bias
        # (docs/decisions/0012-sampled-targets-by-default.md).
        job = job.model_copy(update={"alpha": 0.0})
    # Evaluated as at the end of its schedules, so that all evaluations of a run measure the same loss.
    objective, at_its_end = (
        {name: getattr(of, name) for name in Objective.model_fields} | {"window_tokens": job.window_tokens}
        for of in (job, job.at(1.0))
    )
    provenance, record = caches.provenance, None
    if live is not None:
        provenance = provenance | {f"live/{name}": value for name, value in live.provenance.items()}
        record = LiveTeachers(
            sources=job.live_teachers, combine=job.combine or "single", provenance=dict(live.provenance)
        )
        size = min(windows.vocabulary_size, live.columns)
        loss: DistillationLoss = DenseLoss(live, size, **objective)
        eval_loss: DistillationLoss | str = DenseLoss(live, size, **at_its_end)
    else:
        loss = DistillationLoss(windows.vocabulary_size, members=members, **objective)
        eval_loss = _eval_loss(caches, job, at_its_end)
    # Targets that no term of the loss uses are not read; the windows are the same.
    read = windows if job.uses_teachers else windows.without_targets()
    return Data(job, caches, read, loss, eval_windows, eval_loss, provenance, record)


def _eval_loss(caches: Caches, job: StudentJob, objective: dict[str, Any]) -> DistillationLoss | str:
    """The run's loss on the held-out targets, or the reason why there is none."""
    if job.eval_cache is None:
        return "there is no held-out cache: give --eval-cache"
    if not job.teachers:
        return "without teachers it is the cross-entropy, which is called loss"
    if caches.not_measured:
        return "; ".join(f"teacher {name}: {why}" for name, why in caches.not_measured.items())
    if job.loss == LIGHTNING_OPD and not caches.same_sampler():
        return f"{job.eval_cache} has no rollouts of the student, and loss {job.loss} is of those"
    weights = {teacher.name: teacher.weight for teacher in job.teachers}
    members = [replace(member, weight=weights[member.name]) for member in caches.eval_members]
    try:
        return DistillationLoss(caches.windows.vocabulary_size, members=members, **objective)
    except InputError as error:
        return f"{job.eval_cache}: {error}"


def _is_unbiased(member: Member, entry: TeacherEntry, job: StudentJob) -> bool:
    """Whether the gradient on these targets is an unbiased estimate of the dense one; or the weight is 0."""
    holds_all = entry.targets.k == entry.vocabulary_size and entry.targets.top_p is None
    return not member.weight or holds_all or tail_of(member, job) in ("sampled", "controlled")


def _check_eval(job: StudentJob, windows: DistillationWindows) -> tuple[DistillationWindows, dict[str, str]]:
    """The held-out windows, with the teachers that can be compared there, and the reasons why others cannot."""
    assert job.eval_cache is not None
    cache = LogitCache.open(job.eval_cache)
    ours, theirs = windows.record.tokenizer, cache.record.tokenizer
    if ours.fingerprint != theirs.fingerprint:
        raise IdentityMismatch(
            f"{job.cache} and {job.eval_cache} have different tokenizers",
            [f"fingerprint: {ours.fingerprint} and {theirs.fingerprint}"],
            "Make the held-out cache with the tokenizer of the first",
        )
    for name in set(windows.entries).intersection(cache.teachers) if job.available else ():
        if cache.teacher(name).missing():
            raise IncompleteCache(
                f"{job.eval_cache}: the entry of teacher {name} is incomplete there, and --available is about the text "
                f"that is trained on: complete it, or leave --eval-cache out"
            )
    reasons = {
        name: _not_comparable(cache, name, entry) or _no_documents(cache, name, windows.sources.get(name))
        for name, entry in windows.entries.items()
    }
    measured = [name for name, reason in reasons.items() if reason is None]
    begun = windows.begin_id is not None
    sources = {name: given for name, given in windows.sources.items() if name in measured}
    held_out = DistillationWindows(
        job.eval_cache, measured, job.window_tokens, "fixed", job.seed, windows.isolate_documents, begun, sources,
        packs_documents(job),
    )  # fmt: skip
    return held_out, {name: reason for name, reason in reasons.items() if reason is not None}


def _not_comparable(cache: LogitCache, name: str, entry: TeacherEntry) -> str | None:
    if name not in cache.teachers:
        return "the held-out cache has no entry of that name"
    there = cache.teacher(name)
    if there.entry.teacher != entry.teacher:
        return "another teacher has that name in the held-out cache"
    if there.entry.windowing.isolate_documents != entry.windowing.isolate_documents:
        return "the teacher saw isolated documents in one of the caches and not in the other"
    if there.entry.windowing.begin_id != entry.windowing.begin_id:
        return "the teacher's windows begin with BOS in one of the caches and not in the other"
    if there.missing():
        return "its entry in the held-out cache is incomplete"
    return None


def _no_documents(cache: LogitCache, name: str, sources: Sequence[str] | None) -> str | None:
    """Why a teacher of some sources cannot be compared in a held-out cache; None where it can, or is of all."""
    if sources is None:
        return None
    try:
        usable_sources(cache, name, sources)
    except InputError as error:
        return str(error)
    return None
