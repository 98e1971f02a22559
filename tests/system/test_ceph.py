"""Against a real S3 server, Ceph's gateway: what moto waves through is refused here. `make test-ceph` runs these.

Races, kills, wrong credentials, and uploads that are damaged on their way; the whole pipeline is in `test_s3`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.caches.small import make_corpus, make_entry, random_stream, write_entry
from support.commands import PYTHONPATH, ROOT, command, environment, refused
from support.servers.fault_proxy import Fault, FaultProxy
from support.servers.s3 import Bucket, use

from storage import LogitCache
from storage.cache.verify import verify
from storage.stores.doctor import examine, safe_to_write

pytestmark = pytest.mark.ceph

RACERS, ROUNDS = 8, 20
# One process of a race: for every line that it reads, it creates an object that seven others create too.
RACE = """
import sys
from storage.stores import open_store
store, me = open_store(sys.argv[1]), int(sys.argv[2])
store.size("warm")
print("ready", flush=True)
for line in sys.stdin:
    print(store.create(f"race/{int(line)}", bytes([me]) * 20_000), flush=True)
"""


def test_of_eight_processes_that_create_one_object_one_wins(ceph_bucket: Bucket) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, ceph_bucket.url, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env=environment(),
        )
        for number in range(RACERS)
    ]
    assert [answer(process) for process in processes] == ["ready"] * RACERS
    winners = []
    for number in range(ROUNDS):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{number}\n")
        said = [answer(process) for process in processes]
        assert sorted(said) == ["False"] * (RACERS - 1) + ["True"]
        winners.append(said.index("True"))
    for process in processes:
        process.communicate(timeout=60)
    assert ceph_bucket.objects("race/") == {str(n): bytes([winner]) * 20_000 for n, winner in enumerate(winners)}
    assert len(set(winners)) > 1, "it was a race"


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("kills", [8, pytest.param(30, marks=pytest.mark.soak)])
def test_kill_minus_nine(ceph_bucket: Bucket, small_cache: Path, teacher: Path, tmp_path: Path, kills: int) -> None:
    """Killed while it works, by one worker or two on the same shards, then finished: nothing lost, the same bytes."""
    done = subprocess.run(
        [sys.executable, "tests/support/programs/ceph_kill_loop.py", ceph_bucket.url, small_cache, teacher, tmp_path,
         str(kills)],
        capture_output=True, text=True, cwd=ROOT, timeout=1800, check=False,
        env={**environment(), "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["kills"] >= kills
    assert found["kills_after_a_commit"] >= kills // 3
    assert found["kills_with_leftovers"] > 0
    assert found["most_threads"] == 1


WRONG = {
    "a wrong secret": ({"AWS_SECRET_ACCESS_KEY": "a-wrong-secret-of-somebody"}, "access refused"),
    "an unknown key": ({"AWS_ACCESS_KEY_ID": "NOBODY"}, "access refused"),
    "none at all": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "redential"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_credentials_are_refused_in_one_line(
    ceph_bucket: Bucket, small_cache: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    url = ceph_bucket.upload(small_cache, "cache")
    before = ceph_bucket.objects()
    changes, word = WRONG[case]
    for name, value in changes.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials of whoever runs the test
    tokenizer = ("--tokenizer", small_cache / "tokenizer")
    for arguments in (
        ("logit-cache", "inspect", url),
        ("logit-cache", "verify", url),
        ("logit-cache", "doctor", url),
        ("logit-cache", "tokenize", "--text", text_file, *tokenizer, "--out", f"{ceph_bucket.url}/new"),
    ):
        began = time.monotonic()
        done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(), check=False)
        seconds = time.monotonic() - began
        refused(done, word, ceph_bucket.url)
        assert seconds < 10, arguments
        secrets = [ceph_bucket.server.secret, *(value for value in changes.values() if value)]
        assert not [secret for secret in secrets if secret in done.stdout + done.stderr and secret != "NOBODY"]
    assert ceph_bucket.objects() == before
    assert not list(tmp_path.rglob("*.json"))


def test_what_the_server_guarantees(ceph_bucket: Bucket) -> None:
    found = examine(f"{ceph_bucket.url}/runs")
    assert safe_to_write(found)
    assert [finding for finding in found if finding.state == "not"] == []
    assert {finding.name for finding in found if finding.state == "ok"} >= {
        "create only if absent", "damaged uploads refused", "atomic overwrite",
    }  # fmt: skip
    assert ceph_bucket.objects() == {}


def test_uploads_damaged_or_unanswered_on_their_way(ceph_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses what does not match its signature, and the upload is repeated; a lost answer is no loss."""
    vocabulary, positions, k = 101, 1024, 12
    tokens, targets = random_stream(vocabulary, positions, k)
    url = f"{ceph_bucket.url}/cache"
    with FaultProxy(ceph_bucket.server.url) as proxy:
        use(monkeypatch, ceph_bucket.server, proxy.url)
        record = make_corpus(url, tokens, vocabulary)
        proxy.faults += [
            Fault("flipped upload", "PUT", "/token_ids/c/0", count=1),
            Fault("flipped upload", "PUT", "/receipts/00000001", count=1),
            Fault("lost", "PUT", "/kept/c/1", count=1),
            Fault("lost", "PUT", "/receipts/00000002", count=1),
            Fault("reset", "PUT", "/entropy/c/2", count=2),
        ]
        write_entry(url, "a", make_entry(record, k, shard_tokens=256, chunk_tokens=128, encoding="float32"), targets)
        assert [fault.hits for fault in proxy.faults] == [1, 1, 1, 1, 2]
    use(monkeypatch, ceph_bucket.server)
    assert verify(url, deep=True).sound
    assert np.array_equal(LogitCache.open(url).teacher("a").read(0, positions).logprobs, targets.logprobs)
