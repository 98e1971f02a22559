"""The wheel holds everything: installed away from the checkout, every command answers and the report is rendered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import click
import pytest
from support.commands import COMMANDS, ROOT
from support.report_folders import recipe_folder

PACKAGES = ("storage", "student", "teachers", "logit_cache")
LINES = [
    [script, *words]
    for script, command in COMMANDS.items()
    for words in ([[], *([name] for name in command.commands)] if isinstance(command, click.Group) else [[]])
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy, so that no earlier build beside the checkout gets in.
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    line = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel, and of this one only the packages that it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(scripts: Path, line: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(scripts / line[0]), *line[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=scripts, env=environment, check=False)


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.*") if path.suffix != ".pyc"]
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_help_of_every_command(line: list[str], scripts: Path) -> None:
    done = run(scripts, [*line, "--help"])
    assert done.returncode == 0, done.stderr
    assert "--version" in done.stdout
    assert "Example:" in done.stdout or line == ["logit-cache"]


def test_the_report_is_rendered(scripts: Path, tmp_path: Path) -> None:
    done = run(scripts, ["logit-cache", "report", str(recipe_folder(tmp_path / "baby-llama"))])
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "baby-llama" / "report.html").read_text(encoding="utf-8")
