"""One training run from a job to a report: check, train or go on, evaluate, publish.

Everything that can be wrong with a job is looked at before its folder is touched.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, TrainerState, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from storage import LogitCache
from storage.errors import IdentityMismatch, InputError
from storage.manifest import TeacherEntry, digest
from student.arguments import PRESENTATION, training_arguments, training_values
from student.buckets import NOT_TRAINED
from student.evaluate import HeldOut
from student.heads import choose_head
from student.job import HeldOutKL, HeldOutReport, StudentJob, TailBound, TrainingReport
from student.losses import DistillationLoss, tail_of
from student.models import PRESETS, load_student
from student.objective import EXACT_TEMPERATURES, Objective
from student.output import OutputDirectory, full_disk_is_said
from student.progress import TrainingProgress
from student.targets import Member, interpolation_bound
from student.trainer import DistillationTrainer, windows_per_step
from student.windows import DistillationWindows, collate, flat_targets, reading_order

Say = Callable[[str], None]

# Fields of a job that go by their digests, or that change how a run computes and not what.
_NOT_THE_RUN = {"cache", "eval_cache", "output_dir", "teachers", "training", "fused_head"}

# Windows that an interpolated tail is judged by.
_BOUND_WINDOWS = 32


@dataclass(frozen=True)
class Caches:
    """What a job reads, opened and checked once; the jobs of a sweep share it."""

    windows: DistillationWindows
    eval_windows: DistillationWindows | None
    eval_members: tuple[Member, ...]
    not_measured: dict[str, str]
    provenance: dict[str, str]


@dataclass(frozen=True)
class Data:
    """The checked inputs of a job, and the job with what was left open."""

    job: StudentJob
    windows: DistillationWindows
    loss: DistillationLoss
    eval_windows: DistillationWindows | None
    eval_members: tuple[Member, ...]
    not_measured: dict[str, str]
    provenance: dict[str, str]


def train(job: StudentJob, say: Say | None = None) -> TrainingReport:
    """Run a job to its end and return its report, which is also `report.json` in the output directory.

    A finished run of the same job is not repeated: its report is returned. An interrupted one goes on from its last
    checkpoint and ends as it would have. `say` is given lines of progress (stderr by default); under torchrun every
    process calls this function, and only the first writes and speaks.

    Raises the errors of `storage.errors`: InputError and IdentityMismatch before anything is written.
    """
    values = training_values(job)
    data = fit(open_caches(job), job)
    job = data.job
    args = training_arguments(job, values)
    first = args.process_index == 0
    tell = (say or _to_stderr) if first else _silent
    batch = args.train_batch_size * args.world_size
    check_batch(data.windows, batch, args)
    step_windows = windows_per_step(args)
    identity = _identity(job, values, data, step_windows)

    output = OutputDirectory(job.output_dir, writes=first)
    output.check(identity)
    finished = output.report()
    if finished is not None:
        tell(f"{job.output_dir}: this run is finished; remove the folder, or give another, to train again")
        return finished
    model = _load_model(job, data.windows)
    # Nobody may look at the folder while the first process begins to write there.
    PartialState().wait_for_everyone()
    output.claim(identity)
    use_cache = bool(getattr(model.config, "use_cache", True))
    parameters = sum(p.numel() for p in model.parameters())
    tell(
        f"{job.model}: {parameters:,} parameters; {len(data.windows):,} windows of {job.window_tokens} tokens, "
        f"{step_windows} to a step"
    )

    tail_bounds = _tail_bounds(data)
    for name, bound in tail_bounds.items():
        tell(
            f"teacher {name} at temperature {job.temperature:g}: the mass outside its stored ids is interpolated, "
            f"within {bound.mean:.4f} of the true one on average and {bound.greatest:.4f} at worst over "
            f"{bound.positions:,} positions"
        )

    # One bar for the run says enough; transformers shows another for every file that it writes.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    trainer = _trainer(model, args, data, job.fused_head, TrainingProgress(step_windows * job.window_tokens))
    if trainer.not_fused is not None:
        tell(
            f"{job.model}: the logits of a batch are held, as the output layer is not fused with the loss: "
            f"{trainer.not_fused}"
        )
    started = time.monotonic()
    with full_disk_is_said(job.output_dir):
        resumed_from = _train_or_go_on(trainer, output, tell)
    seconds = time.monotonic() - started
    held_out = None
    if data.eval_windows is not None:
        tell(f"evaluating on {len(data.eval_windows):,} windows of {job.eval_cache}")
        held_out = _held_out(trainer.held_out(data.eval_windows), data)

    report = TrainingReport(
        job=job.model_copy(update={"training": values}),
        provenance=data.provenance,
        isolated_documents=data.windows.isolate_documents,
        parameters=parameters,
        steps=trainer.state.global_step,
        windows_per_step=step_windows,
        tokens_seen=_positions_seen(data.windows, args, trainer.state.global_step),
        seconds=round(seconds, 3),
        resumed_from_step=resumed_from,
        device=str(args.device),
        fused_head=trainer.not_fused is None,
        processes=args.world_size,
        libraries={name: version(name) for name in ("torch", "transformers", "accelerate")},
        divergence={member.name: data.loss.meaning(member.name) for member in data.loss.members},
        tail_bounds=tail_bounds,
        train_log=[entry for entry in trainer.state.log_history if "loss" in entry],
        eval_log=[entry for entry in trainer.state.log_history if "eval_loss" in entry],
        held_out=held_out,
    )
    with full_disk_is_said(job.output_dir):
        _publish(trainer, output, report, use_cache)
    tell(f"{job.output_dir}: the model, its tokenizer and report.json")
    return report


def open_caches(job: StudentJob) -> Caches:
    """Open the caches of a job and check that they, their entries and its windows fit together."""
    names = [teacher.name for teacher in job.teachers]
    windows = DistillationWindows(job.cache, names, job.window_tokens, job.offset, job.seed, job.isolate_documents)
    provenance = {"cache": digest(windows.record)}
    provenance |= {f"cache/{name}": digest(entry) for name, entry in windows.entries.items()}
    eval_windows: DistillationWindows | None = None
    eval_members: tuple[Member, ...] = ()
    not_measured: dict[str, str] = {}
    if job.eval_cache is not None:
        eval_windows, not_measured = _check_eval(job, windows)
        eval_members = tuple(Member.of(name, entry) for name, entry in eval_windows.entries.items())
        provenance["eval_cache"] = digest(eval_windows.record)
        provenance |= {f"eval_cache/{name}": digest(entry) for name, entry in eval_windows.entries.items()}
    return Caches(windows, eval_windows, eval_members, not_measured, provenance)


def fit(caches: Caches, job: StudentJob) -> Data:
    """The loss and the windows of a job over caches that were opened for it, or for one of other windows and loss."""
    windows, eval_windows = caches.windows.cut(job.window_tokens, job.offset), caches.eval_windows
    entries = windows.entries
    members = [Member.of(teacher.name, entries[teacher.name], teacher.weight) for teacher in job.teachers]
    if job.leaves_alpha_open and all(_is_unbiased(member, entries[member.name], job) for member in members):
        # The cross-entropy would only add the noise of a single label; with a bucket it mends some of the bias
        # (docs/decisions/0012-sampled-targets-by-default.md).
        job = job.model_copy(update={"alpha": 0.0})
    objective = {name: getattr(job, name) for name in Objective.model_fields}
    loss = DistillationLoss(windows.vocabulary_size, members=members, window_tokens=job.window_tokens, **objective)
    if eval_windows is not None:
        eval_windows = eval_windows.cut(job.window_tokens, "fixed")
    # Targets that no term of the loss looks at are not read; the windows are the same.
    read = windows if job.uses_teachers else windows.without_targets()
    return Data(job, read, loss, eval_windows, caches.eval_members, caches.not_measured, caches.provenance)


def _is_unbiased(member: Member, entry: TeacherEntry, job: StudentJob) -> bool:
    """Whether the loss on these targets has, on average over draws, the dense one's gradient; or a weight of 0."""
    holds_all = entry.targets.k == entry.vocabulary_size and entry.targets.top_p is None
    return not member.weight or holds_all or tail_of(member, job) == "sampled"


