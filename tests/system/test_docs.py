"""The documents are true: commands parse, Python runs, links lead somewhere, the README's pipeline runs as printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from support.commands import COMMANDS, LIBRARY, ROOT, Run
from support.programs import format_page

import storage.format

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README, SHARING = TEXT["README.md"], TEXT["docs/sharing.md"]
SOURCES = "".join(
    path.read_text(encoding="utf-8") for package in ("storage", "teachers") for path in (ROOT / package).rglob("*.py")
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> list[str]:
    """Our commands in the console blocks of a page, continued lines joined."""
    lines = "\n".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.split("#")[0].split(" ")[0] in COMMANDS]


def command_of(line: str) -> tuple[click.Command, list[str]]:
    """The click command of a line, and its arguments."""
    name, *arguments = shlex.split(line, comments=True)
    found = COMMANDS[name]
    return (found.commands[arguments.pop(0)], arguments) if isinstance(found, click.Group) else (found, arguments)


def unparsed(line: str) -> list[str]:
    """The words of a line that are neither an option nor its value; refused options end the test."""
    found, arguments = command_of(line)
    return found.make_context(str(found.name), arguments).args


@pytest.mark.parametrize(
    ("page", "line"),
    [
        (page, line)
        for page, text in TEXT.items()
        for line in command_lines(text)
        if "…" not in line or page in ("README.md", "docs/sharing.md")
    ],
)
def test_commands_parse(page: str, line: str) -> None:
    assert not unparsed(line)


@pytest.mark.parametrize(
    "line", [text for text in re.findall(r"`(logit-cache [^`\n…]+)`", SHARING) if len(text.split()) > 2]
)
def test_commands_named_in_the_text_of_sharing_parse(line: str) -> None:
    found, arguments = command_of(line)
    if len(arguments) == 1 and arguments[0].startswith("--"):  # an option that is only named
        assert arguments[0] in {option for item in found.params for option in item.opts}
    else:
        assert not unparsed(line)


def test_the_readme_shows_the_whole_pipeline_and_every_command() -> None:
    shown = {" ".join(line.split()[: 1 + line.startswith("logit-cache")]) for line in command_lines(README)}
    assert shown >= {"logit-cache tokenize", "logit-cache inspect", "train-teacher", "cache-logits", "train-student"}
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        made = set(re.findall(r"^make ([a-z0-9-]+)", "\n".join(blocks(TEXT[page], "console")), flags=re.MULTILINE))
        assert made
        assert made <= targets
    group = COMMANDS["logit-cache"]
    assert isinstance(group, click.Group)
    for name in [*COMMANDS.keys() - {"logit-cache"}, *(f"logit-cache {name}" for name in group.commands)]:
        assert f"`{name}`" in README


@pytest.mark.parametrize("how", ["run", pytest.param("installed", marks=pytest.mark.slow)])
def test_the_pipeline_of_the_readme_runs(how: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Every command of it in order, as printed but for sizes: a vocabulary of 400 ids, two steps of training."""
    do: Run = request.getfixturevalue(how)
    for part, name in (("train", "textwrap.py"), ("valid", "bisect.py")):
        (tmp_path / "corpus" / part).mkdir(parents=True)
        shutil.copy(LIBRARY / name, tmp_path / "corpus" / part / "library.txt")
    lines = [line for line in command_lines(README) if shlex.split(line, comments=True)[-1] != "--help"]
    assert len(lines) >= 10
    for line in lines:
        name, *arguments = shlex.split(line.replace(" 16000 ", " 400 "), comments=True)
        small = ["--set", "max_steps=2"] if name in ("train-teacher", "train-student") else []
        done = do(name, *arguments, *small, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "run" / "student" / "config.json").exists()


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in ("README.md", "docs/format.md") for number in range(len(blocks(TEXT[page], "python")))],
)
def test_python_of_the_pages_runs(page: str, number: int) -> None:
    golden = str(ROOT / "tests" / "golden" / "v1")
    code = blocks(TEXT[page], "python")[number]
    code = code.replace("run/train", golden).replace("llama", "codes").replace("1000", "44")
    names: dict[str, object] = {}
    exec(compile(code, page, "exec"), names)
    assert {"targets", "logprobs"} & set(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\(([a-z-]+\.md)\)", TEXT["docs/README.md"]))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_page_of_the_format_is_the_specification() -> None:
    """`make docs` writes it."""
    assert TEXT["docs/format.md"] == format_page.page(storage.format.__doc__ or "")


def test_sharing_shows_every_way() -> None:
    lines = command_lines(SHARING) + re.findall(r"`(logit-cache [^`\n]+)`", SHARING)
    assert {line.split()[1] for line in lines} >= {"push", "pull", "verify", "audit", "doctor"}
    options = set(re.findall(r"--[a-z-]+", " ".join(lines)))
    assert options >= {"--teacher", "--without-tokens", "--corpus", "--sign", "--verify-key", "--deep", "--license"}
    (rule,) = (json.loads(block)["Rules"][0] for block in blocks(SHARING, "json"))
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}


@pytest.mark.parametrize(("page", "number"), [("docs/README.md", 5), ("docs/sharing.md", 4)])
def test_environment_variables_are_read_somewhere(page: str, number: int) -> None:
    named = set(re.findall(r"LOGIT_CACHE_[A-Z_]+", TEXT[page]))
    assert len(named) == number
    assert all(f'"{variable}"' in SOURCES for variable in named)
