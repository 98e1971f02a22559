"""Does a cache hold its teacher's values? The live teacher rescores random windows, which are compared with the store.

`verify` proves that the bytes are the committed ones; an audit tests whether the committed values are true. Random
windows (`logit_cache.fidelity.samples`) are compared value by value.

The tolerance is measured, not assumed: the entry states its error (`logit_cache.fidelity.stated_errors`), and the noise
is how far the live teacher is from itself (`logit_cache.fidelity.tolerance`),

batch shape   in the entry's recorded batch shape, and window by window in another order
dtype         where that does not explain it and a half precision is involved, the same weights in another dtype:
              the whole effect of its rounding, whatever the device and the kernels that made the entry. Of one whose
              teacher was not loaded no dtype is recorded: it is compared in float32, and bfloat16 explains the most

One window that differs in one field is enough for the verdict. Sampled ids that are stored without log-probs are drawn
again, and held against the share that two runs of the live teacher have in common. Digests that differ are named and
decide nothing: the same weights saved in another way have another one, and other weights have other values.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from logit_cache.caching.job import is_server
from logit_cache.caching.prepare import check_tokenizer, execution_of, first_tokens
from logit_cache.fidelity.rescore import live_values, stored_values
from logit_cache.fidelity.sampled_ids import DrawnAgain, Values, compare_drawn
from logit_cache.fidelity.samples import Examination, Sample, entry_of, fresh_seed, read_samples
from logit_cache.fidelity.served import served_values
from logit_cache.fidelity.tolerance import FieldReport, biased_sample, compare
from storage.cache.reader import LogitCache, TeacherTargets
from storage.errors import IdentityMismatch, InputError
from storage.format.manifest.entry import TARGET_FIELDS, TeacherEntry
from storage.format.manifest.shared import Versions
from storage.format.sealing import differences
from student.models.vocabulary import check_vocabulary
from teachers.base import Teacher
from teachers.ensemble import EnsembleTeacher
from teachers.huggingface.teacher import DEFAULT_LOGIT_BUDGET_BYTES, HuggingFaceTeacher
from teachers.served.teacher import ServedTeacher

Dtype = Literal["float32", "bfloat16", "float16"]

# The largest batch that the fields of a foreign record may request: 32 MiB of token ids, before the model runs.
_MOST_BATCH_TOKENS = 1 << 22
_IDENTITY = (
    *("weights_sha256", "config_sha256", "adapter_sha256", "adapter_config_sha256"),
    *("architecture", "dtype", "head_columns", "parameters"),
)


@dataclass(kw_only=True)
class Audit(Examination):
    """The result of an audit.

    sampled     of ids that were drawn again, how many came again; None where none were
    uncompared  what the entry does not store, or cannot be compared of it
    controls    the ways in which the live teacher was compared with itself
    identity    fields in which the live teacher is not the one that the entry names
    execution   settings other than the recorded ones; they explain noise and decide nothing
    differing   windows whose values differ, as positions first..last
    """

    teacher: str
    controls: list[str] = field(default_factory=list)
    identity: list[str] = field(default_factory=list)
    execution: list[str] = field(default_factory=list)
    differing: list[tuple[int, int]] = field(default_factory=list)
    uncompared: list[str] = field(default_factory=list)
    fields: dict[str, FieldReport] = field(default_factory=dict)
    sampled: DrawnAgain | None = None

    @property
    def consistent(self) -> bool:
        """Whether the entry holds this teacher's values, as far as the windows show."""
        return not self.problems and not self.differing


@dataclass(frozen=True)
class AuditJob:
    """The entry to audit, and how to load the teacher, or the members of an ensemble in the order of the record.

    A dtype of None is the recorded one, a device of None CUDA where there is one, a seed of None a fresh one, so that
    nobody knows the windows beforehand. `revision`: one per hub teacher, or none.
    """

    cache: str
    teacher: tuple[str, ...]
    name: str | None = None
    windows: int = 16
    seed: int | None = None
    device: str | None = None
    dtype: Dtype | None = None
    revision: tuple[str, ...] = ()
    trust_remote_code: bool = False
    served_model: str | None = None

    @property
    def is_served(self) -> bool:
        """Whether the live teacher is behind a server, or several; `served_model` is its name there."""
        return is_server(self.teacher[0])


