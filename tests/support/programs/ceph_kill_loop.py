"""Kills `cache-logits` at work on an S3 server, over and over; `test_ceph` starts it as a process.

    python tests/support/programs/ceph_kill_loop.py s3://BUCKET CACHE TEACHER FOLDER KILLS

As in `kill_loop`, children are forked from a parent that has imported everything and has one thread; the parent looks
into the bucket with a client that has none either. Prints its counts as JSON; any fault ends it with an error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import s3fs  # noqa: F401  the parent pays for the imports, once
from support.programs.kill_loop import NAME, Victims, loop
from support.servers.s3 import Bucket, Server

import storage.cache.leases
from storage.cache.verify import verify

# Leases lie beside receipts, and go away while workers work.
RECEIPT = r"\d{8}\.json"


class InBucket(Victims):
    """Caches in a bucket, each under a prefix of its own."""

    # A small report: most of the time is to be spent on shards, which a kill can interrupt.
    arguments = (*Victims.arguments, "--shard-tokens", "1024", "--fidelity-positions", "64")
    pause = 0.15

    def __init__(self, bucket: Bucket, cache: Path, teacher: Path, folder: Path) -> None:
        super().__init__(cache, teacher, folder)
        self.bucket, self.lease, self.prefix = bucket, storage.cache.leases.LEASE_SECONDS, ""
        self.truth = {path.name: digests(path.read_bytes()) for path in self.receipts_in(self.whole)}
        self.seconds = self.time(bucket.upload(cache, "undisturbed"))

    def begin(self, number: int) -> None:
        self.url = self.bucket.upload(self.cache, f"victim-{number}")
        self.prefix = f"victim-{number}/teachers/{NAME}/"

    def start(self, workers: int) -> list[int]:
        # With two workers no lease holds; a single one finds that the leases of killed workers have ended.
        storage.cache.leases.LEASE_SECONDS = 0.0 if workers == 2 else self.lease
        return super().start(workers)

    def receipts(self) -> dict[str, bytes]:
        return self.bucket.objects(f"{self.prefix}receipts/", RECEIPT)

    def commits(self) -> int:
        return len(self.bucket.keys(f"{self.prefix}receipts/", RECEIPT))

    def has_leftovers(self) -> bool:
        started = {key.split("/c/")[1].split("/")[0] for key in self.bucket.keys(self.prefix) if "/c/" in key}
        return len(started) > self.commits()

    def check(self) -> None:
        """Check that every object matches the digest in its receipt, and is that of an undisturbed run."""
        found = verify(self.url, deep=True, workers=4)
        assert found.sound, found.problems
        for name, data in self.receipts().items():
            assert digests(data) == self.truth[name], "a shard of other bytes"

    def finished(self) -> dict[str, bytes]:
        stored = self.bucket.objects(self.prefix)
        return {key: data for key, data in stored.items() if not key.startswith("receipts/")}


def digests(receipt: bytes) -> object:
    """The objects that a receipt lists; its time and host differ from run to run."""
    return json.loads(receipt)["objects"]


if __name__ == "__main__":
    server = Server(*(os.environ[f"AWS_{name}"] for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")))
    bucket = Bucket(server, sys.argv[1].removeprefix("s3://"))
    print(json.dumps(loop(InBucket(bucket, *map(Path, sys.argv[2:5])), int(sys.argv[5]))))
