"""The documents are true: commands parse, Python runs, links lead somewhere, the README's pipeline runs as printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from support.caches.streams import CHATML, chat_tokenizer, write_rows
from support.commands import COMMANDS, LIBRARY, ROOT, Run
from support.programs import format_page
from support.servers.s3 import Bucket
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import storage.format

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README, SHARING = TEXT["README.md"], TEXT["docs/sharing.md"]
# Its commands take files of others; tests/logit_cache/importing has the tests.
(ELSEWHERE,) = re.findall(r"^## Targets from elsewhere\n.*?(?=^## )", SHARING, flags=re.MULTILINE | re.DOTALL)
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


def walk_the_readme(do: Run, folder: Path) -> None:
    """Every command of it in order, as printed but for sizes: a vocabulary of 400 ids, two steps of training."""
    for part, name in (("train", "textwrap.py"), ("valid", "bisect.py")):
        (folder / "corpus" / part).mkdir(parents=True)
        shutil.copy(LIBRARY / name, folder / "corpus" / part / "library.txt")
    for line in command_lines(README):
        name, *arguments = shlex.split(line.replace(" 16000 ", " 400 "), comments=True)
        small = ["--set", "max_steps=2"] if name in ("train-teacher", "train-student") else []
        done = do(name, *arguments, *small, cwd=folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.fixture(scope="module")
def pipeline(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of the README were run."""
    folder = tmp_path_factory.mktemp("pipeline")
    walk_the_readme(run, folder)
    return folder


def test_the_readme_goes_from_text_to_a_report(pipeline: Path) -> None:
    assert (pipeline / "run" / "student" / "config.json").exists()
    assert json.loads((pipeline / "run" / "scores.json").read_text(encoding="utf-8"))["held_out"]
    assert "llama" in (pipeline / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_pipeline_of_the_readme_runs_as_installed(installed: Run, tmp_path: Path) -> None:
    walk_the_readme(installed, tmp_path)


@pytest.mark.slow
def test_two_laboratories_share_a_cache_as_the_page_says(
    pipeline: Path, run: Run, moto_bucket: Bucket, tmp_path: Path
) -> None:
    """Its commands in order, as printed but for the bucket: one side pushes and audits, the other has no cache yet."""
    pytest.importorskip("model_signing")
    ours, theirs = shutil.copytree(pipeline, tmp_path / "ours"), tmp_path / "theirs"
    (theirs / "corpus").mkdir(parents=True)
    shutil.copy(LIBRARY / "textwrap.py", theirs / "corpus" / "library.txt")
    theirs_to_do, walked = {"pull", "tokenize", "verify"}, set()
    for block in blocks(SHARING.replace(ELSEWHERE, ""), "console"):
        if " pull " in block:
            shutil.rmtree(theirs / "run", ignore_errors=True)
        for line in block.replace("\\\n", " ").replace("s3://our-bucket", moto_bucket.url).splitlines():
            name, *arguments = shlex.split(line, comments=True)
            if name == "openssl":
                subprocess.run([name, *arguments], cwd=ours, check=True, capture_output=True)
                if arguments[-1] == "PUB.pem":
                    shutil.copy(ours / "PUB.pem", theirs)
            elif name == "logit-cache" and "hf://" not in line:  # the hub has tests of its own
                done = run(name, *arguments, cwd=theirs if arguments[0] in theirs_to_do else ours)
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                walked.add(arguments[0])
    assert walked >= theirs_to_do | {"push", "audit", "list", "rename", "remove"}


@pytest.mark.parametrize(
    ("page", "number"),
    [
        (page, number)
        for page in ("README.md", "docs/format.md", "docs/losses.md", "docs/sharing.md")
        for number in range(len(blocks(TEXT[page], "python")))
    ],
)
def test_python_of_the_pages_runs(page: str, number: int, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, where the README's commands have been run; `model` is the student that they trained."""
    monkeypatch.chdir(pipeline)
    names: dict[str, Any] = {"model": AutoModelForCausalLM.from_pretrained("run/student")}
    exec(compile(blocks(TEXT[page], "python")[number], page, "exec"), names)
    if page == "docs/losses.md":
        assert int(names["output"].parts[0, 0]) == 256
        assert all(parameter.grad is not None for parameter in names["model"].parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_chats_become_an_adapter_as_the_page_says(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worked example as printed, on two tiny models that share a tokenizer."""
    pytest.importorskip("peft")
    section = TEXT["docs/conversations.md"].split("## From chats to an adapter")[1].split("\n## ")[0]
    tokenizer = chat_tokenizer(CHATML)
    for number, name in enumerate(("teacher-chat", "small-chat")):
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32 >> number, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=256,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / "models" / name)
        tokenizer.save_pretrained(tmp_path / "models" / name)
    for name, count in (("chats", 120), ("held", 12)):
        write_rows(tmp_path / f"{name}.jsonl", *(
            {"messages": [{"role": "user", "content": f"Is {i} even?"},
                          {"role": "assistant", "content": f"No, {i} is odd." if i % 2 else "Yes. " * (1 + i % 7)}]}
            for i in range(count)
        ))  # fmt: skip
    said = []
    for line in command_lines(section):
        done = run(*shlex.split(line), cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said.append(done.stdout + done.stderr)
    assert "each of 120 documents is read by itself, in a context of 59 tokens" in caplog.text
    assert "of what its teacher read is padding" in said[2]
    assert json.loads(done.stdout)["held_out"]["kl"]["chat"]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(section, "python")[0], "docs/conversations.md", "exec"), {})
    assert "Rome?" in capsys.readouterr().out


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
