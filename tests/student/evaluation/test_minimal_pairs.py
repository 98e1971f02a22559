"""Minimal pairs and `logit-cache evaluate`: scores against brute force in float64, groups, errors, the command.

Legend: `N` pairs, `S` sentences, `W` columns of the model's head.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.caches.small import make_corpus
from support.commands import ROOT, Run, refused
from support.models.saved import make_tokenizer, tiny_tokenizer
from support.models.students import small_model
from support.runs import job_in, make_world
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from logit_cache.cli.main import main
from storage import LogitCache
from storage.errors import IdentityMismatch, InputError
from student.evaluation import held_out as evaluate
from student.evaluation import minimal_pairs
from student.evaluation.blimp import PHENOMENA
from student.evaluation.evaluate import evaluate as measure
from student.evaluation.job import EvaluationJob
from student.evaluation.minimal_pairs import Pair, encode, read_pairs, score_pairs, sentence_logprobs, tally
from student.evaluation.report import HeldOutScores
from student.job import StudentJob
from student.training.run import train

W = 611
BLIMP = ROOT.parent / "shared" / "data" / "blimp"


def llama() -> PreTrainedModel:
    return small_model("llama", vocab_size=W, num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.5)


def random_sentences(number: int, longest: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(2, longest + 1, (number,), generator=generator).tolist()
    return [tuple(torch.randint(0, W, (length,), generator=generator).tolist()) for length in lengths]


def brute_force(model: PreTrainedModel, sentence: tuple[int, ...]) -> float:
    """One sentence, one growing context at a time, all in float64."""
    total = 0.0
    for end in range(1, len(sentence)):
        logits = model(torch.tensor([sentence[:end]])).logits[0, -1].double()
        total += float(logits[sentence[end]]) - float(logits.exp().sum().log())
    return total


@torch.no_grad()
def test_log_probs_equal_brute_force() -> None:
    model, sentences = llama(), random_sentences(23, 11)
    sentences[5] = sentences[2]
    sentences[7] = (*sentences[3][:-1], (sentences[3][-1] + 1) % W)
    found = sentence_logprobs(model, sentences, batch_sentences=4)
    assert found.dtype == torch.float64
    double = llama().double()
    expected = torch.tensor([brute_force(double, sentence) for sentence in sentences], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert found[5] == found[2], "equal sentences tie exactly"
    assert (found[7] - found[3]).abs() > 1e-2


def test_order_batches_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sentences = llama(), random_sentences(31, 17)
    expected = sentence_logprobs(model, sentences, batch_sentences=100)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    shuffled = sentence_logprobs(model, [sentences[i] for i in order], batch_sentences=5)
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-6, atol=1e-5)
    alone = torch.cat([sentence_logprobs(model, [sentence]) for sentence in sentences])
    torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-5)
    monkeypatch.setitem(evaluate._CHUNK_LOGITS, "elsewhere", 7 * W)
    torch.testing.assert_close(sentence_logprobs(model, sentences), expected, rtol=1e-6, atol=1e-5)


def test_a_pass_of_the_model_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither more logits than the bound, nor more rows than asked for; longest first; each sentence counted once."""
    model, sentences = llama(), random_sentences(40, 12)
    sentences += sentences[:3]
    monkeypatch.setattr(minimal_pairs, "BATCH_LOGITS", 30 * W)
    shapes: list[tuple[int, int]] = []
    original = model.forward

    def watched(input_ids: torch.Tensor, **others: Any) -> Any:
        shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return original(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "forward", watched)
    done: list[int] = []
    sentence_logprobs(model, sentences, batch_sentences=6, advance=done.append)
    passes = shapes[1:]  # the first counts the columns
    assert all(rows <= 6 and rows * tokens <= 30 for rows, tokens in passes)
    assert passes == sorted(passes, key=lambda shape: -shape[1])
    assert sum(rows for rows, _ in passes) == len(set(sentences))
    assert sum(done) == len(sentences)


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = 4 * torch.randn(50, W, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50)
    labels[::5] = -100
    half = evaluate.next_token_logprobs(logits.bfloat16(), labels)
    expected = torch.log_softmax(logits.bfloat16().double(), 1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected[::5] = 0
    torch.testing.assert_close(half, expected, rtol=1e-6, atol=1e-6)


def test_nan_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(InputError, match="log-probability NaN"):
        sentence_logprobs(model, random_sentences(3, 5))


def test_sentences_begin_with_one_prefix() -> None:
    tokenizer = tiny_tokenizer("gpt2")
    bos = tokenizer.bos_token_id
    plain = tokenizer("A parser", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, ["A parser"], leading_space=False) == [(bos, *plain)]
    assert encode(tokenizer, ["<s>A parser"], leading_space=False) == [(bos, *plain)], "not twice"
    spaced = tokenizer(" A parser", add_special_tokens=False)["input_ids"]
    assert spaced != plain
    assert encode(tokenizer, ["A parser"]) == [(bos, *spaced)]
    ours = tiny_tokenizer("seeds")
    assert encode(ours, ["A parser"]) == encode(ours, ["A parser"], leading_space=False)
    with pytest.raises(InputError, match="no tokens"):
        encode(tokenizer, ["<s>"], leading_space=False)


def test_special_tokens_that_a_tokenizer_adds_are_left_out() -> None:
    tokenizer = make_tokenizer("gpt2")
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    expected = encode(tokenizer, ["A parser"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert tokenizer("A")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(tokenizer, ["A parser"]) == expected


def test_eos_stands_in_for_bos_and_one_of_them_there_must_be() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.bos_token = None
    assert encode(tokenizer, ["a"])[0][0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither: set bos_token"):
        encode(tokenizer, ["a"])


def write(folder: Path, name: str, *rows: object) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def row(number: int = 0, **others: object) -> dict[str, object]:
    return {"sentence_good": f"Good {number}.", "sentence_bad": f"Bad {number}.", **others}


def test_reading(tmp_path: Path) -> None:
    """UID before the file's name; linguistics_term before the table before the paradigm's own name."""
    write(tmp_path, "b", row(1, UID="x", linguistics_term="s-selection", pairID="7"), "", row(2, UID="wh_island"))
    write(tmp_path, "a", *(row(i) for i in range(5)))
    write(tmp_path, "only_npi_scope", row(9, linguistics_term="of_its_own"))
    (tmp_path / "notes.txt").write_text("not read")
    found = read_pairs(tmp_path, limit=3)
    assert found == [
        *(Pair(f"Good {i}.", f"Bad {i}.", "a", "a") for i in range(3)),
        Pair("Good 1.", "Bad 1.", "x", "argument_structure"),
        Pair("Good 2.", "Bad 2.", "wh_island", "island_effects"),
        Pair("Good 9.", "Bad 9.", "only_npi_scope", "of_its_own"),
    ]
    assert len(read_pairs(tmp_path)) == 8


def test_the_table_of_phenomena() -> None:
    paradigms = [name for group in PHENOMENA.values() for name in group]
    assert (len(PHENOMENA), len(paradigms), len(set(paradigms))) == (12, 67, 67)


@pytest.mark.skipif(not BLIMP.is_dir(), reason=f"BLiMP is not at {BLIMP}: it is no part of this project")
def test_the_table_is_that_of_blimps_own_files(tmp_path: Path) -> None:
    for file in BLIMP.glob("*.jsonl"):
        first = json.loads(file.read_text(encoding="utf-8").split("\n")[0])
        write(tmp_path / "with", file.stem, first)
        write(tmp_path / "without", file.stem, {name: first[name] for name in ("sentence_good", "sentence_bad")})
    with_terms, without = read_pairs(tmp_path / "with"), read_pairs(tmp_path / "without")
    assert len(with_terms) == 67
    assert with_terms == without
    scores = tally(without, torch.zeros(67, 2))
    assert scores.is_blimp
    assert not tally(without[1:], torch.zeros(66, 2)).is_blimp


BAD = [
    (["{"], "m.jsonl, line 1: expected a JSON object, found '{'"),
    ([row(), "[1]"], "m.jsonl, line 2: expected a JSON object, found list"),
    ([{"sentence_good": "a", "bad": "b"}], "line 1: expected the fields sentence_good and sentence_bad, found"),
    ([row(), row(sentence_bad=" ")], "line 2: expected a sentence as sentence_bad, found ' '"),
    ([row(sentence_good=3)], "line 1: expected a sentence as sentence_good, found 3"),
    ([row(UID=["x"])], "line 1: expected strings as UID"),
    ([row(linguistics_term="a"), row(linguistics_term="b")], "line 2: paradigm m is of group b here and of a before"),
    ([""], "found only empty files"),
]


@pytest.mark.parametrize(("rows", "message"), BAD, ids=range(len(BAD)))
def test_bad_files_are_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    write(tmp_path, "m", *rows)
    with pytest.raises(InputError) as caught:
        read_pairs(tmp_path)
    assert message in str(caught.value)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no folder there"):
        read_pairs(tmp_path / "none")
    with pytest.raises(InputError, match="found no file named"):
        read_pairs(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="expected UTF-8 text"):
        read_pairs(tmp_path)


def test_the_tally() -> None:
    """Groups pool their pairs, the two means are unweighted, ties are wrong and close pairs are counted."""
    pairs = [
        *(Pair("", "", "p", "g") for _ in range(4)),
        *(Pair("", "", "q", "g") for _ in range(2)),
        Pair("", "", "r", "h"),
    ]
    margins = torch.tensor([1.0, -1.0, 0.0, -5e-5, 2.0, 5e-5, 3.0], dtype=torch.float64)
    scores = tally(pairs, torch.stack([margins, torch.zeros(7, dtype=torch.float64)], 1))
    assert {name: (s.pairs, s.accuracy, s.group, s.right) for name, s in scores.paradigms.items()} == {
        "p": (4, 0.25, "g", "1000"),
        "q": (2, 1.0, "g", "11"),
        "r": (1, 1.0, "h", "1"),
    }
    assert {name: (s.pairs, s.accuracy) for name, s in scores.groups.items()} == {"g": (6, 0.5), "h": (1, 1.0)}
    # Of p the sample variance is 0.25, of q 0: (3 · 0.25 + 1 · 0) / (3 + 1) pooled.
    assert scores.groups["g"].stderr == pytest.approx(math.sqrt(0.1875 / 6))
    assert scores.paradigms["p"].stderr == pytest.approx(math.sqrt(0.25 / 4))
    assert (scores.groups["h"].stderr, scores.mean_over_groups_stderr) == (None, None), "of one pair there is none"
    assert (scores.mean_over_groups, scores.mean_over_paradigms) == (0.75, 0.75)
    assert (scores.pairs, scores.tied, scores.close) == (7, 1, 3)
    margins = torch.cat([margins, torch.tensor([-1.0], dtype=torch.float64)])
    known = tally([*pairs, Pair("", "", "r", "h")], torch.stack([margins, torch.zeros_like(margins)], 1))
    errors = [score.stderr or 0.0 for score in known.groups.values()]
    assert known.mean_over_groups_stderr == pytest.approx(math.hypot(*errors) / 2)
    assert known.sha256 != scores.sha256


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small_cache: Path) -> Path:
    """A model with the tokenizer of `small_cache`, trained for one step, its report, and a folder of pairs."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "gpt2.json").write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64})
    )
    job = {
        "cache": str(small_cache),
        "eval_cache": str(small_cache),
        "model": str(folder / "gpt2.json"),
        "window_tokens": 48,
        "output_dir": str(folder / "model"),
        "training": {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"},
    }
    train(StudentJob.model_validate(job), log=lambda line: None)
    write(folder / "pairs", "wh_island", row(sentence_good="return the width", sentence_bad="the return width"), row(1))
    write(folder / "pairs", "mine", *(row(i) for i in range(4)))
    return folder


def test_the_command(world: Path, small_cache: Path, tmp_path: Path, run: Run) -> None:
    options = ["--pairs", world / "pairs", "--cache", small_cache, "--window-tokens", 48, "--limit", 2]
    out, tasks = tmp_path / "report.json", tmp_path / "tasks"
    done = run("logit-cache", "evaluate", world / "model", *options, "--out", out, "--lm-eval-tasks", tasks)
    assert done.returncode == 0, done.stderr
    assert "minimal pairs: 8 of 8 sentences" in done.stderr
    assert f"--include_path {tasks}" in done.stderr
    report = json.loads(out.read_text())
    pairs = read_pairs(world / "pairs", limit=2)
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    logprobs = score_pairs(model, AutoTokenizer.from_pretrained(world / "model"), pairs)
    assert report["minimal_pairs"] == tally(pairs, logprobs).model_dump()
    assert report["minimal_pairs"]["groups"].keys() == {"mine", "island_effects"}
    assert report["prefix_token"] == "<s>"
    held, error = report["held_out"], 100 * report["minimal_pairs"]["mean_over_groups_stderr"]
    for shown in (
        f"{held['cross_entropy_per_token']:.4f} nats per token, {held['cross_entropy_per_byte']:.4f} nats per byte",
        f"{held['perplexity_per_token']:,.2f} per token, {held['perplexity_per_byte']:,.4f} per byte",
        "bits per byte",
        "calibration error",
        f"mean of groups     {report['minimal_pairs']['mean_over_groups']:.2%} ± {error:.2f} (2)",
    ):
        assert shown in done.stdout, done.stdout
    assert "BLiMP" not in done.stdout
    assert (tasks / "pairs_wh_island.yaml").is_file()
    assert len((tasks / "data" / "mine.jsonl").read_text().splitlines()) == 2


def test_json_and_the_space_in_front(world: Path) -> None:
    arguments = ["evaluate", str(world / "model"), "--pairs", str(world / "pairs"), "--json", "--as-written"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["job"]["leading_space"] is False
    assert report["held_out"] is None
    assert report["minimal_pairs"]["pairs"] == 6


def test_held_out_figures_are_those_of_the_training_report(tmp_path: Path, run: Run) -> None:
    make_world(tmp_path)
    held, model = tmp_path / "held", tmp_path / "model"
    reported = train(job_in(tmp_path, model, eval_cache=str(held)), log=lambda line: None).held_out
    # The world's corpus is made without its tokenizer; a model without one is not checked.
    for file in model.glob("tokenizer*"):
        file.unlink()
    options = ["--cache", held, "--window-tokens", 16, "--batch-size", 5, "--out", tmp_path / "scores.json"]
    done = run("logit-cache", "evaluate", model, "--teacher", "a", "--teacher", "b", *options)
    assert done.returncode == 0, done.stderr
    found = HeldOutScores.model_validate(json.loads((tmp_path / "scores.json").read_text())["held_out"])
    assert (found.tokens, found.accuracy) == (reported.tokens, reported.accuracy)
    assert found.cross_entropy_per_token == pytest.approx(reported.cross_entropy, rel=1e-6)
    assert found.perplexity_per_token == pytest.approx(reported.perplexity, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(reported.bits_per_byte, rel=1e-6)
    assert found.ece == pytest.approx(reported.ece, rel=1e-5)
    corpus = LogitCache.open(str(held)).record.corpus
    per_byte = found.cross_entropy_per_token * corpus.positions / corpus.text_bytes
    assert found.cross_entropy_per_byte == pytest.approx(per_byte, rel=1e-9)
    assert found.perplexity_per_byte == pytest.approx(math.exp(per_byte), rel=1e-9)
    assert found.bits_per_byte == pytest.approx(per_byte / math.log(2), rel=1e-9)
    assert found.kl.keys() == {"a", "b"}
    for name, expected in reported.kl.items():
        assert found.kl[name].nats == pytest.approx(expected.nats, rel=1e-5)
        assert found.kl[name].lower_bound == expected.lower_bound
        assert f"KL to {name}" in done.stdout
    refused(run("logit-cache", "evaluate", model, "--teacher", "c", *options), "'c'")
    refused(run("logit-cache", "evaluate", model, "--teacher", "a"), "--cache")


def refusal(**fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        measure(EvaluationJob(**fields))
    return str(caught.value)


def test_refusals(world: Path, small_cache: Path, teacher: Path, tmp_path: Path, run: Run) -> None:
    model, pairs = str(world / "model"), str(world / "pairs")
    refused(run("logit-cache", "evaluate", model), "nothing to measure", "--pairs")
    assert "no directory there" in refusal(model="llama-tiny", pairs=pairs)
    assert "expected a tokenizer beside the model" in refusal(model=str(teacher), pairs=pairs)
    assert "'warp' cannot be used" in refusal(model=model, pairs=pairs, device="warp")
    assert "writes the pairs of --pairs" in refusal(model=model, cache=str(small_cache), lm_eval_tasks=str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").touch()
    where = str(tmp_path / "other")
    assert "found other files" in refusal(model=model, pairs=pairs, lm_eval_tasks=where)
    long = write(tmp_path / "long", "m", row(sentence_good="width " * 70))
    assert "longest sentence has" in refusal(model=model, pairs=str(long))
    assert "64 positions, fewer than the 65" in refusal(model=model, cache=str(small_cache), window_tokens=65)


def test_another_tokenizer_is_refused(world: Path, tmp_path: Path) -> None:
    make_corpus(str(tmp_path / "other"), np.zeros(300, dtype=np.uint16), 61)
    with pytest.raises(IdentityMismatch, match=r"its tokenizer is not the one of .* logit-cache tokenize --tokenizer"):
        measure(EvaluationJob(model=str(world / "model"), cache=str(tmp_path / "other")))


def test_a_model_without_a_tokenizer_has_held_out_figures(teacher: Path, small_cache: Path) -> None:
    report = measure(EvaluationJob(model=str(teacher), cache=str(small_cache), window_tokens=64))
    assert report.held_out is not None
    assert report.prefix_token is None
    assert report.minimal_pairs is None
