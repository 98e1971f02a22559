"""A sweep: many students from one cache. Each trial is a training run of its own; Optuna proposes its values.

More processes, on this machine or on others that share the folder, are the same command again: each takes the next
trial until as many as were asked for are done, and then waits for those of the others, in case one is killed.
Impossible values in the search space are reported before anything runs. The folder of a sweep is described in
`student.sweep.record`.
"""

from __future__ import annotations

import importlib.util
import os
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from storage import LogitCache
from storage.errors import InputError
from storage.locks import has_locks
from storage.progress import Log, to_stderr
from student.evaluation.minimal_pairs import read_pairs
from student.job import StudentJob
from student.models.tokenizer import special_ids
from student.sweep.record import SweepFolder, SweepReport, earlier_report, is_earlier
from student.sweep.search_space import Search
from student.sweep.trial import OBJECTIVE, STEP, check_names, check_space, shown
from student.training.arguments import PRESENTATION, training_arguments, training_values
from student.training.defaults import described, filled, open_fields
from student.training.inputs import Caches, open_caches
from student.training.run_folder import OutputDirectory, full_disk_is_reported, model_digest

if TYPE_CHECKING:
    from student.sweep.study import SharedStudy

_NOT_IDENTITY = {"trials", "timeout_seconds", "title", "storage", "keep_checkpoints"}
# Seconds between two looks at the trials of other processes.
_LOOK = 1.0


def sweep(job: StudentJob, search: Search, log: Log | None = None) -> SweepReport:
    """Run a sweep to its end and return its report, which is also `sweep.json` in the job's output directory.

    A killed sweep resumes: trials that are done are not repeated, and one that was running goes on from its last
    checkpoint. More trials of the same search may be asked for later; another search in the same folder is refused.
    `log` is called with lines about the sweep (stderr by default). Raises the errors of `storage.errors`: InputError
    and IdentityMismatch before anything is written.
    """
    log = log or to_stderr
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "a trial runs in one process: start the sweep without torchrun, and once more for each further process"
        )
    if importlib.util.find_spec("optuna") is None:
        raise InputError("a sweep needs optuna: pip install 'logit-cache[tune]'")
    if job.live_teachers:
        raise InputError("a sweep trains from cached teachers: leave live_teachers out, and name entries as teachers")
    if job.eval_cache is None:
        raise InputError("a sweep compares its trials on held-out text: give --eval-cache")
    check_names(job, search)
    output = OutputDirectory(job.output_dir)
    asked, record = job, output.recorded()
    steps = search.parameters.get(STEP)
    largest = {} if steps is None else {STEP: max(map(int, steps.probes()))}
    opened = open_fields(job.model_copy(update=largest), record, search.parameters)
    job = filled(job, opened)
    for note in described(job, opened, record):
        log(note)
    caches = _checked(job, search, log)
    identity = _identity(asked, search, caches)
    output.check(identity)
    if is_earlier(job.output_dir, record):
        return earlier_report(job.output_dir, search.trials)
    if search.backend == "ray":
        raise InputError(
            "sweep.backend ray is no more: leave backend out, and start the same command once for each GPU or machine"
        )
    from student.sweep.study import SharedStudy, open_database

    database = open_database(search.storage) if search.storage else None
    name = f"sweep-{uuid.uuid4().hex[:12]}" if search.storage else "sweep"
    record = output.share(identity, study=name, **opened)
    if "available" in opened:  # Another process may have started the sweep since this one looked.
        job = filled(job, open_fields(asked, record, search.parameters))
    folder = SweepFolder(job, search)
    if database is None and not has_locks(folder.path):
        log(f"{folder.path}: this file system has no locks: start one process only, or give a database as storage")
    study = SharedStudy(folder.path, search, record["launch"].get("study", "sweep"), database)
    with full_disk_is_reported(job.output_dir):
        _run(job, search, study, folder, log)
        with study.locked():
            return folder.publish(study.trials())


