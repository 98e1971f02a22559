"""S3 servers for tests, and what a test does to them.

`moto` is a fake: it shows that requests are formed and answered as S3 does, and proves nothing about authentication,
checksums or races, all of which it waves through. `ceph` is a real server (`tests/support/scripts/ceph_rgw.sh`), for
the tests marked so. `bucket` fixtures set the environment, so that commands started by a test reach the same server.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.caches.known import contents
from support.processes import start

from storage.cache.leases import leased_shard

REGION = "us-east-1"
# Of `cache-logits`, on the cache `small_cache`.
SMALL = ("--context-tokens", 64, "--shard-tokens", 2048, "-k", 24)


@dataclass(frozen=True)
class Server:
    """Where an S3 server listens and who may use it."""

    url: str
    key: str
    secret: str

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What the standard chain reads; `endpoint` is where to send requests instead, such as a proxy."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A plain client of another library than the one that the package uses."""
        client = _session().create_client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name=REGION,
        )
        with contextlib.closing(client):
            yield client


@functools.cache
def _session() -> Any:
    """One session makes all clients: it reads their descriptions once."""
    import botocore.session

    return botocore.session.get_session()


@dataclass(frozen=True)
class Bucket:
    """A bucket of one test."""

    server: Server
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def keys(self, prefix: str = "", only: str = "") -> list[str]:
        """The keys below a prefix, the prefix left out; `only`: a pattern that what is left has to match."""
        with self.server.client() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
            found = [item["Key"][len(prefix) :] for page in pages for item in page.get("Contents", ())]
        return [key for key in found if re.fullmatch(only or ".*", key)]

    def objects(self, prefix: str = "", only: str = "") -> dict[str, bytes]:
        """The objects with those keys."""
        keys = self.keys(prefix, only)
        with self.server.client() as client:
            return {key: client.get_object(Bucket=self.name, Key=prefix + key)["Body"].read() for key in keys}

    def put(self, key: str, data: bytes) -> None:
        """Write an object past the package."""
        with self.server.client() as client:
            client.put_object(Bucket=self.name, Key=key, Body=data)

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a local cache into the bucket, past the package; returns its URL."""
        with self.server.client() as client:
            for key, data in sorted(contents(folder).items()):
                client.put_object(Bucket=self.name, Key=f"{prefix}/{key}", Body=data)
        return f"{self.url}/{prefix}"


def forget_connections() -> None:
    """Make the next access to S3 in this process read the environment again."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def use(monkeypatch: pytest.MonkeyPatch, server: Server, endpoint: str | None = None) -> None:
    """Point this process, and the commands that it starts, to a server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    forget_connections()


def new_bucket(server: Server) -> Bucket:
    """A fresh bucket with a random name."""
    bucket = Bucket(server, f"test-{secrets.token_hex(6)}")
    with server.client() as client:
        client.create_bucket(Bucket=bucket.name)
    return bucket


def remove_bucket(bucket: Bucket) -> None:
    """The bucket and all that is in it."""
    keys = bucket.keys()
    with bucket.server.client() as client:
        for key in keys:
            client.delete_object(Bucket=bucket.name, Key=key)
        client.delete_bucket(Bucket=bucket.name)


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[Any], seconds: float = 60) -> None:
    """Until something answers at a URL; fails when the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"nothing answered at {url}; exit status {process.poll()}")


def no_leases(keys: Iterable[str]) -> list[str]:
    """All keys but those of leases: a worker that is killed right after a commit leaves one."""
    return [key for key in keys if leased_shard(key.rsplit("/", 1)[-1]) is None]


def assert_same_cache(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same keys; the same bytes but for the times and hosts in receipts, whose digests of objects are the same."""
    found = {key: found[key] for key in no_leases(found)}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, data in expected.items():
        if "receipts/" in key:
            if not key.endswith("index.json"):
                one, other = json.loads(found[key]), json.loads(data)
                assert one.get("objects") == other.get("objects"), key
                assert one.get("files") == other.get("files"), key
        else:
            assert found[key] == data, key


def kill_after_a_receipt(bucket: Bucket, *arguments: object) -> None:
    """Run a command and kill it as soon as the first shard is committed and the next is being written."""
    process = start(*arguments)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        keys = bucket.keys("cache/teachers/a/")
        if any(key.startswith("receipts/0") for key in keys) and any("/c/1" in key for key in keys):
            break
        time.sleep(0.01)
    assert process.poll() is None, "it was killed in the middle of its work"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def cached_here(
    small_cache: Path, slow_teacher: Path, run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a server must hold after the same commands: `small_cache` with an entry `a`, made on a local disk."""
    path = Path(shutil.copytree(small_cache, tmp_path_factory.mktemp("here") / "cache"))
    done = run("cache-logits", "--cache", path, "--teacher", slow_teacher, "--name", "a", *SMALL)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    """A moto server in a process of its own."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        # Short pages, so that every listing of some length has several.
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "20"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process)
        yield Server(url, "MOTOKEY", "MOTOSECRET")
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def moto_bucket(moto: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """A fresh bucket on moto, the environment that leads to it, and an empty folder for fetched shards."""
    yield from _bucket(moto, monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def ceph() -> Server:
    """The running Ceph gateway of `make test-ceph`."""
    port = int(os.environ.get("CEPH_PORT", "9501"))
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)):
            pytest.fail(f"no Ceph gateway on port {port}: make test-ceph starts one")
    return Server(f"http://127.0.0.1:{port}", "TESTKEY", "TESTSECRET")


@pytest.fixture
def ceph_bucket(ceph: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """A fresh bucket on Ceph, the environment that leads to it, and an empty folder for fetched shards."""
    yield from _bucket(ceph, monkeypatch, tmp_path)


def _bucket(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    use(monkeypatch, server)
    monkeypatch.setenv("LOGIT_CACHE_LOCAL_DIR", str(tmp_path / "fetched"))
    bucket = new_bucket(server)
    yield bucket
    remove_bucket(bucket)
