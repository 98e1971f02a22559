"""`logit-cache report`: the statistics by hand, and pages of complete, incomplete and hostile folders."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support import report_folders as invented
from support.commands import Run, refused

from logit_cache.cli.inspect import cache_text
from logit_cache.describe import describe_cache
from logit_cache.report.figures import curve, mean_points, thinned
from logit_cache.report.findings import BreakEven, RecipeFindings, gather_recipe
from logit_cache.report.folders import RecipeFolder, read_folder
from logit_cache.report.metrics import best_epoch, pairs_mean
from logit_cache.report.page import make_report
from logit_cache.report.statistics import Spread, spread, t_quantile
from logit_cache.report.verdict import pairs_sentences, verdicts
from storage import LogitCache
from storage.format.fidelity import Calibration, Treatment
from storage.format.sealing import sealed_bytes
from student.sweep.record import SweepReport

HELD_OUT = {
    "tokens": 9,
    "cross_entropy_per_token": 4.0,
    "perplexity_per_token": 12.0,
    "cross_entropy_per_byte": None,
    "perplexity_per_byte": None,
    "bits_per_byte": None,
    "ece": 0.5,
    "accuracy": 0.5,
}
EVIL = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete recipe. Copy it before writing to it."""
    return invented.recipe_folder(tmp_path_factory.mktemp("recipe") / "baby-llama")


@pytest.fixture
def recipe(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "baby-llama"))


def findings(folder: Path) -> RecipeFindings:
    found = read_folder(folder)
    assert isinstance(found, RecipeFolder)
    return gather_recipe(found)


def edit(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file; `a__b` is the field b of a, and a number the place in a list."""
    data = json.loads(file.read_text(encoding="utf-8"))
    for name, value in changes.items():
        *path, last = name.split("__")
        inner = data
        for part in path:
            inner = inner[int(part) if part.isdigit() else part]
        inner[last] = value
    file.write_text(json.dumps(data), encoding="utf-8")


def page_of(*folders: Path, out: Path) -> str:
    make_report(folders, out)
    return out.read_text(encoding="utf-8")


def tables_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    return Words(page_of(folder, out=folder.with_suffix(".html"))).tables


class Words(HTMLParser):
    """The page's text, its tags and its attributes, and the cells of its tables by the label and the row's name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tables: dict[str, dict[str, list[str]]] = {}
        self._style = False
        self._table: dict[str, list[str]] = {}
        self._cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self._style = tag == "style"
        if "region" in dict(attributes).values():
            self._table = self.tables.setdefault(dict(attributes)["aria-label"] or "", {})
        elif tag == "tr":
            self._cells = []
        elif tag in ("th", "td"):
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self._table[self._cells[0]] = self._cells[1:]

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text.append(data)
            if self._cells:
                self._cells[-1] += data.strip().replace("\u00a0", " ")

    @property
    def joined(self) -> str:
        return " ".join(" ".join(self.text).replace("\u00a0", " ").split())


def test_mean_deviation_and_interval() -> None:
    found = Spread((1.0, 2.0, 4.0))
    assert found.mean == pytest.approx(7 / 3)
    # Squares of -4/3, -1/3, 5/3 make 42/9; divided by two, 7/3.
    assert found.deviation == pytest.approx(math.sqrt(7 / 3))
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)
    assert found.interval == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-6)
    one = spread([None, 3.0])
    assert one is not None
    assert (one.mean, one.deviation, one.interval, one.number) == (3.0, None, None, 1)
    assert spread([None, None]) is None
    assert not Spread((1.0, math.nan)).is_finite


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (30, 2.04227), (101, 1.98373)]
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=2e-5)


