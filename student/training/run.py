"""One training run from a job to a report: check, train or resume, evaluate, publish.

Everything that can be wrong with a job is checked before its folder is touched.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from storage import LogitCache
from storage.errors import InputError
from storage.files import local_path
from storage.progress import Log, silent
from student.data.batches import collate, flat_targets
from student.data.windows import DistillationWindows, reading_order
from student.job import StudentJob
from student.labels import NOT_TRAINED
from student.loss.dense import LogitSource
from student.loss.objective import EXACT_TEMPERATURES
from student.loss.output_layer import choose_head
from student.loss.teacher_targets import interpolation_bound
from student.models.loading import load_student
from student.models.presets import PRESETS
from student.models.saved_tokenizer import saved_tokenizer
from student.models.stored_dtype import stored_dtype
from student.models.tokenizer import read_tokenizer, special_ids, write_files
from student.report import HeldOutKL, HeldOutReport, PeakMemory, TailBound, TrainingReport
from student.training.arguments import PRESENTATION, training_arguments, training_values
from student.training.cast_weights import cast_weights
from student.training.defaults import described, filled, open_fields
from student.training.fsdp import check_checkpoint, check_fsdp
from student.training.inputs import Data, check_step, job_inputs, open_caches
from student.training.peak_memory import peak_device_bytes, peak_process_bytes
from student.training.progress import TrainingProgress
from student.training.published_config import add_earlier_fields
from student.training.run_folder import OutputDirectory, full_disk_is_reported
from student.training.step import COMPUTE_ONLY, divide_step, windows_per_step
from student.training.trainer import DistillationTrainer

# Loads the live teachers of a job on a device; `teachers.live` has it, and nothing here may import that.
LoadLive = Callable[[StudentJob, torch.device], LogitSource]

# Fields of a job that are identified by digests, or that change how a run computes and not what.
_NOT_THE_RUN = {"cache", "eval_cache", "output_dir", "teachers", "training", "fused_head", "live_teachers", "combine"}

# Windows over which the error of an interpolated tail is measured.
_BOUND_WINDOWS = 32


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
    model = _load_model(run.job, run.data.windows, special_ids(tokenizer, job.model), run.log)
    dtype = run.job.save_dtype or stored_dtype(run.job.model, run.log)
    # No process may look at the folder while the first one starts to write there.
    PartialState().wait_for_everyone()
    with run.output.reserved(run.identity, processes=run.args.world_size):
        use_cache = bool(getattr(model.config, "use_cache", True))
        parameters = sum(p.numel() for p in model.parameters())
        tail_bounds = _announce(run, parameters)
        trainer = _trainer(run, model, callbacks)
        started = time.monotonic()
        with full_disk_is_reported(job.output_dir):
            resumed_from = _train_or_resume(trainer, run.output, run.log)
        seconds = time.monotonic() - started
        held_out = _evaluate(run, trainer)
        report = _report(run, trainer, parameters, tail_bounds, seconds, resumed_from, held_out)
        with full_disk_is_reported(job.output_dir):
            _publish(trainer, run.output, report, use_cache, dtype, tokenizer)
    run.log(f"{job.output_dir}: the model in {dtype}, its tokenizer and report.json")
    # Says it where transformers opens the tokenizer with rules of the model's family.
    read_tokenizer(Path(job.output_dir), job.output_dir, log=run.log)
    return report


def _check(job: StudentJob, log: Log | None, load_live: LoadLive | None) -> _Run:
    """Open the inputs of a job and check all of it but the student's model; writes nothing."""
    folder = OutputDirectory(job.output_dir, writes=os.environ.get("RANK", "0") == "0")
    record = folder.recorded()
    folder.check_writable()
    opened = open_fields(job, record)
    job = filled(job, opened)
    values = training_values(job)
    caches = open_caches(job)
    live = None
    if job.live_teachers:
        if load_live is None:
            raise InputError(
                "train-student loads no teacher: train-teacher --live-teacher runs them beside the student"
            )
        # After the cheap checks of fields and caches, since loading takes long.
        live = load_live(job, _device(values))
    data = job_inputs(caches, job, live)
    best_by = str(values.get("metric_for_best_model")).removeprefix("eval_")
    if best_by == "distillation_loss" and isinstance(data.eval_loss, str):
        raise InputError(f"metric_for_best_model distillation_loss cannot be measured: {data.eval_loss}")
    job = data.job
    args = training_arguments(job, values)
    check_fsdp(args)
    first = args.process_index == 0
    output = OutputDirectory(job.output_dir, writes=first)
    notes = [*caches.remarks, *described(job, opened, record)]
    notes += filter(None, [divide_step(job, args, record.get("identity", {}) | record.get("launch", {}))])
    check_step(data.windows, args)
    step_windows = windows_per_step(args)
    identity = _identity(job, values, data, step_windows)
    output.check(identity)
    log = (log or _to_stderr) if first else silent
    return _Run(job, values, data, args, step_windows, output, identity, notes, log)


