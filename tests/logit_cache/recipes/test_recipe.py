"""Recipes: the papers' sizes, refusals before the start, the commands, and a whole run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import psutil
import pytest
import torch
from support import processes
from support.commands import LIBRARY, Run, command, environment, refused
from transformers import AutoConfig, AutoModelForCausalLM

import logit_cache.recipes.stages
from logit_cache.cli.main import cache_logits, main
from logit_cache.recipes import run as recipe_module
from logit_cache.recipes.commands import RecipeJob
from logit_cache.recipes.estimate import seconds
from logit_cache.recipes.machine import Machine, free_memory, probe
from logit_cache.recipes.published import RECIPES, Recipe, Scale, find_recipe
from logit_cache.recipes.run import RecipeRun
from logit_cache.recipes.stages import Pipeline, Stage
from storage.errors import IdentityMismatch, InputError
from storage.locks import LOCK
from storage.text import duration
from student.cli import train_student
from student.job import StudentJob
from student.models.presets import PRESETS
from student.sweep.search_space import read_sweep
from student.sweep.trial import check_names
from teachers.cli import train_teacher

GIB = 1 << 30
LARGE = Machine(device="cpu", name="a machine", memory_bytes=64 * GIB, products_per_second=1e11)
ALL = [(name, scale) for name in RECIPES for scale in get_args(Scale)]
COMMANDS: dict[str, click.Command] = {
    "train-teacher": train_teacher,
    "train-student": train_student,
    "cache-logits": cache_logits,
    **{f"logit-cache {name}": found for name, found in main.commands.items()},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `valid/` with two files each, of the standard library's source; 40 kB and 10 kB."""
    folder = tmp_path_factory.mktemp("text")
    for name, size in (("train", 20_000), ("valid", 5_000)):
        (folder / name).mkdir()
        for number, module in enumerate(("argparse.py", "typing.py")):
            content = (LIBRARY / module).read_text(encoding="utf-8")
            (folder / name / f"{number}.txt").write_text(content[-size:] if name == "valid" else content[:size])
    return folder


USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture(autouse=True)
def a_large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `paper` needs is free, whatever disk these tests run on."""
    monkeypatch.setattr(recipe_module.shutil, "disk_usage", lambda path: USAGE(1 << 40, 0, 1 << 40))


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two megabytes of text: enough for two steps at every scale."""
    path = tmp_path_factory.mktemp("plenty") / "many.txt"
    path.write_text("word " * 400_000)
    return str(path)


def job_of(folder: Path, out: Path, **changes: Any) -> RecipeJob:
    fields: dict[str, Any] = {
        "recipe": "baby-llama", "scale": "tiny", "text": (f"{folder}/train/*.txt",),
        "eval_text": (f"{folder}/valid/*.txt",), "out": str(out),
    }  # fmt: skip
    return RecipeJob.model_validate(fields | changes)


