"""How a job ended: the shards built, the shards that failed permanently, and why the job is not done."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """How a job ended: shards built, shards that failed permanently (with their last error), whether it was stopped.

    submitted: it has not ended, and nobody waits for it.
    """

    built: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    stopped: bool = False
    submitted: bool = False


class NotDone(Exception):
    """A job ended before its work was done, for another reason than a user's error; the message is one line."""


class WorkersLost(Exception):
    """The workers of a job are lost as fast as they are started."""