def _announce(run: _Run, parameters: int) -> dict[str, TailBound]:
    """Log the size of the run and how it is computed; returns the tail bounds, which it logs too."""
    job, args, windows = run.job, run.args, run.data.windows
    run.log(
        f"{job.model}: {parameters:,} parameters; {len(windows):,} windows of {job.window_tokens} tokens, "
        f"{run.step_windows} to a step: {args.world_size} process(es), {args.gradient_accumulation_steps} "
        f"micro-batch(es) of {args.train_batch_size}"
    )
    for note in run.notes:
        run.log(note)
    tail_bounds = _tail_bounds(run.data)
    for name, bound in tail_bounds.items():
        run.log(
            f"teacher {name} at temperature {job.temperature:g}: the mass outside its stored ids is interpolated, "
            f"within {bound.mean:.4f} of the true one on average and {bound.greatest:.4f} at worst over "
            f"{bound.positions:,} positions"
        )
    return tail_bounds


def _evaluate(run: _Run, trainer: DistillationTrainer) -> HeldOutReport | None:
    data = run.data
    if data.eval_windows is None:
        return None
    run.log(f"evaluating on {len(data.eval_windows):,} windows of {run.job.eval_cache}")
    result = trainer.held_out(data.eval_windows)
    # To the loggers of report_to; on the terminal the report follows.
    trainer.remove_callback(TrainingProgress)
    trainer.show_held_out(result)
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
        distillation_loss=result.distillation_loss,
    )


def _report(
    run: _Run,
    trainer: DistillationTrainer,
    parameters: int,
    tail_bounds: dict[str, TailBound],
    seconds: float,
    resumed_from: int,
    held_out: HeldOutReport | None,
) -> TrainingReport:
    data, args, state = run.data, run.args, trainer.state
    seen, trained = _positions_seen(data.windows, args, state.global_step)
    return TrainingReport(
        job=run.job.model_copy(update={"training": run.values}),
        provenance=data.provenance,
        isolated_documents=data.windows.isolate_documents,
        parameters=parameters,
        steps=state.global_step,
        windows_per_step=run.step_windows,
        windows_at_once=args.train_batch_size,
        tokens_seen=seen,
        tokens_trained=trained,
        seconds=round(seconds, 3),
        resumed_from_step=resumed_from,
        device=str(args.device),
        fused_head=trainer.not_fused is None,
        processes=args.world_size,
        libraries={name: version(name) for name in ("torch", "transformers", "accelerate")},
        divergence={member.name: data.loss.meaning(member.name) for member in data.loss.members},
        tail_bounds=tail_bounds,
        train_log=[entry for entry in state.log_history if "loss" in entry],
        eval_log=[entry for entry in state.log_history if "eval_loss" in entry],
        held_out=held_out,
        live=data.live,
        peak_memory=PeakMemory(process_bytes=peak_process_bytes(), device_bytes=peak_device_bytes(args.device)),
    )


