"""The driver on a fake pool: every shard is built once, or fails permanently for a fault of its own."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import redirect_stderr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_cache.caching.log import JobLog
from logit_cache.engines.driver import Driver, Event, Gone, Ready, Reported
from logit_cache.engines.outcome import Outcome, WorkersLost
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import ShardOutcome, Turn
from storage.errors import CorruptCache, InputError, LogitCacheError, StoreUnavailable


class FakePool:
    """Workers that follow a plan for each shard, one turn of one worker at each call of `events`.

    plan: shard → the result of each attempt: "built", "failed", "leased" (another job has it when a worker looks),
    "lost" (the worker dies of it), "node" (the worker dies of something else), "hangs" (the worker never answers, and
    its lease ends), or an error that it raises; "built" once the plan is at its end. Like real ones, workers take a
    shard before they build it, and report it when the next one is computed, or when there is no other.
    """

    def __init__(self, shards: int, workers: int, plan: dict[int, list[str | LogitCacheError]]) -> None:
        self.workers, self.shards = workers, shards
        self.plan = {shard: list(steps) for shard, steps in plan.items()}
        self.asked: dict[str, Collection[int] | None] = {}
        self.taken: dict[str, int | None] = {}
        self.committing: dict[str, int | None] = {}
        self.started: Counter[int] = Counter()
        self.committed: list[int] = []
        self.unread: list[Event] = []
        self.stopped = self.has_share = False
        self.turns = self.made = 0
        self.refuses: dict[int, LogitCacheError] = {}
        self.ranks: list[int] = []

    def start(self, rank: int) -> str:
        name = str(self.made)
        self.made += 1
        self.ranks.append(rank)
        refusal = self.refuses.get(int(name))
        if refusal is not None:
            self.unread.append(Gone(name, str(refusal), refusal))
            return name
        self.asked[name] = self.taken[name] = self.committing[name] = None
        self.unread.append(Ready(name, {"host": "here"}, self.has_share))
        return name

    def turn(self, worker: str, given_up: Collection[int]) -> None:
        assert self.asked[worker] is None, "a worker takes one turn at a time"
        self.asked[worker] = given_up

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        raise AssertionError("the driver ends before")

    def stop(self) -> None:
        self.stopped = True

    def events(self, timeout: float) -> Sequence[Event]:
        names = [name for name, given_up in self.asked.items() if given_up is not None]
        if names:
            self.turns += 1
            self._take_turn(names[self.turns % len(names)])
        events, self.unread = self.unread, []
        return events

    def _take_turn(self, name: str) -> None:
        given_up, self.asked[name] = self.asked[name], None
        assert given_up is not None
        shard, self.taken[name] = self.taken[name], None
        shard = None if shard in given_up else shard
        outcomes: list[ShardOutcome] = []
        if shard is not None and self.stopped:
            self.unread.append(Reported(name, Turn((*self._flush(name), ShardOutcome(shard, "dropped")))))
            return
        if shard is not None:
            step = self._step(shard)
            if step in ("lost", "node", "hangs"):
                for states in (self.asked, self.taken, self.committing):
                    states.pop(name, None)  # type: ignore[attr-defined]
                if step != "hangs":
                    self.unread.append(Gone(name, "killed by SIGKILL", blame=step == "lost"))
                return
            outcomes = self._flush(name)
            if isinstance(step, LogitCacheError):
                ended = ShardOutcome(shard, "ended", error=str(step), cause=step)
                self.unread += [Reported(name, Turn((*outcomes, ended))), Gone(name, str(step), step)]
                del self.asked[name], self.taken[name]
                return
            if step == "failed":
                failed = ShardOutcome(shard, "failed", error="Traceback\nRuntimeError: out of memory")
                self.unread.append(Reported(name, Turn((*outcomes, failed))))
                return
            self.committing[name] = shard
        self.taken[name] = self._free(name, given_up)
        if self.taken[name] is not None:
            self.unread.append(Reported(name, Turn(tuple(outcomes), self.taken[name])))
        elif self.committing[name] is not None or self.stopped:
            self.unread.append(Reported(name, Turn((*outcomes, *self._flush(name)))))
        else:
            missing = set(range(self.shards)) - set(self.committed) - set(given_up)
            self.unread.append(Reported(name, Turn(tuple(outcomes), None, tuple(sorted(missing)))))

    def _step(self, shard: int) -> str | LogitCacheError:
        assert shard not in self.committed, "a shard is built twice"
        self.started[shard] += 1
        steps = self.plan.get(shard, [])
        return steps.pop(0) if steps else "built"

    def _free(self, name: str, given_up: Collection[int]) -> int | None:
        held = {*self.taken.values(), *self.committing.values(), *self.committed, *given_up}
        for shard in range(self.shards):
            if self.stopped or shard in held or (self.has_share and shard % self.workers != self.ranks[int(name)]):
                continue
            if self.plan.get(shard, [])[:1] == ["leased"]:
                self.plan[shard].pop(0)
                continue
            return shard
        return None

    def _flush(self, name: str) -> list[ShardOutcome]:
        shard, self.committing[name] = self.committing[name], None
        if shard is None:
            return []
        self.committed.append(shard)
        return [ShardOutcome(shard, "built", positions=10, seconds=1.0)]


def drive(pool: FakePool, attempts: int = 3) -> tuple[Outcome, list[dict[str, object]]]:
    """The outcome, and the log."""
    log = io.StringIO()
    with redirect_stderr(log):
        outcome = Driver(pool, JobLog("json"), Stopping(), attempts).run()
    return outcome, [json.loads(line) for line in log.getvalue().splitlines()]


STEP = st.sampled_from(["built", "failed", "lost", "node"])


@settings(max_examples=200, deadline=None)
@given(
    shards=st.integers(1, 12),
    workers=st.integers(1, 4),
    plan=st.dictionaries(st.integers(0, 11), st.lists(STEP, max_size=4), max_size=6),
)
def test_every_shard_is_built_once_or_fails_permanently_by_its_own_fault(
    shards: int, workers: int, plan: dict[int, list[str | LogitCacheError]]
) -> None:
    pool = FakePool(shards, workers, plan)
    try:
        outcome, _ = drive(pool)
    except WorkersLost:
        # So many losses in a row, with no shard built in between.
        assert sum(steps.count("lost") + steps.count("node") for steps in plan.values()) >= workers + 3
        return
    assert sorted([*pool.committed, *outcome.failed]) == list(range(shards))
    assert outcome.built == len(pool.committed)
    for shard in outcome.failed:
        harmful = [step for step in plan[shard] if step in ("failed", "lost")]
        assert len(harmful) >= 3, "only faults of the shard itself count"


def test_a_shard_that_fails_every_attempt_fails_permanently_and_the_others_are_built() -> None:
    pool = FakePool(5, 2, {3: ["failed"] * 9})
    outcome, log = drive(pool, attempts=4)
    assert pool.started[3] == 4
    assert list(outcome.failed) == [3]
    assert "out of memory" in outcome.failed[3]
    assert sorted(pool.committed) == [0, 1, 2, 4]
    assert [(line["event"], line.get("attempt")) for line in log if line.get("shard") == 3] == [
        ("retry", 1),
        ("retry", 2),
        ("retry", 3),
        ("given up", 4),
    ]


def test_a_shard_that_kills_its_workers_does_not_take_others_with_it() -> None:
    """The driver knows which shard a worker has taken before it is computed."""
    pool = FakePool(30, 2, {7: ["lost"] * 9})
    outcome, _ = drive(pool)
    assert list(outcome.failed) == [7]
    assert sorted(pool.committed) == [shard for shard in range(30) if shard != 7]
    assert pool.started[7] == 3


def test_a_lost_node_is_no_shards_fault() -> None:
    pool = FakePool(4, 1, {2: ["node"] * 3})
    outcome, _ = drive(pool, attempts=2)
    assert not outcome.failed
    assert sorted(pool.committed) == [0, 1, 2, 3]


def test_workers_that_are_lost_as_fast_as_they_are_started_end_the_job() -> None:
    pool = FakePool(3, 2, {shard: ["node"] * 99 for shard in range(3)})
    with pytest.raises(WorkersLost, match="killed by SIGKILL"):
        drive(pool)
    assert pool.made < 12


def test_an_error_of_the_job_ends_it_at_once() -> None:
    pool = FakePool(9, 2, {4: [CorruptCache("another worker wrote other bytes")]})
    with pytest.raises(CorruptCache, match="other bytes"):
        drive(pool)


def test_a_worker_that_lost_its_store_is_not_replaced() -> None:
    pool = FakePool(9, 3, {1: [StoreUnavailable("no answer")]})
    outcome, log = drive(pool)
    assert sorted(pool.committed) == list(range(9))
    assert not outcome.failed
    assert pool.made == 3, "a replacement would not reach the store either"
    assert [line["worker"] for line in log if line["event"] == "worker lost"]


def test_a_job_that_no_worker_can_open_is_refused_with_the_error_of_one() -> None:
    pool = FakePool(9, 2, {})
    pool.refuses = {number: InputError("--k 70000 is larger than the vocabulary") for number in range(9)}
    with pytest.raises(InputError, match="--k 70000"):
        drive(pool)
    assert pool.made == 2
    pool = FakePool(9, 2, {})
    pool.refuses = {0: InputError("teacher: no such directory")}
    assert drive(pool)[0].built == 9, "the other worker can open it"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle workers look for a free shard at every turn, and nobody waits for the last words of one that hangs."""
    for module in ("driver", "attempts"):
        monkeypatch.setattr(f"logit_cache.engines.{module}.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("logit_cache.engines.driver._LAST_OUTCOMES_SECONDS", 0.0)


@pytest.mark.usefixtures("no_waiting")
def test_shards_leased_by_others_are_waited_for() -> None:
    pool = FakePool(4, 1, {2: ["leased", "leased"]})
    assert drive(pool)[0].built == 4


@pytest.mark.usefixtures("no_waiting")
def test_a_worker_that_hangs_does_not_hold_the_job() -> None:
    """Once its lease has ended, which here is at once, another worker builds its shard."""
    pool = FakePool(6, 2, {3: ["hangs"]})
    outcome, _ = drive(pool)
    assert sorted(pool.committed) == list(range(6))
    assert pool.started[3] == 2
    assert not outcome.failed
    assert pool.made == 2


@pytest.mark.usefixtures("no_waiting")
def test_without_leases_a_replacement_has_the_share_of_the_worker_that_was_lost() -> None:
    pool = FakePool(9, 3, {4: ["node"]})
    pool.has_share = True
    assert drive(pool)[0].built == 9
    assert pool.ranks == [0, 1, 2, 1]
    pool = FakePool(9, 3, {})
    pool.has_share, pool.refuses = True, {1: InputError("teacher: no such directory")}
    with pytest.raises(InputError, match="no such directory"):
        drive(pool)
    assert sorted(pool.committed) == [0, 2, 3, 5, 6, 8]


def test_a_stop_hands_out_no_more_shards_and_receives_the_outcomes_under_way() -> None:
    pool = FakePool(50, 2, {})
    stopping = Stopping(100.0)
    driver = Driver(pool, JobLog(), stopping)
    looks = pool.events
    seen = 0

    def events(timeout: float) -> Sequence[Event]:
        nonlocal seen
        seen += 1
        if seen == 10:
            stopping.wanted = True
        return looks(timeout)

    pool.events = events  # type: ignore[method-assign]
    outcome = driver.run()
    assert outcome.stopped
    assert 0 < outcome.built == len(pool.committed) < 12
    assert not any(shard is not None for shard in (*pool.taken.values(), *pool.committing.values()))


@pytest.mark.parametrize("states", [("built", "there"), ("there", "built")])
def test_a_shard_counts_once_whoever_reports_it_first(states: tuple[str, str]) -> None:
    """Another worker may find it committed before the one that built it says so."""
    advanced: list[int] = []
    driver = Driver(FakePool(1, 2, {}), JobLog("json"), Stopping(1.0), advance=advanced.append)
    with redirect_stderr(io.StringIO()):
        for worker, state in enumerate(states):
            driver._record(ShardOutcome(0, state, positions=10), str(worker))  # type: ignore[arg-type]
    assert sum(advanced) == 10
