"""One training run from a job to a report: check, train or resume, evaluate, publish.

Everything that can be wrong with a job is checked before its folder is touched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from storage import LogitCache
from storage.errors import InputError
from storage.progress import Log, silent, to_stderr
from storage.text import counted, quoted
from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.job import StudentJob
from student.labels import NOT_TRAINED
from student.loss.dense import LogitSource
from student.loss.objective import EXACT_TEMPERATURES
from student.loss.output_layer import choose_head
from student.loss.teacher_targets import interpolation_bound, targets_of
from student.models.adapters.attach import check_checkpoint_adapter, check_mergeable, count_trained
from student.models.loading import load_student
from student.models.model_files import stored_dtype
from student.models.saved_tokenizer import saved_tokenizer
from student.models.tokenizer import read_tokenizer, special_ids
from student.report import AvailableText, HeldOutReport, PeakMemory, TailBound, TrainingReport, parameters_in_words
from student.training.arguments import checked_arguments, training_values, trains_adapter
from student.training.defaults import described, filled, open_fields
from student.training.field_checks import one_line_refusals
from student.training.fsdp import check_checkpoint
from student.training.inputs import Data, job_inputs, open_caches
from student.training.peak_memory import peak_device_bytes, peak_process_bytes
from student.training.progress import TrainingProgress
from student.training.publish import publish
from student.training.run_folder import OutputDirectory, full_disk_is_reported, identity_of
from student.training.step import check_step, positions_seen, windows_per_step
from student.training.trainer import DistillationTrainer, SaveByTime

# Loads the live teachers of a job on a device; `teachers.live` has it, and nothing here may import that.
LoadLive = Callable[[StudentJob, torch.device], LogitSource]

# Windows over which the error of an interpolated tail is measured, and evenly spaced temperatures of a schedule.
_BOUND_WINDOWS = 32
_BOUND_TEMPERATURES = 9


@dataclass(frozen=True)
class _Run:
    """A checked job, and all that training and reporting need of it."""

    job: StudentJob
    values: dict[str, Any]
    data: Data
    args: TrainingArguments
    step_windows: int
    output: OutputDirectory
    identity: dict[str, Any]
    notes: list[str]  # lines for the log: what the job left open, how a recorded step is computed here
    log: Log


def train(
    job: StudentJob,
    log: Log | None = None,
    load_live: LoadLive | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingReport:
    """Run a job to its end and return its report, which is also `report.json` in the output directory.

    A finished run of the same job is not repeated: its report is returned. An interrupted one resumes from its last
    checkpoint and ends as it would have. `log` is called with lines of progress (stderr by default); under torchrun
    every process calls this function, and only the first writes and logs. `load_live` loads the job's `live_teachers`.
    `callbacks` are the Trainer's, besides those of every run.

    Raises the errors of `storage.errors`: InputError and IdentityMismatch before anything is written.
    """
    run = _check(job, log, load_live)
    finished = run.output.report()
    if finished is not None:
        run.log(f"{job.output_dir}: this run is finished; remove the folder, or give another, to train again")
        return finished
    tokenizer = saved_tokenizer(LogitCache.open(job.cache), job.model, run.log)
    is_adapter = trains_adapter(run.job) and not run.job.merge
    # Beside an adapter nothing is saved of its base, so what is missing there is not worth a line.
    log = silent if is_adapter else run.log
    model = _load_model(run.job, run.data.windows, special_ids(tokenizer, job.model), log)
    dtype = run.job.save_dtype or ("float32" if is_adapter else stored_dtype(run.job.model, run.log))
    # No process may look at the folder while the first one starts to write there.
    PartialState().wait_for_everyone()
    with run.output.reserved(run.identity, processes=run.args.world_size):
        use_cache = bool(getattr(model.config, "use_cache", True))
        parameters, trained = sum(p.numel() for p in model.parameters()), count_trained(model)
        tail_bounds = _announce(run, parameters, trained)
        trainer = _trainer(run, model, callbacks)
        started = time.monotonic()
        with full_disk_is_reported(job.output_dir):
            resumed_from = _train_or_resume(trainer, run.output, run.log)
        seconds = time.monotonic() - started
        held_out = _evaluate(run, trainer)
        report = _report(run, trainer, parameters, trained, tail_bounds, seconds, resumed_from, held_out)
        with full_disk_is_reported(job.output_dir):
            publish(trainer, run.output, report, use_cache, dtype, tokenizer, run.job.merge)
    run.log(f"{job.output_dir}: the {'adapter' if is_adapter else 'model'} in {dtype}, its tokenizer and report.json")
    # Says it where transformers opens the tokenizer with rules of the model's family.
    read_tokenizer(Path(job.output_dir), job.output_dir, log=run.log)
    return report


def _check(job: StudentJob, log: Log | None, load_live: LoadLive | None) -> _Run:
    """Open the inputs of a job and check all of it but the student's model; writes nothing."""
    folder = OutputDirectory(job.output_dir, writes=os.environ.get("RANK", "0") == "0")
    record = folder.recorded()
    folder.check_writable()
    opened, asked = open_fields(job, record), job.pack_documents
    job = filled(job, opened)
    values = training_values(job)
    caches = open_caches(job)
    windows = caches.windows.cut(job.window_tokens, job.offset)
    if asked and not windows.packed:
        raise InputError(
            f"{job.cache}: --pack-documents is about windows that stay inside documents, and these cross them: give "
            "--isolate-documents too, or leave it out"
        )
    known = record.get("identity", {}) | record.get("launch", {})
    args, step_notes = checked_arguments(job, values, windows, known)
    if job.available:
        # Processes have looked one after the other while shards were committed: all take what the first one saw.
        (available,) = broadcast_object_list([job.available])
        if available != job.available:
            job = job.model_copy(update={"available": available})
            caches = open_caches(job)
            check_step(caches.windows.cut(job.window_tokens, job.offset), args)
    live = None
    if job.live_teachers:
        if load_live is None:
            raise InputError(
                "train-student loads no teacher: train-teacher --live-teacher runs them beside the student"
            )
        # After the checks of fields and caches, since loading takes long.
        live = load_live(job, args.device)
        if windows.packed and not live.packs(windows.input_tokens):
            if asked:
                raise InputError("--pack-documents: a live teacher cannot keep documents apart: give --pad-documents")
            job = job.model_copy(update={"pack_documents": False})
            caches = open_caches(job)
            args, step_notes = checked_arguments(job, values, caches.windows.cut(job.window_tokens, job.offset), known)
            step_notes.append("live teachers cannot keep documents apart: each document has windows of its own, padded")
    data = job_inputs(caches, job, live)
    best_by = values.get("metric_for_best_model")
    if str(best_by).removeprefix("eval_") == "distillation_loss" and isinstance(data.eval_loss, str):
        raise InputError(f"metric_for_best_model distillation_loss cannot be measured: {data.eval_loss}")
    if best_by is not None and job.eval_cache is not None:
        caches.check_figure("metric_for_best_model", best_by, ["distillation_loss"])
    job = data.job
    first = args.process_index == 0
    output = OutputDirectory(job.output_dir, writes=first)
    notes = [*caches.remarks, *described(job, opened, record), *step_notes]
    step_windows = windows_per_step(args)
    identity = identity_of(job, values, data, step_windows)
    output.check(identity)
    log = (log or to_stderr) if first else silent
    return _Run(job, values, data, args, step_windows, output, identity, notes, log)


