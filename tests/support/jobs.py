"""Jobs of `cache-logits`, in the test's process, which saves three seconds of imports, or as a command."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import processes
from support.caches.known import contents as files

from logit_cache.caching.job import CacheJob
from logit_cache.caching.prepare import open_job
from logit_cache.engines.this_machine import build_missing
from storage import LogitCache
from storage.cache.reader import TeacherTargets
from storage.config import build_config
from storage.errors import LogitCacheError
from storage.format.targets import SparseTargets


def cache_logits(cache: Path, name: str, *teachers: Path, **fields: Any) -> tuple[TeacherTargets, SparseTargets]:
    """Run a job to its end; returns the entry and all its targets."""
    sources = [str(teacher) for teacher in teachers]
    given = {"cache": str(cache), "name": name, "teacher": sources, "context_tokens": 64, **fields}
    opened = open_job(build_config(CacheJob, given, {}, "cache-logits"))
    build_missing(opened)
    return whole(cache, name)


def whole(cache: Path, name: str) -> tuple[TeacherTargets, SparseTargets]:
    """An entry and all its targets."""
    opened = LogitCache.open(str(cache))
    targets = opened.teacher(name)
    return targets, targets.read(0, len(opened.tokens))


def refusal(cache: Path, name: str, *teachers: Path, **fields: Any) -> str:
    """The error line of a job that is refused."""
    with pytest.raises(LogitCacheError) as caught:
        cache_logits(cache, name, *teachers, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Shards of half a second or so, some 33 of them in the small cache.
SMALL = ("-k", 16, "--context-tokens", 64, "--shard-tokens", 512, "--chunk-tokens", 256, "--fidelity-positions", 128)


def contents(cache: Path, name: str = "a") -> dict[str, bytes]:
    """The files that are equal whichever workers made an entry: all but its receipts, which hold times and hosts, and
    what killed workers left behind."""
    found = files(cache / "teachers" / name)
    return {key: data for key, data in found.items() if not key.startswith("receipts/") and ".partial" not in key}


def committed(cache: Path, name: str = "a") -> int:
    """Number of shards that have a receipt now."""
    return len(list((cache / "teachers" / name / "receipts").glob("????????.json")))


def shards_of(cache: Path) -> int:
    """Number of shards in an entry of such jobs."""
    return -(-len(LogitCache.open(str(cache)).tokens) // 512)


@dataclass
class Job:
    """A running `cache-logits --log-format json`; `logged`: its events read so far, `other`: its other lines."""

    process: processes.Process
    logged: list[dict[str, Any]] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lines = self.process.error_lines()

    def lines(self) -> Iterator[dict[str, Any]]:
        """The job's events, as they come."""
        for line in self._lines:
            if line.startswith("{"):
                self.logged.append(json.loads(line))
                yield self.logged[-1]
            else:
                self.other.append(line)

    def until(self, event: str, times: int = 1) -> dict[str, Any]:
        """Wait for the n-th event of a name from now on."""
        for line in self.lines():
            times -= line["event"] == event
            if not times:
                return line
        raise AssertionError(f"it ended before: {self.logged[-3:]} {self.other[-20:]}")

    def end(self, timeout: float = 120) -> int:
        """Read to the end; returns the exit status."""
        for _ in self.lines():
            pass
        return self.process.wait(timeout)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of a name that were read so far."""
        return [line for line in self.logged if line["event"] == name]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process that was started, and to it alone."""
        os.kill(self.process.pid, number)


def start(cache: Path, teacher: Path, *options: object, cwd: Path | None = None, **variables: str) -> Job:
    """Start a job on a cache, in a process group of its own."""
    base = ("--cache", cache, "--teacher", teacher, "--name", "a", *SMALL, "--log-format", "json")
    return Job(processes.start("cache-logits", *base, *options, cwd=cwd, **variables))


def copy_of(cache: Path, path: Path) -> Path:
    """Copy a cache, so that a test may change it."""
    return Path(shutil.copytree(cache, path))
