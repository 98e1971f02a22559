"""Kills `cache-logits` at work on an S3 server, over and over; `test_ceph` starts it as a process.

    python tests/support/programs/ceph_kill_loop.py s3://BUCKET CACHE TEACHER FOLDER KILLS

As in `kill_loop`, children are forked from a parent that has imported everything and has one thread; the parent looks
into the bucket with a client that has none either. Prints its counts as JSON; any fault ends it with an error.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import s3fs  # noqa: F401  the parent pays for the imports, once
from support.programs import kill_loop
from support.programs.kill_loop import ARGUMENTS, NAME, call, fork, wait, wait_for_commit
from support.servers.s3 import Bucket, Server

import storage.cache.leases
from logit_cache.cli.main import cache_logits
from storage.cache.verify import verify


def run(cache: str, teacher: Path) -> object:
    # A small report: most of the time is to be spent on shards, which a kill can interrupt.
    more = ("--shard-tokens", "1024", "--fidelity-positions", "64")
    return cache_logits(["--cache", cache, "--teacher", str(teacher), *ARGUMENTS, *more])


# Leases lie beside receipts, and go away while workers work.
RECEIPT = r"\d{8}\.json"


def receipts(bucket: Bucket, prefix: str) -> dict[str, bytes]:
    return bucket.objects(f"{prefix}/teachers/{NAME}/receipts/", RECEIPT)


def count_receipts(bucket: Bucket, prefix: str) -> int:
    return len(bucket.keys(f"{prefix}/teachers/{NAME}/receipts/", RECEIPT))


def names(whole: Path) -> list[str]:
    return [path.name for path in (whole / "teachers" / NAME / "receipts").glob("????????.json")]


def digests(receipt: bytes) -> object:
    """The objects that a receipt lists; its time and host differ from run to run."""
    return json.loads(receipt)["objects"]


def check(cache: str) -> None:
    """Check that every object matches the digest in its receipt."""
    found = verify(cache, deep=True, workers=4)
    assert found.sound, found.problems


def loop(bucket: Bucket, cache: Path, teacher: Path, folder: Path, kills: int) -> dict[str, object]:
    chance = random.Random(0)
    log = folder / "log"
    whole = Path(shutil.copytree(cache, folder / "whole"))
    call(lambda: run(str(whole), teacher), log)
    expected = kill_loop.objects(whole)
    truth = {name: digests((whole / "teachers" / NAME / "receipts" / name).read_bytes()) for name in names(whole)}
    url = bucket.upload(cache, "undisturbed")
    began = time.monotonic()
    call(lambda: run(url, teacher), log)
    seconds = time.monotonic() - began
    counts = {"kills": 0, "kills_after_a_commit": 0, "kills_with_leftovers": 0, "two_at_once": 0, "caches": 0}
    rounds, most_threads, lease = 0, 0, storage.cache.leases.LEASE_SECONDS
    done = True
    while counts["kills"] < kills or not done:
        if done:
            counts["caches"] += 1
            prefix, done, acknowledged = f"victim-{counts['caches']}", False, {}
            url = bucket.upload(cache, prefix)
        rounds += 1
        before = len(acknowledged)
        commits = partial(count_receipts, bucket, prefix)
        # Every third time two workers do the same shards at once.
        workers = 2 if rounds % 3 == 0 else 1
        counts["two_at_once"] += workers == 2
        # With two workers no lease holds; a single one finds that the leases of killed workers have ended.
        storage.cache.leases.LEASE_SECONDS = 0.0 if workers == 2 else lease
        most_threads = max(most_threads, kill_loop.threads())
        work = partial(run, url, teacher)
        children = [fork(work, folder / f"log{n}") for n in range(workers)]
        if counts["kills"] < kills:
            # Every other time the clock starts at a commit: a job on a store spends its first moments without commits.
            if rounds % 2:
                wait_for_commit(commits, before, children)
                time.sleep(chance.uniform(0.0, 0.15) * seconds * workers)
            else:
                time.sleep(chance.uniform(0.1, 0.7) * seconds * workers)
        else:
            for child in children:
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        acknowledged |= receipts(bucket, prefix)
        for child in children:
            os.kill(child, signal.SIGKILL)
        statuses = [wait(child) for child in children]
        for number, status in enumerate(statuses):
            assert status in (0, -signal.SIGKILL), (status, (folder / f"log{number}").read_text())
        found = receipts(bucket, prefix)
        assert found.items() >= acknowledged.items(), "an acknowledged shard is gone, or another one"
        acknowledged = found
        killed = sum(status < 0 for status in statuses)
        counts["kills"] += killed
        counts["kills_after_a_commit"] += killed if len(found) > before else 0
        assert all(digests(data) == truth[name] for name, data in found.items()), "a shard of other bytes"
        if 0 in statuses:
            stored = bucket.objects(f"{prefix}/teachers/{NAME}/")
            arrays = {key: data for key, data in stored.items() if not key.startswith("receipts/")}
            assert arrays == expected, "another cache than that of an undisturbed run"
            done = True
        else:
            stored = bucket.keys(f"{prefix}/teachers/{NAME}/")
            started = {int(key.split("/c/")[1].split("/")[0]) for key in stored if "/c/" in key}
            counts["kills_with_leftovers"] += killed if len(started) > len(found) else 0
        call(partial(check, url), log)
    return {**counts, "most_threads": most_threads, "seconds_undisturbed": round(seconds, 3)}


if __name__ == "__main__":
    server = Server(*(os.environ[f"AWS_{name}"] for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")))
    bucket = Bucket(server, sys.argv[1].removeprefix("s3://"))
    print(json.dumps(loop(bucket, *map(Path, sys.argv[2:5]), int(sys.argv[5]))))
