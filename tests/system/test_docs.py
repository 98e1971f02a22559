"""The documents are true: their commands parse, their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from support.commands import COMMANDS, ROOT

import logit_cache.cli.main

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    text = "\n".join(blocks("console")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.split("#")[0].split(" ")[0] in COMMANDS]


@pytest.mark.parametrize("line", command_lines())
def test_commands_of_the_readme_parse(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    command = COMMANDS[name]
    if isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    context = command.make_context(name, arguments)
    assert not context.args, "every word of the line is an option or its value"


def test_the_readme_shows_the_whole_road() -> None:
    shown = {" ".join(line.split()[: 1 + line.startswith("logit-cache")]) for line in command_lines()}
    assert shown >= {"logit-cache tokenize", "logit-cache inspect", "train-teacher", "cache-logits", "train-student"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("console")), flags=re.MULTILINE)) <= targets


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_of_the_readme_runs(number: int) -> None:
    golden = str(ROOT / "tests" / "golden" / "v1")
    code = blocks("python")[number].replace("run/train", golden).replace("llama", "codes").replace("1000", "44")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert {"targets", "logprobs"} & set(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_command_is_in_the_readme() -> None:
    for name in COMMANDS:
        assert f"`{name}`" in README or f"{name} " in README
    for name in logit_cache.cli.main.main.commands:
        assert f"logit-cache {name}" in README or f"make {name}" in README
