"""`logit-cache status`: progress and speed from receipts, on every kind of store, without reading more than it must."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.small import SHA, make_corpus, make_entry
from support.commands import PYTHONPATH, TESTS, Run, command, environment, refused, succeeded
from support.servers.s3 import Bucket
from support.servers.web import serving

from logit_cache.caching.commit_rate import Commit, joint_rate, without_pauses
from logit_cache.caching.status import EntryStatus, status_of
from logit_cache.cli.status import status_line, status_text
from storage import LogitCache
from storage.cache.writer import EntryWriter
from storage.format.manifest.receipts import ObjectDigest, ShardReceipt
from storage.format.sealing import sealed_bytes
from storage.stores import open_store

N, V, K, SHARD = 1_000, 64, 8, 64  # 16 shards, the last of 40 positions
NOW = 1_750_000_000.0


def sparse(url: str, *names: str) -> None:
    """A cache with entries and not a single shard of them."""
    record = make_corpus(url, np.arange(N, dtype=np.uint16) % V, V)
    for name in names:
        EntryWriter.open(url, name, make_entry(record, K, shard_tokens=SHARD, chunk_tokens=32))


def receipt(url: str, name: str, shard: int, at: float, seconds: float = 10.0, host: str = "here") -> None:
    """Commit a shard on paper: its receipt is real, its objects are not there."""
    receipts = LogitCache.open(url).teacher(name).receipts
    objects = {
        array: ObjectDigest(bytes=spec.index_bytes, sha256=SHA, seal_sha256=SHA)
        for array, spec in receipts.specs.items()
    }
    written = ShardReceipt(
        record_sha256=receipts.record_sha256,
        shard=shard,
        start=shard * SHARD,
        stop=min((shard + 1) * SHARD, receipts.first_array.shape[0]),
        objects=objects,
        seconds=seconds,
        written_at=datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
        host=host,
    )
    assert open_store(url).publish(receipts.key(shard), sealed_bytes(written))


@pytest.fixture
def cache(tmp_path: Path) -> str:
    sparse(str(tmp_path / "cache"), "a")
    return str(tmp_path / "cache")


def one(url: str, now: float = NOW) -> EntryStatus:
    (found,) = status_of(url, ["a"], now)
    return found


def test_nothing_started(cache: str) -> None:
    found = one(cache)
    assert (found.state, found.shards_done, found.positions_done, found.shards_begun) == ("not begun", 0, 0, 0)
    assert found.positions_per_second is found.seconds_left is found.last_commit is None
    assert found.hosts == ()
    assert "0.0 %" in status_text(cache, [found])


def test_figures_of_a_running_job(cache: str) -> None:
    # Two hosts, a shard of 20 seconds each, a commit every 10 seconds, the last one 5 seconds ago.
    for number, shard in enumerate([0, 1, 2, 3, 4, 5, 6, 15]):
        receipt(cache, "a", shard, NOW - 75 + 10 * number, 20.0, "one" if number % 2 else "two")
    found = one(cache)
    assert (found.state, found.complete) == ("in progress", False)
    assert (found.shards, found.shards_done, found.shards_missing) == (16, 8, 8)
    assert found.positions_done == 7 * SHARD + 40
    assert found.share == pytest.approx(488 / N)
    # Seven shards, the last one shorter, in the 70 seconds after the first one.
    rate = (6 * SHARD + 40) / 70
    assert found.positions_per_second == pytest.approx(rate)
    assert found.positions_per_second_per_worker == pytest.approx(488 / 160)
    assert found.seconds_left == pytest.approx((N - 488) / rate)
    assert found.seconds_since_last_commit == pytest.approx(5.0)
    assert [(host.host, host.shards) for host in found.hosts] == [("one", 4), ("two", 4)]
    text = status_text(cache, [found])
    for words in ("48.8 %", "8 done, 8 missing", "488 of 1,000", "one (4 shards), two (4 shards)", "5s ago"):
        assert words in text
    assert "stalled" not in text
    assert "8 of 16 shards" in status_line(found)


def test_a_stalled_job_is_marked(cache: str) -> None:
    for shard in range(4):
        receipt(cache, "a", shard, NOW - 400 + 30 * shard, 30.0)
    # The last one came 310 seconds ago: more than ten shard times, five are allowed.
    found = one(cache)
    assert found.state == "stalled"
    assert "stalled?" in status_text(cache, [found])
    assert "stalled?" in status_line(found)
    assert one(cache, NOW - 310 + 149).state == "in progress"
    assert one(cache, NOW - 310 + 151).state == "stalled"
    # A host whose clock is ahead has not committed in the future.
    assert one(cache, NOW - 1_000).seconds_since_last_commit == 0.0


def test_a_night_between_two_runs_does_not_count(cache: str) -> None:
    for shard in range(4):
        receipt(cache, "a", shard, NOW - 40_000 + 10 * shard)
        receipt(cache, "a", 4 + shard, NOW - 35 + 10 * shard)
    found = one(cache)
    assert found.positions_per_second == pytest.approx(SHARD / 10)
    assert found.shards_done == 8


def commits(times: list[float], seconds: float = 10.0) -> list[Commit]:
    return [Commit(time, 100, seconds, "here") for time in times]


def test_the_rate_of_workers_that_started_together() -> None:
    # Eight of them, a shard each ten seconds: 80 positions a second, where 39 commits in 40 seconds would be 97.5.
    assert joint_rate(commits([10.0 * (i // 8) for i in range(40)])) == pytest.approx(80.0)
    # The same workers one after the other, every 1.25 seconds.
    assert joint_rate(commits([float(int(1.25 * i)) for i in range(64)])) == pytest.approx(80.0, rel=0.03)
    # Only one round is known of them.
    assert joint_rate(commits([0.0] * 8)) == pytest.approx(80.0)
    assert joint_rate(commits([0.0])) == pytest.approx(10.0)
    assert joint_rate(commits([0.0, 0.0], seconds=0.0)) is None
    assert without_pauses([]) == []


def test_more_receipts_are_read_where_many_workers_commit(tmp_path: Path) -> None:
    url = str(tmp_path / "many")
    record = make_corpus(url, np.arange(64 * 400, dtype=np.uint16) % V, V)
    EntryWriter.open(url, "a", make_entry(record, K, shard_tokens=SHARD, chunk_tokens=32))
    for shard in range(390):  # 130 workers, three rounds of 100 seconds
        receipt(url, "a", shard, NOW - 300 + 100 * (shard // 130), 100.0, f"node-{shard % 130}")
    found = one(url)
    # Of 64, and of 256, all lie within a round or two.
    assert found.receipts_read == 390
    assert len(found.hosts) == 130
    assert found.positions_per_second == pytest.approx(130 * SHARD / 100)
    assert "and 122 more" in status_text(url, [found])


def test_started_shards(cache: str) -> None:
    receipt(cache, "a", 0, NOW - 5)
    folder = Path(cache, "teachers/a/token_ids/c")
    for name in ("0/0", "3/0", "7/0.123-abcd.partial"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    found = one(cache)
    assert (found.shards_done, found.shards_begun) == (1, 2)
    assert "started without a receipt: 2" in status_text(cache, [found])


def test_a_damaged_receipt_is_reported(cache: str, run: Run) -> None:
    receipt(cache, "a", 2, NOW)
    path = Path(cache, "teachers/a/receipts/00000002.json")
    path.write_bytes(path.read_bytes().replace(b'"here"', b'"hare"'))
    refused(run("logit-cache", "status", cache), "00000002.json", "it was changed")
    shutil.copy(path, path.with_name("00000003.json"))
    path.unlink()
    refused(run("logit-cache", "status", cache), "00000003.json")


def test_a_host_name_cannot_steer_the_terminal(cache: str) -> None:
    receipt(cache, "a", 0, NOW, host="\x1b[2Jgone")
    assert "\x1b" not in status_text(cache, [one(cache)])


def test_memory_and_hosts_of_many_entries(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/cache"
    sparse(url, "a", "b")
    receipt(url, "b", 5, NOW - 20)
    found = status_of(url, (), NOW)
    assert [(entry.name, entry.state, entry.shards_done) for entry in found] == [
        ("a", "not begun", 0),
        ("b", "in progress", 1),
    ]


def test_by_command_on_a_disk_and_on_s3(
    moto_bucket: Bucket, cached_here: Path, small_cache: Path, run: Run, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(cached_here, tmp_path / "cache"))
    whole = LogitCache.open(str(path)).teacher("a").receipts
    empty = run("logit-cache", "status", small_cache)
    assert (empty.returncode, empty.stdout) == (0, f"{small_cache}: no teacher entry yet\n")

    (path / "teachers/a/receipts/index.json").unlink()
    (path / "teachers/a/receipts/00000001.json").unlink()
    for url in (str(path), moto_bucket.upload(path, "cache")):
        done = succeeded(run("logit-cache", "status", url, "--json"))
        found = json.loads(done.stdout)
        entry = found["teachers"]["a"]
        assert (found["url"], found["complete"], entry["complete"]) == (url, False, False)
        assert (entry["shards_done"], entry["shards_missing"], entry["shards_begun"]) == (whole.shards - 1, 1, 1)
        assert entry["receipts_read"] == whole.shards - 1
        assert entry["hosts"][0]["shards"] == whole.shards - 1
        assert entry["positions_per_second"] > 0

    for url in (str(cached_here), moto_bucket.upload(cached_here, "whole")):
        done = succeeded(run("logit-cache", "status", url, "--teacher", "a"))
        assert done.stdout.startswith("teacher a: complete\n")
        assert f"{whole.shards} done, 0 missing" in done.stdout
    refused(run("logit-cache", "status", path, "--teacher", "b"), "no teacher entry 'b'", "there is: a")
    refused(run("logit-cache", "status", tmp_path / "nowhere"), "no cache there")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL at which a plain web server, which lists nothing, serves the test's own folder."""
    with serving(tmp_path) as (url, _):
        yield f"{url}/cache"