def audit(job: AuditJob, progress: Callable[[int], None] | None = None) -> Audit:
    """Rescore random windows of an entry and compare; `progress` receives the number of windows since its last call.

    Raises InputError for a teacher that cannot be run on this entry, CacheNotFound (no such entry, or a cache that was
    shared without its tokens), IncompleteCache (nothing cached yet) and CorruptCache (no sampled window can be read);
    damage in some of the windows is a problem in the result.
    """
    cache = LogitCache.open(job.cache)
    targets = entry_of(cache, job.name)
    entry = targets.entry
    _check_members(job, targets)
    if entry.made == "projected":
        raise InputError(
            f"{job.cache}: {targets.name} was projected into this vocabulary, and its teacher reads another one: audit "
            f"the entry that it was projected from"
        )
    teachers = " + ".join(job.teacher)
    found = Audit(cache=job.cache, name=targets.name, teacher=teachers, seed=fresh_seed(job.seed))
    samples = list(read_samples(cache, targets, job.windows, found))
    stored = [stored_values(entry, sample.stored) for sample in samples]
    found.uncompared += _uncompared(entry)
    if job.is_served:
        return _against_server(job, cache, targets, samples, stored, found, progress)
    order = targets.sampling_order()
    loaded = entry.teacher.loaded
    dtype: Dtype = job.dtype or (loaded[0].dtype if loaded else "float32")

    members = _load(job, entry, dtype)
    _other_tokenizers(job, cache, members, found)
    teacher = _together(entry, members)
    _describe(entry, teacher, found)
    at_once = _batch_windows(entry, teacher, len(samples))
    alone = 1 if at_once > 1 else 2
    live = live_values(teacher, entry, samples, at_once, progress, order)
    controls = [live_values(teacher, entry, samples[::-1], alone, progress, order)[::-1]]
    found.controls.append(f"in batches of {at_once} and of {alone} windows")
    differing = _judge(entry, samples, stored, live, controls, found)

    # Of a model that was not loaded nobody knows the dtype, and most run in this one.
    other: Dtype = "float32" if dtype != "float32" else loaded[0].dtype if loaded else "bfloat16"
    if (differing or _drawn_otherwise(found)) and other != dtype:
        del members, teacher
        gc.collect()  # models hold cycles, and two of them may not fit
        try:
            teacher = _together(entry, _load(job, entry, other))
            controls.append(live_values(teacher, entry, samples, at_once, progress, order))
        except InputError as error:
            found.execution.append(f"the rounding of {dtype} could not be measured: {error}")
        else:
            found.controls.append(f"the same weights in {other}")
            differing = _judge(entry, samples, stored, live, controls, found)
    found.differing = [(samples[number].window.first, samples[number].window.last) for number in differing]
    found.problems += filter(None, [_drawn_otherwise(found), biased_sample(live)])
    return found


