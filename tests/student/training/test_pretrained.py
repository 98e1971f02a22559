"""A student that starts from weights stays itself: where it stops, its tokenizer, its defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.small import make_corpus, word_tokenizer
from support.commands import Run
from support.models.saved import make_tokenizer
from support.programs.saved_models import texts
from support.runs import LLAMA, V, fill, have_equal_weights, job_in
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from storage import LogitCache
from storage.format.manifest.entry import Windowing
from student.data.windows import DistillationWindows
from student.job import StudentJob
from student.models.saved_tokenizer import saved_tokenizer
from student.models.tokenizer import write_files
from student.report import RUN_FILE
from student.sweep.run import sweep
from student.sweep.search_space import Search
from student.training.defaults import open_fields
from student.training.run import train


def pretrained(folder: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """A model directory; `generation` is its whole generation_config.json, None for none."""
    settings = {**{name: value for name, value in LLAMA.items() if name != "model_type"}, "vocab_size": V, **config}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(folder)
    path = folder / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps(generation))
    return folder


def job_from(world: Path, output: Path, model: Path, **changes: Any) -> StudentJob:
    return job_in(world, output, model=str(model), **changes)


# Where it stops


STOPS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, set[int]]] = {
    "several in the generation config": (
        {"eos_token_id": 5, "pad_token_id": 6},
        {"eos_token_id": [5, 7, 9], "bos_token_id": 4, "pad_token_id": 6},
        {5, 7, 9},
    ),
    "several in the configuration, no other": (
        {"eos_token_id": [5, 7], "bos_token_id": 4, "pad_token_id": 6}, None, {5, 7}
    ),
    "the generation config has none": ({"eos_token_id": [5, 7], "bos_token_id": 4}, {"max_length": 40}, set()),
    "none anywhere": ({"eos_token_id": None, "bos_token_id": None}, None, {1}),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_a_saved_student_stops_where_the_original_stops(world: Path, tmp_path: Path, case: str) -> None:
    """Token for token, with equal weights. Only a model without any end takes that of the tokenizer."""
    config, generation, stops = STOPS[case]
    original, saved = pretrained(tmp_path / "original", generation, **config), tmp_path / "out"
    train(job_from(world, saved, original, training={"learning_rate": 0.0, "max_steps": 2}))
    assert have_equal_weights(original, saved)
    found = texts(saved)
    assert {int(id) for id, text in found.items() if len(text) == 6} == stops
    assert case == "none anywhere" or found == texts(original)


def test_a_generation_config_is_saved_as_it_was(world: Path, tmp_path: Path) -> None:
    shipped = {
        "eos_token_id": [5, 7], "bos_token_id": 4, "pad_token_id": 6, "do_sample": True, "temperature": 0.7, "top_k": 9,
        "max_length": 99, "suppress_tokens": [9, 10], "begin_suppress_tokens": [3], "forced_bos_token_id": 4,
        "forced_eos_token_id": [5, 7], "stop_strings": ["t9"], "repetition_penalty": 1.1,
        "cache_implementation": "static", "bad_words_ids": [[8]],
    }  # fmt: skip
    train(job_from(world, tmp_path / "out", pretrained(tmp_path / "original", shipped), training={"max_steps": 1}))
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in shipped} == shipped
    original, found = (GenerationConfig.from_pretrained(tmp_path / name).to_dict() for name in ("original", "out"))
    assert {k: v for k, v in found.items() if v != original.get(k)}.keys() <= {"transformers_version"}


def test_a_tied_head_stays_tied(world: Path, tmp_path: Path) -> None:
    original = pretrained(tmp_path / "original", tie_word_embeddings=True)
    train(job_from(world, tmp_path / "out", original, training={"max_steps": 2}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "out"))
    assert {name: after.get(name) for name in before} == before | {"pad_token_id": 0}
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"], "for transformers 4.57"


# Its tokenizer


def with_tokenizer(folder: Path, template: str | None, **backend: Any) -> Path:
    files = {**word_tokenizer(V), "chat_template.jsonl": b"no file of a tokenizer"}
    content = json.loads(files["tokenizer.json"]) | backend
    config = json.loads(files["tokenizer_config.json"]) | {"model_max_length": 77, "padding_side": "left"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def conversations(url: str, template: str) -> None:
    tokens = np.random.default_rng(0).integers(0, V, 900).astype(np.uint16)
    make_corpus(
        url, tokens, V, loss_mask=np.arange(900) % 3 > 0,
        tokenizer_files={**word_tokenizer(V), "chat_template.jinja": template.encode()},
    )  # fmt: skip


def test_a_student_is_saved_with_its_own_tokenizer(world: Path, tmp_path: Path) -> None:
    original = with_tokenizer(pretrained(tmp_path / "original"), "its own {{ messages }}")
    said: list[str] = []
    train(job_from(world, tmp_path / "out", original, training={"max_steps": 1}), said.append)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "its own {{ messages }}"
    assert not [line for line in said if "tokenizer splits" in line or "chat template" in line]


def test_a_student_of_conversations_is_saved_with_their_template(world: Path, tmp_path: Path) -> None:
    """It has learnt that one; the rest of the tokenizer stays its own."""
    conversations(str(tmp_path / "chat"), "theirs {{ messages }}")
    common: dict[str, Any] = {"cache": str(tmp_path / "chat"), "teachers": [], "temperature": 1}
    for own in ("its own {{ messages }}", None):
        original = with_tokenizer(pretrained(tmp_path / f"from-{own}"), own)
        said: list[str] = []
        train(job_from(world, tmp_path / f"to-{own}", original, **common, training={"max_steps": 1}), said.append)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"to-{own}")
        assert (tokenizer.chat_template, tokenizer.model_max_length) == ("theirs {{ messages }}", 77)
        assert len([line for line in said if "chat template" in line]) == 1


def test_a_template_that_wrote_no_text_is_not_saved(tmp_path: Path) -> None:
    """As of replies that were given as they are, or of plain text."""
    conversations(str(tmp_path / "chat"), "theirs")
    original = with_tokenizer(pretrained(tmp_path / "original"), "its own")
    for known, saved in ({"template_sha256": None}, "its own"), ({"template_sha256": "0" * 64}, "theirs"):
        cache = LogitCache.open(str(tmp_path / "chat"))
        corpus = cache.record.corpus.model_copy(update={"begins_with_bos": False, **known})
        cache.record = cache.record.model_copy(update={"corpus": corpus})
        write_files(saved_tokenizer(cache, str(original), print), tmp_path / saved)
        assert AutoTokenizer.from_pretrained(tmp_path / saved).chat_template == saved


def test_a_tokenizer_that_splits_otherwise_is_replaced_and_said(world: Path, tmp_path: Path) -> None:
    """The student has learnt the cache's way."""
    original = with_tokenizer(pretrained(tmp_path / "original"), None, pre_tokenizer=None)
    said: list[str] = []
    train(job_from(world, tmp_path / "out", original, training={"max_steps": 1}), said.append)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("t3 t60 t7") == [3, 60, 7]
    assert len([line for line in said if "splits text" in line]) == 1


