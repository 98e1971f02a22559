"""Imports flow one way, and commands start fast because nothing heavy is imported until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from support.commands import ROOT

PACKAGES = ("storage", "teachers", "student", "logit_cache")
ALLOWED = {
    "storage": {"storage"},
    "teachers": {"teachers", "storage"},
    "student": {"student", "storage"},
    "logit_cache": {"logit_cache", "storage", "teachers"},
}
EXCEPTIONS = {
    "teachers/cli.py": {"student"},
    "teachers/live.py": {"student"},
    "logit_cache/evaluation_cli.py": {"student"},
    "logit_cache/forecast.py": {"student"},
    "logit_cache/step_probe.py": {"student"},
}
CLICK = {
    "logit_cache/caching_cli.py",
    "logit_cache/cleaning_cli.py",
    "logit_cache/cli.py",
    "logit_cache/corpus_cli.py",
    "logit_cache/evaluation_cli.py",
    "logit_cache/options.py",
    "logit_cache/planning_cli.py",
    "logit_cache/recipe_cli.py",
    "logit_cache/report_cli.py",
    "logit_cache/sharing_cli.py",
    "student/cli.py",
    "teachers/cli.py",
}
FILES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("name", FILES)
def test_imports_of_each_file(name: str) -> None:
    package = name.split("/")[0]
    names = imported(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    assert names & set(PACKAGES) <= ALLOWED[package] | EXCEPTIONS.get(name, set())
    assert "click" not in names or name in CLICK
    if package == "storage":
        assert not names & {"torch", "transformers", "click"}
    if package == "logit_cache":
        assert "transformers" not in names or name in {"logit_cache/corpus.py", "logit_cache/tokenizer.py"}


def modules_after(code: str) -> set[str]:
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(' '.join(sys.modules))"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    return set(printed.split())


def test_importing_the_reader_needs_no_torch() -> None:
    assert not modules_after("from storage import LogitCache") & {"torch", "transformers", "click"}


def test_importing_the_package_does_nothing() -> None:
    assert "zarr" not in modules_after("import storage, logit_cache")


@pytest.mark.parametrize("module", ["logit_cache.cli", "student.cli", "teachers.cli"])
def test_command_modules_import_nothing_heavy(module: str) -> None:
    assert not modules_after(f"import {module}") & {"torch", "transformers", "zarr", "datasets", "numpy"}


def test_the_student_never_loads_a_teacher() -> None:
    stems = sorted(path.stem for path in (ROOT / "student").glob("*.py") if path.stem != "__init__")
    modules = ", ".join(f"student.{stem}" for stem in stems)
    loaded = modules_after(f"import {modules}")
    assert not {name for name in loaded if name.split(".")[0] in ("teachers", "logit_cache")}
