"""The folders are the architecture: imports go one way, and what is heavy is imported where it is needed.

`ROOMS` is the rule. A room (a file or folder of a package) may import its own package's rooms in the levels above it,
and any earlier package; rooms of one level do not know each other. A folder may import itself, without a circle.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest
from support.commands import ROOT

PACKAGES = ("storage", "student", "teachers", "logit_cache")
ROOMS = {
    "storage": (
        ("errors", "lazy", "text"), ("files",), ("locks", "config", "processes", "progress"), ("format",), ("stores",),
        ("cache",), ("transfer",),
    ),
    "student": (
        ("labels", "foreign_errors", "lifeline", "target_batch"), ("models",), ("cli_command",), ("data",), ("loss",),
        ("job",), ("report",),
        ("evaluation",), ("training",), ("sweep",), ("cli",),
    ),
    "teachers": (
        ("ranks",), ("base",), ("huggingface", "reduction"), ("batch_size", "ensemble", "served", "vocabulary"),
        ("live",),
        ("cli",),
    ),
    "logit_cache": (
        ("describe", "passage"), ("corpus",), ("caching",), ("fidelity",), ("importing", "projection"),
        ("engines", "exporting"), ("cli",),
    ),
}  # fmt: skip
# Leaves of logit_cache, each with the leaves whose records it reads: they know the first level, and only the commands
# know them all.
LEAVES: dict[str, tuple[str, ...]] = {"sharing": (), "recipes": (), "report": ("recipes",)}
MOST_ENTRIES = 14


@functools.cache
def import_statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_of(path: Path, modules: Collection[str]) -> set[str]:
    """Dotted names of what a file imports, wherever it does; `from a import b` is a.b where that is a module."""
    found: set[str] = set()
    for node in import_statements(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
            found |= inner | ({node.module or ""} if len(inner) < len(node.names) else set())
    return found


def files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every module of the packages by its dotted name."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def allowed(module: str) -> set[str]:
    """The packages, and rooms of its own package, that a module may import."""
    package, *inner = module.split(".")
    earlier = set(PACKAGES[: PACKAGES.index(package)])
    if not inner:
        return earlier | {f"{package}.{room}" for level in ROOMS[package] for room in level}
    levels = ROOMS[package]
    if package == "logit_cache" and inner[0] in LEAVES:
        levels = (levels[0], LEAVES[inner[0]], (inner[0],))
    (depth,) = [number for number, level in enumerate(levels) if inner[0] in level] or [-1]
    assert depth >= 0, f"{module}: {inner[0]} is no room of {package}: give it a place in ROOMS"
    above = {f"{package}.{room}" for level in levels[:depth] for room in level}
    leaves = {f"{package}.{room}" for room in LEAVES} if (package, inner[0]) == ("logit_cache", "cli") else set()
    return earlier | above | {f"{package}.{inner[0]}"} | leaves


def breaches(root: Path) -> list[str]:
    """Everything in a tree that is against the rule, a line each."""
    modules, found, graph = dict(files(root)), [], {}
    for module, path in modules.items():
        names = imports_of(path, modules)
        ours = {name for name in names if name.split(".")[0] in PACKAGES}
        for name in sorted(ours):
            parts = name.split(".")
            room = ".".join(parts[:2]) if parts[0] == module.split(".")[0] else parts[0]
            if room not in allowed(module):
                found.append(f"{module} imports {name}")
        heavy = {name.split(".")[0] for name in names}
        room = module.split(".")[1] if "." in module else ""
        if "click" in heavy and not room.startswith("cli"):
            found.append(f"{module} imports click")
        if "triton" in heavy and "triton" not in path.stem:
            found.append(f"{module} imports triton")
        if module.startswith("logit_cache") and "transformers" in heavy and path.stem not in ("tokenize", "tokenizer"):
            found.append(f"{module} imports transformers")
        if module.startswith("storage") and heavy & {"torch", "transformers"}:
            found.append(f"{module} imports torch or transformers")
        graph[module] = {name for name in ours if name in modules and name != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle: {' → '.join(error.args[1])}")
    for folder in sorted({path.parent for path in modules.values()} | set((root / "tests").rglob("*/"))):
        entries = [item for item in folder.glob("*") if item.name not in ("__init__.py", "__pycache__")]
        entries = [item for item in entries if item.suffix == ".py" or item.is_dir()]
        if len(entries) > MOST_ENTRIES and "golden" not in folder.parts:
            found.append(f"{folder.relative_to(root)} has {len(entries)} entries")
    return found


def test_the_tree_keeps_the_rule() -> None:
    assert not breaches(ROOT)


def test_every_folder_says_what_belongs_in_it() -> None:
    for package in PACKAGES:
        for init in (ROOT / package).rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), init
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent}: a wheel would leave it out"


PLANTED = {
    "storage/stores/planted.py": ("from student import labels", "storage.stores.planted imports student.labels"),
    "student/data/planted.py": ("def f():\n    import teachers.live", "student.data.planted imports teachers.live"),
    "storage/format/planted.py": ("import storage.cache.reader", "planted imports storage.cache.reader"),
    "teachers/reduction/planted.py": (
        "from teachers.huggingface import teacher",
        "reduction.planted imports teachers.hug",
    ),
    "logit_cache/report/planted.py": ("from logit_cache.caching import job", "imports logit_cache.caching.job"),
    "logit_cache/recipes/planted.py": ("import logit_cache.report.page", "imports logit_cache.report.page"),
    "logit_cache/caching/job.py": ("import logit_cache.report.page", "imports logit_cache.report.page"),
    "student/loss/planted.py": ("from student import load_student", "student.loss.planted imports student"),
    "logit_cache/corpus/planted.py": ("import click", "logit_cache.corpus.planted imports click"),
    "student/data/plantedtoo.py": ("import triton.language", "student.data.plantedtoo imports triton"),
    "logit_cache/fidelity/planted.py": ("import transformers", "logit_cache.fidelity.planted imports transformers"),
    "storage/cache/planted.py": ("def f():\n    import torch", "storage.cache.planted imports torch"),
    "storage/format/sealing.py": ("import storage.format.manifest.shared", "a circle: "),
}


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_breach_is_found(file: str, tmp_path: Path) -> None:
    text, said = PLANTED[file]
    planted = _copy(tmp_path) / file
    planted.write_text((planted.read_text(encoding="utf-8") if planted.exists() else "") + f"\n{text}\n")
    # A folder may be full, and have one entry too many with the planted file.
    (line,) = (line for line in breaches(tmp_path) if not line.endswith(" entries"))
    assert said in line


def test_a_crowded_folder_is_found(tmp_path: Path) -> None:
    folder = _copy(tmp_path) / "student" / "loss"
    for number in range(MOST_ENTRIES):
        (folder / f"planted{number}.py").touch()
    (line,) = breaches(tmp_path)
    assert line.startswith("student/loss has ")


def _copy(folder: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def modules_after(code: str) -> set[str]:
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(' '.join(sys.modules))"],
        check=True, capture_output=True, text=True, cwd=ROOT,
    ).stdout  # fmt: skip
    return set(printed.split())


def test_reading_and_checking_a_cache_needs_no_torch() -> None:
    loaded = modules_after("import storage.cache.reader, logit_cache.fidelity.plausibility")
    assert not loaded & {"torch", "transformers", "click", "rich"}


def test_importing_the_packages_does_nothing() -> None:
    loaded = modules_after("import storage, student, teachers, logit_cache")
    assert not loaded & {"zarr", "torch", "transformers", "numpy", "rich", "pydantic"}


@pytest.mark.parametrize("package", ["storage", "student", "teachers"])
def test_public_names_are_there(package: str) -> None:
    module = importlib.import_module(package)
    assert {getattr(module, name).__name__ for name in module.__all__ if name != "NOT_TRAINED"} <= set(module.__all__)
    imported = re.findall(r"^    from .* import (\w+) as \1$", Path(module.__file__).read_text(), re.MULTILINE)
    assert sorted(imported) == module.__all__, "type checkers know the same names"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_the_version_of_the_distribution(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__version__ == version("logit-cache")
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_command_modules_import_nothing_heavy() -> None:
    loaded = modules_after("import logit_cache.cli.main, student.cli, teachers.cli")
    assert not loaded & {"torch", "transformers", "zarr", "datasets", "numpy", "rich"}


def test_losses_and_reducers_on_a_cpu_load_no_triton() -> None:
    code = """
