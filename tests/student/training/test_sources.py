"""Runs whose teachers teach the documents of some sources: what a job says, what is measured, what is another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import fill, job_in

from storage.errors import IdentityMismatch, InputError
from student.data.windows import DistillationWindows
from student.job import StudentJob
from student.training.run import train

BOTH = ["a@source=math", "b:2@source=code"]


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of two sources, and held-out text of one of them and of another, with both teachers everywhere."""
    folder = tmp_path_factory.mktemp("domains")
    of_train = {"document_starts": np.array([0, 200, 450]), "document_sources": ("math", "code", "math")}
    fill(str(folder / "train"), 600, 0, ("a", "b"), of_train)
    fill(
        str(folder / "held"),
        120,
        1,
        ("a", "b"),
        {"document_starts": np.array([0, 70]), "document_sources": ("web", "math")},
    )
    return folder


def job_of(world: Path, domains: Path, out: Path, **changes: Any) -> StudentJob:
    changes = {"training": {"max_steps": 2}, "temperature": 1, "eval_cache": str(domains / "held"), **changes}
    return job_in(world, out, cache=str(domains / "train"), **changes)


def test_every_loss_takes_teachers_of_different_sources(world: Path, domains: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    job = job_of(world, domains, tmp_path / "out", teachers=BOTH, loss="jsd", alpha=0.5)
    report = train(job, lines.append)
    windows = DistillationWindows(job.cache, ["a", "b"], 16, "random", 5, sources={"a": ["math"], "b": ["code"]})
    assert {"jsd_a", "jsd_b"} <= report.train_log[-1].keys()
    assert sum(report.tokens_taught.values()) == report.tokens_trained
    assert 0 < report.tokens_taught["b"] < report.tokens_taught["a"]
    assert "teacher a teaches in documents of math" in lines
    assert windows.untaught_sources() == []
    assert report.held_out is not None
    assert set(report.held_out.kl) == {"a"}
    assert "no document is from the source 'code'" in report.held_out.kl_not_measured["b"]
    with pytest.raises(InputError, match=r"loss jsd of several teachers \(a, b\)"):
        train(job_of(world, domains, tmp_path / "x", teachers=["a@source=math", "b"], loss="jsd"))


def test_held_out_kl_is_over_the_documents_of_a_teacher(world: Path, domains: Path, tmp_path: Path) -> None:
    of_math = train(job_of(world, domains, tmp_path / "math", teachers=["a@source=math"])).held_out
    everywhere = train(job_of(world, domains, tmp_path / "all", teachers=["a"])).held_out
    assert of_math is not None
    assert everywhere is not None
    assert of_math.tokens == everywhere.tokens
    assert of_math.kl["a"].nats != pytest.approx(everywhere.kl["a"].nats, rel=1e-3)


def test_a_teacher_of_other_sources_is_another_run(world: Path, domains: Path, tmp_path: Path) -> None:
    job = job_of(world, domains, tmp_path / "out", teachers=BOTH, eval_cache=None)
    report = train(job)
    assert train(job) == report
    others = ["a@source=math@source=code", "b:2"]
    with pytest.raises(IdentityMismatch) as caught:
        train(job_of(world, domains, tmp_path / "out", teachers=others, eval_cache=None))
    assert [field.split(":")[0] for field in caught.value.fields] == ["teachers.a.sources", "teachers.b.sources"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a", ("a", 1.0, None)),
        ("a:0.5", ("a", 0.5, None)),
        ("a@source=web: en=1", ("a", 1.0, ("web: en=1",))),
        ("a:3@source=x:2@source=y", ("a", 3.0, ("x:2", "y"))),
        ({"name": "a", "sources": "x"}, ("a", 1.0, ("x",))),
    ],
)
def test_a_teacher_as_it_is_written(written: Any, expected: tuple[Any, ...]) -> None:
    [teacher] = StudentJob(cache="c", model="m", output_dir="o", teachers=[written]).teachers
    assert (teacher.name, teacher.weight, teacher.sources) == expected
    assert ("sources" in teacher.model_dump()) == (expected[2] is not None)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (["a@source=x@source=x"], "teacher a: name each source once"),
        ([{"name": "a", "sources": []}], "one at least; got none"),
        (["a@source="], "at least 1 character"),
        (["a@math"], "teachers"),
        (["a:b@source=x"], "expected NAME or NAME:WEIGHT, then @source=SOURCE, and 'b' is not a number"),
        (["a@source=x", "a@source=y"], "each teacher may be named once"),
    ],
)
def test_a_teacher_that_cannot_be_meant(teachers: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentJob(cache="c", model="m", output_dir="o", teachers=teachers)
