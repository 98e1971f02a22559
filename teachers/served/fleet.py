"""Prompts to several servers at once: so many in flight at each, and what a busy one did not take to another.

One thread, the caller's, decides; others wait for answers, and die with the process. A server that fails is left alone
as long as it asks for, or for twice as long after every failure. Where no server has answered for the patience of the
job, it ends: committed shards stay, and the same command resumes it.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from storage.errors import LogitCacheError
from teachers.served.server import Busy, Server

Item = TypeVar("Item")

# Between looks at the clock; whoever waits renews leases meanwhile.
_LOOK_SECONDS = 0.5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_MOST_ASKED_PAUSE = 600.0


class ServersLost(LogitCacheError, ConnectionError):
    """No server of a job has answered for as long as it is patient."""

    exit_status = 1


@dataclass
class _State:
    """A server's pause. `suspect`: it failed since it last answered, and may be another one when it comes back."""

    server: Server
    failures: int = 0
    resumes_at: float = 0.0
    suspect: bool = False


@dataclass
class _Call(Generic[Item]):
    """The prompts of one call that are under way, and those that came back unanswered."""

    answered: queue.SimpleQueue[tuple[_State, bool, Item, Any]] = field(default_factory=queue.SimpleQueue)
    again: deque[Item] = field(default_factory=deque)
    in_flight: dict[str, int] = field(default_factory=dict)


class Fleet:
    """Servers of one model. each: prompts in flight at one server; patience: seconds without an answer of any."""

    def __init__(self, servers: Iterable[Server], each: int, patience: float) -> None:
        self._states = [_State(server) for server in servers]
        self._each, self._patience = each, patience
        self._failing_since: float | None = None
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def servers(self) -> list[Server]:
        return [state.server for state in self._states]

    def patiently(self, server: Server, ask: Callable[[], Any]) -> Any:
        """What `ask` returns, tried again while that server is busy. Raises ServersLost."""
        began, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                return ask()
            except Busy as busy:
                left = began + self._patience - time.monotonic()
                if left <= 0:
                    raise self._lost(server, busy) from None
                if pause == _FIRST_PAUSE:
                    _log(f"{server.url}: {busy}; waiting for it, {self._patience:g} s at most")
                time.sleep(max(0.0, min(pause if busy.seconds is None else busy.seconds, left)))
                pause = min(2 * pause, _LONGEST_PAUSE)

    def answers(
        self,
        items: Iterable[Item],
        ask: Callable[[Server, Item], Any],
        known_again: Callable[[Server], None] | None = None,
    ) -> Iterator[tuple[Item, Any] | None]:
        """Each item with what `ask` returns for it at some server, in the order of the answers; None while it waits.

        known_again: called for a server that failed, before it is asked again. Both run in threads, and may raise Busy.
        What else they raise is raised here. Raises ServersLost.
        """
        waiting = iter(items)
        call: _Call[Item] = _Call(in_flight={state.server.url: 0 for state in self._states})
        more = True
        while True:
            while (state := self._free(call)) is not None and (more or call.again):
                if call.again:
                    item = call.again.popleft()
                else:
                    try:
                        item = next(waiting)
                    except StopIteration:
                        more = False
                        break
                self._send(call, state, item, ask, known_again)
            if not more and not call.again and not any(call.in_flight.values()):
                return
            try:
                state, trial, item, found = call.answered.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                yield None
                continue
            call.in_flight[state.server.url] -= 1
            if isinstance(found, Busy):
                call.again.append(item)
                self._pause(state, found)
            elif isinstance(found, BaseException):
                raise found
            else:
                self._failing_since = None
                if trial:  # others may have been sent before it failed
                    state.failures, state.suspect = 0, False
                yield item, found

    def _free(self, call: _Call[Item]) -> _State | None:
        """The least busy server that can take a prompt now; one that failed takes one prompt, as a trial."""
        now = time.monotonic()
        free = [
            state
            for state in self._states
            if state.resumes_at <= now and call.in_flight[state.server.url] < (1 if state.suspect else self._each)
        ]
        return min(free, key=lambda state: call.in_flight[state.server.url], default=None)

    def _send(
        self,
        call: _Call[Item],
        state: _State,
        item: Item,
        ask: Callable[[Server, Item], Any],
        known_again: Callable[[Server], None] | None,
    ) -> None:
        call.in_flight[state.server.url] += 1
        trial, answered = state.suspect, call.answered

        def work() -> None:
            try:
                if trial and known_again is not None:
                    known_again(state.server)
                answered.put((state, trial, item, ask(state.server, item)))
            except BaseException as error:
                answered.put((state, trial, item, error))

        self._todo.put(work)
        if len(self._threads) < sum(call.in_flight.values()):
            self._threads.append(threading.Thread(target=self._serve, daemon=True, name="served-teacher"))
            self._threads[-1].start()

    def _serve(self) -> None:
        while True:
            self._todo.get()()

    def _pause(self, state: _State, busy: Busy) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since >= self._patience:
            raise self._lost(state.server, busy)
        if busy.seconds is not None:
            state.resumes_at = max(state.resumes_at, now + min(busy.seconds, _MOST_ASKED_PAUSE))
        elif now >= state.resumes_at:  # of several that fail together, one counts
            pause = min(_FIRST_PAUSE * 2.0**state.failures, _LONGEST_PAUSE)
            state.resumes_at = now + pause * random.uniform(0.5, 1.0)
            state.failures = min(state.failures + 1, 16)
        if not state.suspect:
            _log(f"{state.server.url}: {busy}; its windows are asked for again")
        state.suspect = True

    def _lost(self, server: Server, busy: Busy) -> ServersLost:
        return ServersLost(
            f"{server.url}: no answer for {self._patience:g} s ({busy}): start the server again, then run the same "
            f"command again to resume"
        )


def _log(line: str) -> None:
    logging.getLogger(__name__).warning(line)