def test_differences_are_paired_by_seed(whole: Path) -> None:
    control, teacher, live = findings(whole).losses
    assert control.by_seed == pytest.approx({0: -0.20, 1: -0.23, 2: -0.20})
    assert teacher.by_seed == pytest.approx({0: -0.12, 1: -0.08, 2: -0.13})
    assert teacher.teachers == dict.fromkeys(invented.SEEDS, "llama")
    assert live.by_seed == pytest.approx({0: -0.001, 1: 0.002, 2: 0.001})


def test_the_verdict_states_the_result_of_the_seeds(whole: Path) -> None:
    (sentence,) = verdicts(findings(whole))
    # -0.20, -0.23, -0.20: deviation sqrt(0.0003), interval half 4.302653 * 0.0173205 / sqrt(3) = 0.0430.
    assert "lowers the student's held-out loss by 0.2100 ± 0.0173 nats per token" in sentence
    assert "(3 seeds, 95 % interval 0.1670 to 0.2530)" in sentence
    # 0.12, 0.08, 0.13: mean 0.11, deviation sqrt(0.0007).
    assert "beats its best teacher (llama) in each of 3 seeds, on average by 0.1100 ± 0.0265 nats" in sentence
    # -0.001, 0.002, 0.001: half of the interval is 0.0038, so it is -0.0031 to 0.0045.
    assert "95 % interval −0.0031 to 0.0045), which is equal within 0.01" in sentence
    # 6 points above the control in every seed, in 60 of 1,000 pairs of most paradigms: sqrt(0.0565 / 1000) of each.
    sentence = " ".join(pairs_sentences(findings(whole)))
    assert "6.0 ± 0.0 percentage points above the control (3 seeds" in sentence
    assert "standard error over pairs 0.1)" in sentence


def test_the_best_teacher_is_that_of_the_seed(recipe: Path) -> None:
    edit(recipe / "seed-1/teacher-gpt2/report.json", held_out__cross_entropy=3.30)
    teacher = findings(recipe).losses[1]
    assert teacher.by_seed == pytest.approx({0: -0.12, 1: 0.12, 2: -0.13})
    assert teacher.teachers[1] == "gpt2"
    (sentence,) = verdicts(findings(recipe))
    assert "beats its best teacher in 2 of 3 seeds, and is on average 0.0433" in sentence


def test_a_teacher_that_is_missing_might_be_the_best(recipe: Path) -> None:
    (recipe / "seed-1/teacher-gpt2/report.json").unlink()
    found = findings(recipe)
    assert set(found.losses[1].by_seed) == {0, 2}
    assert "teacher gpt2, seed 1" in " ".join(found.warnings)


def test_teachers_of_one_seed_serve_every_student(recipe: Path) -> None:
    models = json.loads((recipe / "recipe.json").read_text())["models"]
    edit(recipe / "recipe.json", models=[m for m in models if m["role"] != "teacher" or m["seed"] == 0])
    assert findings(recipe).losses[1].by_seed == pytest.approx({0: -0.12, 1: -0.10, 2: -0.11})


def test_a_difference_that_is_not_shown_is_not_claimed(recipe: Path) -> None:
    for seed, loss in enumerate((3.39, 3.43, 3.45)):
        edit(recipe / f"seed-{seed}/control-student/report.json", held_out__cross_entropy=loss)
        edit(recipe / f"seed-{seed}/live-student/report.json", held_out__cross_entropy=3.40 + 0.05 * seed)
    (sentence,) = verdicts(findings(recipe))
    assert "makes no difference that 3 seeds can show" in sentence
    assert "no difference is shown, and neither is that they are equal within 0.01" in sentence