def _device(values: Mapping[str, Any]) -> torch.device:
    """The device that this process will train on."""
    if values.get("use_cpu") or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _tail_bounds(data: Data) -> dict[str, TailBound]:
    """How far interpolated tails can be off, by teacher, over windows spread evenly over the stream."""
    loss, windows = data.loss, data.windows
    if data.live is not None or loss.temperature in EXACT_TEMPERATURES or not loss.members:
        return {}
    number = min(len(windows), _BOUND_WINDOWS)
    chosen = [i * len(windows) // number for i in range(number)]
    batch = collate(windows.__getitems__(chosen))
    targets, trained = flat_targets(batch["targets"]), batch["labels"].flatten() != NOT_TRAINED
    found = {}
    for member in loss.members:
        off = interpolation_bound(targets[member.name], member, loss.temperature)
        # The padding of a short window is left out, unless no position is trained at all.
        off = off[trained] if trained.any() else off
        found[member.name] = TailBound(mean=float(off.mean()), greatest=float(off.max()), positions=len(off))
    return found


def _identity(job: StudentJob, values: Mapping[str, Any], data: Data, step_windows: int) -> dict[str, Any]:
    """The run's identity, as a flat mapping. Caches are identified by digests, so that they may move."""
    asked = job.model_dump(mode="json", exclude=_NOT_THE_RUN)
    asked["isolate_documents"] = data.windows.isolate_documents
    asked["bos_each_window"] = data.windows.begin_id is not None or None  # absent in runs from before there was one
    asked["windows_per_step"] = step_windows
    asked["model_sha256"] = model_digest(job.model)
    asked |= {f"teachers.{teacher.name}": teacher.weight for teacher in job.teachers}
    training = {name: value for name, value in values.items() if name not in PRESENTATION | COMPUTE_ONLY}
    asked |= {f"training.{name}": value for name, value in training.items()}
    return asked | {f"provenance.{name}": value for name, value in data.provenance.items()}


def model_digest(model: str) -> str | None:
    """sha256 of a model's local files, which may change under one name; None for presets and hub ids."""
    path = local_path(model)
    if model in PRESETS or not path.exists():
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin"):
            with file.open("rb") as opened:
                total.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


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
    )
    choose_head(model, job.fused_head)
    return model


def _trainer(run: _Run, model: PreTrainedModel, callbacks: Sequence[TrainerCallback]) -> DistillationTrainer:
    data, job = run.data, run.job
    # One progress bar for the run; transformers shows another for every file that it writes.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        trainer = DistillationTrainer(
            model,
            run.args,
            train_dataset=data.windows,
            eval_dataset=data.eval_windows,
            loss=data.loss,
            eval_members=data.eval_members,
            eval_loss=data.measured_loss,
            fused_head=job.fused_head,
            callbacks=[TrainingProgress(run.step_windows * job.window_tokens), *callbacks],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"transformers refuses these training fields: {error}") from None
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
        trainer.train()
        return 0
    folder, state = checkpoint
    check_checkpoint(folder, trainer.is_fsdp_enabled)
    step = int(state["global_step"])
    if step >= int(state["max_steps"]):
        # Trained, but killed before the model was published. The base class would take one step too many.
        log(f"{folder}: all {step} steps are done")
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


def _publish(
    trainer: DistillationTrainer,
    output: OutputDirectory,
    report: TrainingReport,
    use_cache: bool,
    dtype: str,
    tokenizer: Mapping[str, bytes],
) -> None:
    # The base class switches the key-value cache off for training; a saved model would generate slowly.
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = use_cache
    if trainer.is_fsdp_enabled:
        # Checkpoints may be sharded; the published model is whole, gathered by all processes.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output.stage))
    if trainer.args.process_index == 0:
        # A pickle, and nothing in it that the report lacks.
        (output.stage / "training_args.bin").unlink(missing_ok=True)
        cast_weights(output.stage, dtype)
        add_earlier_fields(output.stage)
        write_files(tokenizer, output.stage)
        output.publish(report)
    trainer.accelerator.wait_for_everyone()


def _positions_seen(windows: DistillationWindows, args: TrainingArguments, steps: int) -> tuple[int, int]:
    """Positions read in the first `steps` steps, and those of them that are trained on: their numbers follow from the
    order, also for a resumed run."""
    step = windows_per_step(args)
    order = reading_order(windows, step, whole_steps=args.dataloader_drop_last)
    steps_per_epoch = -(-len(order) // step)
    total = trained = 0
    for epoch in range(-(-steps // steps_per_epoch)):
        done = min(steps_per_epoch, steps - epoch * steps_per_epoch)
        read = min(done * step, len(order))
        numbers = order.permutation(epoch)[:read]
        total += int(windows.blocks.lengths(numbers).sum())
        trained += windows.trained_positions((numbers + epoch * len(windows)).tolist())
    return total, trained


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
