"""Our scores of minimal pairs against those of EleutherAI's lm-eval, on the same saved models."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import ROOT
from support.models.saved import make_tokenizer
from support.models.students import small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.config import read_yaml
from student.evaluation.blimp import PHENOMENA
from student.evaluation.lm_eval_tasks import write_tasks
from student.evaluation.minimal_pairs import CLOSE_NATS, Pair, read_pairs, score_pairs, tally
from student.evaluation.report import GroupScore

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'logit-cache[eval]'"
    ),
    # Warnings of its own and of its dependencies are no business of these tests.
    pytest.mark.filterwarnings("ignore"),
]

BLIMP = ROOT.parent / "shared" / "data" / "blimp"
VOCABULARY = (
    "The a some no every dog dogs child children who what has have is are was been never ever not that which "
    'it\'s "quoted" , naïve {{curly}} parser argument string width indent seen sees see'
)
WORDS = VOCABULARY.split()


@pytest.fixture(autouse=True)
def _its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its copies of the data go into the test's folder, its log nowhere, and its environment ends with the test."""
    for name in ("HF_XET_HIGH_PERFORMANCE", "HF_HUB_ENABLE_HF_TRANSFER"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def save_model(folder: Path, family: str, kind: str, has_bos: bool = True) -> Path:
    """A random model with spread-out logits and a few columns more than its tokenizer has ids."""
    tokenizer = make_tokenizer(kind)
    columns = max(tokenizer.get_vocab().values()) + 4
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if not has_bos:
        tokenizer.bos_token = None
    positions = {"n_positions" if family == "gpt2" else "max_position_embeddings": 128}
    small_model(family, vocab_size=columns, initializer_range=0.2, **positions, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(folder: Path) -> Path:
    """240 pairs in three paradigms: of words in another order, of another word, of another length."""
    folder.mkdir()
    rng = random.Random(0)
    for number, name in enumerate(("wh_island", "anaphor_number_agreement", "my own, paradigm")):
        lines = []
        for _ in range(80):
            good = [rng.choice(WORDS) for _ in range(rng.randint(3, 14))]
            bad = list(good)
            position = rng.randrange(len(good))
            if number == 0:
                rng.shuffle(bad)
            elif number == 1:
                bad[position] = rng.choice(WORDS)
            else:
                bad.insert(position, rng.choice(WORDS))
            lines.append(json.dumps({"sentence_good": " ".join(good) + ".", "sentence_bad": " ".join(bad) + "."}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def ours(model: Path, pairs: Sequence[Pair], **options: bool) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return score_pairs(loaded, tokenizer, pairs, batch_sentences=17, **options)


def theirs(model: Path, tasks: list[Any], include: Path | None = None) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=tasks,
        task_manager=TaskManager(include_path=include, include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=1,  # errors of means are in closed form; 0 leaves them out, too
        log_samples=True,
    )


def logprobs_of(found: dict[str, Any], task: str) -> torch.Tensor:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return torch.tensor([[resp[0] for resp in s["filtered_resps"]] for s in samples], dtype=torch.float64)


def check_agreement(model: Path, pairs: list[Pair], folder: Path, leading_space: bool = True) -> None:
    """On the pairs that rounding does not decide; lm-eval counts ties right."""
    mine = ours(model, pairs, leading_space=leading_space)
    sure = (mine[:, 0] - mine[:, 1]).abs() >= CLOSE_NATS
    pairs, mine = [pair for pair, is_sure in zip(pairs, sure.tolist(), strict=True) if is_sure], mine[sure]
    names = write_tasks(pairs, folder, leading_space)
    found = theirs(model, ["pairs"], folder)
    their_logprobs = torch.cat([logprobs_of(found, name) for name in names.values()])
    torch.testing.assert_close(mine, their_logprobs, rtol=1e-5, atol=1e-4)
    scores, results = tally(pairs, mine), found["results"]
    assert 0.1 < results["pairs"]["acc,none"] < 0.9
    for paradigm, task in names.items():
        assert_same(results[task], scores.paradigms[paradigm])
    by_alias = {result["alias"].strip(" -"): result for name, result in results.items() if "_group_" in name}
    for group, score in scores.groups.items():
        assert_same(by_alias[group], score)


def assert_same(theirs: dict[str, Any], score: GroupScore) -> None:
    assert theirs["acc,none"] == pytest.approx(score.accuracy)
    assert theirs["acc_stderr,none"] == pytest.approx(score.stderr)


@pytest.mark.parametrize(
    ("family", "kind", "has_bos", "leading_space"),
    [("llama", "llama2", True, True), ("gpt2", "gpt2", False, True), ("gpt2", "gpt2", True, False)],
)
def test_log_likelihoods_and_accuracies_are_those_of_lm_eval(
    tmp_path: Path, family: str, kind: str, has_bos: bool, leading_space: bool
) -> None:
    model = save_model(tmp_path / "model", family, kind, has_bos)
    pairs = read_pairs(write_pairs(tmp_path / "pairs"))
    assert len(pairs) == 240
    check_agreement(model, pairs, tmp_path / "tasks", leading_space)
    spaced, written = (ours(model, pairs, leading_space=choice) for choice in (True, False))
    assert not torch.allclose(spaced, written, atol=0.1), "the space is seen"


def test_the_default_is_what_its_own_blimp_task_scores(tmp_path: Path) -> None:
    """lm-eval's template for BLiMP, with the pairs instead of the hub's data set."""
    model = save_model(tmp_path / "model", "gpt2", "gpt2")
    folder = write_pairs(tmp_path / "pairs")
    pairs = [pair for pair in read_pairs(folder) if pair.paradigm == "wh_island"]
    template = read_yaml(str(files("lm_eval") / "tasks" / "blimp" / "_template_yaml"))
    data = {"train": str(folder / "wh_island.jsonl")}
    task = {**template, "task": "stock", "dataset_path": "json", "dataset_kwargs": {"data_files": data}}
    found = theirs(model, [task])
    torch.testing.assert_close(ours(model, pairs), logprobs_of(found, "stock"), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not BLIMP.is_dir(), reason=f"BLiMP is not at {BLIMP}: it is no part of this project")
def test_agreement_on_blimp(tmp_path: Path) -> None:
    """The first pairs of two paradigms of each of the 12 groups, so that a group's error is of a pooled variance."""
    folder = tmp_path / "blimp"
    folder.mkdir()
    for paradigms in PHENOMENA.values():
        for name in paradigms[:2]:
            (folder / f"{name}.jsonl").write_bytes((BLIMP / f"{name}.jsonl").read_bytes())
    pairs = read_pairs(folder, limit=25)
    assert {pair.group for pair in pairs} == set(PHENOMENA)
    check_agreement(save_model(tmp_path / "model", "llama", "seeds"), pairs, tmp_path / "tasks")
