"""Sweeps of a recipe's schedules in its report: the best trial so far, and a point for each model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import report_folders as invented

from logit_cache.report.findings import RecipeFindings, gather_recipe
from logit_cache.report.folders import RecipeFolder, read_folder
from logit_cache.report.page import make_report
from logit_cache.report.schedules import schedule_figures, schedules
from storage.errors import InputError
from student.sweep.record import SweepReport, TrialRecord

# Of each trial the held-out loss and the accuracy on minimal pairs; one failed.
CONTROLS = [(3.70, 0.52), None, (3.55, 0.56), (3.60, 0.58)]
STUDENTS = [(3.45, 0.60), (3.41, 0.59)]


def sweep_of(trials: list[tuple[float, float] | None]) -> SweepReport:
    records = [
        TrialRecord(number=number, state="failed", error="out of memory")
        if found is None
        else TrialRecord(
            number=number, state="complete", value=found[0], metrics={"eval_loss": found[0]}, pairs=found[1],
            pairs_stderr=0.004, parameters={"learning_rate": 0.001 * (number + 1)},
        )
        for number, found in enumerate(trials)
    ]  # fmt: skip
    return SweepReport(
        title="", cache="train", metric="eval_loss", direction="minimize", backend="optuna", seconds=1.0, job={},
        search={"trials": len(trials)}, best=None, trials=tuple(records),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = invented.recipe_folder(
        tmp_path_factory.mktemp("swept") / "recipe", seeds=(0,), roles=("student", "control")
    )
    record = json.loads((folder / "recipe.json").read_text())
    named = [{"role": role, "name": role, "seed": 0, "folder": f"sweeps/{role}"} for role in ("control", "student")]
    # A sweep that has not begun has no file yet.
    later = {"role": "teacher", "name": "llama", "seed": 0, "folder": "sweeps/llama"}
    invented.write_json(folder / "recipe.json", record | {"sweeps": [*named, later]})
    for role, trials in (("control", CONTROLS), ("student", STUDENTS)):
        invented.write_json(folder / "sweeps" / role / "sweep.json", sweep_of(trials).model_dump(mode="json"))
    return folder


def found_in(folder: Path) -> RecipeFindings:
    found = read_folder(folder)
    assert isinstance(found, RecipeFolder)
    return gather_recipe(found)


def test_the_best_trials_against_the_student(folder: Path) -> None:
    control, student = schedules(found_in(folder))
    assert (control.label, control.style, len(control.trials)) == ("control", "control", 3)
    # The recipe's own student is at 3.40.
    assert (control.best_loss, control.behind) == pytest.approx((3.55, 0.15))
    assert (student.best_loss, student.behind) == pytest.approx((3.41, 0.01))
    assert control.settings == "learning_rate 0.003"
    assert control.pairs is not None
    assert (control.pairs.value, control.pairs.stderr) == (0.56, 0.004)


def test_the_figures_show_every_model(folder: Path) -> None:
    loss, pairs, both = schedule_figures(found_in(folder))
    for figure, best in ((loss, [3.70, 3.55, 3.55, 3.45, 3.41]), (pairs, [52, 56, 58, 60, 60])):
        points = re.findall(r"best trial so far, trial (\d): ([\d.]+)", figure.chart)
        assert [float(value) for _, value in points] == pytest.approx(best)
        assert [int(number) for number, _ in points] == [0, 2, 3, 0, 1], "a failed trial has no point"
    titles = re.findall(r"<title>([^<]*) nats", both.chart)
    assert len(titles) == 2 + 3 + 2
    assert "student: 3.4000" in titles
    assert "control, trial 2: 3.5500" in titles


def test_the_page_has_the_section_where_there_are_sweeps(folder: Path, tmp_path: Path) -> None:
    make_report([folder], tmp_path / "swept.html")
    page = (tmp_path / "swept.html").read_text(encoding="utf-8")
    assert "Is it the schedules?" in page
    assert "56.0 %" in page
    assert "±\u00a00.40" in page
    record = json.loads((folder / "recipe.json").read_text())
    invented.write_json(folder / "recipe.json", record | {"sweeps": []})
    make_report([folder], tmp_path / "plain.html")
    assert "schedules?" not in (tmp_path / "plain.html").read_text(encoding="utf-8")
    record["sweeps"][0]["folder"] = "../elsewhere"
    invented.write_json(folder / "recipe.json", record)
    with pytest.raises(InputError, match=r"sweep 0 \('control'\): expected a path inside the folder of the recipe"):
        read_folder(folder)
