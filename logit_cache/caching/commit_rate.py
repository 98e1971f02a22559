"""The speed of a caching job's workers, from the commits of some shards: pure arithmetic on times and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# An entry counts as stalled after this many shard times without a commit, and never before this many seconds.
_PATIENCE_SHARDS, _PATIENCE_S = 5.0, 60.0


@dataclass(frozen=True)
class Commit:
    """The work that a receipt records: committed at `time` (seconds since 1970) after `seconds` of one worker."""

    time: float
    positions: int
    seconds: float
    host: str


def patience(commits: Sequence[Commit]) -> float:
    """Seconds without a commit after which an entry counts as stalled."""
    return max(_PATIENCE_S, _PATIENCE_SHARDS * max(commit.seconds for commit in commits))


def without_pauses(commits: Sequence[Commit]) -> list[Commit]:
    """The commits after the last long pause, so that a night between two runs does not lower the rate.

    commits: ordered by time.
    """
    longest = patience(commits) if commits else 0.0
    first = len(commits) - 1
    while first > 0 and commits[first].time - commits[first - 1].time <= longest:
        first -= 1
    return list(commits[max(first, 0) :])


def joint_rate(commits: Sequence[Commit]) -> float | None:
    """Positions per second of all workers together: positions committed after the first commits, by the time since.

    commits: ordered by time. Workers that started together commit together, so commits within a quarter of a shard
    time of the first one count as one with it. Where no commit came after these, all work is taken to have started
    with the earliest worker. None where receipts record no time.
    """
    first, last = commits[0].time, commits[-1].time
    near = median(commit.seconds for commit in commits) / 4
    begin = [commit for commit in commits if commit.time <= first + near]
    after = commits[len(begin) :]
    centre = sum(commit.time for commit in begin) / len(begin)
    # Times are whole seconds: a span of fewer than two is too inexact.
    if after and last - centre >= 2.0:
        return sum(commit.positions for commit in after) / (last - centre)
    spent = last - min(commit.time - commit.seconds for commit in commits)
    return sum(commit.positions for commit in commits) / spent if spent > 0 else None


def own_rate(commits: Sequence[Commit]) -> float | None:
    """Positions per second of one worker, by the workers' own seconds."""
    seconds = sum(commit.seconds for commit in commits)
    return sum(commit.positions for commit in commits) / seconds if seconds else None