@pytest.mark.parametrize("normalizer", [{"type": "Lowercase"}, {"type": "NFKC"}, ("argument", "option"), None])
def test_the_way_of_splitting_is_compared_beyond_the_beginning(tmp_path: Path, normalizer: Any) -> None:
    """The cache's text as it is stored has no capitals where the cache lowers them; other words come late in it."""
    tokenizer = make_tokenizer("gpt2")
    original, url = pretrained(tmp_path / "model", vocab_size=len(tokenizer)), str(tmp_path / "cache")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(original)
    tokenizer = make_tokenizer("gpt2")
    if isinstance(normalizer, tuple):
        normalizer = {"type": "Replace", "pattern": {"String": normalizer[0]}, "content": normalizer[1]}
    tokenizer.save_pretrained(tmp_path / "cached")
    path = tmp_path / "cached" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"normalizer": normalizer}))
    files = {file.name: file.read_bytes() for file in (tmp_path / "cached").iterdir()}
    ids = tokenizer.encode("in lower case. " * 3000 + "an argument. " * 3000, add_special_tokens=False)
    make_corpus(url, np.array(ids, dtype=np.uint16), len(tokenizer), tokenizer_files=files)
    said: list[str] = []
    saved = saved_tokenizer(LogitCache.open(url), str(original), said.append)
    assert json.loads(saved["tokenizer.json"])["normalizer"] == normalizer
    assert len(said) == (normalizer is not None)
    assert (b"<extra>" in saved["tokenizer.json"]) == (normalizer is None)


def test_a_tokenizer_is_saved_without_chance_and_cut_offs(tmp_path: Path) -> None:
    """As it is used: the student has not learnt what dropout makes of a text, and reads more than the cut-off."""
    tokenizer, url = make_tokenizer("gpt2"), str(tmp_path / "cache")
    original = pretrained(tmp_path / "model", vocab_size=len(tokenizer))
    names = [Path(name).name for name in tokenizer.save_pretrained(original)]
    files = {name: (original / name).read_bytes() for name in names}
    path = original / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content | {"model": content["model"] | {"dropout": 0.5}}))
    make_corpus(url, np.arange(300, dtype=np.uint16), len(tokenizer), tokenizer_files=files)
    said: list[str] = []
    saved = json.loads(saved_tokenizer(LogitCache.open(url), str(original), said.append)["tokenizer.json"])
    assert (saved["truncation"], saved["model"]["dropout"]) == (None, None)
    assert [line for line in said if "saved without truncation, BPE dropout (dropout 0.5)" in line] == said[:1] == said


