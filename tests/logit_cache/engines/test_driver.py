"""The driver on a fake pool: every shard is built once, or fails permanently for a fault of its own."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_cache.caching.log import JobLog
from logit_cache.engines.driver import Driver, Event, Gone, Ready, Reported
from logit_cache.engines.outcome import Outcome, WorkersLost
from logit_cache.engines.shard_queue import ShardQueue
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import ShardOutcome
from storage.errors import CorruptCache, InputError, LogitCacheError, StoreUnavailable


class FakePool:
    """Workers that follow a plan for each shard, one step of one worker at each call of `events`.

    plan: shard → the result of each attempt: "built", "failed", "leased", "lost" (the worker dies of it), "node" (the
    worker dies of something else) or an error that it raises; "built" once the plan is at its end. Like real ones,
    workers report a shard when the next one is computed, or when they have no other.
    """

    def __init__(self, shards: int, workers: int, plan: dict[int, list[str | LogitCacheError]]) -> None:
        self.workers, self.shards = workers, shards
        self.plan = {shard: list(steps) for shard, steps in plan.items()}
        self.queues: dict[str, list[int]] = {}
        self.computed: dict[str, list[ShardOutcome]] = {}
        self.started: Counter[int] = Counter()
        self.committed: list[int] = []
        self.unread: list[Event] = []
        self.stopped = False
        self.turn = 0
        self.refuses: dict[int, LogitCacheError] = {}
        self.made = 0

    def start(self) -> str:
        name = str(self.made)
        self.made += 1
        refusal = self.refuses.get(int(name))
        if refusal is not None:
            self.unread.append(Gone(name, str(refusal), refusal))
            return name
        self.queues[name], self.computed[name] = [], []
        left = tuple(shard for shard in range(self.shards) if shard not in self.committed)
        self.unread.append(Ready(name, left, {"host": "here"}))
        return name

    def build(self, worker: str, shard: int) -> None:
        assert shard not in self.committed, "a shard is built twice"
        assert all(shard not in queue for queue in self.queues.values()), "a shard is with two workers"
        self.queues[worker].append(shard)
        assert len(self.queues[worker]) + len(self.computed[worker]) <= 3

    def stop(self) -> None:
        self.stopped = True

    def events(self, timeout: float) -> Sequence[Event]:
        names = [name for name, queue in self.queues.items() if queue]
        if names:
            self.turn += 1
            self._step(names[self.turn % len(names)])
        events, self.unread = self.unread, []
        return events

    def _step(self, name: str) -> None:
        queue = self.queues[name]
        shard = queue.pop(0)
        if self.stopped:
            self.unread.append(Reported(name, (*self._flush(name), ShardOutcome(shard, "dropped"))))
            return
        self.started[shard] += 1
        steps = self.plan.get(shard, [])
        step = steps.pop(0) if steps else "built"
        if step in ("lost", "node"):
            del self.queues[name], self.computed[name]
            self.unread.append(Gone(name, "killed by SIGKILL", blame=step == "lost"))
            return
        before = self._flush(name)
        if isinstance(step, LogitCacheError):
            self.unread.append(Reported(name, (*before, ShardOutcome(shard, "ended", error=str(step), cause=step))))
            self.unread.append(Gone(name, str(step), step))
            del self.queues[name], self.computed[name]
            return
        if step == "built":
            self.computed[name].append(ShardOutcome(shard, "built", positions=10, seconds=1.0))
        elif step == "leased":
            before.append(ShardOutcome(shard, "leased"))
        else:
            before.append(ShardOutcome(shard, "failed", error="Traceback\nRuntimeError: out of memory"))
        if not queue:
            before += self._flush(name)
        self.unread.append(Reported(name, tuple(before)))

    def _flush(self, name: str) -> list[ShardOutcome]:
        outcomes = self.computed[name]
        self.committed += [item.shard for item in outcomes]
        self.computed[name] = []
        return outcomes


def drive(pool: FakePool, attempts: int = 3, **options: bool) -> tuple[Outcome, list[dict[str, object]]]:
    """The outcome, and the log."""
    log = io.StringIO()
    with redirect_stderr(log):
        outcome = Driver(pool, JobLog("json"), Stopping(), attempts=attempts, **options).run()
    return outcome, [json.loads(line) for line in log.getvalue().splitlines()]


STEP = st.sampled_from(["built", "failed", "lost", "node"])


@settings(max_examples=300, deadline=None)
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
    """At first its worker holds others, too: all of them become suspects, and alone only this one does it again."""
    pool = FakePool(30, 2, {7: ["lost"] * 9})
    outcome, _ = drive(pool)
    assert list(outcome.failed) == [7]
    assert sorted(pool.committed) == [shard for shard in range(30) if shard != 7]
    assert pool.started[7] == 4  # once among others, three times alone


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


def test_shards_leased_by_others_are_retried_or_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logit_cache.engines.driver._LOOK_SECONDS", 0.0)
    outcome, _ = drive(FakePool(4, 1, {2: ["leased", "leased"]}))
    assert outcome.built == 4
    pool = FakePool(4, 1, {2: ["leased", "leased"]})
    outcome, _ = drive(pool, wait_for_others=False)
    assert sorted(pool.committed) == [0, 1, 3]


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
    assert not any(pool.queues.values())


def test_every_worker_gets_one_shard_before_any_gets_a_second() -> None:
    queue = ShardQueue(range(5))
    for worker in "abc":
        assert queue.take(worker, 3) is not None
    # Two are left for three workers: they wait for the first worker that is done.
    assert queue.take("a", 3) is None
    queue.done("b", 1)
    assert queue.take("b", 3) == 3
