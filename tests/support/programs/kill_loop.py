"""Runs `cache-logits` in forked children and kills them, over and over; `test_kills` starts it as a process.

    python tests/support/programs/kill_loop.py CACHE TEACHER FOLDER KILLS

The parent has imported all that the command needs and has no thread but its own, so a child starts with the command's
own work at once, and a kill costs milliseconds. Everything that looks into a cache also happens in a child: Zarr starts
a thread when it is first used. Prints its counts as JSON; any fault ends it with an error.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch  # noqa: F401  the parent pays for the imports, once
import transformers.models.gpt2.modeling_gpt2
import zarr

import teachers.huggingface.teacher  # noqa: F401
from logit_cache.cli.main import cache_logits
from storage import LogitCache
from storage.cache.verify import verify
from storage.errors import IncompleteCache

NAME = "a"


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def fork(work: Callable[[], object], log: Path) -> int:
    """A child that does `work`, with its output in `log`, and exits with 0, or 1 for an error."""
    assert threads() == 1, "a fork copies one thread only"
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        # In its own session, so that no signal meant for the parent reaches it.
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def call(work: Callable[[], object], log: Path) -> None:
    """`work` in a child, to its end."""
    status = wait(fork(work, log))
    if status:
        raise SystemExit(f"exit status {status}: {log.read_text()}")


def wait_for_commit(commits: Callable[[], int], before: int, children: list[int]) -> None:
    """Until there are more commits than `before`, or a child has ended."""
    while commits() <= before:
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) for child in children):
            return
        time.sleep(0.001)


class Victims:
    """Caches on this disk that `cache-logits` works in, one after the other.

    pause    the longest time from a commit to a kill, as a share of that of an undisturbed run
    """

    arguments: tuple[str, ...] = (
        "--name", NAME, "-k", "16", "--context-tokens", "32", "--shard-tokens", "512", "--chunk-tokens", "256",
    )  # fmt: skip
    pause = 0.3

    def __init__(self, cache: Path, teacher: Path, folder: Path) -> None:
        self.cache, self.teacher, self.folder, self.log = cache, teacher, folder, folder / "log"
        self.url = str(folder / "victim")
        self.whole = Path(shutil.copytree(cache, folder / "whole"))
        self.seconds = self.time(str(self.whole))
        # The files that are equal in every run: receipts hold times.
        self.expected = self.objects(self.whole)

    def time(self, url: str) -> float:
        """Seconds of an undisturbed run."""
        began = time.monotonic()
        call(lambda: self.run(url), self.log)
        return time.monotonic() - began

    def run(self, url: str) -> object:
        return cache_logits(["--cache", url, "--teacher", str(self.teacher), *self.arguments])

    def begin(self, number: int) -> None:
        """Make the next cache."""
        shutil.rmtree(self.url, ignore_errors=True)
        shutil.copytree(self.cache, self.url)

    def start(self, workers: int) -> list[int]:
        return [fork(lambda: self.run(self.url), self.folder / f"log{n}") for n in range(workers)]

    def receipts(self) -> dict[str, bytes]:
        """The receipts that exist now; a file that a child removes meanwhile is not one."""
        return {path.name: path.read_bytes() for path in self.receipts_in(Path(self.url))}

    def commits(self) -> int:
        return len(self.receipts())

    def has_leftovers(self) -> bool:
        """Whether a killed worker left something of a shard that is not committed."""
        return any(Path(self.url).rglob("*.partial"))

    def check(self) -> None:
        """Check that no object is damaged, and that readable shards equal those of an undisturbed run."""
        found = verify(self.url, deep=True, workers=1)
        committed = self.receipts()
        assert found.sound, found.problems
        if not (Path(self.url) / "teachers" / NAME / "zarr.json").exists():
            return
        truth, ours = (LogitCache.open(url).teacher(NAME) for url in (str(self.whole), self.url))
        for shard in range(ours.receipts.shards):
            start = shard * ours.entry.layout.shard
            stop = min(start + ours.entry.layout.shard, len(ours))
            try:
                read, expected = ours.stored(start, stop).arrays, truth.stored(start, stop).arrays
            except IncompleteCache:
                assert ours.receipts.key(shard).rsplit("/", 1)[-1] not in committed
                continue
            for name, values in expected.items():
                assert read[name].tobytes() == values.tobytes(), (shard, name)

    def finished(self) -> dict[str, bytes]:
        """The objects of a finished cache but its receipts."""
        return self.objects(Path(self.url))

    @staticmethod
    def receipts_in(cache: Path) -> Iterator[Path]:
        return (cache / "teachers" / NAME / "receipts").glob("????????.json")

    @staticmethod
    def objects(cache: Path) -> dict[str, bytes]:
        folder = cache / "teachers" / NAME
        paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
        return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.parent.name != "receipts"}


def loop(victims: Victims, kills: int) -> dict[str, object]:
    chance, seconds = random.Random(0), victims.seconds
    counts = dict.fromkeys(("kills", "kills_after_a_commit", "kills_with_leftovers", "rounds", "caches"), 0)
    most_threads, done, acknowledged = 0, True, dict[str, bytes]()
    while counts["kills"] < kills or not done:
        if done:
            counts["caches"] += 1
            victims.begin(counts["caches"])
            acknowledged = {}
        counts["rounds"] += 1
        before = len(acknowledged)
        # Every third time two workers do the same shards at once.
        workers = 2 if counts["rounds"] % 3 == 0 else 1
        most_threads = max(most_threads, threads())
        children = victims.start(workers)
        if counts["kills"] < kills:
            # Every other time the clock starts at a commit: how far a run gets in a given time depends on the machine,
            # and a job on a store spends its first moments without commits.
            if counts["rounds"] % 2:
                wait_for_commit(victims.commits, before, children)
                time.sleep(chance.uniform(0.0, victims.pause) * seconds * workers)
            else:
                time.sleep(chance.uniform(0.1, 0.7) * seconds * workers)
        else:
            for child in children:
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        acknowledged |= victims.receipts()
        for child in children:
            os.kill(child, signal.SIGKILL)
        statuses = [wait(child) for child in children]
        for number, status in enumerate(statuses):
            assert status in (0, -signal.SIGKILL), (status, (victims.folder / f"log{number}").read_text())
        found = victims.receipts()
        assert found.items() >= acknowledged.items(), "an acknowledged shard is gone, or another one"
        acknowledged = found
        killed = sum(status < 0 for status in statuses)
        counts["kills"] += killed
        counts["kills_after_a_commit"] += killed if len(found) > before else 0
        counts["kills_with_leftovers"] += killed if victims.has_leftovers() else 0
        call(victims.check, victims.log)
        done = 0 in statuses
        assert not done or victims.finished() == victims.expected, "another cache than that of an undisturbed run"
    return {**counts, "most_threads": most_threads, "seconds_undisturbed": round(seconds, 3)}


if __name__ == "__main__":
    assert transformers.models.gpt2.modeling_gpt2
    assert zarr
    print(json.dumps(loop(Victims(*map(Path, sys.argv[1:4])), int(sys.argv[4]))))
