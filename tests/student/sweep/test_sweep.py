"""`train-student --sweep`: what is refused, what a trial really had, and that a sweep is repeatable, killed or not."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import ROOT, Run, refused
from support.processes import Process, start
from support.runs import LLAMA, fill
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.errors import IdentityMismatch, InputError
from student.cli import build_job
from student.evaluation.minimal_pairs import read_pairs, score_pairs, tally
from student.job import StudentJob
from student.report import TrainingReport
from student.sweep.record import INTERRUPTED, SweepReport, TrialRecord
from student.sweep.run import sweep
from student.sweep.search_space import Search, read_sweep
from student.sweep.study import SharedStudy, open_database
from student.sweep.trial import check_names, trial_job, trial_settings

EXAMPLE = ROOT / "examples" / "babyllama2_sweep.yaml"
PARAMETERS: dict[str, Any] = {
    "learning_rate": {"distribution": "log_uniform", "low": 1e-4, "high": 3e-2},
    "windows_per_step": {"choices": [4, 8, 12]},
    "alpha": {"distribution": "uniform", "low": 0.0, "high": 1.0},
    "temperature": {"choices": [1, 2]},
    "weight_decay": {"distribution": "log_normal", "mu": 0.0, "sigma": 1.0, "high": 2.0},
    "adam_beta2": {"distribution": "log_uniform", "low": 1e-4, "high": 1e-2, "one_minus": True},
    "warmup_steps": {"distribution": "int", "low": 0, "high": 4, "step": 2},
    "offset": {"choices": ["fixed", "random"]},
    "model.hidden_size": {"choices": [16, 32]},
}


def fields(world: Path, out: Path, parameters: dict[str, Any] | None = None, **search: Any) -> dict[str, Any]:
    """A sweep's file. GPT-2's dropout makes a trial depend on the random state.

    The tokens of `make_world` are random: nothing is to be learnt, and the slowest student is the best.
    """
    training = {"max_steps": 5, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    return {
        "cache": str(world / "train"),
        "teachers": ["a", "b"],
        "model": str(world / "gpt2.json"),
        "eval_cache": str(world / "held"),
        "window_tokens": 16,
        "output_dir": str(out),
        "seed": 5,
        "training": {**training, **search.pop("training", {}), "per_device_train_batch_size": 8},
        "sweep": {"trials": 4, "seed": 3, "parameters": parameters or PARAMETERS, **search},
    }


def written(file: Path, data: dict[str, Any]) -> str:
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(file)


def swept(file: Path, data: dict[str, Any]) -> SweepReport:
    job, search = loaded(written(file, data))
    return sweep(job, search, lambda line: None)


def loaded(file: str) -> tuple[StudentJob, Search]:
    common, search = read_sweep(file)
    return built(common), search


def built(config: Any) -> StudentJob:
    return build_job("train-student", {"config": config, "settings": (), "as_json": False})


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """The folder of a finished sweep, by the installed command."""
    out = tmp_path_factory.mktemp("done") / "out"
    result = run("train-student", "--sweep", written(out.parent / "sweep.yaml", fields(world, out)), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((out / "sweep.json").read_text())
    return out


def report_in(folder: Path) -> SweepReport:
    return SweepReport.model_validate_json((folder / "sweep.json").read_bytes())


# What is refused


CHANGED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "reversed": ({"learning_rate": {"distribution": "uniform", "low": 1, "high": 0.1}}, ("learning_rate", "not below")),
    "log of zero": ({"weight_decay": {"distribution": "log_uniform", "low": 0, "high": 1}}, ("low above 0", "found 0")),
    "distribution": ({"alpha": {"distribution": "unifrom", "low": 0, "high": 1}}, ("did you mean 'uniform'",)),
    "both": ({"alpha": {"distribution": "uniform", "choices": [1]}}, ("either choices or a distribution",)),
    "field": ({"alpha": {"distribution": "uniform", "low": 0, "hgih": 1, "high": 1}}, ("did you mean 'high'",)),
    "twice": ({"alpha": {"choices": [0.5, 0.5]}}, ("each choice is given once",)),
    "steps": ({"warmup_steps": {"distribution": "int", "low": 0, "high": 5, "step": 2}}, ("do not reach 5",)),
    "no low": ({"alpha": {"distribution": "uniform", "high": 1}}, ("alpha: low is missing",)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_ranges_that_are_none_are_refused(world: Path, tmp_path: Path, run: Run, case: str) -> None:
    parameters, words = CHANGED[case]
    file = written(tmp_path / "sweep.yaml", fields(world, tmp_path / "out", parameters))
    refused(run("train-student", "--sweep", file), str(file), *words)
    assert not (tmp_path / "out").exists()


def test_other_fields_of_the_block(world: Path, tmp_path: Path, run: Run) -> None:
    for changes, word in (({"backend": "optun"}, "backend"), ({"trails": 4}, "'trials'"), ({"trials": 0}, "trials")):
        file = written(tmp_path / "sweep.yaml", fields(world, tmp_path / "out", **changes))
        refused(run("train-student", "--sweep", file), word)
    plain = {name: value for name, value in fields(world, tmp_path / "out").items() if name != "sweep"}
    refused(run("train-student", "--sweep", written(tmp_path / "plain.yaml", plain)), "block `sweep:`")
    refused(run("train-student", "--sweep", file, "--config", file), "give one of them")


UNFIT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown": ({"learning_rat": {"choices": [1]}}, {}, "did you mean 'learning_rate'"),
    "unknown of model": ({"model.n_embed": {"choices": [16]}}, {}, "did you mean 'model.n_embd'"),
    "reserved": ({"seed": {"choices": [1, 2]}}, {}, "give --seed"),
    "computing": ({"eval_steps": {"choices": [1, 2]}}, {}, "cannot be swept"),
    "vocabulary": ({"model.vocab_size": {"choices": [61]}}, {}, "cannot be swept"),
    "fixed above": ({"window_tokens": {"choices": [8, 16]}}, {}, "also fixed as 16"),
    "fixed in training": ({"max_steps": {"choices": [2, 3]}}, {}, "also fixed as training: max_steps"),
    "step": ({"windows_per_step": {"choices": [4]}, "gradient_accumulation_steps": {"choices": [1]}}, {}, "it decides"),
    "temperature": ({"temperature": {"choices": [1, 1.5]}}, {}, "temperature: 1.5 is impossible"),
    "temperatures": ({"temperature": {"distribution": "uniform", "low": 1, "high": 2}}, {}, "choices: [1, 2]"),
    "beyond": ({"alpha": {"distribution": "uniform", "low": 0, "high": 1.5}}, {}, "alpha: 1.5 is impossible"),
    "heads": ({"model.hidden_size": {"choices": [16, 17]}}, {}, "model.hidden_size: 17 is impossible"),
    "layers": ({"model.n_layer": {"choices": [0, 1]}}, {}, "at least one layer"),
    "word": ({"windows_per_step": {"choices": [8, "all"]}}, {}, "'all' is impossible: expected a number"),
    "batch": ({"windows_per_step": {"choices": [8, 2000]}}, {}, "windows_per_step: 2000 is impossible"),
    "positions": ({"model.n_positions": {"choices": [8, 64]}}, {}, "model.n_positions: 8 is impossible"),
    "scheduler": ({"lr_scheduler_type": {"choices": ["cosine", "square"]}}, {}, "'square' is impossible"),
    "one": ({"adam_beta1": {"distribution": "uniform", "low": 0.5, "high": 1}}, {}, "adam_beta1: 1.0 is impossible"),
    "fixed": ({}, {"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, "One of min_lr or min_lr_rate"),
    "metric": ({}, {"metric": "kl_c"}, "is not measured"),
    "its own loss": ({"alpha": {"choices": [0, 1]}}, {"metric": "distillation_loss"}, "another figure for every alpha"),
    "pruner": ({}, {"pruner": "median", "training": {"eval_strategy": "no"}}, "set eval_strategy"),
    "ray": ({}, {"backend": "ray"}, "backend ray is no more: leave backend out, and start the same command once for"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_parameters_that_do_not_fit_are_refused_before_anything_runs(
    world: Path, tmp_path: Path, run: Run, case: str
) -> None:
    parameters, changes, words = UNFIT[case]
    data = fields(world, tmp_path / "out", parameters or None, **copy.deepcopy(changes))
    refused(run("train-student", "--sweep", written(tmp_path / "sweep.yaml", data)), words)
    assert not (tmp_path / "out").exists()


def test_weights_held_out_text_and_processes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fields(world, tmp_path / "out")
    without = {name: value for name, value in data.items() if name != "eval_cache"}
    with pytest.raises(InputError, match="held-out text"):
        swept(tmp_path / "sweep.yaml", without)
    with pytest.raises(InputError, match="no teacher is named"):
        swept(tmp_path / "sweep.yaml", {**data, "teachers": []})
    with pytest.raises(InputError, match="a sweep trains from cached teachers"):
        swept(tmp_path / "sweep.yaml", {**data, "teachers": [], "live_teachers": ["teacher"]})
    with pytest.raises(InputError, match="weights are loaded"):
        swept(tmp_path / "sweep.yaml", {**data, "model": str(tmp_path)})
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda module: None)
        with pytest.raises(InputError, match=r"needs optuna: pip install 'logit-cache\[tune\]'"):
            swept(tmp_path / "sweep.yaml", data)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a trial runs in one process: start the sweep without torchrun"):
        swept(tmp_path / "sweep.yaml", data)


# What a trial had


def test_values_lie_in_their_ranges_and_were_really_used(done: Path) -> None:
    report = report_in(done)
    assert (report.metric, report.direction, report.backend) == ("eval_loss", "minimize", "optuna")
    assert [trial.number for trial in report.trials] == [0, 1, 2, 3]
    assert len({repr(trial.parameters) for trial in report.trials}) == 4
    for trial in report.trials:
        had = trial.parameters
        assert trial.state == "complete"
        assert trial.steps == 5
        assert 1e-4 <= had["learning_rate"] <= 3e-2
        assert 0 <= had["alpha"] <= 1
        assert had["temperature"] in (1, 2)
        assert math.exp(-3) <= had["weight_decay"] <= 2
        assert 0.99 <= had["adam_beta2"] <= 0.9999
        assert had["warmup_steps"] in (0, 2, 4)
        assert had["windows_per_step"] in (4, 8, 12)
        assert trial.metrics["eval_loss"] == trial.value
        assert [step for step, _ in trial.evaluations] == [2, 4, 5]
        training = trial.job["training"]
        assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == had[
            "windows_per_step"
        ]  # fmt: skip
        assert training["per_device_train_batch_size"] <= 8
        assert json.loads(Path(trial.job["model"]).read_text())["n_embd"] == had["model.hidden_size"]
    by_width = {t.parameters["model.hidden_size"]: t.model_parameters for t in report.trials}
    assert len(by_width) == 2
    assert by_width[32] > by_width[16]  # type: ignore[operator]
    assert [path.parent.name for path in done.rglob("*.safetensors")] == [f"trial-{report.best}"]
    assert all((done / f"trial-{number}" / "report.json").exists() for number in range(4))


def test_the_best_trial_is_the_run_of_its_job_to_the_last_bit(done: Path, tmp_path: Path, run: Run) -> None:
    report = report_in(done)
    trial = report.ranked()[0]
    assert trial.number == report.best
    result = run("train-student", "--config", done / "best.yaml", "--output-dir", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    trained = json.loads(result.stdout)
    assert trained["held_out"]["cross_entropy"] == trial.value
    assert [(entry["step"], entry["eval_loss"]) for entry in trained["eval_log"]] == [*map(tuple, trial.evaluations)]
    assert trained["train_log"][-1]["loss"] == trial.train_loss
    assert trained["parameters"] == trial.model_parameters
    assert max(entry["learning_rate"] for entry in trained["train_log"]) <= trial.parameters["learning_rate"]
    assert trained["job"]["alpha"] == trial.parameters["alpha"]
    width = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size
    assert width == trial.parameters["model.hidden_size"]


def test_another_seed_makes_other_proposals(world: Path, done: Path, tmp_path: Path) -> None:
    """The same seed makes the same ones: the sweep that was killed shows it."""
    other = swept(tmp_path / "b.yaml", fields(world, tmp_path / "other", seed=4, trials=1))
    assert other.trials[0].parameters != report_in(done).trials[0].parameters


def test_the_table_is_best_first_and_a_finished_sweep_is_not_run_again(done: Path, run: Run) -> None:
    kept = list(done.glob("trial-*/*"))
    before = [path.stat().st_mtime_ns for path in kept]
    result = run("train-student", "--sweep", done.parent / "sweep.yaml")
    assert result.returncode == 0, result.stderr
    assert "all 4 trials are done" in result.stderr
    values = [float(line.split()[2]) for line in result.stdout.splitlines()[1:5]]
    assert values == sorted(values)
    assert result.stdout.splitlines()[-1].endswith(f"--config {done}/best.yaml")
    assert before == [path.stat().st_mtime_ns for path in kept]


# Sweeps that resume, and trials that do not end well


def test_another_search_in_the_folder_is_refused_and_more_trials_are_not(world: Path, tmp_path: Path) -> None:
    parameters = {"learning_rate": PARAMETERS["learning_rate"]}
    data = fields(world, tmp_path / "out", parameters, trials=2, sampler="random")
    first = swept(tmp_path / "sweep.yaml", data)
    for change in ({"low": 1e-3}, {"distribution": "uniform"}):
        other = copy.deepcopy(data)
        other["sweep"]["parameters"]["learning_rate"].update(change)
        with pytest.raises(IdentityMismatch, match=r"sweep\.parameters\.learning_rate"):
            swept(tmp_path / "sweep.yaml", other)
    data["sweep"]["trials"] = 4
    more = swept(tmp_path / "sweep.yaml", data)
    assert more.trials[:2] == first.trials
    assert len({trial.parameters["learning_rate"] for trial in more.trials}) == 4
    at_once = swept(tmp_path / "sweep.yaml", {**data, "output_dir": str(tmp_path / "at-once")})
    assert [(t.parameters, t.value) for t in at_once.trials] == [(t.parameters, t.value) for t in more.trials]


def running(world: Path, out: Path, name: str, **search: Any) -> Process:
    """A process of the sweep in `out`."""
    return start("train-student", "--sweep", written(out.parent / f"{name}.yaml", fields(world, out, **search)))


def until(path: Path, *processes: Process) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert all(process.poll() is None for process in processes), processes[0].output()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcomes(report: SweepReport) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.parameters, t.value, t.evaluations, t.steps) for t in report.trials]


def test_a_killed_sweep_goes_on_from_its_checkpoint_and_ends_as_an_uninterrupted_one(
    world: Path, done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    saving = {"save_steps": 2}
    process = running(world, out, "first", training=saving)
    until(out / "trial-1" / "checkpoint-2" / "trainer_state.json", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [trial.state for trial in report_in(out).trials] == ["complete"]
    report = swept(tmp_path / "sweep.yaml", fields(world, out, training=saving))
    resumed = TrainingReport.model_validate_json((out / "trial-1" / "report.json").read_bytes())
    assert resumed.resumed_from_step in (2, 4)
    assert outcomes(report) == outcomes(report_in(done))
    assert not list(out.glob("trial-*/checkpoint-*")), "nothing goes on from them"
    assert not list(out.rglob("*.lock"))


@pytest.mark.slow
def test_one_process_and_three_of_which_one_is_killed_finish_the_same_trials(world: Path, tmp_path: Path) -> None:
    search = {"trials": 6, "sampler": "random"}
    alone = swept(tmp_path / "sweep.yaml", fields(world, tmp_path / "alone", **search))
    out = tmp_path / "shared" / "out"
    out.parent.mkdir()
    processes = [running(world, out, str(i), **search) for i in range(3)]
    until(out / "trial-2" / "run.json", *processes)
    time.sleep(random.uniform(0, 1))
    killed = processes[random.randrange(3)]
    killed.send_signal(signal.SIGKILL)
    ends = [process.end() for process in processes]
    assert [end.returncode for end, process in zip(ends, processes, strict=True) if process is not killed] == [0, 0]
    assert outcomes(report_in(out)) == outcomes(alone)
    finished = [line for end in ends for line in end.stderr.splitlines() if ": eval_loss " in line]
    numbers = sorted(int(line.removeprefix("trial ").partition(":")[0]) for line in finished)
    assert len(set(numbers)) == len(numbers) in (5, 6), "killed between the end of a trial and its line: one less"
    assert {path.name for path in out.glob("trial-*")} == {f"trial-{number}" for number in range(6)}
    assert len(list(out.rglob("*.safetensors"))) == 1


def test_a_database_is_shared_and_its_trial_without_heartbeats_is_taken_over(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.sweep.study.HEARTBEAT_SECONDS", 1)
    out, url = tmp_path / "out", f"sqlite:///{tmp_path / 'studies.db'}?timeout=7"
    parameters = {"learning_rate": PARAMETERS["learning_rate"]}
    data = fields(world, out, parameters, trials=2, storage=url)
    begun = swept(tmp_path / "sweep.yaml", data)
    data["sweep"]["trials"] = 4
    job, search = loaded(written(tmp_path / "sweep.yaml", data))
    name = json.loads((out / "run.json").read_text())["launch"]["study"]
    with SharedStudy(out, search, name, open_database(url)).claimed() as trial:
        values = trial.params
    ended = sweep(job, search, lambda line: None)
    assert ended.trials[:2] == begun.trials
    assert [(trial.number, trial.state) for trial in ended.trials] == [(i, "complete") for i in range(4)]
    assert ended.trials[trial.number].parameters == values
    assert "timeout" not in (out / "run.json").read_text() + (out / "sweep.json").read_text()
    other = fields(world, tmp_path / "other", parameters, trials=1, storage=url)
    assert len(swept(tmp_path / "sweep.yaml", other).trials) == 1, "another folder is another sweep"
    del data["sweep"]["storage"]
    with pytest.raises(IdentityMismatch, match=r"sweep\.storage: the run has 'sqlite"):
        swept(tmp_path / "sweep.yaml", data)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("studies", ("expected the URL of a database", "found another text")),
        ("sqlite://", ("in memory",)),
        ("redis://name:secret@host/0", ("redis://host/0", "expected a database that opens")),
        ("sqlite:////nowhere/at/all.db", ("unable to open database file",)),
    ],
)
def test_a_storage_that_is_no_database_is_refused(
    world: Path, tmp_path: Path, run: Run, url: str, words: tuple[str, ...]
) -> None:
    file = written(tmp_path / "sweep.yaml", fields(world, tmp_path / "out", storage=url))
    result = run("train-student", "--sweep", file)
    refused(result, "sweep.storage", *words)
    assert "secret" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_an_earlier_version_is_shown_where_it_is_finished(world: Path, tmp_path: Path, run: Run) -> None:
    """It had a record of each trial, and no folders of their runs."""
    out = tmp_path / "out"
    parameters = {"learning_rate": PARAMETERS["learning_rate"]}
    data = fields(world, out, parameters, trials=1)
    report = swept(tmp_path / "sweep.yaml", data)
    (out / "optuna.log").unlink()
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"launch": {}}))
    again = TrialRecord(number=1, state="failed", error=INTERRUPTED)
    earlier = report.model_copy(update={"trials": (*report.trials, again)})
    (out / "sweep.json").write_text(earlier.model_dump_json())
    assert swept(tmp_path / "sweep.yaml", data) == earlier
    data["sweep"]["trials"] = 2
    names = sorted(path.name for path in out.iterdir())
    file = written(tmp_path / "sweep.yaml", data)
    refused(run("train-student", "--sweep", file), "an earlier version", "1 of 2 trials", "ask for 1", "--output-dir")
    (out / "sweep.json").unlink()
    refused(run("train-student", "--sweep", file), "an earlier version", "no trial ended", "--output-dir")
    assert sorted(path.name for path in out.iterdir()) == [name for name in names if name != "sweep.json"]


def test_trials_are_scored_on_minimal_pairs(small_cache: Path, world: Path, tmp_path: Path, run: Run) -> None:
    """Also those whose model is not kept; and checkpoints that only serve to select an epoch go."""
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    pairs.mkdir()
    rows = [{"sentence_good": f"return {word}", "sentence_bad": f"{word} return"} for word in ("value", "name", "self")]
    (pairs / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {
        "max_steps": 2, "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    search = {"trials": 2, "pairs": str(pairs), "pairs_limit": 2, "keep_checkpoints": False}
    data = fields(world, out, {"learning_rate": {"choices": [1e-3, 1e-2]}}, training=training, **search)
    data |= {"cache": str(small_cache), "eval_cache": str(small_cache), "teachers": []}
    result = run("train-student", "--sweep", written(tmp_path / "sweep.yaml", data))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:4] == ["trial", "state", "eval_loss", "pairs"]
    report = report_in(out)
    for trial in report.trials:
        scores = json.loads((out / f"trial-{trial.number}" / "scores.json").read_text())["minimal_pairs"]
        assert scores["pairs"] == 2
        assert (trial.pairs, trial.pairs_stderr) == (scores["mean_over_groups"], scores["mean_over_groups_stderr"])
    model = AutoModelForCausalLM.from_pretrained(out / f"trial-{report.best}")
    tokenizer = AutoTokenizer.from_pretrained(out / f"trial-{report.best}")
    found = tally(read_pairs(pairs, 2), score_pairs(model, tokenizer, read_pairs(pairs, 2)))
    assert report.trials[report.best or 0].pairs == found.mean_over_groups
    assert not list(out.glob("trial-*/checkpoint-*"))
    data["sweep"]["pairs"] = str(tmp_path / "none")
    data["output_dir"] = str(tmp_path / "other")
    refused(run("train-student", "--sweep", written(tmp_path / "other.yaml", data)), "none", "found no folder there")
    assert not (tmp_path / "other").exists()


def test_a_trial_whose_best_weights_were_put_back_has_their_value(world: Path, tmp_path: Path) -> None:
    training = {
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_strategy": "steps",
        "save_steps": 2, "learning_rate": 0.05, "max_steps": 8,
    }  # fmt: skip
    parameters = {"weight_decay": {"choices": [0.0]}}
    report = swept(tmp_path / "sweep.yaml", fields(world, tmp_path / "out", parameters, trials=1, training=training))
    (trial,) = report.trials
    values = [value for _, value in trial.evaluations]
    assert values[-1] > min(values), "its last weights are not its best"
    assert trial.value == pytest.approx(min(values), rel=1e-6)


@pytest.mark.parametrize(
    "pruner",
    [
        {"name": "hyperband", "max_evaluations": 4, "reduction_factor": 2},
        {"name": "median", "startup_trials": 1},
    ],
    ids=["hyperband", "median"],
)
def test_poor_trials_are_pruned_and_keep_their_last_value(world: Path, tmp_path: Path, pruner: dict[str, Any]) -> None:
    parameters = {"learning_rate": {"distribution": "log_uniform", "low": 1e-7, "high": 1e-1}}
    data = fields(world, tmp_path / "out", parameters, trials=7, seed=1, pruner=pruner)
    data["training"] |= {"max_steps": 6, "eval_steps": 2, "warmup_steps": 0}
    report = swept(tmp_path / "sweep.yaml", data)
    pruned = [trial for trial in report.trials if trial.state == "pruned"]
    complete = [trial for trial in report.trials if trial.state == "complete"]
    assert pruned
    for trial in pruned:
        made = len(trial.evaluations)
        assert trial.steps == 2 * made < 6
        assert trial.value == trial.evaluations[-1][1]
        assert any(other.evaluations[made - 1][1] < trial.value for other in complete)
    assert len(pruned) + len(complete) == 7
    assert report.trials[report.best or 0].value == min(trial.value or math.inf for trial in complete)


def test_a_trial_that_diverges_fails_and_is_never_the_best(world: Path, tmp_path: Path) -> None:
    training = {"optim": "sgd", "max_grad_norm": 0, "eval_strategy": "no"}
    parameters = {"learning_rate": {"choices": [1e30, 1e-2]}}
    # To maximise the loss is where an infinite one would win.
    data = fields(
        world, tmp_path / "out", parameters, seed=1, sampler="random", direction="maximize", training=training
    )
    report = swept(tmp_path / "sweep.yaml", data)
    states = {trial.parameters["learning_rate"]: trial.state for trial in report.trials}
    assert states == {1e30: "failed", 1e-2: "complete"}
    failed = next(trial for trial in report.trials if trial.state == "failed")
    assert failed.value is None
    assert "so training ends there" in (failed.error or "")
    assert report.trials[report.best or 0].parameters["learning_rate"] == 1e-2
    json.loads((tmp_path / "out" / "sweep.json").read_text(), parse_constant=pytest.fail)

    data = fields(world, tmp_path / "none", {"learning_rate": {"choices": [1e30]}}, trials=1, training=training)
    report = swept(tmp_path / "sweep.yaml", data)
    assert report.best is None
    assert not (tmp_path / "none" / "best.yaml").exists()


def test_a_combination_that_is_impossible_fails_with_its_reason(world: Path, tmp_path: Path) -> None:
    parameters = {"model.hidden_size": {"choices": [16, 24]}, "model.num_attention_heads": {"choices": [2, 3]}}
    data = fields(world, tmp_path / "out", parameters, trials=6, seed=2, sampler="random")
    data |= {"model": str(world / "llama.json"), "training": {**data["training"], "max_steps": 1}}
    lines: list[str] = []
    report = sweep(*loaded(written(tmp_path / "sweep.yaml", data)), lines.append)
    assert any("1 of 4 combinations" in line for line in lines)
    states = {tuple(trial.parameters.values()): trial.state for trial in report.trials}
    assert states == {(16, 2): "complete", (24, 2): "complete", (24, 3): "complete", (16, 3): "failed"}
    failed = next(trial for trial in report.trials if trial.state == "failed")
    assert "16" in (failed.error or "")
    assert "multiple" in (failed.error or "")


def test_all_trials_have_the_shards_that_were_committed_at_the_start(world: Path, tmp_path: Path) -> None:
    fill(str(tmp_path / "train"), 1500, 0, ("a",), shard_tokens=256, chunk_tokens=64)
    receipts, held_back = tmp_path / "train" / "teachers" / "a" / "receipts", tmp_path / "held-back"
    held_back.mkdir()
    for name in ("index.json", "00000001.json", "00000004.json"):
        shutil.move(receipts / name, held_back / name)
    data = fields(world, tmp_path / "out", {"learning_rate": PARAMETERS["learning_rate"]}, trials=1)
    data |= {"cache": str(tmp_path / "train"), "teachers": ["a"], "available": True}
    swept(tmp_path / "sweep.yaml", data)
    shutil.copytree(held_back, receipts, dirs_exist_ok=True)
    data["sweep"]["trials"] = 2
    assert [trial.state for trial in swept(tmp_path / "sweep.yaml", data).trials] == ["complete", "complete"]
    reports = [(tmp_path / "out" / f"trial-{number}" / "report.json").read_bytes() for number in (0, 1)]
    first, second = (TrainingReport.model_validate_json(report) for report in reports)
    assert first.job.available == second.job.available == {"a": ((0, 256), (512, 1024), (1280, 1500))}
    assert first.available == second.available


def test_other_parameters_are_tried_with_a_step_of_the_search(world: Path, tmp_path: Path) -> None:
    """The job's own, which is larger than the data, is no trial's."""
    parameters = {"learning_rate": {"choices": [1e-3]}, "windows_per_step": {"choices": [4]}}
    data = fields(world, tmp_path / "out", parameters, trials=1)
    data["training"]["per_device_train_batch_size"] = 128
    assert [trial.state for trial in swept(tmp_path / "sweep.yaml", data).trials] == ["complete"]


def test_key_value_heads_follow_the_heads(tmp_path: Path) -> None:
    config = {**LLAMA, "num_key_value_heads": 2}
    (tmp_path / "shared.json").write_text(json.dumps(config))
    (tmp_path / "grouped.json").write_text(json.dumps({**config, "num_key_value_heads": 1}))
    values = {"model.num_attention_heads": 4}
    for name, expected in (("shared", None), ("grouped", 1)):
        job = built({"cache": "c", "output_dir": "o", "model": str(tmp_path / f"{name}.json")})
        assert (trial_settings(job, values) or {}).get("num_key_value_heads") == expected


def test_the_example_has_the_eleven_parameters_and_is_a_job() -> None:
    job, search = loaded(str(EXAMPLE))
    assert len(search.parameters) == 11
    check_names(job, search)
    ends = [{name: parameter.probes()[i] for name, parameter in search.parameters.items()} for i in (0, -1)]
    low, high = (trial_job(job, values, "out") for values in ends)
    assert low.training["per_device_train_batch_size"] <= high.training["per_device_train_batch_size"] <= 64
    assert high.training["gradient_accumulation_steps"] == -(-round(math.exp(5 + 3 * 1.5)) // 64)
    assert (low.training["adam_beta1"], high.training["adam_beta1"]) == (0.99, 0.0)