def test_named_templates_are_published_again(world: Path, tmp_path: Path) -> None:
    """After a run that was killed while it published."""
    original = with_tokenizer(pretrained(tmp_path / "original"), None)
    (original / "additional_chat_templates").mkdir()
    (original / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (original / "chat_template.jinja").write_text("default")
    job = job_from(world, tmp_path / "out", original, training={"max_steps": 1})
    train(job)
    (tmp_path / "out" / "report.json").unlink()
    train(job)
    named = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert named == {"default": "default", "tool_use": "tools"}


# Its defaults


DEFAULTS = {"learning_rate": 2e-5, "weight_decay": 0.0}


def open_job(world: Path, output: Path, model: Path, **changes: Any) -> StudentJob:
    """A job that gives neither learning rate nor weight decay nor window."""
    job = job_from(world, output, model, training={"max_steps": 2}, **changes)
    training = {name: value for name, value in job.training.items() if name != "learning_rate"}
    given = job.model_fields_set - {"window_tokens", "training"}
    return StudentJob(**{name: getattr(job, name) for name in given}, training=training)


def used(output: Path) -> dict[str, Any]:
    job = json.loads((output / "report.json").read_text())["job"]
    return {name: job["training"][name] for name in DEFAULTS} | {"window_tokens": job["window_tokens"]}


def test_the_defaults_from_weights_are_those_of_fine_tuning(world: Path, tmp_path: Path) -> None:
    """A window is as long as the longest context of the teachers, 1,024 without, within the model and the texts."""
    url = str(tmp_path / "cache")
    fill(url, 1500, 0, ("a",), windowing=Windowing(context_tokens=24, stride_tokens=24))
    short, long = pretrained(tmp_path / "short"), pretrained(tmp_path / "long", max_position_embeddings=4096)
    train_in = {"cache": url, "teachers": ["a"], "windows_per_step": 1}
    plain = train_in | {"teachers": [], "temperature": 1}
    cases = [(train_in, long, 24), (plain, short, 32), (plain, long, 1024)]
    cases += [(plain | {"eval_cache": str(world / "held")}, long, 299)]
    for number, (changes, model, window) in enumerate(cases):
        said: list[str] = []
        train(open_job(world, tmp_path / f"{number}", model, **changes), said.append)
        assert used(tmp_path / f"{number}") == DEFAULTS | {"window_tokens": window}
        (line,) = [one for one in said if "defaults of fine-tuning" in one]
        assert f"learning rate 2e-05, no weight decay, windows of {window:,} tokens" in line


@pytest.mark.parametrize("offset", ["fixed", "random"])
@pytest.mark.parametrize("isolated", [False, True])
def test_an_epoch_has_a_step_of_windows(tmp_path: Path, offset: str, isolated: bool) -> None:
    """Where neither window nor step was given."""
    url, starts = str(tmp_path / "cache"), [0, 700, 900, 2400]
    make_corpus(url, np.zeros(3000, dtype=np.uint16), V, document_starts=np.array(starts, dtype=np.uint64))
    model = pretrained(tmp_path / "model", max_position_embeddings=4096)
    job = StudentJob(cache=url, model=str(model), output_dir=str(tmp_path / "out"), isolate_documents=isolated)
    job = job.model_copy(update={"offset": offset, "training": {"gradient_accumulation_steps": 2}})
    window = open_fields(job, {})["window_tokens"]
    windows = DistillationWindows(url, (), window, job.offset, isolate_documents=isolated)
    assert 64 <= len(windows) <= 72
    one = open_fields(job.model_copy(update={"windows_per_step": 2, "isolate_documents": False}), {})
    assert one["window_tokens"] == 1024
    assert (
        open_fields(job.model_copy(update={"training": {"dataloader_drop_last": False}}), {})["window_tokens"] == 1024
    )


def test_a_window_fits_the_live_teachers(world: Path, tmp_path: Path) -> None:
    short, long = pretrained(tmp_path / "short"), pretrained(tmp_path / "long", max_position_embeddings=4096)
    job = open_job(world, tmp_path / "out", long, teachers=[], temperature=1, live_teachers=[str(short)])
    assert open_fields(job, {})["window_tokens"] == 32


def test_only_what_is_not_given_has_a_default(world: Path, tmp_path: Path) -> None:
    job = open_job(world, tmp_path / "out", pretrained(tmp_path / "model"))
    said: list[str] = []
    train(job.model_copy(update={"window_tokens": 8, "training": {**job.training, "weight_decay": 0.5}}), said.append)
    assert used(tmp_path / "out") == {"learning_rate": 2e-5, "weight_decay": 0.5, "window_tokens": 8}
    (line,) = [one for one in said if "defaults of fine-tuning" in one]
    assert line.endswith("starts from weights: learning rate 2e-05 (defaults of fine-tuning)")


def record_of_the_earlier_version(folder: Path) -> None:
    """Has no fields that came later, and nothing of what a job left open."""
    path = folder / RUN_FILE
    record = json.loads(path.read_text())
    identity = {name: value for name, value in record["identity"].items() if name not in ("attention", "save_dtype")}
    path.write_text(json.dumps(record | {"identity": identity, "launch": {"processes": 1}}))


EARLIER = {"learning_rate": 1e-3, "weight_decay": 0.1, "window_tokens": 128}


def test_a_run_of_the_earlier_version_resumes_with_its_own_values(world: Path, tmp_path: Path) -> None:
    """And is known when it is finished."""
    model = pretrained(tmp_path / "model", max_position_embeddings=4096)
    job = open_job(world, tmp_path / "out", model, windows_per_step=2)
    given = {name: value for name, value in EARLIER.items() if name != "window_tokens"}
    finished = train(job.model_copy(update={"window_tokens": 128, "training": {**job.training, **given}}))
    record_of_the_earlier_version(tmp_path / "out")
    said: list[str] = []
    assert train(job, said.append) == finished
    assert "finished" in said[-1]
    (tmp_path / "out" / "report.json").unlink()
    report = train(job, said.append)
    assert report.resumed_from_step == 2
    assert used(tmp_path / "out") == EARLIER
    (line,) = [one for one in said if "starts from weights" in one]
    assert line.endswith("learning rate 0.001, weight decay 0.1, windows of 128 tokens (as this folder was started)")


def test_a_sweep_goes_on_with_the_values_that_it_began_with(world: Path, tmp_path: Path) -> None:
    """By this version, or by the earlier one, which recorded none; parameters of the search have no default."""
    out = tmp_path / "out"
    model = pretrained(tmp_path / "model", max_position_embeddings=4096)
    job = open_job(world, out, model, windows_per_step=2, eval_cache=str(world / "held"))
    job = job.model_copy(update={"alpha": 0.5})

    def last_trial(trials: int) -> dict[str, Any]:
        search = {"trials": trials, "parameters": {"weight_decay": {"choices": [0.3]}}}
        report = sweep(job, Search.model_validate(search), lambda line: None)
        assert len(report.trials) == trials
        found = report.trials[-1].job
        return {name: found["training"][name] for name in DEFAULTS} | {"window_tokens": found["window_tokens"]}

    first = {"learning_rate": 2e-5, "weight_decay": 0.3, "window_tokens": 16}
    assert last_trial(1) == first
    assert last_trial(2) == first
    record_of_the_earlier_version(out)
    assert last_trial(3) == EARLIER | {"weight_decay": 0.3}


def test_the_window_of_a_sweep_leaves_room_for_its_largest_step(world: Path, tmp_path: Path) -> None:
    job = open_job(world, tmp_path / "out", pretrained(tmp_path / "model"), eval_cache=str(world / "held"))
    search = {"trials": 1, "parameters": {"windows_per_step": {"choices": [2, 100]}}}
    report = sweep(job.model_copy(update={"alpha": 0.5}), Search.model_validate(search), lambda line: None)
    assert report.trials[0].job["window_tokens"] == 1499 // 100


def test_train_teacher_has_the_same_defaults_and_a_new_model_has_its_own(world: Path, tmp_path: Path, run: Run) -> None:
    model = pretrained(tmp_path / "model")
    line = ["--cache", world / "train", "--set", "max_steps=1", "--windows-per-step", 1]
    done = run("train-teacher", *line, "--model", model, "--output-dir", tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    assert used(tmp_path / "weights") == DEFAULTS | {"window_tokens": 32}
    assert "defaults of fine-tuning" in done.stderr
    done = run("train-teacher", *line, "--model", "llama-tiny", "--output-dir", tmp_path / "new")
    assert used(tmp_path / "new") == EARLIER
    assert "fine-tuning" not in done.stderr