def _announce(run: _Run, parameters: int, trained: int) -> dict[str, TailBound]:
    """Log the size of the run and how it is computed; returns the tail bounds, which it logs too."""
    job, args, windows = run.job, run.args, run.data.windows
    run.log(
        f"{job.model}: {parameters_in_words(parameters, trained)}; {counted(len(windows), 'window')} of "
        f"{job.window_tokens} tokens, {run.step_windows} to a step: {counted(args.world_size, 'process')}, "
        f"{counted(args.gradient_accumulation_steps, 'micro-batch')} of {args.train_batch_size}"
    )
    for note in run.notes:
        run.log(note)
    available = _available(windows)
    if available is not None:
        run.log(available.in_words())
    untaught = windows.untaught_sources()
    if untaught:
        learnt = "only the cross-entropy counts there"
        if not (job.alpha or job.alpha_end):
            learnt = "nothing is learnt there, as alpha is 0"
        run.log(f"no teacher teaches the documents of {quoted(untaught)}: {learnt}")
    tail_bounds = _tail_bounds(run.data)
    temperature = " to ".join(f"{one:g}" for one in job.temperatures)
    for name, bound in tail_bounds.items():
        run.log(
            f"teacher {name} at temperature {temperature}: the mass outside its stored ids is interpolated, "
            f"within {bound.mean:.4f} of the true one on average and {bound.greatest:.4f} at worst over "
            f"{bound.positions:,} positions"
        )
    return tail_bounds


