"""What several test files share: installed commands, a small real cache, tiny random teachers."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.caches import known as known_cache
from support.clusters.slurm import running_slurm, slurm  # noqa: F401
from support.commands import LIBRARY, Run, command, environment, in_process

# Fixtures that several files use; pytest finds them by name.
from support.servers.s3 import cached_here, ceph, ceph_bucket, moto, moto_bucket  # noqa: F401

# A parent such as nohup or cron ignores these signals, and every process of a test would inherit that.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# Runs of several processes are compared to the last bit, which depends on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The servers of the tests are on this machine: a proxy is not to be asked for them.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1,localhost")))


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage: accelerate collects it at every training run, in 0.4 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _local_copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Local copies of remote shards go into a folder of the tests, not into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGIT_CACHE_LOCAL_DIR", str(tmp_path_factory.mktemp("local-copies")))
        yield


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a command in this process; the result has stdout, stderr and returncode."""
    return in_process


@pytest.fixture(scope="session")
def installed() -> Run:
    """Runs an installed console script as a process of its own; the result has stdout, stderr and returncode."""

    def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, cwd=cwd, env=environment(), timeout=900, check=False
        )

    return call


@pytest.fixture(scope="session")
def known_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `known_cache`, complete. To be read only."""
    path = tmp_path_factory.mktemp("known") / "cache"
    known_cache.write_whole(path)
    return path


@pytest.fixture
def source(known_whole: Path, tmp_path: Path) -> Path:
    """A copy of it in the test's own folder."""
    return Path(shutil.copytree(known_whole, tmp_path / "source"))


@pytest.fixture
def encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of `known_cache` are encoded once, for tests that write the same few thousands of times."""
    monkeypatch.setattr("storage.format.shard.encode_shard", known_cache.encode_once)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 kB of real text: source files of the standard library."""
    path = tmp_path_factory.mktemp("text") / "library.txt"
    names = ("textwrap.py", "heapq.py", "bisect.py")
    path.write_text("".join((LIBRARY / name).read_text(encoding="utf-8")[:14_000] for name in names), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory, text_file: Path, run: Run) -> Path:
    """A token stream of that text with a tokenizer of 400 ids. Copy it before writing to it."""
    path = tmp_path_factory.mktemp("small") / "cache"
    done = run("logit-cache", "tokenize", "--text", text_file, "--train-tokenizer", 400, "--out", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    """A copy of it in the test's own folder."""
    return Path(shutil.copytree(small_cache, tmp_path / "cache"))


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a random GPT-2 with spread-out logits; another seed gives other weights."""

    def make(seed: int = 0, vocabulary_size: int = 400, **config: object) -> Path:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3, **config}
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary_size, bos_token_id=1, eos_token_id=2, **settings))
        path = tmp_path_factory.mktemp("teacher") / f"gpt2-{seed}"
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def teacher(make_teacher: Callable[..., Path]) -> Path:
    """A random GPT-2 whose head has the 400 columns of `small_cache`'s tokenizer."""
    return make_teacher()


@pytest.fixture(scope="session")
def slow_teacher(make_teacher: Callable[..., Path]) -> Path:
    """Like it, but it takes a moment for a shard: long enough to be killed at."""
    return make_teacher(3, n_embd=128, n_layer=6, n_head=4)