def test_a_web_server(web: str, cache: str, run: Run) -> None:
    for shard in range(15):
        receipt(cache, "a", shard, NOW - 150 + 10 * shard)
    found = one(web)
    assert (found.state, found.shards_done, found.shards_begun) == ("not known", None, None)
    done = succeeded(run("logit-cache", "status", web, "--teacher", "a"))
    assert "not known: the server cannot list" in done.stdout
    refused(run("logit-cache", "status", web), "name the teacher entry")
    receipt(cache, "a", 15, NOW)
    LogitCache.open(cache).teacher("a").receipts.write_index()
    found = one(web)
    assert (found.state, found.positions_done, found.receipts_read) == ("complete", N, 16)


def test_no_torch(cache: str) -> None:
    code = (
        "import sys; from logit_cache.cli.main import main; "
        f"main(['status', {cache!r}], standalone_mode=False); print('torch' in sys.modules, 'zarr' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def watching(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command("logit-cache", "status", *arguments), text=True, env=environment(), **options)


def test_watching_to_the_end(cache: str) -> None:
    for shard in range(10):
        receipt(cache, "a", shard, time.time())
    process = watching(cache, "--watch", 0.1, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("a: 64.0 %, 10 of 16 shards")
    for shard in range(10, 16):
        receipt(cache, "a", shard, time.time())
    LogitCache.open(cache).teacher("a").receipts.write_index()
    lines, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert lines.splitlines()[-1] == "a: complete, 16 of 16 shards"


def test_watching_in_json(cache: str, run: Run) -> None:
    for shard in range(16):
        receipt(cache, "a", shard, time.time())
    assert json.loads(succeeded(run("logit-cache", "status", cache, "--json", "--watch")).stdout)["complete"]


def test_control_c_ends_quietly(cache: str) -> None:
    receipt(cache, "a", 0, time.time())
    process = watching(cache, "--watch", 600, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("a: 6.4 %")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 130


def test_on_a_terminal_the_text_is_rewritten(cache: str) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    for shard in range(15):
        receipt(cache, "a", shard, time.time())
    process = watching(cache, "--watch", 0.1, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    while b"15 done" not in seen:
        seen += os.read(ours, 65_536)
    receipt(cache, "a", 15, time.time())
    while True:
        try:
            piece = os.read(ours, 65_536)
        except OSError:  # on Linux: the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert b"16 done" in seen
    assert b"\x1b[1A" in seen, "the cursor goes up to write over the last text"


@pytest.mark.parametrize("which", ["incomplete", "complete"])
def test_a_hundred_billion_positions(which: str) -> None:
    """At the default layout that is 1.5 million shards, each with a receipt."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "support/programs/hundred_billion.py"), which],
        capture_output=True, text=True, env={**environment(), "PYTHONPATH": PYTHONPATH}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    status = found["status"]
    assert found["shards"] == status["shards"] == 1_525_879
    assert found["bytes"] < 20e6
    # Two records, the index or its end, and the newest receipts.
    assert found["reads"] <= 67
    assert found["listings"] == (["teachers/a/receipts"] if which == "incomplete" else [])
    if which == "incomplete":
        assert (status["shards_missing"], status["shards_begun"]) == (1_000, None)
        assert status["seconds_since_last_commit"] == pytest.approx(3.0)
        assert len(status["hosts"]) == 8
    assert status["positions_per_second"] == pytest.approx(8 * 65_536 / 20, rel=0.05)
