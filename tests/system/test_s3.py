"""A cache on an object store does what one on a local disk does: the whole pipeline by commands, on moto and on Ceph.

moto accepts any credentials and checksums: what shows those is in `test_ceph`. Other stores that fsspec reaches come
last: a plain web server.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.caches.known import contents
from support.caches.small import make_corpus, make_entry, random_stream, write_entry
from support.commands import Run, command, environment, refused
from support.runs import LLAMA, python, weights
from support.servers.fault_proxy import FaultProxy
from support.servers.s3 import SMALL, Bucket, Server, assert_same_cache, kill_after_a_receipt, no_leases, use
from support.servers.web import serving

from storage import LogitCache, SparseTargets
from storage.cache.verify import verify
from storage.errors import LogitCacheError, StoreUnavailable

V, N, K = 101, 1200, 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SparseTargets]:
    """A small local cache with an entry `a`, and what is in it."""
    path = tmp_path_factory.mktemp("made") / "cache"
    tokens, targets = random_stream(V, N, K)
    record = make_corpus(str(path), tokens, V)
    write_entry(path, "a", make_entry(record, K, shard_tokens=256, chunk_tokens=128), targets)
    return path, targets


def cached(opened: LogitCache) -> SparseTargets:
    return opened.teacher("a").read(0, len(opened.teacher("a")))


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """A bucket on the server that the test names."""
    found: Bucket = request.getfixturevalue(f"{request.param}_bucket")
    return found


CEPH = pytest.param("ceph", marks=pytest.mark.ceph)
MOTO_SLOWLY = pytest.param("moto", marks=pytest.mark.slow)


@pytest.mark.parametrize("bucket", ["moto", CEPH], indirect=True)
def test_the_whole_road_by_commands(
    bucket: Bucket, cached_here: Path, slow_teacher: Path, text_file: Path, run: Run, tmp_path: Path
) -> None:
    url, said = f"{bucket.url}/cache", []

    def do(*arguments: object, status: int = 0) -> str:
        done = run(*arguments)
        said.append(done.stdout + done.stderr)
        assert done.returncode == status, said[-1]
        return done.stdout

    do("logit-cache", "tokenize", "--text", text_file, "--train-tokenizer", 400, "--out", url)
    arguments = ("cache-logits", "--cache", url, "--teacher", slow_teacher, "--name", "a", *SMALL)
    kill_after_a_receipt(bucket, *arguments)
    left = LogitCache.open(url).teacher("a").missing()
    assert left
    assert left[0][0] > 0
    assert json.loads(do(*arguments, "--json"))["complete"]
    objects = bucket.objects("cache/")
    assert_same_cache(objects, contents(cached_here))

    stored = LogitCache.open(str(cached_here)).teacher("a").stored_bytes()
    assert json.loads(do("logit-cache", "inspect", url, "--json"))["teachers"]["a"]["stored_bytes"] == stored
    found = json.loads(do("logit-cache", "verify", url, "--deep", "--json"))
    assert (found["problems"], no_leases(found["leftovers"]), found["missing"]) == ([], [], {})

    bucket.put("cache/teachers/a/entropy_code/c/1", objects["teachers/a/entropy_code/c/0"])
    (problem,) = json.loads(do("logit-cache", "verify", url, "--json", status=1))["problems"]
    assert "teachers/a/entropy_code/c/1" in problem
    assert_no_credentials(bucket.server, tmp_path, *said, *objects.values())


def assert_no_credentials(server: Server, folder: Path, *printed_or_stored: str | bytes) -> None:
    """Neither key nor secret in what was printed, stored or left in a folder."""
    words = [server.secret.encode(), server.key.encode()]
    for data in (*printed_or_stored, *(path.read_bytes() for path in folder.rglob("*") if path.is_file())):
        found = data.encode() if isinstance(data, str) else data
        assert not [word for word in words if word in found], found[:2000]


@pytest.mark.parametrize("bucket", [MOTO_SLOWLY, CEPH], indirect=True)
def test_two_workers_at_once(bucket: Bucket, small_cache: Path, cached_here: Path, slow_teacher: Path) -> None:
    url = bucket.upload(small_cache, "cache")
    arguments = ("cache-logits", "--cache", url, "--teacher", slow_teacher, "--name", "a", *SMALL)
    workers = [subprocess.Popen(command(*arguments, "--worker", f"{i}/2"), env=environment()) for i in range(2)]
    # A credential in an argument could be read by every user of the machine.
    for worker in workers:
        assert bucket.server.secret.encode() not in Path(f"/proc/{worker.pid}/cmdline").read_bytes()
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    assert_same_cache(bucket.objects("cache/"), contents(cached_here))


@pytest.mark.parametrize("bucket", [MOTO_SLOWLY, CEPH], indirect=True)
def test_a_student_learns_the_same_from_s3(bucket: Bucket, cached_here: Path, run: Run, tmp_path: Path) -> None:
    url = bucket.upload(cached_here, "cache")
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    # From S3 by a process of its own, forked after the cache was opened: connections do not survive that.
    for place, name, workers in ((str(cached_here), "here", 0), (url, "there", 1)):
        done = run(
            "train-student", "--cache", place, "--teacher", "a", "--model", tmp_path / "llama.json", "--output-dir",
            tmp_path / name, "--window-tokens", 32, "--seed", 3, "--set", "max_steps=4",
            "--set", f"dataloader_num_workers={workers}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    here, there = weights(tmp_path / "here"), weights(tmp_path / "there")
    assert here.keys() == there.keys()
    assert all((here[name] == there[name]).all() for name in here)
    assert (tmp_path / "fetched").exists()
    assert_no_credentials(bucket.server, tmp_path, done.stdout, done.stderr)


def test_a_shard_moves_in_one_request(
    moto_bucket: Bucket, made: tuple[Path, SparseTargets], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, targets = made
    with FaultProxy(moto_bucket.server.url) as proxy:
        use(monkeypatch, moto_bucket.server, proxy.url)
        url = moto_bucket.upload(path, "cache")
        opened = LogitCache.open(url)
        assert np.array_equal(cached(opened).token_ids, targets.token_ids)
        for name in opened.teacher("a").specs:
            for shard in range(opened.teacher("a").receipts.shards):
                gets = proxy.matching("GET", rf"/teachers/a/{name}/c/{shard}(/0)?$")
                assert len(gets) == 1, (name, shard, gets)

        proxy.reset()
        assert verify(url, deep=True).sound
        gets = proxy.matching("GET", r"/c/")
        assert len(gets) == len({get.target for get in gets}) == 2 + 5 * len(opened.teacher("a").specs)

        proxy.reset()
        copy = f"{moto_bucket.url}/copy"
        record = make_corpus(copy, LogitCache.open(url).tokens.read(0, N), V)
        entry = make_entry(record, K, shard_tokens=256, chunk_tokens=128)
        write_entry(copy, "a", entry, targets)
        puts = proxy.matching("PUT", r"/c/")
        assert len(puts) == len({put.target for put in puts}) == 2 + 5 * len(opened.teacher("a").specs)
        assert not proxy.matching("POST", r"uploads")


def test_writing_into_a_bucket_that_is_not_there(moto_bucket: Bucket) -> None:
    url = f"s3://nowhere-at-all-{uuid.uuid4().hex}/cache"
    with pytest.raises(StoreUnavailable, match="there is no such bucket"):
        make_corpus(url, np.arange(9, dtype=np.uint16), 11)


def test_s3_without_its_package() -> None:
    done = python("-c", "import sys; sys.modules['s3fs'] = None; from logit_cache.cli.main import main; "
                  "main(['inspect', 's3://bucket/cache'])")  # fmt: skip
    refused(done, "pip install 'logit-cache[s3]'")


@pytest.fixture
def web(made: tuple[Path, SparseTargets], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL at which a plain web server, which lists nothing, serves that cache."""
    monkeypatch.setenv("LOGIT_CACHE_LOCAL_DIR", str(tmp_path))
    with serving(made[0].parent) as (url, _):
        yield f"{url}/cache"


def test_reading_from_a_plain_web_server(web: str, made: tuple[Path, SparseTargets], run: Run) -> None:
    opened = LogitCache.open(web)
    assert np.array_equal(cached(opened).logprobs, cached(LogitCache.open(str(made[0]))).logprobs)
    assert np.array_equal(opened.tokens.read(5, 99), LogitCache.open(str(made[0])).tokens.read(5, 99))
    with pytest.raises(LogitCacheError):
        opened.teacher("b")
    done = run("logit-cache", "verify", web)
    assert "Traceback" not in done.stderr
    refused(run("logit-cache", "tokenize", "--text", __file__, "--train-tokenizer", 300, "--out", web + "2"))
