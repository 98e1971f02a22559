"""How a job ended: the shards built, the shards that failed permanently, and why the job is not done."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """How a job ended: shards built, shards that failed permanently (with their last error), whether it was stopped.

    submitted: it has not ended, and nobody waits for it. elsewhere: shards left to the jobs that have leased them.
    """

    built: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    stopped: bool = False
    submitted: bool = False
    elsewhere: tuple[int, ...] = ()

    def then(self, later: Outcome) -> Outcome:
        """Both outcomes as one, `later` after this one."""
        return Outcome(
            self.built + later.built,
            self.failed | later.failed,
            self.stopped or later.stopped,
            self.submitted or later.submitted,
            (*self.elsewhere, *later.elsewhere),
        )


class NotDone(Exception):
    """A job ended before its work was done, for another reason than a user's error; the message is one line."""


class WorkersLost(Exception):
    """The workers of a job are lost as fast as they are started."""
