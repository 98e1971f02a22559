"""`cache-logits --tensor-parallel` under torchrun on CPUs: the cache of one process, and how ranks end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from support.caches import small as fakes
from support.commands import Run, command, environment, refused, succeeded
from support.jobs import refusal, whole
from support.models.saved import saver
from support.runs import ranks

from storage import LogitCache
from storage.format.targets import SparseTargets

V, N, K = 400, 6_000, 16
COMMON: dict[str, Any] = {
    "vocab_size": 417,  # padded beyond V, and no multiple of two
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**{**COMMON, "vocab_size": V}),
    "tied": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "phi": lambda: transformers.PhiConfig(**COMMON),  # an LM head with a bias
    "gemma2": lambda: transformers.Gemma2Config(  # a soft cap after the LM head
        **COMMON, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=10.0
    ),
    # More padding than the last of four ranks has columns.
    "padded": lambda: transformers.LlamaConfig(**{**COMMON, "vocab_size": 600}),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    ),
}
OPTIONS = ("-k", K, "--context-tokens", 64, "--encoding", "float32", "--fields", "all")

Save = Callable[[str], Path]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Saves a random model of a family once."""
    return saver(tmp_path_factory.mktemp("parallel"), CONFIGS)


def make_stream(path: Path, positions: int = N) -> Path:
    tokens = np.random.default_rng(0).integers(0, V, positions).astype(np.uint16)
    fakes.make_corpus(str(path), tokens, V, document_starts=np.array([0, 1_000, 1_700, 4_200]))
    return path


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return make_stream(tmp_path / "cache")


def torchrun(number: int, *arguments: object) -> list[str]:
    """`cache-logits` of these arguments on so many ranks."""
    return [*command("torchrun", "--nproc-per-node", number, "--no-python"), *command("cache-logits", *arguments)]


