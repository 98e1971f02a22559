"""A sweep: many students from one cache, by the search backends of transformers' own Trainer.

The caches are opened and checked once; impossible values in the search space are reported before anything runs. The
folder of a sweep is described in `student.sweep.record`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from transformers.utils.logging import disable_progress_bar

from storage import LogitCache
from storage.errors import InputError
from storage.progress import Log
from student.job import StudentJob
from student.models.tokenizer import special_ids
from student.sweep.record import INTERRUPTED, SweepFolder, SweepReport
from student.sweep.search_space import Search
from student.sweep.trainer import SweepInputs, SweepTrainer, TrialFailed
from student.sweep.trial import OBJECTIVE, check_names, check_space
from student.training.arguments import PRESENTATION, training_arguments, training_values
from student.training.defaults import described, filled, open_fields
from student.training.inputs import Caches, open_caches
from student.training.run import model_digest
from student.training.run_folder import OutputDirectory, full_disk_is_reported

_NEEDS = {"optuna": ("optuna",), "ray": ("ray.tune", "optuna")}


def sweep(job: StudentJob, search: Search, log: Log | None = None) -> SweepReport:
    """Run a sweep to its end and return its report, which is also `sweep.json` in the job's output directory.

    A killed sweep resumes: trials that are done are not repeated, those that were running are run again. More trials of
    the same search may be asked for later; another search in the same folder is refused. `log` is called with lines
    about the sweep (stderr by default); its trials log to stderr. Raises the errors of `storage.errors`: InputError and
    IdentityMismatch before anything is written.
    """
    log = log or _to_stderr
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a sweep runs in one process, its trials one after the other: start it without torchrun")
    for module in _NEEDS[search.backend]:
        if not _installed(module):
            raise InputError(
                f"sweep.backend {search.backend} needs {module}: pip install 'logit-cache[tune]' (or another backend)"
            )
    if job.live_teachers:
        raise InputError("a sweep trains from cached teachers: leave live_teachers out, and name entries as teachers")
    if job.eval_cache is None:
        raise InputError("a sweep compares its trials on held-out text: give --eval-cache")
    check_names(job, search)
    output = OutputDirectory(job.output_dir)
    asked, record = job, output.recorded()
    opened = open_fields(job, record, search.parameters)
    job = filled(job, opened)
    for note in described(job, opened, record):
        log(note)
    values = training_values(job)
    _check_pruner(search, values)
    if values.get("deepspeed") or values.get("fsdp"):
        raise InputError("a sweep runs in one process, without deepspeed and fsdp: leave them out of training:")
    windows = search.parameters.get("window_tokens")
    caches = open_caches(job.model_copy(update={"window_tokens": _least(windows.probes())}) if windows else job)
    for remark in caches.remarks:
        log(remark)
    _check_metric(job, search, caches)
    cache = LogitCache.open(job.cache)
    inputs = SweepInputs(job, search, caches, special_ids(cache.tokenizer_files(), job.cache))
    possible = check_space(job, search, caches, inputs.special_ids, log)
    gpus = training_arguments(job, values).n_gpu
    if gpus > 1 and search.backend == "optuna":
        log(f"a sweep of backend optuna runs one trial at a time, on one of the {gpus} GPUs; ray uses them all")

    identity = _identity(asked, search, caches)
    output.check(identity)
    folder = SweepFolder(job.output_dir, search, job.model_dump(mode="json", include=job.model_fields_set), job.cache)
    with output.reserved(identity, **opened), full_disk_is_reported(job.output_dir):
        disable_progress_bar()  # type: ignore[no-untyped-call]
        # The search libraries print to stdout, where the command writes its report.
        with contextlib.redirect_stdout(sys.stderr):
            _run(inputs, folder, lambda: SweepTrainer(inputs, possible, folder), gpus, log)
        return folder.publish()


def _run(inputs: SweepInputs, folder: SweepFolder, make: Callable[[], SweepTrainer], gpus: int, log: Log) -> None:
    search = inputs.search
    if search.backend == "optuna":
        from student.sweep.optuna_backend import study_options

        options = study_options(folder)
    else:
        _close_interrupted(folder)
    done = sum(trial.counts for trial in folder.trials())
    if done >= search.trials:
        log(f"{folder.path}: all {done} trials are done; ask for more trials, or give another --output-dir")
        return
    if done:
        log(f"{folder.path}: resuming after {done} trials")
    trainer, started = make(), time.monotonic()
    common: dict[str, Any] = {
        "n_trials": search.trials - done,
        "direction": search.aim,
        "backend": search.backend,
        "compute_objective": trainer.compute,
    }
    if search.backend == "optuna":
        if search.timeout_seconds is not None:
            options["timeout"] = search.timeout_seconds
        with _without_a_best(folder, ValueError):
            trainer.hyperparameter_search(hp_space=_no_space, catch=(TrialFailed,), **common, **options)
        return
    from student.sweep.ray_backend import close, domains, run_options

    # The trainer is pickled to other processes, without the model, which is created there.
    trainer.drop_model()
    space = domains(dict(search.parameters))
    with _without_a_best(folder, AttributeError):
        trainer.hyperparameter_search(hp_space=lambda _: space, **common, **run_options(folder, done, gpus))
    close(folder, search.timeout_seconds is not None and time.monotonic() - started >= search.timeout_seconds)


def _no_space(trial: Any) -> dict[str, Any]:
    """An empty search space: `SweepTrainer` sets the arguments of a trial itself."""
    del trial
    return {}


@contextlib.contextmanager
def _without_a_best(folder: SweepFolder, error: type[Exception]) -> Iterator[None]:
    """Ignore the error that a backend raises when it looks for the best trial and none was completed.

    An error of this type that a trial ended with leaves that trial running, and is raised.
    """
    try:
        yield
    except error:
        if any(trial.state in ("complete", "running") for trial in folder.trials()):
            raise


def _close_interrupted(folder: SweepFolder) -> None:
    for trial in folder.trials():
        if trial.state == "running":
            folder.write(trial.model_copy(update={"state": "failed", "value": None, "error": INTERRUPTED}))


def _check_pruner(search: Search, values: dict[str, Any]) -> None:
    if search.pruner.name != "none" and str(values.get("eval_strategy", "no")) == "no":
        raise InputError(
            f"sweep.pruner {search.pruner.name} judges trials by their evaluations during training, and there are "
            "none: set eval_strategy (steps with eval_steps, or epoch) in training:"
        )


def _check_metric(job: StudentJob, search: Search, caches: Caches) -> None:
    known = ["loss", "perplexity", "ece", "accuracy", *(f"kl_{member.name}" for member in caches.eval_members)]
    if job.teachers and not caches.not_measured:
        known.append("distillation_loss")
    asked = search.figure.removeprefix("eval_")
    swept = sorted(OBJECTIVE & search.parameters.keys())
    if asked == "distillation_loss" and swept:
        raise InputError(
            f"sweep.metric distillation_loss is another figure for every {' and '.join(swept)}: take loss, or leave "
            "these parameters fixed"
        )
    if asked not in known:
        why = caches.not_measured.get(asked.removeprefix("kl_"))
        raise InputError(
            f"sweep.metric {search.metric!r} is not measured{f' ({why})' if why else ''}; there is: {', '.join(known)}"
        )


def _identity(job: StudentJob, search: Search, caches: Caches) -> dict[str, Any]:
    """The sweep's identity, as a flat mapping. Number of trials, time limit and title are no part of it."""
    given = job.model_dump(mode="json", include=job.model_fields_set - {"cache", "eval_cache", "output_dir"})
    training = given.pop("training", {})
    asked = search.model_dump(mode="json", exclude={"trials", "timeout_seconds", "title"})
    parameters = asked.pop("parameters")
    identity = {f"job.{name}": value for name, value in given.items()}
    identity |= {f"job.training.{name}": value for name, value in training.items() if name not in PRESENTATION}
    identity |= {f"sweep.{name}": value for name, value in asked.items()}
    identity |= {f"sweep.parameters.{name}": value for name, value in parameters.items()}
    identity |= {f"provenance.{name}": value for name, value in caches.provenance.items()}
    return identity | {"job.model_sha256": model_digest(job.model)}


def _least(values: tuple[Any, ...]) -> int:
    return min(int(value) for value in values)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
