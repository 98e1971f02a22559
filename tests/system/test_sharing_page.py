"""docs/sharing.md is true: its commands parse, its variables exist, its JSON is JSON."""

from __future__ import annotations

import json
import re
import shlex

import click
import pytest
from support.commands import COMMANDS, ROOT

PAGE = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
SOURCES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "storage").rglob("*.py"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def lines() -> list[str]:
    shown = "\n".join(blocks("console")).splitlines()
    inline = [command for command in re.findall(r"`([^`\n]+)`", PAGE) if "…" not in command]
    return [line for line in shown + inline if line.split()[:1] == ["logit-cache"] and len(line.split()) > 3]


@pytest.mark.parametrize("line", lines())
def test_commands_parse(line: str) -> None:
    name, verb, *arguments = shlex.split(line, comments=True)
    group = COMMANDS[name]
    assert isinstance(group, click.Group)
    if arguments[0].startswith("--"):
        # An option that is only named in the text.
        assert arguments[0] in {option for item in group.commands[verb].params for option in item.opts}
        return
    assert not group.commands[verb].make_context(verb, arguments).args


def test_the_page_shows_every_way_of_sharing() -> None:
    shown = {line.split()[1] for line in lines()}
    assert shown >= {"push", "pull", "verify", "audit", "doctor"}
    options = set(re.findall(r"--[a-z-]+", " ".join(lines())))
    assert options >= {"--teacher", "--without-tokens", "--corpus", "--sign", "--verify-key", "--deep", "--license"}


def test_the_variables_are_read_somewhere() -> None:
    named = set(re.findall(r"LOGIT_CACHE_[A-Z_]+", PAGE))
    assert len(named) == 4
    assert all(f'"{variable}"' in SOURCES for variable in named)


def test_the_lifecycle_rule_is_json() -> None:
    (rule,) = (json.loads(block)["Rules"][0] for block in blocks("json"))
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