def test_worse_is_called_worse(recipe: Path) -> None:
    for seed in invented.SEEDS:
        edit(recipe / f"seed-{seed}/student-student/report.json", held_out__cross_entropy=3.9 + seed / 1000)
    (sentence,) = verdicts(findings(recipe))
    assert "raises the student's held-out loss by" in sentence
    assert "in none of 3 seeds" in sentence
    assert "which is worse" in sentence


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    folder = invented.recipe_folder(tmp_path / "one", seeds=(0,))
    (sentence,) = verdicts(findings(folder))
    assert "by 0.2000 nats per token (one seed, so no spread)" in sentence
    assert "beats its best teacher (llama): it is 0.1200 nats below (one seed)" in sentence
    assert "interval" not in sentence
    assert "±" not in sentence
    tables = tables_of(folder)
    # teachers, student, control, live, and student − control: over pairs, whatever the seeds.
    assert [cell.split("±")[-1].strip() for cell in tables.pop("As numbers")["ellipsis"]][-1] == "0.53"
    cells = [cell for table in tables.values() for row in table.values() for cell in row]
    assert len(cells) > 80
    assert not any("±" in cell for cell in cells)


def test_a_diverged_run_has_no_verdict(recipe: Path) -> None:
    edit(recipe / "seed-1/student-student/report.json", held_out__cross_entropy="NaN", held_out__perplexity="Infinity")
    (sentence,) = verdicts(findings(recipe))
    assert "is not known: a run ended without a finite loss" in sentence
    words = Words(page_of(recipe, out=recipe / "page.html")).joined
    assert "not finite" in words
    assert "nan" not in words.lower().split()


def test_other_held_out_text_is_noticed(recipe: Path) -> None:
    edit(recipe / "seed-1/control-student/report.json", provenance__eval_cache="c" * 64)
    assert "not all scored on the same held-out text" in " ".join(findings(recipe).warnings)


def test_break_even() -> None:
    found = BreakEven(caching=60.0, cached=100.0, live=130.0)
    assert found.students == pytest.approx(2.0)
    assert found.rows(3) == [(1, 160.0, 130.0), (2, 260.0, 260.0), (3, 360.0, 390.0)]
    assert [n for n, _, _ in found.rows()] == list(range(1, 17))
    assert BreakEven(caching=60.0, cached=130.0, live=130.0).students is None


def test_costs_of_the_folder(recipe: Path) -> None:
    found = findings(recipe).break_even
    assert found is not None
    # One student reads one entry of two shards, each of half of the seconds.
    assert found.caching == pytest.approx(invented.CACHING_SECONDS, rel=0.05)
    assert (found.cached, found.live) == pytest.approx((101.0, 131.0))
    edit(recipe / "seed-1/student-student/report.json", resumed_from_step=50)
    found = findings(recipe).break_even
    assert found is not None
    assert found.cached == pytest.approx(101.0), "of the seeds 0 and 2: the resumed run did not record its total time"
    assert tables_of(recipe)["Time"]["studenttraining from the cache"][1] == "2"


def test_the_contents_of_the_tables(whole: Path) -> None:
    tables = tables_of(whole)
    rows = tables["Models"]
    assert list(rows) == ["model", "teacher llama", "teacher gpt2", "student", "control", "live teachers"]
    assert rows["student"][:3] == ["3 of 3", "2.30 M", "3.28 M"]
    assert rows["student"][3:6] == ["3.4100± 0.0100", "1.8± 0.0", f"{_mean_perplexity():.2f}± 0.30"]
    assert rows["student"][8] == "0.3100± 0.0100"
    assert rows["control"][8] == "not measured"
    means = [pairs_mean(model) for model in findings(whole).models if model.role == "control"]
    assert rows["control"][9].startswith(f"{100 * sum(m for m in means if m is not None) / 3:.1f} %")
    (fidelity,) = (rows for title, rows in tables.items() if title.startswith("How close the stored targets are"))
    assert fidelity["ensemble-0"][:5] == ["600", "8.10 %", "24.00 %", "0.0310", "0.00210"]


