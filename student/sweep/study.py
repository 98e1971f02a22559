"""Optuna behind a sweep: the storage that all its processes share, its samplers and its pruners.

Trials are handed out one at a time, under the lock of the sweep's folder. A running trial belongs to the process that
holds the lock `trial-<n>.lock`, which the kernel releases when that process ends in any way; in a database also to the
one whose heartbeat is recorded there. A running trial that belongs to nobody is taken over: same number, same values.

Needs the extra `tune`; imported where a sweep asks for it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from storage.errors import InputError
from storage.locks import locked
from student.sweep.record import JOURNAL
from student.sweep.search_space import Choices, LogNormal, Parameter, Pruner, Search, Whole

HEARTBEAT_SECONDS = 60
"""Time between heartbeats of a trial in a database; one that has missed two belongs to nobody."""


class SharedStudy:
    """The trials of one sweep, for each of the processes that run it. Raises InputError for a database that does not
    open."""

    def __init__(self, folder: Path, search: Search, name: str, storage: BaseStorage | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._folder, self._search = folder, search
        self._storage = storage or _journal(folder)
        self._study = optuna.create_study(
            study_name=name,
            storage=self._storage,
            direction=search.aim,
            pruner=_pruner(search.pruner),
            load_if_exists=True,
        )

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._study.get_trials(deepcopy=False)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the other processes from handing out trials and from writing the sweep's records."""
        with locked(self._folder, "the sweep", wait=True):
            yield

    @contextlib.contextmanager
    def claimed(self) -> Iterator[Trial | None]:
        """A trial for this process while the body runs: one whose process was killed, or else a new one; None once all
        that were asked for are begun."""
        with contextlib.ExitStack() as held:
            with self.locked():
                trial = self._abandoned(held) or self._new(held)
            if trial is not None:
                beats: Any = get_heartbeat_thread(trial._trial_id, self._storage)
                held.enter_context(beats)
            yield trial

    def tell(self, trial: Trial, state: str, value: float | None) -> None:
        """Record the end of a trial: complete, pruned or failed."""
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        self._study.tell(trial, value if state == "complete" else None, states[state], skip_if_finished=True)

    def _abandoned(self, held: contextlib.ExitStack) -> Trial | None:
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        if isinstance(self._storage, RDBStorage):
            stale = self._storage._get_stale_trial_ids(self._study._study_id)
            running = [trial for trial in running if trial._trial_id in stale or self._never_claimed(trial)]
        return next((Trial(self._study, t._trial_id) for t in running if self._claim(t, held)), None)

    def _never_claimed(self, trial: FrozenTrial) -> bool:
        """Whether its process was killed before the first heartbeat, without which Optuna never calls a trial stale."""
        age = datetime.now() - (trial.datetime_start or datetime.min)
        return age.total_seconds() > 2 * HEARTBEAT_SECONDS and not self._lock_of(trial).exists()

    def _new(self, held: contextlib.ExitStack) -> Trial | None:
        begun = len(self.trials())
        if begun >= self._search.trials:
            return None
        self._study.add_trial(self._proposed(begun))
        trial = self.trials()[begun]
        self._claim(trial, held)
        return Trial(self._study, trial._trial_id)

    def _proposed(self, number: int) -> FrozenTrial:
        """A running trial with all its values. It enters the storage whole: one whose process is killed has the values
        that it would have had.

        Each is sampled by a sampler of its own: proposals follow from the seed and the trials before, whatever process
        they ran in.
        """
        copy = optuna.create_study(
            study_name=self._study.study_name,
            direction=self._search.aim,
            pruner=self._study.pruner,
            sampler=_sampler(self._search.sampler, seed_of(self._search.seed, number)),
        )
        copy.add_trials(self.trials())
        distributions = {name: _distribution(item) for name, item in self._search.parameters.items()}
        values = copy.ask(distributions).params
        return create_trial(state=TrialState.RUNNING, params=values, distributions=distributions)

    def _claim(self, trial: FrozenTrial, held: contextlib.ExitStack) -> bool:
        try:
            held.enter_context(locked(self._folder, f"trial {trial.number}", name=self._lock_of(trial).name))
        except InputError:
            return False
        if isinstance(self._storage, RDBStorage):
            self._storage.record_heartbeat(trial._trial_id)
        return True

    def _lock_of(self, trial: FrozenTrial) -> Path:
        return self._folder / f"trial-{trial.number}.lock"


class _JournalLock:
    """Optuna's own lock of a journal outlives a killed process by 30 seconds; the kernel's does not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = contextlib.ExitStack()

    def acquire(self) -> bool:
        lock = locked(self._path.parent, "the sweep", name=f"{self._path.name}.lock", wait=True)
        self._held.enter_context(lock)
        return True

    def release(self) -> None:
        self._held.close()


def _journal(folder: Path) -> JournalStorage:
    path = folder / JOURNAL
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))  # type: ignore[arg-type]


def open_database(url: str) -> RDBStorage:
    """The database of a sweep. Raises InputError where it does not open."""
    where = without_credentials(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that heartbeats are experimental
            return RDBStorage(url, heartbeat_interval=HEARTBEAT_SECONDS)
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError, optuna.exceptions.OptunaError) as error:
        raise InputError(
            f"sweep.storage {where}: expected a database that opens, found {type(error).__name__} "
            f"({' '.join(str(error.__cause__ or error).split())[:200]}): start it, or leave storage out"
        ) from None


def without_credentials(url: str) -> str:
    """A database's URL as it may be recorded. Raises InputError for another text, or a database in memory."""
    try:
        given = make_url(url)
        parsed = URL.create(given.drivername, host=given.host, port=given.port, database=given.database)
    except (SQLAlchemyError, ValueError):
        raise InputError(
            "sweep.storage: expected the URL of a database, as postgresql://host/name or sqlite:///file.db, found "
            "another text; without it the sweep's folder is shared"
        ) from None
    if parsed.drivername.startswith("sqlite") and parsed.database in (None, "", ":memory:"):
        raise InputError(f"sweep.storage {url}: a database in memory ends with its process: give sqlite:///file.db")
    return parsed.render_as_string()


def seed_of(seed: int, number: int) -> int:
    """A sampler's seed for a trial, below 2**32; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _sampler(name: str, seed: int) -> BaseSampler:
    return TPESampler(seed=seed) if name == "tpe" else RandomSampler(seed=seed)


def _distribution(asked: Parameter) -> BaseDistribution:
    if isinstance(asked, Choices):
        return CategoricalDistribution(asked.choices)
    if isinstance(asked, LogNormal):
        return FloatDistribution(*asked.quantiles())
    is_log = asked.distribution.startswith("log_")
    if isinstance(asked, Whole):
        return IntDistribution(asked.low, asked.high, log=is_log, step=asked.step)
    return FloatDistribution(asked.low, asked.high, log=is_log)


def _pruner(asked: Pruner) -> BasePruner:
    """The pruner of a search; its resource is the number of evaluations."""
    if asked.name == "hyperband":
        return HyperbandPruner(
            min_resource=asked.min_evaluations,
            max_resource=asked.max_evaluations or "auto",
            reduction_factor=asked.reduction_factor,
        )
    if asked.name == "median":
        return MedianPruner(n_startup_trials=asked.startup_trials, n_warmup_steps=asked.min_evaluations - 1)
    return NopPruner()
