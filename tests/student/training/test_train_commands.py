"""`train-student` and `train-teacher` as a user meets them: runs, resumption, several processes, wrong input."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.caches import small as fakes
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.commands import Run, refused
from support.processes import start_code
from support.runs import KILLED, LLAMA, V, arguments, have_equal_weights, job_in, python, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from storage import LogitCache
from storage.cache.writer import EntryWriter
from storage.errors import IdentityMismatch, InputError, StorageFull
from storage.format.manifest.entry import Windowing
from student.cli import build_job, train_student
from student.report import Passage
from student.training.arguments import training_values
from student.training.publish import cast_weights
from student.training.run import train
from student.training.run_folder import OutputDirectory, full_disk_is_reported
from teachers.cli import train_teacher


def test_a_run_leaves_a_standard_model_directory_and_a_report(world: Path, tmp_path: Path) -> None:
    job = job_in(world, tmp_path / "out", eval_cache=str(world / "held"))
    lines: list[str] = []
    report = train(job, lines.append)
    assert report.steps == 93 // 8
    assert report.tokens_seen == report.steps * 8 * 16
    assert report.windows_per_step == 8
    assert [entry["step"] for entry in report.train_log] == [2, 4, 6, 8, 10, 11], "the last step is logged, too"
    assert {"loss", "cross_entropy", "kl_a", "kl_b"} <= report.train_log[0].keys()
    held = report.held_out
    assert held.tokens == 299
    assert held.perplexity == pytest.approx(np.exp(held.cross_entropy))
    assert held.bits_per_byte == pytest.approx(held.cross_entropy / np.log(2) / 4)
    assert (held.kl["a"].lower_bound, held.kl["b"].lower_bound) == (True, False)
    assert held.kl["b"].nats > 0
    assert set(report.provenance) == {
        "cache", "cache/a", "cache/b", "eval_cache", "eval_cache/a", "eval_cache/b"
    }  # fmt: skip

    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == V
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(out).encode("t3 t60 t7") == [3, 60, 7]
    assert json.loads((out / "report.json").read_text()) == report.model_dump(mode="json")
    assert not [name for name in os.listdir(out) if name.endswith((".partial", ".bin", ".pt")) or name == "publishing"]
    passage = Passage.model_validate_json((out / "passage.json").read_text())
    read = torch.from_numpy(LogitCache.open(world / "held").tokens.read(0, 17).astype(np.int64))
    with torch.no_grad():
        published = model(read[None, :16]).logits[0].log_softmax(1)
    assert [one.label_logprob for one in passage.expected] == pytest.approx(
        published[range(16), read[1:]].tolist(), abs=1e-4
    ), "of the published weights"

    before = {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}
    assert train(job, lines.append) == report
    assert "finished" in lines[-1]
    assert before == {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}


def test_distillation_reduces_the_divergence_and_seeds_repeat(world: Path, tmp_path: Path) -> None:
    training = {"num_train_epochs": 6}
    job = job_in(world, tmp_path / "one", teachers=["b"], alpha=0.1, training=training)
    report = train(job)
    assert report.train_log[-1]["kl_b"] < 0.8 * report.train_log[0]["kl_b"]
    again = train(job.model_copy(update={"output_dir": str(tmp_path / "two")}))
    assert [e["loss"] for e in again.train_log] == [e["loss"] for e in report.train_log]
    assert have_equal_weights(tmp_path / "one", tmp_path / "two")


def test_alpha_one_is_the_control_of_its_teachers(world: Path, tmp_path: Path) -> None:
    named = train(job_in(world, tmp_path / "named", alpha=1.0, eval_cache=str(world / "held")))
    control = train(job_in(world, tmp_path / "control", teachers=[], temperature=1))
    assert set(named.held_out.kl) == {"a", "b"}
    assert [e["loss"] for e in named.train_log] == [e["loss"] for e in control.train_log]
    assert have_equal_weights(tmp_path / "named", tmp_path / "control")


def test_a_killed_run_resumes_and_ends_as_an_uninterrupted_one(world: Path, tmp_path: Path) -> None:
    """GPT-2 has dropout, so the random state matters; the kill is in the second epoch, between two checkpoints."""
    training = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 4
    }  # fmt: skip
    common = {"model": str(world / "gpt2.json"), "training": training, "alpha_end": 0.2}
    whole = train(job_in(world, tmp_path / "whole", **common))
    assert whole.steps == 3 * (93 // 8), "no step is shorter than the others"
    assert [e["alpha"] for e in whole.train_log[:2]] == pytest.approx([0.5 - 0.3 / 32, 0.5 - 0.3 * 3 / 32])
    assert whole.train_log[-1]["alpha"] == pytest.approx(0.2)
    job = job_in(world, tmp_path / "killed", **common)
    killed = start_code(KILLED.format(step=19), *arguments(job)).end()
    assert killed.returncode == 9, killed.stderr
    assert (tmp_path / "killed" / "checkpoint-16").is_dir()
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint-20").mkdir()  # one that was being written
    (tmp_path / "killed" / "checkpoint-20" / "model.safetensors").write_bytes(b"half")
    report = train(job)
    assert report.resumed_from_step == 16
    assert (report.steps, report.tokens_seen) == (whole.steps, whole.tokens_seen)
    assert [(e["step"], e["loss"]) for e in report.train_log] == [(e["step"], e["loss"]) for e in whole.train_log]
    assert have_equal_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_that_cannot_be_read_is_no_half_written_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may answer again; what was being written when a run was killed is removed."""
    folder, read = OutputDirectory(str(tmp_path)), Path.read_bytes
    for number, state in ((1, '{"global_step": 1}'), (2, '{"global_'), (3, None), (4, '{"global_step": 4}')):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(state)

    def fails(self: Path) -> bytes:
        if self.parent.name == "checkpoint-4":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(InputError, match=r"checkpoint-4/trainer_state\.json: cannot be read \(Input/output error\)"):
        folder.last_checkpoint()
    monkeypatch.setattr(Path, "read_bytes", read)
    assert folder.last_checkpoint() == (tmp_path / "checkpoint-4", {"global_step": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]


def test_a_run_killed_before_publishing_is_published_without_another_step(world: Path, tmp_path: Path) -> None:
    job = job_in(world, tmp_path / "out", training={"max_steps": 5, "save_steps": 2})
    report = train(job)
    expected = weights(tmp_path / "out")
    for name in ("report.json", "config.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    again = train(job)
    assert (again.steps, again.resumed_from_step, again.tokens_seen) == (5, 5, report.tokens_seen)
    found = weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_the_command_says_of_a_run(world: Path, run: Run, tmp_path: Path) -> None:
    training = {"max_steps": 3, "logging_steps": 2}
    job = job_in(world, tmp_path / "out", eval_cache=str(world / "held"), training=training)
    done = run("train-student", *arguments(job))
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "out" / "report.json").read_text())["train_log"][-1]
    assert f"{last['loss']:.4f}, logged at step 3\n" in done.stdout
    assert "KL to a" in done.stdout
    assert "lower bound" in done.stdout