@pytest.mark.parametrize("treatments", [("sampled",), ()])
def test_an_entry_that_serves_no_bucket_has_no_figures_of_it(recipe: Path, treatments: tuple[Treatment, ...]) -> None:
    targets = LogitCache.open(str(recipe / "train")).teacher("ensemble-0")
    report = targets.fidelity()
    assert report is not None
    angles, divergence = report.gradients["bucket"], report.divergences["bucket"]
    lean = {
        "format_version": 2,
        "divergences": dict.fromkeys(treatments, divergence),
        "gradients": dict.fromkeys(treatments, angles),
        "calibration": Calibration(full=0.014, stored=dict.fromkeys(treatments, 0.02)),
    }
    (recipe / "train/teachers/ensemble-0/fidelity.json").write_bytes(sealed_bytes(report.model_copy(update=lean)))
    tables = tables_of(recipe)
    (fidelity,) = (rows for title, rows in tables.items() if title.startswith("How close the stored targets are"))
    missing = "no treatment of these targets"
    assert fidelity["ensemble-0"][3:5] == [missing, "0.00210" if treatments else missing]
    assert fidelity["ensemble-0"][6:] == ["2.40°" if treatments else "not defined", "1.40 %"]
    shown = cache_text(describe_cache(LogitCache.open(str(recipe / "train"))))
    assert "KL(full, stored)  quantisation alone 4.8e-06 nats" in shown


def _mean_perplexity() -> float:
    return sum(math.exp(loss) for loss in invented.LOSSES["student", "student"]) / 3


def test_curves() -> None:
    assert mean_points([((1.0, 2.0), (2.0, 4.0)), ((2.0, 6.0), (3.0, 1.0))]) == ((2.0, 5.0),)
    assert thinned(tuple((float(i), float(i)) for i in range(6)), 3) == ((0.5, 0.5), (2.5, 2.5), (4.5, 4.5))
    log = [{"epoch": 1, "eval_loss": 4.0}, {"epoch": 2, "eval_loss": math.nan}, {"eval_loss": 1.0}]
    assert curve(log, "eval_loss", by="epoch") == ((1.0, 4.0),)


def test_the_best_epoch_is_that_of_the_published_weights(whole: Path) -> None:
    (model,) = [m for m in findings(whole).models if (m.role, m.name, m.seed) == ("student", "student", 0)]
    log = [
        {"epoch": 1.0, "eval_loss": 4.0, "eval_distillation_loss": 2.0},
        {"epoch": 2.0, "eval_loss": 3.0, "eval_distillation_loss": 1.0},
        {"epoch": 3.0, "eval_loss": 2.5, "eval_distillation_loss": 1.5},
    ]
    expected = (
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_distillation_loss"}, 2.0),
        ({"load_best_model_at_end": True}, 3.0),
        ({"metric_for_best_model": "distillation_loss"}, 3.0),
    )
    for training, epoch in expected:
        assert model.run is not None
        job = model.run.job.model_copy(update={"training": training})
        run = model.run.model_copy(update={"job": job, "eval_log": log})
        assert best_epoch(dataclasses.replace(model, run=run)) == epoch
    assert best_epoch(dataclasses.replace(model, run=None)) is None


def test_trials_are_sorted_by_value(tmp_path: Path) -> None:
    folder = invented.sweep_folder(tmp_path / "sweep")
    sweep = SweepReport.model_validate_json((folder / "sweep.json").read_text())
    complete = [trial.value for trial in sweep.ranked() if trial.state == "complete"]
    assert complete == sorted(complete)
    assert sweep.ranked()[-1].state == "failed"
    other = sweep.model_copy(update={"direction": "maximize"})
    assert other.ranked()[0].value == max(complete)
    broken = sweep.trials[0].model_copy(update={"value": math.nan, "number": 99})
    last = sweep.model_copy(update={"trials": (broken, *sweep.trials)}).ranked()[len(complete)]
    assert last.number == 99, "a value that is no number is no better than any"