def _tail_bounds(data: Data) -> dict[str, TailBound]:
    """How far interpolated tails can be off, by teacher, over windows spread evenly over the stream."""
    loss, windows = data.loss, data.windows
    if loss.temperature in EXACT_TEMPERATURES or not loss.members:
        return {}
    number = min(len(windows), _BOUND_WINDOWS)
    chosen = [i * len(windows) // number for i in range(number)]
    batch = collate(windows.__getitems__(chosen))
    targets, trained = flat_targets(batch["targets"]), batch["labels"].flatten() != NOT_TRAINED
    found = {}
    for member in loss.members:
        off = interpolation_bound(targets[member.name], member, loss.temperature)
        # What fills up a short window says nothing; where nothing at all is trained, something has to be said.
        off = off[trained] if trained.any() else off
        found[member.name] = TailBound(mean=float(off.mean()), greatest=float(off.max()), positions=len(off))
    return found


def _check_eval(job: StudentJob, windows: DistillationWindows) -> tuple[DistillationWindows, dict[str, str]]:
    """The held-out windows, with the teachers that can be compared there, and why the others cannot."""
    assert job.eval_cache is not None
    cache = LogitCache.open(job.eval_cache)
    ours, theirs = windows.record.tokenizer, cache.record.tokenizer
    if ours.fingerprint != theirs.fingerprint:
        raise IdentityMismatch(
            f"{job.cache} and {job.eval_cache} have different tokenizers",
            [f"fingerprint: {ours.fingerprint} and {theirs.fingerprint}"],
            "Make the held-out cache with the tokenizer of the first",
        )
    measured, not_measured = [], {}
    for name, entry in windows.entries.items():
        reason = _not_comparable(cache, name, entry)
        if reason is None:
            measured.append(name)
        else:
            not_measured[name] = reason
    held_out = DistillationWindows(
        job.eval_cache, measured, job.window_tokens, "fixed", job.seed, windows.isolate_documents
    )
    return held_out, not_measured


def _not_comparable(cache: LogitCache, name: str, entry: TeacherEntry) -> str | None:
    if name not in cache.teachers:
        return "the held-out cache has no entry of that name"
    there = cache.teacher(name)
    if there.entry.teacher != entry.teacher:
        return "another teacher has that name in the held-out cache"
    if there.entry.windowing.isolate_documents != entry.windowing.isolate_documents:
        return "the teacher saw isolated documents in one of the caches and not in the other"
    if there.missing():
        return "its entry in the held-out cache is incomplete"
    return None


def check_batch(windows: DistillationWindows, batch: int, args: TrainingArguments) -> None:
    """Raise InputError where the windows are too few for a single batch over all processes."""
    if args.dataloader_drop_last and len(windows) < batch:
        raise InputError(
            f"{windows.cache_url}: {len(windows)} windows of {windows.window_tokens} tokens are fewer than the {batch} "
            f"of one batch over {args.world_size} process(es): take a smaller per_device_train_batch_size or window"
        )


def _identity(job: StudentJob, values: Mapping[str, Any], data: Data, step_windows: int) -> dict[str, Any]:
    """What makes two runs the same, flat. Caches go by their digests, so that one may have moved."""
    asked = job.model_dump(mode="json", exclude=_NOT_THE_RUN)
    asked["isolate_documents"] = data.windows.isolate_documents
    asked["windows_per_step"] = step_windows
    asked["model_sha256"] = model_digest(job.model)
    asked |= {f"teachers.{teacher.name}": teacher.weight for teacher in job.teachers}
    asked |= {f"training.{name}": value for name, value in values.items() if name not in PRESENTATION}
    return asked | {f"provenance.{name}": value for name, value in data.provenance.items()}


def model_digest(model: str) -> str | None:
    """sha256 of a model's files where they are files here: their contents may change under one name."""
    path = Path(model).expanduser()
    if model in PRESETS or not path.exists():
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin"):
            with file.open("rb") as opened:
                total.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def special_ids(cache: str) -> dict[str, int | None]:
    """The ids of a cache's tokenizer that a model's configuration names."""
    with tempfile.TemporaryDirectory() as folder:
        LogitCache.open(cache).save_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _load_model(job: StudentJob, windows: DistillationWindows) -> PreTrainedModel:
    model = load_student(
        job.model,
        vocabulary_size=windows.vocabulary_size,
        special_ids=special_ids(job.cache),
        window_tokens=job.window_tokens,
        seed=job.seed,
    )
    choose_head(model, job.fused_head)
    return model


def _trainer(
    model: PreTrainedModel,
    args: TrainingArguments,
    data: Data,
    fused_head: Literal["auto", "on", "off"],
    progress: TrainingProgress,
) -> DistillationTrainer:
    try:
        trainer = DistillationTrainer(
            model,
            args,
            train_dataset=data.windows,
            eval_dataset=data.eval_windows,
            loss=data.loss,
            eval_members=data.eval_members,
            fused_head=fused_head,
            callbacks=[progress],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"transformers refuses these training fields: {error}") from None
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train_or_go_on(trainer: DistillationTrainer, output: OutputDirectory, tell: Say) -> int:
    """Train from the last checkpoint or from the start; the step at which it began."""
    checkpoint = output.last_checkpoint()
    trainer.accelerator.wait_for_everyone()
    if checkpoint is None:
        trainer.train()
        return 0
    folder, state = checkpoint
    step = int(state["global_step"])
    if step >= int(state["max_steps"]):
        # Trained, but killed before the model was published. The base class would take one step too many.
        tell(f"{folder}: all {step} steps are done")
        trainer.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer._load_from_checkpoint(best or str(folder))
    else:
        tell(f"going on from {folder}")
        trainer.train(resume_from_checkpoint=str(folder))
    return step


def _publish(trainer: DistillationTrainer, output: OutputDirectory, report: TrainingReport, use_cache: bool) -> None:
    # The base class switches the key-value cache off for training; a saved model would generate slowly.
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = use_cache
    trainer.save_model(str(output.stage))
    if trainer.args.process_index == 0:
        # A pickle, and nothing that the report does not say.
        (output.stage / "training_args.bin").unlink(missing_ok=True)
        LogitCache.open(report.job.cache).save_tokenizer(output.stage)
        output.publish(report)
    trainer.accelerator.wait_for_everyone()


def _positions_seen(windows: DistillationWindows, args: TrainingArguments, steps: int) -> int:
    """Positions read in the first `steps` steps: their number follows from the order, also for a resumed run."""
    size, world, accumulation = args.train_batch_size, args.world_size, args.gradient_accumulation_steps
    rest_is_dropped = args.dataloader_drop_last
    batches = len(windows) // size // world if rest_is_dropped else -(-len(windows) // (size * world))
    steps_per_epoch = -(-batches // accumulation)
    order = reading_order(windows, windows_per_step(args))
    total = 0
    for epoch in range(-(-steps // steps_per_epoch)):
        done = min(steps_per_epoch, steps - epoch * steps_per_epoch)
        read = min(min(done * accumulation, batches) * size * world, len(windows))
        total += int(windows.blocks.lengths(order.permutation(epoch)[:read]).sum())
    return total


def _held_out(result: HeldOut, data: Data) -> HeldOutReport:
    kl = {name: HeldOutKL(nats=nats, lower_bound=result.kl_is_lower_bound[name]) for name, nats in result.kl.items()}
    return HeldOutReport(
        tokens=result.tokens,
        cross_entropy=result.cross_entropy,
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        ece=result.ece,
        accuracy=result.accuracy,
        kl=kl,
        kl_not_measured=data.not_measured,
    )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    del line