def _checked(job: StudentJob, search: Search, log: Log) -> Caches:
    """The caches of the sweep, opened, once its fields, its metric and its search space are seen to fit them."""
    values = training_values(job)
    _check_pruner(search, values)
    if values.get("deepspeed") or values.get("fsdp"):
        raise InputError("a trial runs in one process, without deepspeed and fsdp: leave them out of training:")
    windows = search.parameters.get("window_tokens")
    caches = open_caches(job.model_copy(update={"window_tokens": min(map(int, windows.probes()))}) if windows else job)
    for remark in caches.remarks:
        log(remark)
    _check_metric(job, search, caches)
    ids = special_ids(LogitCache.open(job.cache).tokenizer_files(), job.cache)
    _check_pairs(job, search, ids)
    check_space(job, search, caches, ids, log)
    gpus = training_arguments(job, values).n_gpu
    if gpus > 1:
        log(f"a process runs its trials on one of the {gpus} GPUs: start one for each, with CUDA_VISIBLE_DEVICES")
    return caches


def _run(job: StudentJob, search: Search, study: SharedStudy, folder: SweepFolder, log: Log) -> None:
    """Run trials until there are as many as were asked for, or the time is over."""
    from student.sweep.trial_run import run_trial

    done, started, waits = sum(trial.state.is_finished() for trial in study.trials()), time.monotonic(), False
    if done >= search.trials:
        log(f"{folder.path}: all {done} trials are done; ask for more trials, or give another --output-dir")
    elif done:
        log(f"{folder.path}: resuming after {done} trials")
    while search.timeout_seconds is None or time.monotonic() - started < search.timeout_seconds:
        with study.claimed() as trial:
            if trial is not None:
                values = {name: item.value(trial.params[name]) for name, item in search.parameters.items()}
                log(f"trial {trial.number}: {shown(values)}")
                ended = run_trial(job, search, trial, values)
                study.tell(trial, ended.state, ended.value)
                log(f"trial {trial.number}: {ended.outcome(search.figure)}")
                with study.locked():
                    folder.publish(study.trials())
                continue
        running = [trial.number for trial in study.trials() if not trial.state.is_finished()]
        if not running:
            return
        if not waits:
            log(f"{folder.path}: waiting for trials that other processes run: {', '.join(map(str, running))}")
        waits = True
        time.sleep(_LOOK)


def _check_pruner(search: Search, values: dict[str, Any]) -> None:
    if search.pruner.name != "none" and str(values.get("eval_strategy", "no")) == "no":
        raise InputError(
            f"sweep.pruner {search.pruner.name} judges trials by their evaluations during training, and there are "
            "none: set eval_strategy (steps with eval_steps, or epoch) in training:"
        )


def _check_pairs(job: StudentJob, search: Search, special: Mapping[str, int | None]) -> None:
    if search.pairs is None:
        return
    read_pairs(search.pairs, search.pairs_limit)
    if special["bos"] is None and special["eos"] is None:
        raise InputError(
            f"sweep.pairs: {job.cache} has a tokenizer without BOS or EOS to start sentences with: leave it out"
        )


def _check_metric(job: StudentJob, search: Search, caches: Caches) -> None:
    swept = sorted(OBJECTIVE & search.parameters.keys())
    if search.figure == "eval_distillation_loss" and swept:
        raise InputError(
            f"sweep.metric distillation_loss is another figure for every {' and '.join(swept)}: take loss, or leave "
            "these parameters fixed"
        )
    has_loss = bool(job.teachers) and not caches.not_measured
    caches.check_figure("sweep.metric", search.metric, ["distillation_loss"] if has_loss else [])


def _identity(job: StudentJob, search: Search, caches: Caches) -> dict[str, Any]:
    """The sweep's identity, as a flat mapping."""
    given = job.model_dump(mode="json", include=job.model_fields_set - {"cache", "eval_cache", "output_dir"})
    training = given.pop("training", {})
    asked = search.model_dump(mode="json", exclude=_NOT_IDENTITY)
    parameters = asked.pop("parameters")
    identity = {f"job.{name}": value for name, value in given.items()}
    identity |= {f"job.training.{name}": value for name, value in training.items() if name not in PRESENTATION}
    identity |= {f"sweep.{name}": value for name, value in asked.items()}
    identity |= {f"sweep.parameters.{name}": value for name, value in parameters.items()}
    identity |= {f"provenance.{name}": value for name, value in caches.provenance.items()}
    if search.storage:
        from student.sweep.study import without_credentials

        identity["sweep.storage"] = without_credentials(search.storage)
    return identity | {"job.model_sha256": model_digest(job.model)}