def pairs_in(folder: Path) -> Path:
    """Nine minimal pairs of one paradigm."""
    folder.mkdir()
    rows = [{"sentence_good": f"return the value {n}", "sentence_bad": f"the return value {n}"} for n in range(9)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_parameters_are_those_of_real_models(name: str, scale: Any) -> None:
    recipe = find_recipe(name, scale)
    for network in recipe.models.values():
        with torch.device("meta"):
            config = AutoConfig.for_model(**network.config, vocab_size=recipe.vocabulary_size)
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == network.parameters(recipe.vocabulary_size)
        looked_up = [model.get_input_embeddings()] if network.family == "llama" else [model.transformer.wpe]
        multiplied = network.parameters(recipe.vocabulary_size) - sum(m.weight.numel() for m in looked_up)
        assert network.products(recipe.vocabulary_size) == multiplied


def test_the_papers_networks_and_schedules() -> None:
    baby, second = find_recipe("baby-llama", "paper"), find_recipe("babyllama-2", "paper")
    sizes = {name: network.parameters(16_000) for name, network in baby.models.items()}
    assert sizes == {
        "llama": PRESETS["llama-360m"].parameters,
        "gpt2": PRESETS["gpt2-705m"].parameters,
        "student": PRESETS["llama-58m"].parameters,
    }
    assert {n.parameters(16_000) for n in second.models.values()} == {PRESETS["llama-345m"].parameters}
    assert (baby.temperature, baby.alpha, baby.offset, baby.loss_scale) == (2.0, 0.5, "fixed", "babyllama")
    assert (second.temperature, second.alpha, second.offset) == (1.0, 0.5, "random")
    models = (*baby.teachers, baby.student, second.teachers[0], second.student)
    assert [tuple(model.training.model_dump().values()) for model in models] == [
        (3e-4, 128, 4, 300, 0.0),
        (2.5e-4, 128, 4, 300, 0.0),
        (2.5e-4, 32, 6, 200, 0.1),
        (7e-4, 128, 8, 600, 5.0),
        (7e-4, 128, 8, 600, 5.0),
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_the_weight_decay_per_step_is_kept(name: str) -> None:
    """Learning rate times weight decay, at every scale."""

    def pull(recipe: Recipe) -> list[float]:
        return [m.training.learning_rate * m.training.weight_decay for m in (*recipe.teachers, recipe.student)]

    for scale in get_args(Scale):
        assert pull(find_recipe(name, scale)) == pytest.approx(pull(find_recipe(name, "paper")), rel=0.02)


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_command_exists(text: Path, plenty: str, tmp_path: Path, name: str, scale: Any) -> None:
    """Each option exists and its value parses; training fields are checked as a run would."""
    from student.training.arguments import training_values

    more = {"pairs": str(pairs_in(tmp_path / "pairs")), "limit": 5, "seeds": (0, 3), "live": True, "sweep_trials": 16}
    changes = {"recipe": name, "scale": scale, "text": (plenty,), **more}
    recipe_run = RecipeRun(job_of(text, tmp_path / "out", **changes), LARGE)
    stages = recipe_run.stages
    assert [stage.command[1] for stage in stages[:4]] == ["clean", "clean", "tokenize", "tokenize"]
    # Per seed: two teachers, their cache of two streams, student, control, live, five models' scores; and the sweeps of
    # student and control, which equals BabyLlama-2's teachers, and of Baby Llama's two.
    names = ["control", *(["llama", "gpt2"] if name == "baby-llama" else []), "student"]
    assert len(stages) == 4 + 2 * (2 + 2 + 3 + 5) + len(names) + 1
    assert [Path(stage.command[2]).stem for stage in stages if stage.beside == "sweeps"] == names
    beside = [stage.title.split()[0] for stage in stages if stage.beside == "teachers 0"]
    assert beside == ["teacher", "teacher"]
    for stage in stages:
        key = stage.command[0] if stage.command[0] in COMMANDS else " ".join(stage.command[:2])
        found = COMMANDS[key]
        context = found.make_context(key, list(stage.command[len(key.split()) :]), resilient_parsing=False)
        settings = dict(setting.split("=") for setting in context.params.get("settings", ()))
        if settings:
            fields = {"cache": "c", "model": "m", "output_dir": "o", "eval_cache": "e", "training": settings}
            fields["teachers"] = list(context.params.get("teacher", ()))
            values = training_values(StudentJob.model_validate(fields))
            assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] in (8, 16, 32, 64, 128)
    check_sweeps(recipe_run, stages)


def check_sweeps(recipe_run: RecipeRun, stages: list[Stage]) -> None:
    """Each sweep's trials, with the recipe's own values, are the run of its model in the recipe."""
    for path, content in recipe_run.commands.sweep_files():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        fields, search = read_sweep(str(path))
        job = StudentJob.model_validate(fields)
        check_names(job, search)
        assert (search.trials, search.pairs_limit, search.keep_checkpoints) == (16, 5, False)
        (stage,) = (
            one for one in stages if one.command[-1].endswith(f"seed-0/{path.stem}") and "train-" in one.command[0]
        )
        settings = dict(setting.split("=") for setting in stage.command if "=" in setting)
        swept = {name: float(settings.pop(name)) for name in ("learning_rate", "weight_decay", "num_train_epochs")}
        step = int(settings.pop("gradient_accumulation_steps")) * int(settings["per_device_train_batch_size"])
        assert search.parameters["windows_per_step"].probes() == (step // 2, step, 2 * step)
        for name, value in swept.items():
            low, high = search.parameters[name].probes()
            assert low <= value <= high or (name, value) == ("weight_decay", 0)
        assert {name: str(value).lower() for name, value in job.training.items()} == settings
        options = dict(zip(stage.command, stage.command[1:], strict=False))
        assert (job.model, job.offset, job.cache) == tuple(
            options[f"--{name}"] for name in ("model", "offset", "cache")
        )
        assert [teacher.name for teacher in job.teachers] == (["ensemble-0"] if path.stem == "student" else [])
        if job.teachers:
            objective = (options["--temperature"], options["--alpha"], options["--loss-scale"])
            assert (f"{job.temperature:g}", f"{job.alpha:g}", job.loss_scale) == objective


def test_a_dry_run_prints_the_commands_and_does_nothing(
    text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_module, "probe", lambda: LARGE)
    out = tmp_path / "out dir"
    line = ["logit-cache", "recipe", "babyllama-2", "--out", out, "--scale", "tiny", "--dry-run"]
    line += ["--text", f"{text}/train/*.txt", "--eval-text"]
    refused(run(*line, text / "none.txt"), "--eval-text", "none.txt", "found none")
    done = run(*line, f"{text}/valid/*.txt")
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    lines = [part for part in done.stdout.splitlines() if part.startswith(("logit-cache ", "train-", "cache-logits "))]
    expected = RecipeRun(job_of(text, out, recipe="babyllama-2"), LARGE).stages
    assert [shlex.split(part) for part in lines] == [list(stage.command) for stage in expected]
    assert "teacher one" in done.stdout


def test_the_estimate_has_every_stage(text: Path, tmp_path: Path) -> None:
    """A row for each, whose work is counted, and a total that is their sum; the more pairs, the longer the scoring."""
    pairs = pairs_in(tmp_path / "pairs")
    runs = [
        RecipeRun(job_of(text, tmp_path / "out", pairs=str(pairs), limit=limit, live=True, seeds=(0, 1)), LARGE)
        for limit in (None, 3)
    ]
    *rows, total = runs[0].forecast.splitlines()[2:]
    assert [row.split("  ")[0] for row in rows] == [stage.title for stage in runs[0].stages]
    assert all(stage.cost.products for stage in runs[0].stages[4:-1])
    assert all(stage.cost.text_bytes for stage in runs[0].stages[:4])
    whole = duration(sum(seconds(stage.cost, LARGE) for stage in runs[0].stages))
    assert total.startswith(f"about {whole}, on a machine")
    scored, fewer = (sum(s.cost.products for s in run.stages if s.title.startswith("scores")) for run in runs)
    # Nine pairs less three, of two sentences: 18 or 19 bytes at 3.1 each, and the token before them.
    models = [*runs[0].recipe.models.values(), *[runs[0].recipe.student.network] * 2]
    products = 2 * sum(network.products(2_048) for network in models)
    assert scored - fewer == pytest.approx(products * 12 * (1 + 18.5 / 3.1), rel=0.1)


def test_the_machine_is_probed() -> None:
    machine = probe()
    assert machine.device in ("cpu", "cuda")
    assert 1e8 < machine.products_per_second < 1e17
    assert 1 << 26 < machine.memory_bytes < 1 << 45
    assert 1 << 26 < free_memory() < 1 << 45


def test_micro_batches_shrink_with_memory(text: Path, plenty: str, tmp_path: Path) -> None:
    seen = []
    for memory in (512, 24, 16):
        machine = LARGE.model_copy(update={"memory_bytes": memory * GIB, "device": "cuda"})
        run = RecipeRun(job_of(text, tmp_path / "out", scale="paper", text=(plenty,)), machine)
        seen.append(run.batches["gpt2"])
        settings = [s for stage in run.stages if stage.title.startswith("teacher gpt2") for s in stage.command]
        assert f"per_device_train_batch_size={run.batches['gpt2']}" in settings
        assert f"gradient_accumulation_steps={128 // run.batches['gpt2']}" in settings
        assert "fp16=true" in settings
    assert seen[0] == 128 > seen[1] > seen[2] >= 1


def refusal(folder: Path, out: Path, machine: Machine = LARGE, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        RecipeRun(job_of(folder, out, **changes), machine)
    assert not out.exists()
    return str(caught.value)


def test_impossible_jobs_are_refused_beforehand(
    text: Path, plenty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train = f"{text}/train/*.txt"
    assert "found none" in refusal(text, out, text=(train, f"{text}/missing/*.txt"))
    assert "missing" in refusal(text, out, eval_text=(f"{text}/missing.txt",))
    assert "held-out text must not be trained on" in refusal(text, out, eval_text=(f"{text}/train/0.txt",))
    assert "no recipe 'baby-lama'" in refusal(text, out, recipe="baby-lama")
    assert "given once" in refusal(text, out, seeds=(1, 2, 1))
    assert "JSONL" in refusal(text, out, pairs=str(text))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda module: None)
        assert "pip install 'logit-cache[tune]'" in refusal(text, out, sweep_trials=1)
    assert "two files are called 0.txt" in refusal(
        text, out, text=(train, f"{text}/valid/0.txt"), eval_text=(f"{text}/valid/1.txt",)
    )
    short = tmp_path / "short.txt"
    short.write_text("a few words\n" * 100)
    assert "fewer than two steps of 8 windows" in refusal(text, out, text=(str(short),))
    short.write_text("")
    assert "empty" in refusal(text, out, text=(str(short),))
    small = LARGE.model_copy(update={"memory_bytes": 8 * GIB})
    found = refusal(text, out, small, scale="paper", text=(plenty,))
    assert "teacher gpt2 needs about 1" in found or "teacher llama needs about" in found
    assert "8.6 GB free: take --scale small" in found
    monkeypatch.setattr(recipe_module.shutil, "disk_usage", lambda path: USAGE(GIB, GIB, 1 << 20))
    assert "1.0 MB are free there" in refusal(text, out)


def test_a_folder_of_another_run_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module.Pipeline, "run", lambda pipeline: None)
    out = tmp_path / "out"
    RecipeRun(job_of(text, out), LARGE).run()
    first = json.loads((out / "recipe.json").read_text())
    assert [model["role"] for model in first["models"]] == ["teacher", "teacher", "student", "control"]
    with pytest.raises(IdentityMismatch, match="recipe: 'baby-llama' there, 'babyllama-2' requested"):
        RecipeRun(job_of(text, out, recipe="babyllama-2"), LARGE).run()
    with pytest.raises(IdentityMismatch, match="stride_tokens"):
        RecipeRun(job_of(text, out, stride_tokens=64), LARGE).run()
    # On a smaller machine a started run keeps its micro-batches; seeds may be added later.
    RecipeRun(job_of(text, out, seeds=(1,)), LARGE.model_copy(update={"memory_bytes": 2 * GIB})).run()
    RecipeRun(job_of(text, out, sweep_trials=3), LARGE).run()
    RecipeRun(job_of(text, out), LARGE).run()
    second = json.loads((out / "recipe.json").read_text())
    assert second["micro_batches"] == first["micro_batches"]
    assert second["entries"] == ["ensemble-0", "ensemble-1"]
    assert len(second["models"]) == 8
    assert [sweep["folder"] for sweep in second["sweeps"]] == [
        f"seed-0/sweeps/{name}" for name in ("control", "llama", "gpt2", "student")
    ]
    assert {path.stem for path in (out / "seed-0" / "sweeps").iterdir()} == {"control", "llama", "gpt2", "student"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").touch()
    with pytest.raises(InputError, match="expected a recipe's run, found other files"):
        RecipeRun(job_of(text, tmp_path / "other"), LARGE).run()
    (out / "recipe.json").write_text("{")
    with pytest.raises(InputError, match="expected a recipe record of this version"):
        RecipeRun(job_of(text, out), LARGE)


@pytest.mark.slow
def test_a_whole_recipe_killed_and_resumed(text: Path, tmp_path: Path, installed: Run) -> None:
    """From text to report by the installed command; killed after its first teacher, then run to the end, and again."""
    out = tmp_path / "out"
    pairs = pairs_in(tmp_path / "pairs")
    line = ["logit-cache", "recipe", "baby-llama", "--scale", "tiny", "--text", f"{text}/train/*.txt"]
    line += ["--eval-text", f"{text}/valid/*.txt", "--pairs", pairs, "--out", out, "--live"]
    victim = subprocess.Popen(command(*line), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first = out / "seed-0" / "llama" / "report.json"
    deadline = time.monotonic() + 240
    while not first.exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    victim.kill()
    output, _ = victim.communicate()
    assert first.exists(), output.decode()
    written = first.stat().st_mtime_ns
    assert not (out / "report.html").exists()

    done = installed(*line)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == written, "finished stages are not run again"
    reports = {
        name: json.loads((out / "seed-0" / name / "report.json").read_text())
        for name in ("llama", "gpt2", "student", "control", "live")
    }
    assert reports["student"]["job"]["temperature"] == 2.0
    assert reports["student"]["job"]["alpha"] == reports["live"]["job"]["alpha"] == 0.5
    # After a few steps, on a few thousand held-out positions: one estimated from sampled ids, the other from all ids.
    assert reports["student"]["held_out"]["distillation_loss"] == pytest.approx(
        reports["live"]["held_out"]["distillation_loss"], rel=0.1
    )
    assert reports["control"]["held_out"]["distillation_loss"] is None
    steps = {name: report["steps"] for name, report in reports.items()}
    assert steps["student"] == steps["control"] == steps["live"]
    for name in reports:
        scores = json.loads((out / "seed-0" / f"{name}.scores.json").read_text())
        assert scores["minimal_pairs"]["pairs"] == 9
        assert scores["held_out"]["kl"].keys() == {"ensemble-0"}
        measured = reports[name]["held_out"]["cross_entropy"]
        assert scores["held_out"]["cross_entropy_per_token"] == pytest.approx(measured, rel=1e-5)
    assert (out / "report.html").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix == ".json"}
    again = installed(*line)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} | {out / "recipe.json": 0} == {
        **before, out / "recipe.json": 0
    }  # fmt: skip
    shutil.rmtree(out)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Stage]:
    """Makes a stage of a shell script."""
    monkeypatch.setattr(logit_cache.recipes.stages.sysconfig, "get_path", lambda name: str(tmp_path))

    def make(name: str, lines: str, **settings: Any) -> Stage:
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
        return Stage(name, (name,), **settings)

    return make


def test_a_stage_that_a_signal_ends_is_not_done(script: Callable[..., Stage]) -> None:
    with pytest.raises(InputError, match="victim ended with status -9: see above, then once more"):
        Pipeline([script("victim", "kill -9 $$")], "once more").run()


def test_stages_side_by_side(
    script: Callable[..., Stage], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three at once, which wait for each other; the lines of each are marked; the last stage has stdout."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one, other = tmp_path / "x", tmp_path / "y"
    stages = [
        script("one", f"touch {one}; {_wait_for(other)}; echo $OMP_NUM_THREADS threads", beside="all"),
        script("other", f"touch {other}; {_wait_for(one)}; echo $OMP_NUM_THREADS threads", beside="all"),
        script("third", "", beside="all"),
        script("last", "echo the result"),
    ]
    Pipeline(stages, "", at_once=2, threads=3).run()
    out, error = capfd.readouterr()
    assert out == "the result\n"
    assert {"[1] 3 threads", "[2] 3 threads", "[4/4] last"} <= set(error.splitlines())
    # Alone, as its neighbour is done: with the same threads.
    Pipeline([script("one", "echo $OMP_NUM_THREADS threads >&2", beside="all"), stages[3]], "", 2, 3).run()
    assert "3 threads" in capfd.readouterr().err


def _wait_for(path: Path) -> str:
    return f"for i in $(seq 3000); do [ -e {path} ] && break; sleep 0.01; done; [ -e {path} ] || exit 9"


def test_a_failing_stage_ends_its_neighbour(script: Callable[..., Stage], tmp_path: Path) -> None:
    number = tmp_path / "number"
    stages = [
        script("sleeper", f"echo $$ > {number}.new; mv {number}.new {number}; exec sleep 600", beside="both"),
        script("failing", f"{_wait_for(number)}; exit 3", beside="both"),
    ]
    with pytest.raises(InputError, match="failing ended with status 3"):
        Pipeline(stages, "", at_once=2).run()
    assert not is_running(int(number.read_text()))


_PIPELINE = """
import sys, sysconfig
from logit_cache.recipes.stages import Pipeline, Stage
sysconfig.get_path = lambda name: sys.argv[1]
Pipeline([Stage("sleeper", ("sleeper",))], "once more").run()
"""
_SLEEPER = """#!{python}
import os, sys, time
sys.path[:] = {path!r}
from student.lifeline import end_with_the_starter
end_with_the_starter()
with open({number!r} + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename({number!r} + ".new", {number!r})
time.sleep(600)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
def test_no_stage_outlives_a_pipeline(tmp_path: Path, number: signal.Signals) -> None:
    """However it is ended, and with no chance to say so."""
    written, script = tmp_path / "number", tmp_path / "sleeper"
    script.write_text(_SLEEPER.format(python=sys.executable, path=sys.path, number=str(written)))
    script.chmod(0o755)
    job = processes.start_code(_PIPELINE, tmp_path)
    deadline = time.monotonic() + 120
    while not written.exists():
        assert job.poll() is None, job.output()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stage = int(written.read_text())
    job.send_signal(number)
    assert job.wait() == (-number if number == signal.SIGKILL else 1)
    assert ("once more" in job.output()[1]) == (number != signal.SIGKILL)
    while is_running(stage):
        assert number == signal.SIGKILL
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_runs_one_recipe_at_a_time(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's stages hold its lock, too."""
    held = []

    def run(pipeline: Pipeline) -> None:
        held.append(pipeline._held)
        with pytest.raises(InputError, match=rf"another run of a recipe is at work there \(process {os.getpid()}\)"):
            RecipeRun(job_of(text, tmp_path / "out"), LARGE).run()

    monkeypatch.setattr(recipe_module.Pipeline, "run", run)
    RecipeRun(job_of(text, tmp_path / "out"), LARGE).run()
    assert len(held) == len(held[0]) == 1
    assert not (tmp_path / "out" / LOCK).exists()


def test_models_that_do_not_fit_side_by_side_run_alone(text: Path, plenty: str, tmp_path: Path) -> None:
    """A started run keeps its choice; one that an earlier version started ran one stage at a time."""
    found = []
    for memory in (64, 16):
        machine = LARGE.model_copy(update={"memory_bytes": memory * GIB, "cores": 6})
        run = RecipeRun(job_of(text, tmp_path / "out", scale="paper", text=(plenty,)), machine)
        found.append((run.at_once, run.threads))
    assert found == [(2, 3), (1, 6)]
    out = tmp_path / "started"
    machine = LARGE.model_copy(update={"cores": 6})
    record = RecipeRun(job_of(text, out), machine)._record()
    out.mkdir()
    (out / "recipe.json").write_text(record.model_dump_json())
    assert RecipeRun(job_of(text, out), LARGE).at_once == 2
    (out / "recipe.json").write_text(record.model_dump_json(exclude={"at_once", "threads"}))
    assert RecipeRun(job_of(text, out), machine).at_once == 1


def is_running(pid: int) -> bool:
    """Whether a process exists; one that nobody has waited for yet is gone."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