def _evaluate(run: _Run, trainer: DistillationTrainer) -> HeldOutReport | None:
    data = run.data
    if data.eval_windows is None:
        return None
    run.log(f"evaluating on {counted(len(data.eval_windows), 'window')} of {run.job.eval_cache}")
    result = trainer.held_out(data.eval_windows)
    passage = trainer.passage(data.eval_windows)
    with full_disk_is_reported(run.job.output_dir):
        run.output.write_passage(passage)
    # To the loggers of report_to; on the terminal the report follows.
    trainer.remove_callback(TrainingProgress)
    trainer.show_held_out(result)
    return result.model_copy(update={"kl_not_measured": data.caches.not_measured | result.kl_not_measured})


def _report(
    run: _Run,
    trainer: DistillationTrainer,
    parameters: int,
    trained_parameters: int,
    tail_bounds: dict[str, TailBound],
    seconds: float,
    resumed_from: int,
    held_out: HeldOutReport | None,
) -> TrainingReport:
    data, args, state = run.data, run.args, trainer.state
    seen, trained, taught = positions_seen(data.windows, args, state.global_step)
    return TrainingReport(
        job=run.job.model_copy(update={"training": run.values}),
        provenance=data.provenance,
        isolated_documents=data.windows.isolate_documents,
        available=_available(data.windows),
        parameters=parameters,
        trained_parameters=trained_parameters,
        steps=state.global_step,
        windows_per_step=run.step_windows,
        windows_at_once=args.train_batch_size,
        tokens_seen=seen,
        tokens_trained=trained,
        tokens_taught=taught,
        seconds=round(seconds, 3),
        resumed_from_step=resumed_from,
        device=str(args.device),
        fused_head=trainer.not_fused is None,
        processes=args.world_size,
        libraries={
            name: version(name)
            for name in ("torch", "transformers", "accelerate", *(["peft"] if trains_adapter(run.job) else []))
        },
        divergence={member.name: data.loss.meaning(member.name) for member in data.loss.members},
        tail_bounds=tail_bounds,
        train_log=[entry for entry in state.log_history if "loss" in entry],
        eval_log=[entry for entry in state.log_history if "eval_loss" in entry],
        held_out=held_out,
        live=data.live,
        peak_memory=PeakMemory(process_bytes=peak_process_bytes(), device_bytes=peak_device_bytes(args.device)),
    )


def _available(windows: DistillationWindows) -> AvailableText | None:
    if windows.available is None:
        return None
    committed = {name: sum(stop - start for start, stop in ranges) for name, ranges in windows.available.items()}
    blocks = windows.blocks
    return AvailableText(committed=committed, positions=blocks.positions(), of=blocks.whole.positions())