def test_records_of_newer_and_older_versions_are_read(recipe: Path, tmp_path: Path) -> None:
    """Unknown fields are ignored at every depth; fields that came later have defaults."""
    for report in recipe.rglob("report.json"):
        edit(report, of_tomorrow=1, job__of_tomorrow=2, held_out__of_tomorrow=3)
        data = json.loads(report.read_text())
        for later in ("peak_memory", "live", "tokens_trained", "windows_at_once", "tail_bounds", "fused_head"):
            del data[later]
        report.write_text(json.dumps(data))
    edit(recipe / "recipe.json", of_tomorrow=1)
    data = json.loads((recipe / "recipe.json").read_text())
    for later in ("at_once", "threads"):
        del data[later]
    (recipe / "recipe.json").write_text(json.dumps(data))
    assert "lowers the student's held-out loss" in page_of(recipe, out=tmp_path / "page.html").replace("&#39;", "'")


def test_the_page_of_a_whole_recipe(whole: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = run("logit-cache", "report", whole, "-o", out)
    assert done.returncode == 0, done.stderr
    assert "Distillation lowers the student's held-out loss by 0.2100" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"], "and no partial file"
    page = out.read_text(encoding="utf-8")
    found = Words(page)
    sections = re.findall(r"<h2>(.*?)</h2>", page)
    assert sections == [
        "Gain from distillation",
        "Setup",
        "Teachers, student, control",
        "During training",
        "BLiMP by phenomenon",
        "A look inside",
        "Fidelity of the cache",
        "Cost",
        "Provenance",
    ]
    assert page.index("0.2100") < page.index(sections[0])
    for words in (
        "logit-mean of llama (LlamaForCausalLM, 4,200,000 parameters, float32) and gpt2",
        "top-k, k = 8",
        "subject verb agreement",
        "The cache is cheaper from 3 students on",
        "NVIDIA L4",
        "Thin lines are single seeds",
        "3,100.0 MB",
    ):
        assert words in found.joined, words
    assert not found.tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not {name for name in found.attributes if name.startswith("on")} | found.attributes & {"src", "srcset"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?:|url\(|@import", page)
    assert "/somewhere/" not in page, "folders of a machine are nobody's business"


def test_the_page_lies_in_the_first_folder(recipe: Path, run: Run, tmp_path: Path) -> None:
    sweep = invented.sweep_folder(tmp_path / "sweep")
    single = invented.run_folder(tmp_path / "single", seed=4, loss=3.3)
    done = run("logit-cache", "report", single, recipe, sweep)
    assert done.returncode == 0, done.stderr
    words = Words((single / "report.html").read_text(encoding="utf-8")).joined
    assert not (recipe / "report.html").exists()
    for title in (
        "Baby Llama, scale tiny",
        "Learning rate of the student",
        "single",
        "eval_loss against learning_rate",
    ):
        assert title in words
    assert "Lowest eval_loss: 3.3466" in done.stdout


def test_missing_parts_are_named_as_missing(recipe: Path, tmp_path: Path) -> None:
    shutil.rmtree(recipe / "train")
    shutil.rmtree(recipe / "valid")
    for seed in invented.SEEDS:
        for role in ("teacher-llama", "teacher-gpt2", "live-student"):
            shutil.rmtree(recipe / f"seed-{seed}/{role}")
        edit(recipe / f"seed-{seed}/student-student/report.json", held_out=None, peak_memory=None, train_log=[])
    for scored in recipe.rglob("*.scores.json"):
        scored.unlink()
    found = findings(recipe)
    (sentence,) = verdicts(found)
    assert sentence.count("not measured") == 3
    assert found.break_even is None
    words = Words(page_of(recipe, out=tmp_path / "page.html")).joined
    assert "Break-even of cached against live: not measured" in words
    assert "Not finished, and missing from all numbers: teacher llama, seed 0" in words
    assert "ensemble-0 (not cached yet)" in words


def test_scores_stand_in_for_runs_without_figures(recipe: Path) -> None:
    for report in recipe.rglob("report.json"):
        edit(report, held_out=None)
        edit(report.parent.with_suffix(".scores.json"), held_out={**HELD_OUT, "cross_entropy_per_token": 2.5})
    assert findings(recipe).scored_by_evaluate
    cells = tables_of(recipe)["Models"]["teacher llama"]
    assert (cells[3], *cells[5:8]) == ("2.5000± 0.0000", "12.00± 0.00", "not measured", "50.00 %± 0.00")


def test_the_kl_of_a_model_without_teachers_is_that_of_its_scores(recipe: Path) -> None:
    assert "control" not in {one.series.label for one in findings(recipe).distances}
    for seed, nats in zip(invented.SEEDS, (0.5, 0.7, 0.6), strict=True):
        kl = {f"ensemble-{seed}": {"nats": nats, "lower_bound": True}}
        (file,) = (recipe / f"seed-{seed}").glob("control-*.scores.json")
        edit(file, held_out={**HELD_OUT, "kl": kl})
    tables = tables_of(recipe)
    assert tables["Held-out KL to the teachers"]["control"] == ["its seed's entry", "0.6000± 0.1000", "lower bound"]
    assert tables["Models"]["control"][8] == "≥ 0.6000± 0.1000"


def test_a_cross_entropy_to_a_teacher_is_called_one(recipe: Path) -> None:
    """Of entries without the teacher's entropy no KL is known; neither is a mean of such and of KLs."""
    for seed in invented.SEEDS:
        kl = {f"ensemble-{seed}": {"nats": 2.5, "lower_bound": False, "cross_entropy": True}}
        (file,) = (recipe / f"seed-{seed}").glob("control-*.scores.json")
        edit(file, held_out={**HELD_OUT, "kl": kl})
        (file,) = (recipe / f"seed-{seed}").glob("live-*.scores.json")
        edit(file, held_out={**HELD_OUT, "kl": kl | {"other": {"nats": 0.5, "lower_bound": False}}})
    tables = tables_of(recipe)
    assert tables["Held-out KL to the teachers"]["control"] == [
        "its seed's entry",
        "2.5000± 0.0000",
        "cross-entropy to it",
    ]
    assert tables["Models"]["control"][8] == "CE 2.5000± 0.0000"
    assert tables["Models"]["live teachers"][8] == "not measured"


def test_nothing_from_a_folder_becomes_markup(recipe: Path, tmp_path: Path) -> None:
    data = json.loads((recipe / "recipe.json").read_text())
    data.update(title=EVIL, recipe=EVIL, scale=EVIL, settings={EVIL: EVIL}, entries=[EVIL, *data["entries"]])
    for model in data["models"]:
        model["name"] = f"{EVIL}{model['name']}"
    (recipe / "recipe.json").write_text(json.dumps(data))
    for report in recipe.rglob("report.json"):
        edit(report, device=EVIL, libraries={EVIL: EVIL}, provenance={EVIL: EVIL}, job__model=EVIL)
    for scored in recipe.rglob("*.scores.json"):
        edit(scored, minimal_pairs__groups={EVIL: {"pairs": 1, "accuracy": 0.5}})
    sweep = invented.sweep_folder(tmp_path / "sweep")
    trials = [
        {"number": n, "state": "complete", "value": 1.0 + n, "parameters": {EVIL: EVIL, "b": 1}, "error": EVIL}
        for n in range(3)
    ]
    edit(
        sweep / "sweep.json", title=EVIL, metric=EVIL, backend=EVIL, cache=EVIL, job={EVIL: {EVIL: EVIL}}, trials=trials
    )
    single = invented.run_folder(tmp_path / "<b>run")
    page = page_of(recipe, sweep, single, out=tmp_path / "page.html")
    found = Words(page)
    assert not found.tags & {"script", "img", "b"}
    assert not {name for name in found.attributes if name.startswith("on")}
    assert EVIL in found.joined


def test_hostile_numbers_and_characters(run: Run, recipe: Path, tmp_path: Path) -> None:
    huge = "9" * 400
    sweep = invented.sweep_folder(tmp_path / "sweep", trials=2)
    text = (sweep / "sweep.json").read_text().replace('"num_layers": ', f'"num_layers": {huge}')
    (sweep / "sweep.json").write_text(text.replace("eval_loss", "\\u001b[31mloss"))
    single = invented.run_folder(tmp_path / "single")
    log = [{"step": 1, "cross_entropy": "NaN"}, {"cross_entropy": 1}, {"step": 2, "cross_entropy": 1e300}]
    edit(single / "report.json", train_log=log, held_out__ece="Infinity", held_out__cross_entropy="Infinity")
    done = run("logit-cache", "report", recipe, sweep, single)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "No run ended with a finite held-out loss" in done.stdout
    edit(recipe / "recipe.json", title="half \ud800 a character")
    refused(run("logit-cache", "report", recipe), "recipe.json", "expected JSON")
    edit(single / "report.json", seconds="Infinity")
    refused(run("logit-cache", "report", single), "report.json", "seconds")
    edit(single / "report.json", seconds=1.0, train_log=[{"step": 1, "cross_entropy": "x"}])
    refused(run("logit-cache", "report", single), "report.json", "train_log.0.cross_entropy")


def test_a_teacher_that_diverged_is_not_the_best(recipe: Path) -> None:
    edit(recipe / "seed-0/teacher-llama/report.json", held_out__cross_entropy="NaN")
    teacher = findings(recipe).losses[1]
    assert teacher.by_seed[0] == pytest.approx(3.40 - 3.58)
    assert teacher.teachers[0] == "gpt2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["recipe.json, sweep.json or report.json", "found none"]),
        ({"report.json": "{"}, ["report.json", "expected JSON"]),
        ({"report.json": "[" * 100_000}, ["report.json", "expected JSON"]),
        ({"report.json": '{"kind": "evaluation report"}'}, ["expected a training report", "kind"]),
        ({"sweep.json": '{"kind": "sweep", "format": 2}'}, ["expected a sweep", "format"]),
    ],
)
def test_folders_with_something_else_are_refused(
    run: Run, tmp_path: Path, content: dict[str, str] | None, words: list[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in (content or {}).items():
        (folder / name).write_text(text)
    refused(run("logit-cache", "report", folder), str(folder), *words)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", "s3://bucket/run", ""])
def test_a_recipe_does_not_lead_out_of_its_folder(run: Run, recipe: Path, path: str) -> None:
    edit(recipe / "recipe.json", models__3__run=path)
    refused(run("logit-cache", "report", recipe), "model 3", "inside the folder of the recipe")


def test_refusals(run: Run, recipe: Path, tmp_path: Path) -> None:
    refused(run("logit-cache", "report", tmp_path / "nowhere"), "nowhere", "found no folder")
    refused(run("logit-cache", "report", recipe, "-o", tmp_path / "no" / "page.html"), "--out", "a folder that exists")
    refused(run("logit-cache", "report", recipe, "-o", tmp_path), "--out")
    for report in recipe.rglob("report.json"):
        report.unlink()
    refused(run("logit-cache", "report", recipe), "at least one finished run or trial")
    models = json.loads((recipe / "recipe.json").read_text())["models"]
    edit(recipe / "recipe.json", models=[*models, models[0]])
    refused(run("logit-cache", "report", recipe), "teacher 'llama' of seed 0 is listed twice")
    done = run("logit-cache", "report")
    assert done.returncode == 2
    assert "RUN_DIR" in done.stderr


def test_a_damaged_cache_is_not_reported_on(run: Run, recipe: Path) -> None:
    file = recipe / "train/teachers/ensemble-1/fidelity.json"
    file.write_text(file.read_text().replace("0.081", "0.001"))
    refused(run("logit-cache", "report", recipe), "fidelity.json")