def _against_server(
    job: AuditJob,
    cache: LogitCache,
    targets: TeacherTargets,
    samples: list[Sample],
    stored: list[Values],
    found: Audit,
    progress: Callable[[int], None] | None,
) -> Audit:
    """`audit` with a live teacher behind a server, whose noise is the difference of asking twice."""
    entry, begin = targets.entry, targets.entry.windowing.begin_id
    if entry.targets.method == "varopt":
        raise InputError(
            f"{job.cache}: {targets.name} holds sampled ids, and a server gives its likeliest alone: audit it with "
            f"the model's files"
        )
    teacher = ServedTeacher.connect(job.teacher, job.served_model, max(1, entry.targets.k))
    teacher.check_context(entry.windowing.context_tokens, begin is not None)
    try:
        check_tokenizer(teacher, cache, "Give a server of the teacher that the entry names")
    except IdentityMismatch as error:
        found.problems.append(str(error))
    recorded = entry.teacher.served
    now = teacher.identify(first_tokens(cache, entry.windowing), recorded).members[0]
    if recorded is None:
        found.identity.append(f"the entry was not made by a server, and {now.source} is behind one")
    else:
        found.identity += differences(recorded, now, names=("the entry", "the server"))
    live = served_values(teacher, entry, samples, progress)
    controls = [served_values(teacher, entry, samples[::-1], progress)[::-1]]
    found.controls.append("asked twice, in two orders")
    differing = _judge(entry, samples, stored, live, controls, found)
    found.differing = [(samples[number].window.first, samples[number].window.last) for number in differing]
    return found


def _judge(
    entry: TeacherEntry,
    samples: list[Sample],
    stored: list[Values],
    live: list[Values],
    controls: list[list[Values]],
    found: Audit,
) -> list[int]:
    """Compare values and sampled ids, and note the figures; returns the numbers of the samples that differ."""
    found.fields, differing = compare(entry, samples, stored, live, controls)
    found.sampled, drawn = compare_drawn(stored, live, controls)
    return sorted({*differing, *drawn})


def _drawn_otherwise(found: Audit) -> str | None:
    """The defect of sampled ids of which too few come again, or None."""
    if found.sampled is None or not found.sampled.differs:
        return None
    return (
        f"the sampled ids are not those that this teacher and seed give: {found.sampled.again:.2%} of them come again "
        f"when they are drawn again, at least {found.sampled.limit:.2%} was expected"
    )


def _uncompared(entry: TeacherEntry) -> list[str]:
    """What an audit cannot compare of an entry."""
    targets = entry.targets
    if not targets.k:
        return ["not stored: ids, and all else but the log-probs of the text's own tokens"]
    absent = [name for name in ("tail", *TARGET_FIELDS) if not targets.has(name)]
    if targets.method == "top-k":
        absent = [name for name in absent if name != "sampled-logprobs"]
    found = [f"not stored: {', '.join(absent)}"] if absent else []
    if not targets.has("tail"):
        found.append("the mass outside the ids is not known: log-probs are compared with each other along a row")
    source = entry.imported_from
    if source is not None and source.error_nats is None:
        found.append(f"how numbers are rounded in {source.format} files is not recorded: it shows as a difference")
    shrunk = targets.shrunk_from
    if shrunk and not targets.has("sampled-logprobs"):
        found.append(
            f"sampled ids: sampled from a stored sample of {shrunk[-1].k} ids, so the teacher does not draw them "
            f"again; that they are a sample of its tail shows in their mean log-prob"
        )
    return found


def _check_members(job: AuditJob, targets: TeacherTargets) -> None:
    teacher, count = targets.entry.teacher, len(job.teacher)
    if not job.is_served and count != len(teacher.members):
        sources = ", ".join(member.name for member in teacher.members)
        raise InputError(
            f"{job.cache}: {targets.name} was made by {len(teacher.members)} models and --teacher is given {count} "
            f"times: give it for each of them, in the order of the record ({sources})"
        )
    if len(job.revision) not in (0, count):
        raise InputError(f"--revision is given {len(job.revision)} times: give it once per --teacher, or not at all")
    if min(teacher.weights) <= 0:
        raise InputError(f"{job.cache}: {targets.name} records a weight of {min(teacher.weights):g} for a member")


