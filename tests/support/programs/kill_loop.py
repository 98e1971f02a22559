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
from collections.abc import Callable
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
ARGUMENTS = ("--name", NAME, "-k", "16", "--context-tokens", "32", "--shard-tokens", "512", "--chunk-tokens", "256")


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


def run(cache: Path, teacher: Path) -> Callable[[], object]:
    return lambda: cache_logits(["--cache", str(cache), "--teacher", str(teacher), *ARGUMENTS])


def receipts(cache: Path) -> dict[str, bytes]:
    """The receipts that exist now; a file that a child removes meanwhile is not one."""
    folder = cache / "teachers" / NAME / "receipts"
    found = {}
    for path in folder.glob("????????.json"):
        found[path.name] = path.read_bytes()
    return found


def wait_for_commit(commits: Callable[[], int], before: int, children: list[int]) -> None:
    """Until there are more commits than `before`, or a child has ended."""
    while commits() <= before:
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) for child in children):
            return
        time.sleep(0.001)


def objects(cache: Path) -> dict[str, bytes]:
    """The files that are equal in every run: without receipts, which hold times, and leftovers of a killed writer."""
    folder = cache / "teachers" / NAME
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.parent.name != "receipts"}


def check(cache: Path, whole: Path) -> None:
    """Check that no object is damaged, and that readable shards equal those of an undisturbed run."""
    found = verify(str(cache), deep=True, workers=1)
    committed = receipts(cache)
    assert found.sound, found.problems
    if not (cache / "teachers" / NAME / "zarr.json").exists():
        return
    truth, ours = (LogitCache.open(str(path)).teacher(NAME) for path in (whole, cache))
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


def loop(cache: Path, teacher: Path, folder: Path, kills: int) -> dict[str, object]:
    chance = random.Random(0)
    log = folder / "log"
    whole = Path(shutil.copytree(cache, folder / "whole"))
    began = time.monotonic()
    call(run(whole, teacher), log)
    seconds = time.monotonic() - began
    expected = objects(whole)
    counts = {"kills": 0, "kills_after_a_commit": 0, "kills_with_leftovers": 0, "rounds": 0, "caches": 0}
    most_threads = 0
    victim, acknowledged = folder / "victim", {}
    while counts["kills"] < kills or victim.exists():
        if not victim.exists():
            shutil.copytree(cache, victim)
            acknowledged = {}
            counts["caches"] += 1
        counts["rounds"] += 1
        before = len(receipts(victim))
        # Every third time two workers do the same shards at once.
        workers = 2 if counts["rounds"] % 3 == 0 else 1
        most_threads = max(most_threads, threads())
        children = [fork(run(victim, teacher), folder / f"log{n}") for n in range(workers)]
        if counts["kills"] < kills:
            # Every other time the clock starts at a commit: how far a run gets in a given time depends on the machine.
            if counts["rounds"] % 2:
                wait_for_commit(lambda: len(receipts(victim)), before, children)
                time.sleep(chance.uniform(0.0, 0.3) * seconds * workers)
            else:
                time.sleep(chance.uniform(0.1, 0.7) * seconds * workers)
        else:
            for child in children:
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        acknowledged |= receipts(victim)
        for child in children:
            os.kill(child, signal.SIGKILL)
        statuses = [wait(child) for child in children]
        for number, status in enumerate(statuses):
            assert status in (0, -signal.SIGKILL), (status, (folder / f"log{number}").read_text())
        found = receipts(victim)
        assert found.items() >= acknowledged.items(), "an acknowledged shard is gone, or another one"
        acknowledged = found
        counts["kills"] += sum(status < 0 for status in statuses)
        counts["kills_after_a_commit"] += sum(status < 0 for status in statuses) if len(found) > before else 0
        counts["kills_with_leftovers"] += any(victim.rglob("*.partial"))
        call(lambda: check(victim, whole), log)
        if 0 in statuses:
            assert objects(victim) == expected, "another cache than that of an undisturbed run"
            shutil.rmtree(victim)
    return {**counts, "most_threads": most_threads, "seconds_undisturbed": round(seconds, 3)}


if __name__ == "__main__":
    assert transformers.models.gpt2.modeling_gpt2
    assert zarr
    print(json.dumps(loop(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