@pytest.mark.parametrize("command", [train_student, train_teacher], ids=lambda command: command.name)
def test_help_has_an_example_and_presets(command: click.Command) -> None:
    shown = CliRunner().invoke(command, ["--help"]).stdout
    assert "Example:" in shown
    assert "llama-58m" in shown


def test_train_teacher_trains_on_tokens_alone(world: Path, tmp_path: Path) -> None:
    job = job_in(world, tmp_path / "teacher", teachers=[], temperature=1, training={"max_steps": 3})
    done = CliRunner().invoke(train_teacher, arguments(job))
    assert done.exit_code == 0, done.stderr
    assert "held out" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").config.model_type == "llama"
    report = json.loads((tmp_path / "teacher" / "report.json").read_text())
    assert "kl_a" not in report["train_log"][0]
    assert report["job"]["alpha"] == 1


def test_config_file_and_flags(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(
        f"cache: {world / 'train'}\nmodel: llama-tiny\noutput-dir: {tmp_path / 'out'}\nteachers: {{a: 2, b: 1}}\n"
        "temperature: 2\ntraining:\n  learning_rate: 3e-4\n  num_train_epochs: 2\n"
    )
    flags: dict[str, Any] = {"config": str(config), "settings": ("learning_rate=1e-3", "bf16=true"), "as_json": False}
    flags |= {"model": "gpt2-tiny", "teacher": ()}
    job = build_job("train-student", flags)
    assert (job.model, job.temperature, job.alpha) == ("gpt2-tiny", 2.0, 0.5)
    assert [(t.name, t.weight) for t in job.teachers] == [("a", 2.0), ("b", 1.0)]
    assert job.training == {"learning_rate": 1e-3, "num_train_epochs": 2, "bf16": True}


def edited(**changes: Any) -> Callable[[Path, Path], list[str]]:
    """The command line of a good job with some flags changed or, when None, left out; `set` adds a setting."""

    def build(world: Path, output: Path) -> list[str]:
        line = arguments(job_in(world, output))
        for name, value in changes.items():
            option = "--" + name.replace("_", "-")
            while option != "--set" and option in line:
                at = line.index(option)
                del line[at : at + 2]
            for item in value if isinstance(value, list) else [value]:
                if item is not None:
                    line += [option, str(item).replace("WORLD", str(world))]
        return line

    return build


WRONG = {
    "cache is missing": (edited(cache=None), "--cache is missing"),
    "no cache there": (edited(cache="WORLD/none"), "no cache there"),
    "cache is no cache": (edited(cache="WORLD"), "no cache there"),
    "unknown teacher": (edited(teacher=["c"]), "no teacher entry 'c'; there is: a, b"),
    "teacher twice": (edited(teacher=["a", "a:2"]), "named once"),
    "weight is no number": (edited(teacher=["a:much"]), "'much' is not a number"),
    "no weight at all": (edited(teacher=["a:0", "b:0"]), "every teacher's weight is 0"),
    "alpha too large": (edited(alpha=1.5), "less than or equal to 1"),
    "alpha without teachers": (edited(teacher=[], alpha=0), "alpha is 0 but no teacher is named"),
    "unknown preset": (edited(model="lama-tiny"), "did you mean 'llama-tiny'"),
    "missing model file": (edited(model="WORLD/none.json"), "no such file"),
    "window longer than the model": (edited(window_tokens=33), "32 positions"),
    "window longer than the corpus": (edited(window_tokens=1500), "1500"),
    "unknown training field": (edited(set="learning_rat=1"), "did you mean 'learning_rate'"),
    "setting without value": (edited(set="learning_rate"), "expected NAME=VALUE"),
    "wrong type": (edited(set="max_steps=soon"), "'max_steps'"),
    "wrong choice": (edited(set="lr_scheduler_type=wavy"), "wavy"),
    "reserved field": (edited(set="label_smoothing_factor=0.1"), "replace the distillation loss"),
    "field of ours": (edited(set="seed=3"), "give --seed"),
    "step of two sizes": (edited(windows_per_step=8, set="gradient_accumulation_steps=2"), "leave one of the two out"),
    "step larger than the data": (edited(windows_per_step=94), "93 windows of 16 tokens, fewer than the 94 of one"),
    "unknown logger": (edited(set="report_to=paper"), "'paper' is not known"),
    "evaluation without data": (edited(set="eval_strategy=epoch"), "give --eval-cache"),
    "unknown metric": (edited(eval_cache="WORLD/held", set="metric_for_best_model=bleu"), "not measured"),
    "division by nothing": (edited(set="adam_epsilon=1.0e-50"), "larger adam_epsilon"),
    "no step": (edited(set="max_steps=0"), "(found 0; -1 leaves it to num_train_epochs)"),
    "part of a step": (edited(set="save_steps=2.5"), "should be whole"),
    "deepspeed": (edited(set="deepspeed=x.json"), "deepspeed"),
    "compiler mode": (edited(set="torch_compile_mode=x"), "Unrecognized mode=x"),
    "compiler": (edited(set="torch_compile_backend=x"), "torch_compile with backend x"),
    "float16 on a CPU": (edited(set="fp16=true"), "fp16 was asked for on a CPU"),
    "hub": (edited(set="push_to_hub=true"), "upload --output-dir then"),
    "log level": (edited(set="log_level=loud"), "'passive' (found 'loud')"),
    "best of nothing": (edited(set="save_strategy=best"), "metric_for_best_model"),
    "no config file": (edited(config="WORLD/none.yaml"), "none.yaml"),
    "eval cache is none": (edited(eval_cache="WORLD/none"), "no cache there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(world: Path, tmp_path: Path, run: Run, case: str) -> None:
    build, expected = WRONG[case]
    done = run("train-student", *build(world, tmp_path / "out"))
    refused(done, expected)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_else_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"holds thesis\.txt"):
        train(job_in(world, tmp_path))
    with pytest.raises(InputError, match="is a file"):
        train(job_in(world, tmp_path / "thesis.txt"))
    with pytest.raises(InputError, match="lies in one"):
        train(job_in(world, tmp_path / "thesis.txt" / "deeper"))
    assert os.listdir(tmp_path) == ["thesis.txt"]
    (tmp_path / "run.json").write_text('{"kind": "triathlon"}')
    with pytest.raises(InputError, match=r"run\.json is not of a training run"):
        train(job_in(world, tmp_path))


def test_a_folder_that_cannot_be_written_is_reported(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def refuse(self: Path, *others: Any, **more: Any) -> None:
        if self == tmp_path / "out":
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *others, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot write to .*Permission denied"):
        train(job_in(world, tmp_path / "out"))


def test_another_job_in_the_same_output_is_refused_with_the_fields(world: Path, tmp_path: Path) -> None:
    short = {"max_steps": 1}
    train(job_in(world, tmp_path / "out", training=short))
    with pytest.raises(IdentityMismatch) as caught:
        train(job_in(world, tmp_path / "out", alpha=0.25, training={**short, "learning_rate": 0.5}))
    assert [field.split(":")[0] for field in caught.value.fields] == ["alpha", "training.learning_rate"]


def test_a_changed_configuration_under_the_same_name_is_another_job(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "model.json"
    config.write_text(json.dumps(LLAMA))
    job = job_in(world, tmp_path / "out", model=str(config), training={"max_steps": 1})
    train(job)
    config.write_text(json.dumps({**LLAMA, "hidden_size": 32}))
    with pytest.raises(IdentityMismatch, match="model_sha256"):
        train(job)


def test_held_out_caches_must_share_the_tokenizer_and_teachers_may_be_missing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL is measured to entries of the same teacher only; for the others the report has the reason."""
    held = str(tmp_path / "held")
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, V, 100).astype(np.uint16)
    record = make_corpus(held, tokens, V)
    labels = np.append(tokens[1:], -1).astype(np.int64)
    other = make_entry(record, V, encoding="float32", weights_sha256="e" * 64)
    write_entry(held, "b", other, dense_targets(rng.normal(size=(100, V)), V, labels))
    EntryWriter.open(held, "a", make_entry(record, 9))
    short = {"max_steps": 1}
    report = train(job_in(world, tmp_path / "one", eval_cache=held, training=short))
    assert report.held_out.kl == {}
    assert "incomplete" in report.held_out.kl_not_measured["a"]
    assert "another teacher" in report.held_out.kl_not_measured["b"]

    bare = str(tmp_path / "bare")
    make_corpus(bare, tokens, V)
    report = train(job_in(world, tmp_path / "two", eval_cache=bare, training=short))
    assert "no entry" in report.held_out.kl_not_measured["a"]

    foreign = str(tmp_path / "foreign")
    monkeypatch.setattr(fakes, "SHA", "d" * 64)
    make_corpus(foreign, tokens, V)
    with pytest.raises(IdentityMismatch, match="different tokenizers"):
        train(job_in(world, tmp_path / "three", eval_cache=foreign, training=short))
    assert not (tmp_path / "three").exists()


def test_isolated_teachers_make_isolated_windows(tmp_path: Path, world: Path) -> None:
    url = str(tmp_path / "isolated")
    tokens = np.random.default_rng(3).integers(0, V, 200).astype(np.uint16)
    starts = np.arange(0, 200, 20)
    record = make_corpus(url, tokens, V, document_starts=starts)
    labels = np.append(tokens[1:], -1).astype(np.int64)
    labels[starts[1:] - 1] = -1
    windowing = Windowing(context_tokens=16, stride_tokens=16, isolate_documents=True)
    targets = dense_targets(np.random.default_rng(4).normal(size=(200, V)), 9, labels)
    write_entry(url, "a", make_entry(record, 9, windowing=windowing), targets)
    training = {"per_device_train_batch_size": 2, "max_steps": 2}
    report = train(
        job_in(world, tmp_path / "out", cache=url, eval_cache=url, teachers=["a"], offset="fixed", training=training)
    )
    assert report.isolated_documents
    assert report.held_out.tokens == 190


def test_evaluation_during_training_and_the_best_model(world: Path, tmp_path: Path) -> None:
    training: dict[str, Any] = {
        "dataloader_num_workers": 1,
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "max_steps": 8,
        "load_best_model_at_end": True, "metric_for_best_model": "kl_b",
    }  # fmt: skip
    report = train(job_in(world, tmp_path / "out", eval_cache=str(world / "held"), training=training))
    assert [entry["step"] for entry in report.eval_log] == [4, 8]
    best = min(entry["eval_kl_b"] for entry in report.eval_log)
    assert report.held_out.kl["b"].nats == pytest.approx(best, abs=1e-6)


def test_the_loss_on_held_out_text_is_a_mean_over_tokens(world: Path, tmp_path: Path) -> None:
    """With alpha 1 it is the cross-entropy, though the last batch has fewer tokens than the others."""
    training: dict[str, Any] = {
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "per_device_eval_batch_size": 5,
        "load_best_model_at_end": True, "metric_for_best_model": "distillation_loss",
    }  # fmt: skip
    held = train(job_in(world, tmp_path / "out", alpha=1, eval_cache=str(world / "held"), training=training)).held_out
    assert held.distillation_loss == pytest.approx(held.cross_entropy, rel=1e-6)


@pytest.mark.parametrize("limit", [9_000, 30_000], ids=["weights", "optimizer"])
def test_a_full_disk_is_reported_and_the_run_resumes_afterwards(world: Path, tmp_path: Path, limit: int) -> None:
    job = job_in(world, tmp_path / "out", training={"max_steps": 4, "save_steps": 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageFull, match="free some room"):
            train(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / "config.json").exists()
    report = train(job)
    assert (report.steps, report.resumed_from_step) == (4, 0)


def test_a_student_of_another_tokenizer_is_refused(world: Path, tmp_path: Path) -> None:
    """With the ids that differ; its own cache's tokenizer, or none, is accepted."""
    model = tmp_path / "model"
    train(job_in(world, model))
    for name in ("run.json", "report.json"):
        (model / name).unlink()
    train(job_in(world, tmp_path / "again", model=str(model)))
    other = json.loads((model / "tokenizer.json").read_text())
    words = other["model"]["vocab"]
    words["t3"], words["t60"] = words["t60"], words["t3"]
    (model / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(IdentityMismatch, match="its tokenizer is not the one of") as caught:
        train(job_in(world, tmp_path / "out", model=str(model)))
    assert "id 3: 't3' here, 't60' in the model's" in str(caught.value)
    assert f"logit-cache tokenize --tokenizer {model}" in str(caught.value)
    assert not (tmp_path / "out").exists()
    for path in model.glob("tokenizer*"):
        path.unlink()
    train(job_in(world, tmp_path / "out", model=str(model)))


def test_a_model_is_saved_in_the_dtype_that_it_came_in(world: Path, tmp_path: Path) -> None:
    """Or in the one that was asked for; training itself keeps float32."""
    train(job_in(world, tmp_path / "new"))
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16).save_pretrained(half)
    found = {}
    for name, asked in (("kept", None), ("asked", "float32"), ("new-half", "float16")):
        model = {} if name == "new-half" else {"model": str(half)}
        train(job_in(world, tmp_path / name, save_dtype=asked, **model))
        found[name] = load_file(tmp_path / name / "model.safetensors")
        (dtype,) = {tensor.dtype for tensor in found[name].values()}
        assert AutoConfig.from_pretrained(tmp_path / name).dtype == dtype
    assert {str(tensor.dtype) for tensor in found["new-half"].values()} == {"torch.float16"}
    for name, tensor in found["asked"].items():
        assert torch.equal(tensor.bfloat16(), found["kept"][name])
        assert not torch.equal(tensor, found["kept"][name].float()), "it was trained in float32"


def test_a_model_of_several_files_is_cast_whole(world: Path, tmp_path: Path) -> None:
    train(job_in(world, tmp_path / "new"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    cast_weights(tmp_path / "parts", "bfloat16")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in (tmp_path / "parts").glob("*.safetensors") for tensor in load_file(path).values()
    )


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    folder, other = (OutputDirectory(str(tmp_path / "out")) for _ in range(2))
    with (
        folder.reserved({"cache": "c"}),
        pytest.raises(InputError, match="another training run is at work there"),
        other.reserved({"cache": "c"}),
    ):
        pass
    with other.reserved({"cache": "c"}):
        (tmp_path / "out" / "report.json").touch()
    with pytest.raises(InputError, match="has just finished this run"), folder.reserved({"cache": "c"}):
        pass
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "run.json"]


@pytest.mark.parametrize("identity", [{"cache": "c", "alpha": 0.5, "mix": 0.1}, {"cache": "c"}], ids=["more", "less"])
def test_a_field_that_only_one_of_two_runs_has_makes_them_two(tmp_path: Path, identity: dict[str, Any]) -> None:
    folder = OutputDirectory(str(tmp_path / "out"))
    with folder.reserved({"cache": "c", "alpha": 0.5}):
        pass
    with pytest.raises(IdentityMismatch, match="mix" if "mix" in identity else "alpha"):
        OutputDirectory(str(tmp_path / "out")).check(identity)


@pytest.mark.parametrize("before", ["nothing", "folder", "checkpoint", "record"])
def test_a_run_that_fails_before_it_has_anything_leaves_the_folder_as_it_was(tmp_path: Path, before: str) -> None:
    path = tmp_path / "out"
    if before != "nothing":
        path.mkdir()
    if before == "record":
        with OutputDirectory(str(path)).reserved({"cache": "c"}):
            pass

    def fails() -> None:
        with OutputDirectory(str(path)).reserved({"cache": "c"}):
            assert (path / "run.json").exists()
            if before == "checkpoint":
                (path / "checkpoint-1").mkdir()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    left = {"nothing": [], "folder": [], "checkpoint": ["checkpoint-1", "run.json"], "record": ["run.json"]}
    assert path.exists() == (before != "nothing")
    assert sorted(item.name for item in tmp_path.glob("out/*")) == left[before]


def test_fields_that_no_version_takes_any_more_make_no_other_run(tmp_path: Path) -> None:
    folder = OutputDirectory(str(tmp_path / "out"))
    with folder.reserved({"cache": "c", "training.push_to_hub": False, "training.eval_accumulation_steps": 4}):
        pass
    folder.check({"cache": "c"})


def test_other_errors_are_not_taken_for_a_full_disk() -> None:
    with pytest.raises(KeyError), full_disk_is_reported("out"):
        raise KeyError("x")
    with pytest.raises(RuntimeError, match="os error 2"), full_disk_is_reported("out"):
        raise RuntimeError("No such file or directory (os error 2)")


def test_a_foreign_package_named_storage_is_named(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "__init__.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from student.cli import train_student; train_student([])"
    )
    done = python("-c", code)
    assert done.returncode == 2
    assert str(tmp_path / "storage") in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_process_reads_ahead_of_a_gpu(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert training_values(job_in(world, tmp_path / "out"))["dataloader_num_workers"] == 1
    values = training_values(job_in(world, tmp_path / "out", training={"dataloader_num_workers": 0}))
    assert "dataloader_prefetch_factor" not in values  # torch takes it with workers only
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert "dataloader_num_workers" not in training_values(job_in(world, tmp_path / "out"))