def _load(job: AuditJob, entry: TeacherEntry, dtype: Dtype) -> list[HuggingFaceTeacher]:
    """The members of the teacher in a dtype, checked against the record's context and vocabulary."""
    context = entry.windowing.context_tokens
    if context > _MOST_BATCH_TOKENS:
        raise InputError(f"{job.cache}: its record asks for windows of {context} tokens, at most {_MOST_BATCH_TOKENS}")
    members = []
    for number, source in enumerate(job.teacher):
        teacher = HuggingFaceTeacher.load(
            source,
            dtype=dtype,
            device=job.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            revision=job.revision[number] or None if job.revision else None,
            trust_remote_code=job.trust_remote_code,
            logit_budget_bytes=DEFAULT_LOGIT_BUDGET_BYTES // len(job.teacher),
        )
        reads = teacher.max_positions
        if reads is not None and entry.windowing.input_tokens > reads:
            raise InputError(
                f"{source}: reads at most {reads} tokens at once, and the teacher of {job.cache} read "
                f"{entry.windowing.input_tokens}: give the teacher that the entry names"
            )
        if teacher.head_columns < entry.vocabulary_size:
            raise InputError(
                f"{source}: its head has {teacher.head_columns} columns and cannot have scored the "
                f"{entry.vocabulary_size} ids of {job.cache}: give the teacher that the entry names"
            )
        members.append(teacher)
    return members


def _together(entry: TeacherEntry, members: list[HuggingFaceTeacher]) -> Teacher:
    """The teacher that the record makes of its members: the only one, or their ensemble."""
    record = entry.teacher
    if record.combine == "single":
        return members[0]
    return EnsembleTeacher(members, record.combine, entry.vocabulary_size, record.weights)


def _batch_windows(entry: TeacherEntry, teacher: Teacher, samples: int) -> int:
    """The recorded batch, within bounds; another type of device repeats no bits, so there no batch is padded."""
    at_once = min(entry.execution.batch_windows, _MOST_BATCH_TOKENS // entry.windowing.input_tokens)
    return at_once if teacher.device.type == entry.execution.device_type else min(at_once, samples)


def _describe(entry: TeacherEntry, teacher: Teacher, found: Audit) -> None:
    if not entry.teacher.loaded:
        digests = " + ".join(f"{member.weights_sha256[:12]}…" for member in teacher.identity.loaded)
        named, served = entry.teacher.members[0].name, entry.teacher.served
        made = f"was served by {served.engine}" if served else "made what was imported"
        found.identity.append(f"{named} {made}, its weights not verified: compared with those of {digests}")
        found.execution.append(f"dtype: not recorded, now {teacher.identity.loaded[0].dtype!r}")
        return
    for recorded, now in zip(entry.teacher.loaded, teacher.identity.loaded, strict=True):
        pairs = {name: (getattr(recorded, name), getattr(now, name)) for name in _IDENTITY}
        found.identity += [
            f"{name} of {recorded.source}: the entry has {a!r}, {now.source} {b!r}"
            for name, (a, b) in pairs.items()
            if a != b
        ]
    # Samples are scored in windows of their own, whatever the rows were in which the entry's were.
    rows = entry.execution.model_dump(include={"rows", "row_tokens"})
    here = execution_of(teacher, entry.execution.batch_windows, rows)
    found.execution += [
        f"{name}: recorded {getattr(entry.execution, name)!r}, now {value!r}"
        for name, value in here
        if getattr(entry.execution, name) != value
    ]
    versions, installed = entry.created_with.libraries, Versions.of_this_process().libraries
    found.execution += [
        f"{name}: recorded {versions[name]}, now {installed.get(name)}"
        for name in ("torch", "transformers")
        if versions.get(name, installed.get(name)) != installed.get(name)
    ]


def _other_tokenizers(job: AuditJob, cache: LogitCache, members: list[HuggingFaceTeacher], found: Audit) -> None:
    """A problem for each teacher whose tokenizer is not the cache's; one without tokenizer files cannot be checked."""
    for source, teacher in zip(job.teacher, members, strict=True):
        remedy = "Give the teacher that the entry names"
        entry = cache.teacher(found.name).entry
        named, begin = entry.vocabulary_size, entry.windowing.begin_id
        try:
            check_vocabulary(cache, teacher.vocabulary(), source, remedy, named, found.execution.append, begin)
        except IdentityMismatch as error:
            found.problems.append(str(error))