import torch
from student.loss.distillation import DistillationLoss
from student.loss.fused import fused_loss
from teachers.reduction.reduce import reduce_topk
reduce_topk(torch.zeros(2, 9), 9, 2, torch.zeros(2, dtype=torch.int64), -99.0)
loss = DistillationLoss(9, 1.0, 1.0, [])
hidden = torch.ones(4, 3, requires_grad=True)
fused_loss(hidden, torch.ones(9, 3), None, loss.prepare(torch.arange(4))).loss_sum.backward()
"""
    assert "triton" not in modules_after(code)


def test_the_student_never_loads_a_teacher() -> None:
    names = [name for name, _ in files(ROOT) if name.startswith("student.")]
    loaded = modules_after(f"import {', '.join(names)}")
    assert not {name for name in loaded if name.split(".")[0] in ("teachers", "logit_cache")}


WRONG = (
    "cache-logits --cache c --teacher t --name n -k 0",
    "cache-logits --cache c --teacher t --name N",
    "cache-logits --cache no-cache-here --teacher t --name n",
    "cache-logits --cache c --teacher t --name n --engine none",
    "cache-logits --teacher t --name n --tokenizer t",
    "train-student --cache c --teacher t --model llama-tiny --output-dir o --alpha 2",
    "train-teacher --cache c --output-dir o",
    "logit-cache plan --cache c --teacher t --targets nothing",
    "logit-cache evaluate model",
    "logit-cache recompress c --name n --to N",
    "logit-cache tokenize --text t --out o --train-tokenizer -5",
)


def test_wrong_flags_are_refused_before_torch_is_imported() -> None:
    """All in one process, which has imported neither at its end."""
    loaded = modules_after(f"""
from click.testing import CliRunner
from logit_cache.cli.main import cache_logits, main
from student.cli import train_student
from teachers.cli import train_teacher
commands = {{command.name: command for command in (cache_logits, train_student, train_teacher)}}
commands["logit-cache"] = main
for name, *words in map(str.split, {WRONG!r}):
    done = CliRunner().invoke(commands[name], words)
    assert done.exit_code == 2, (name, words, done.output)
""")
    assert not loaded & {"torch", "transformers"}