def ranks_run(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """All that so many ranks printed, and the first exit status that is not 0."""
    alone = {name: "01"["SIZE" in name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    variables = alone if number == 1 else {}
    done = ranks(number, None, "cache-logits", *map(str, arguments), "--tensor-parallel", **variables)
    status = next((one.returncode for one in done if one.returncode), 0)
    out, error = ("".join(getattr(one, stream) for one in done) for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess(done[0].args, status, out, error)


def one_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check for one error line of ours, whatever torchrun adds, and no traceback of ours."""
    assert done.returncode == (1 if "ChildFailedError" in done.stderr else 2), "torchrun has one status for all"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.count("Traceback") == done.stderr.count("ChildFailedError") // 1 or "elastic" in done.stderr
    assert "logit_cache/" not in done.stderr.replace(errors[0], "")
    for word in words:
        assert word in errors[0], errors[0]


def check_alike(found: SparseTargets, expected: SparseTargets, sampled: bool) -> None:
    """Check log-probs within 1e-5, ids equal but for ties, which include the border of two ids under a tooth."""
    for name in ("log_tail", "log_tail_half", "label_logprob", "entropy"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if name.startswith("log_tail"):
            ours, theirs = ours[found.certain == expected.certain], theirs[found.certain == expected.certain]
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert (found.certain == expected.certain).mean() > 0.999
    if not sampled:
        swapped = found.token_ids != expected.token_ids
        assert swapped.any(axis=1).mean() < 0.03
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
        return
    (ids, logprobs), (theirs, of_theirs) = by_id(found), by_id(expected)
    alike = (ids == theirs).all(axis=1)
    assert alike.mean() > 0.998, "another id only where a tooth falls on the border of two"
    np.testing.assert_allclose(logprobs[alike], of_theirs[alike], atol=1e-5, rtol=1e-5)


def by_id(targets: SparseTargets) -> tuple[np.ndarray, np.ndarray]:
    """Ids and their log-probs in the order of the ids, in which ties of log-probs do not matter."""
    order = targets.token_ids.argsort(axis=1)
    return np.take_along_axis(targets.token_ids, order, 1), np.take_along_axis(targets.logprobs, order, 1)


def cached(run: Run, number: int, stream: Path, teacher: Path, *options: object) -> None:
    """Build an entry by one process and by several ranks; check that they are complete, sound, and alike."""
    succeeded(run("cache-logits", "--cache", stream, "--teacher", teacher, "--name", "one", *OPTIONS, *options))
    done = succeeded(ranks_run(number, "--cache", stream, "--teacher", teacher, "--name", "ranks", *OPTIONS, *options))
    assert done.stdout.count("ranks has 6,000 of 6,000 positions") == 1, "rank 0 alone prints"
    assert done.stderr.count("fidelity of ranks: ") == 1
    succeeded(run("logit-cache", "verify", stream, "--deep"))
    entry, found = whole(stream, "ranks")
    of_one, expected = whole(stream, "one")
    assert entry.entry.execution == of_one.entry.execution.model_copy(update={"tensor_parallel": number})
    assert entry.entry.teacher == of_one.entry.teacher
    check_alike(found, expected, entry.entry.targets.method == "varopt")
    report, of_one_report = entry.fidelity(), of_one.fidelity()
    assert report is not None
    assert of_one_report is not None
    assert report.residual_mass.mean == pytest.approx(of_one_report.residual_mass.mean, rel=0.05)


def test_two_ranks_give_the_cache_of_one_process(run: Run, stream: Path, save: Save) -> None:
    cached(run, 2, stream, save("llama"), "--shard-tokens", 2_048)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "family", "options"),
    [
        (2, "llama", ("--targets", "topk", "--isolate-documents")),
        (2, "llama", ("--stride-tokens", 32, "--target-temperature", 2, "--head-ids", 4)),
        (2, "qwen2", ()),
        (2, "llama", ("--order", "embeddings", "--sampling", "pivotal")),
        (2, "tied", ("--targets", "topk", "--top-p", 0.9)),
        (2, "phi", ()),
        (2, "gemma2", ()),
        (4, "padded", ("-k", 300)),  # more than a rank's columns
        (4, "llama", ("--targets", "topk")),
    ],
)
def test_families_and_targets(
    number: int, family: str, options: tuple[Any, ...], run: Run, stream: Path, save: Save
) -> None:
    cached(run, number, stream, save(family), *options)


@pytest.mark.slow
def test_half_precision_is_as_far_from_one_process_as_its_rounding(run: Run, stream: Path, save: Save) -> None:
    """Parts of a product are rounded to bfloat16 before they are added, which 1e-5 has no room for."""
    options = ("--cache", stream, "--teacher", save("llama"), *OPTIONS, "--targets", "topk", "--dtype", "bfloat16")
    assert run("cache-logits", "--name", "one", *options).returncode == 0
    succeeded(ranks_run(2, "--name", "ranks", *options))
    found, expected = whole(stream, "ranks")[1], whole(stream, "one")[1]
    assert np.nanmean(np.abs(found.label_logprob - expected.label_logprob)) < 0.05
    assert np.abs(found.entropy - expected.entropy).mean() < 0.02


# ---- how ranks end


def test_a_user_error_is_printed_once(stream: Path, save: Save) -> None:
    done = ranks_run(2, "--cache", stream, "--teacher", save("gpt2"), "--name", "x", *OPTIONS)
    one_error(done, "has no plan for spreading its layers over ranks", "use --device-map")
    assert not (stream / "teachers" / "x").exists()


@pytest.mark.slow
def test_an_error_of_one_rank_alone_ends_the_others(run: Run, stream: Path, save: Save, tmp_path: Path) -> None:
    """Rank 0 alone opens the entry, and another rank alone may see another cache."""
    llama = save("llama")
    job = ("--teacher", llama, "--name", "one", *OPTIONS)
    assert run("cache-logits", "--cache", stream, *job).returncode == 0
    began = time.monotonic()
    one_error(ranks_run(2, "--cache", stream, *job), "execution.tensor_parallel: the cache has None, this job has 2")
    other = make_stream(tmp_path / "other", 5_000)
    script = f'exec cache-logits "$@" --cache $([ $RANK = 1 ] && echo {other} || echo {stream})'
    done = subprocess.run(
        [*command("torchrun", "--nproc-per-node", 2, "--no-python"), "bash", "-c", script, "bash",
         *map(str, job[:3]), "apart", *map(str, OPTIONS), "--tensor-parallel"],
        env={**environment(), "PATH": f"{Path(command('cache-logits')[0]).parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    one_error(done, "rank 1 sees another cache or teacher than rank 0", "positions: rank 0 has 6000")
    assert time.monotonic() - began < 120
    assert LogitCache.open(str(other)).teachers == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "arguments", "words"),
    [
        (3, (), "its heads may not divide by 3 ranks"),
        (2, ("--device", "cpu"), "--device names one device"),
        (2, ("--worker", "2/2"), "--worker '2/2'"),
        (2, ("--kk", "2"), "No such option"),
        (1, (), "needs two processes or more"),
    ],
)
def test_refusals_of_ranks(number: int, arguments: tuple[str, ...], words: str, stream: Path, save: Save) -> None:
    done = ranks_run(number, "--cache", stream, "--teacher", save("llama"), "--name", "x", *OPTIONS, *arguments)
    assert words in done.stderr
    if number > 1 and "--kk" not in arguments:
        one_error(done, words)


def test_without_torchrun_and_in_other_commands_it_is_refused(run: Run, stream: Path, save: Save) -> None:
    job = ("--cache", stream, "--teacher", save("llama"), *OPTIONS, "--tensor-parallel")
    refused(run("cache-logits", "--name", "x", *job), "start it with torchrun --nproc-per-node N --no-python")
    message = refusal(stream, "x", save("llama"), k=K, tensor_parallel=True)
    assert "--tensor-parallel is for cache-logits itself" in message
    message = refusal(stream, "x", save("llama"), save("gpt2"), combine="mixture", k=K, tensor_parallel=True)
    assert "--tensor-parallel takes one --teacher" in message


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process started, and theirs; the innermost first."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from descendants(int(child))
            yield int(child)


def wait_for_receipts(folder: Path, count: int, running: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while len(list(folder.glob("receipts/*.json"))) < count:
        assert running.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.002)


def receipts(folder: Path) -> dict[str, Any]:
    """The objects that the receipts of an entry list."""
    return {
        path.name: json.loads(path.read_text()).get("objects")
        for path in sorted(folder.glob("receipts/*.json"))
        if path.stem.isdecimal()
    }


@pytest.mark.slow
def test_killed_ranks_resume_to_the_same_bytes(run: Run, tmp_path: Path, save: Save) -> None:
    """All processes at once, then one rank alone, which torchrun notices."""
    stream = make_stream(tmp_path / "cache", 120_000)
    job = ("--cache", stream, "--teacher", save("llama"), *OPTIONS, "--shard-tokens", 1_024, "--chunk-tokens", 1_024)
    succeeded(ranks_run(2, *job, "--name", "plain"))
    line = torchrun(2, *job, "--name", "killed", "--tensor-parallel")
    folder = stream / "teachers" / "killed"

    for count, alone in ((3, False), (20, True)):
        with subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
            wait_for_receipts(folder, count, running)
            ranks = list(descendants(running.pid))
            assert len(ranks) >= 2
            if alone:
                os.kill(ranks[-1], signal.SIGKILL)
                assert running.wait(timeout=60) == 1
            else:
                for pid in (running.pid, *ranks):
                    os.kill(pid, signal.SIGKILL)
                running.wait(timeout=60)
        end = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < end, "a rank was left behind"
            time.sleep(0.1)
        assert 0 < len(receipts(folder)) < len(receipts(stream / "teachers" / "plain"))

    succeeded(ranks_run(2, *job, "--name", "killed"))
    assert receipts(folder) == receipts(stream / "teachers" / "plain")
    assert run("logit-cache", "verify", stream, "--deep").returncode == 0


@pytest.mark.slow
def test_two_groups_share_an_entry(run: Run, stream: Path, save: Save) -> None:
    job = ("--cache", stream, "--teacher", save("llama"), *OPTIONS, "--shard-tokens", 1_024, "--name", "shared")
    for worker in ("0/2", "1/2"):
        succeeded(ranks_run(2, *job, "--worker", worker))
    entry, _ = whole(stream, "shared")
    assert not entry.missing()
    assert entry.fidelity() is not None