def _tail_bounds(data: Data) -> dict[str, TailBound]:
    """How far interpolated tails can be off, by teacher, over windows spread evenly over the stream.

    Of a schedule, at the temperature where they can be off most.
    """
    loss, windows = data.loss, data.windows
    first, last = loss.objective.temperatures[0], loss.objective.temperatures[-1]
    passed = {first + (last - first) * step / (_BOUND_TEMPERATURES - 1) for step in range(_BOUND_TEMPERATURES)}
    interpolated = sorted(passed.difference(EXACT_TEMPERATURES))
    if data.live is not None or not interpolated or not loss.members:
        return {}
    number = min(len(windows), _BOUND_WINDOWS)
    chosen = [i * len(windows) // number for i in range(number)]
    batch = collate(windows.__getitems__(chosen))
    labels = batch["labels"].flatten()
    found = {}
    for member in loss.members:
        targets = targets_of(member, batch["targets"], labels)
        off = torch.stack([interpolation_bound(targets, member, temperature) for temperature in interpolated])
        # The padding of a short window is left out, unless no position is trained at all.
        taught = (labels != NOT_TRAINED) & (targets.kept > 0)
        off = off[:, taught] if taught.any() else off
        mean, greatest = float(off.mean(1).max()), float(off.max())
        found[member.name] = TailBound(mean=mean, greatest=greatest, positions=off.shape[1])
    return found


def _load_model(
    job: StudentJob, windows: DistillationWindows, ids: Mapping[str, int | None], log: Log
) -> PreTrainedModel:
    model = load_student(
        job.model,
        vocabulary_size=windows.vocabulary_size,
        special_ids=ids,
        window_tokens=windows.input_tokens,
        seed=job.seed,
        attention=job.attention,
        log=log,
        lora=job.lora,
    )
    if job.merge:
        check_mergeable(model, job.model)
    choose_head(model, job.fused_head)
    return model


def _trainer(run: _Run, model: PreTrainedModel, callbacks: Sequence[TrainerCallback]) -> DistillationTrainer:
    data, job = run.data, run.job
    # One progress bar for the run; transformers shows another for every file that it writes.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    # A job that states an interval of its own has that one alone.
    own_interval = {"save_strategy", "save_steps"} & job.training.keys()
    own = [TrainingProgress(run.step_windows * job.window_tokens), *([] if own_interval else [SaveByTime()])]
    with one_line_refusals():
        trainer = DistillationTrainer(
            model,
            run.args,
            train_dataset=data.windows,
            eval_dataset=data.eval_windows,
            loss=data.loss,
            eval_members=data.caches.eval_members,
            eval_loss=None if isinstance(data.eval_loss, str) else data.eval_loss,
            fused_head=job.fused_head,
            callbacks=[*own, *callbacks],
        )
    trainer.remove_callback(PrinterCallback)
    if trainer.not_fused is not None:
        run.log(
            f"{job.model}: the logits of a batch are held, as the output layer is not fused with the loss: "
            f"{trainer.not_fused}"
        )
    return trainer


def _train_or_resume(trainer: DistillationTrainer, output: OutputDirectory, log: Log) -> int:
    """Train from the last checkpoint or from the start; returns the step at which it started."""
    checkpoint = output.last_checkpoint()
    trainer.accelerator.wait_for_everyone()
    if checkpoint is None:
        # The model's layers can refuse fields too, when they are wrapped and given an optimizer.
        with one_line_refusals(has_begun=lambda: trainer.has_begun):
            trainer.train()
        return 0
    folder, state = checkpoint
    check_checkpoint(folder, trainer.is_fsdp_enabled)
    check_checkpoint_adapter(folder, trainer.model)
    step = int(state["global_step"])
    if step >= int(state["max_steps"]):
        # Trained, but killed before the model was published. The base class would take one step too many.
        log(f"{folder}: trained to its last step, {step:,}")
        trainer.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        if trainer.is_fsdp_enabled:
            # Only a model that is sharded already can load such a checkpoint.
            loader = trainer.get_train_dataloader()
            trainer._prepare_for_training(step, loader, best or str(folder))  # type: ignore[no-untyped-call]
        else:
            trainer._load_from_checkpoint(best or str(folder))
    else:
        log(f"resuming from {folder}")
        trainer.train(resume_from_checkpoint=str(folder))
    return step
