"""Cleaning: each family's rules, the same bytes whatever the pieces, and the command with its refusals."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.commands import ROOT, Run, refused

from logit_cache.corpus import cleaning as cleaned_files
from logit_cache.corpus import cleaning_rules as cleaning
from logit_cache.corpus.cleaning import RECORD, Cleaning, CleaningJob
from logit_cache.corpus.cleaning import clean as clean_files
from logit_cache.corpus.cleaning_rules import FAMILIES, Cleaner, clean_text, family_of
from storage.errors import IdentityMismatch, InputError
from storage.progress import progress

PAGE = (ROOT / "docs" / "cleaning.md").read_text(encoding="utf-8")


# --- the rules -------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_are_real() -> None:
    shown = set()
    for heading, body in re.findall(r"^### (.*?)\n(.*?)(?=^##)", PAGE, flags=re.MULTILINE | re.DOTALL):
        blocks = re.findall(r"^```(before|after)\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)
        assert [name for name, _ in blocks] == ["before", "after"], heading
        for family in heading.split(", "):
            assert clean_text(blocks[0][1], family) == blocks[1][1], family
            shown.add(family)
    assert shown == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        # Every family: line ends and byte-order marks.
        ("gutenberg", "\ufeffCHAPTER I\r\n\r\nIt was\rdark  .", "CHAPTER I\n\nIt was\ndark  .\n"),
        ("switchboard", "A:  Uh,  how about you ?\n\n", "A:  Uh,  how about you ?\n\n"),
        ("children_stories", "", ""),
        ("childes", "what's\u00a0that \t? . .\n ! x", "what's that?..\n! x\n"),
        ("childes", "*MOT:\tlook :  a 's\n", "*MOT: look : a 's\n"),
        ("bnc_spoken", "Yes .\n \t\n\n\nNo .", "Yes.\nNo.\n"),
        ("cbt", "He ’d 've gone , WO N'T you ?", "He’d've gone, WON'T you?\n"),
        ("cbt", "and cried 'Stop ! 'said 'sure", "and cried 'Stop! 'said 'sure\n"),
        ("open_subtitles", "SUBTITLED BY X\nI read the subtitles.\nOh.\nsubtitle", "Oh.\n"),
        ("open_subtitles", "Sub title\n\nsub\ntitle\n", "Sub title\n\nsub\ntitle\n"),
        ("simple_wiki", "\n\nOne.\n\n\nTwo. \n", "One.\nTwo. \n"),
        ("wikipedia", "= = = A = B = = =\nx\u2028 y\n= = Two = =\n", "A = B\nx\ny\n= = Two = =\n"),
        ("wikipedia", "= = = = = = = =\n= = =  = = =\n", "= = = = = = = =\n= = =  = = =\n"),
        ("qed", "  IT lS AN OLD IDEA. l THINK SO! ", "It is an old idea. I think so!\n"),
        ("qed", "...\n(laughs)\n\n(a) BC (D", "...\n(laughs)\n\n(A) bc (d\n"),
        ("qed", "Al.\nThe USA is big.\nOK\nTED", "Al.\nThe USA is big.\nOk\nTed\n"),
        ("qed", "ABOUT 3.5 MILLlON. YELLED ALl, yelled", "About 3.5 million. Yelled ali, yelled\n"),
        ("qed", "ABCD efgh", "ABCD efgh\n"),
        ("qed", "ABCDE fgh", "Abcde fgh\n"),
        ("qed", "(MANY CAPITALS HERE) and none there", "(MANY CAPITALS HERE) and none there\n"),
        ("plain", "\n\n\ta\tb \n \n\n\nc\n\n", "\ta b\n\nc\n"),
    ],
)
def test_lines_are_cleaned(family: str, before: str, after: str) -> None:
    assert clean_text(before, family) == after


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("aochildes.train", "aochildes"),
        ("childes.dev", "childes"),
        ("simple_wikipedia.train", "simple_wikipedia"),
        ("simple_wiki.dev", "simple_wiki"),
        ("Wikipedia.txt", "wikipedia"),
        ("gutenberg_children.txt", "gutenberg"),
        ("plain_qed.txt", "qed"),
        ("wikitext.txt", "plain"),
    ],
)
def test_the_longest_family_name_counts(name: str, family: str) -> None:
    assert family_of(name) == family


# --- pieces and repetition -------------------------------------------------------------------------------------------

SNIPPETS = [
    *"\n\n\n\r \t\u00a0\ufeff\u2028\x0c.!?,;'’`\"()=lIiAanßŉİΣ1_-",
    "\r\n", "= = = ", " = = =", "n't", " 's", " 'd", "subtitle", "Subtitles by", "HELLO", "WORLD", "word", "...  ",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.characters(codec="utf-8")), max_size=40).map("".join)
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def in_pieces(text: str, family: str, sizes: list[int]) -> str:
    cleaner, out, start = Cleaner(family), "", 0
    for size in sizes:
        out += cleaner.feed(text[start : start + size])
        start += size
    out += cleaner.feed(text[start:]) + cleaner.close()
    assert cleaner.lines_out == out.count("\n")
    return out


@EVERY_FAMILY
@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 5), max_size=60))
@example("a\r\n\n\nb\r", [2, 1, 1, 1, 1])
def test_pieces_do_not_show(family: str, text: str, sizes: list[int]) -> None:
    assert in_pieces(text, family, sizes) == clean_text(text, family)


@EVERY_FAMILY
@settings(max_examples=100, deadline=None)
@given(TEXTS)
@example("L. L. LL")
@example("= = = \t= = = X = = =\t = = =")
@example("he 'd 've n't")
def test_cleaning_twice_is_cleaning_once(family: str, text: str) -> None:
    once = clean_text(text, family)
    assert clean_text(once, family) == once
    assert not once or once.endswith("\n")


@EVERY_FAMILY
def test_a_hostile_line_takes_no_longer_than_another(family: str) -> None:
    """Rules that search a line from each of its characters would take minutes for these, not tenths of a second."""
    began = time.process_time()
    for unit in ("(", " ", ".", "= = = ", "X", "'", "\u00a0x", "= = = \t"):
        clean_text(unit * (200_000 // len(unit)), family)
        assert time.process_time() - began < 20


def test_a_line_without_end_is_refused_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "MOST_LINE_CHARACTERS", 10)
    for sizes in ([], [1] * 30, [7, 7]):
        assert in_pieces("a\n0123456789\nb\n", "plain", sizes) == "a\n0123456789\nb\n"
        with pytest.raises(InputError, match="line 2 has more than 10 characters"):
            in_pieces("a\n0123456789x\nb\n", "plain", sizes)


# --- files -----------------------------------------------------------------------------------------------------------


def job(tmp_path: Path, *text: Path | str, **fields: object) -> CleaningJob:
    return CleaningJob.model_validate({"text": tuple(map(str, text)), "out": str(tmp_path / "out"), **fields})


def clean(tmp_path: Path, *text: Path | str, **fields: object) -> list[cleaned_files.Outcome]:
    return clean_files(job(tmp_path, *text, **fields), progress)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "childes.train").write_text("more  juice ?\nyes .\n", encoding="utf-8")
    (folder / "open_subtitles.train").write_bytes(b"Hi.\r\nSubtitles by X\r\nBye.")
    (folder / "notes.txt").write_text("one  \n\n\n two\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 18])
def test_files_do_not_depend_on_the_pieces_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(cleaned_files, "PIECE_BYTES", piece)
    source = tmp_path / "qed.txt"
    source.write_bytes("\ufeffGRÜSSE ,  l SAY\r\n\r\n(日本語 😀)\u2028ok\rEND".encode())
    [outcome] = clean(tmp_path, source)
    assert (tmp_path / "out" / "qed.txt").read_text(encoding="utf-8") == "Grüsse ,  I say\n\n(日本語 😀)\nok\nEnd\n"
    assert (outcome.entry.lines_in, outcome.entry.lines_out, outcome.entry.cut) == (4, 5, False)


@pytest.mark.parametrize("family", ["plain", "qed", "cbt", "wikipedia"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(cleaned_files, "PIECE_BYTES", 1 << 15)
    source = tmp_path / "big.txt"
    source.write_bytes(b"It 's a line  of TEXT , and is n't it (all) the same ? \n\n" * 30_000)
    tracemalloc.start()
    clean(tmp_path, source, family=(f"{family}=*",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.stat().st_size > 1.6e6
    assert peak < 8e5


@pytest.mark.parametrize("piece", [1, 3, 1 << 18])
@pytest.mark.parametrize(
    ("limit", "taken"), [(1, 4), (4, 4), (8, 4), (9, 9), (10, 9), (13, 9), (14, 14), (15, 14), (99, 14)]
)
def test_a_limit_cuts_at_a_line_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, limit: int, taken: int
) -> None:
    monkeypatch.setattr(cleaned_files, "PIECE_BYTES", piece)
    text = b"one\n2345\n6789\n"
    (tmp_path / "gutenberg.txt").write_bytes(text)
    [outcome] = clean(tmp_path, tmp_path / "gutenberg.txt", limit_bytes=limit)
    assert (tmp_path / "out" / "gutenberg.txt").read_bytes() == text[:taken]
    assert (outcome.entry.bytes_in, outcome.entry.cut) == (taken, taken < len(text))
    assert outcome.entry.sha256_in == hashlib.sha256(text[:taken]).hexdigest()
    # A line is taken whole, and with it every character.
    (tmp_path / "a.txt").write_text("äöü", encoding="utf-8")
    [outcome] = clean(tmp_path, tmp_path / "a.txt", limit_bytes=1)
    assert (outcome.entry.bytes_in, outcome.entry.cut) == (6, False)


def test_the_record_lists_inputs_and_outputs(tmp_path: Path, corpus: Path) -> None:
    clean(tmp_path, corpus)
    record = Cleaning.model_validate_json((tmp_path / "out" / RECORD).read_bytes())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "childes.train", RECORD, "notes.txt", "open_subtitles.train",
    ]  # fmt: skip
    for name, entry in record.files.items():
        source, out = (corpus / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        assert (entry.bytes_in, entry.sha256_in) == (len(source), hashlib.sha256(source).hexdigest())
        assert (entry.bytes_out, entry.sha256_out) == (len(out), hashlib.sha256(out).hexdigest())
        assert entry.lines_out == out.count(b"\n")
    entry = record.files["open_subtitles.train"]
    assert (entry.family, entry.lines_in, entry.lines_out) == ("open_subtitles", 3, 2)
    assert {name: entry.family for name, entry in record.files.items()}["notes.txt"] == "plain"


def test_finished_files_are_left_alone(tmp_path: Path, corpus: Path) -> None:
    clean(tmp_path, corpus / "*.train")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != RECORD}
    outcomes = clean(tmp_path, corpus)
    assert {outcome.name for outcome in outcomes if not outcome.already_there} == {"notes.txt"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(Cleaning.model_validate_json((tmp_path / "out" / RECORD).read_bytes()).files) == 3


def other_input(corpus: Path, out: Path) -> dict[str, object]:
    (corpus / "notes.txt").write_text("one  \n\n\n ten\n", encoding="utf-8")
    return {}


def other_output(corpus: Path, out: Path) -> dict[str, object]:
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    return {}


def other_rules(corpus: Path, out: Path) -> dict[str, object]:
    record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    record["files"]["notes.txt"]["rules"] = 0
    (out / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return {}


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (other_input, "sha256_in"),
        (other_output, "sha256_out"),
        (other_rules, "rules was 0, is 1"),
        (lambda *_: {"family": ("qed=notes*",)}, "family was plain, is qed"),
        (lambda *_: {"limit_bytes": 7}, "bytes_in was 13, is 7"),
    ],
)
def test_another_file_of_that_name_is_refused(
    tmp_path: Path, corpus: Path, change: Callable[[Path, Path], dict[str, object]], differs: str
) -> None:
    out = tmp_path / "out"
    clean(tmp_path, corpus / "notes.txt")
    fields = change(corpus, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(IdentityMismatch, match=differs) as caught:
        clean(tmp_path, corpus, **fields)
    assert differs.split()[0] in caught.value.fields[0] or len(caught.value.fields) > 1
    assert {path: path.read_bytes() for path in out.iterdir()} == before, "nothing is written before the refusal"
    (out / "notes.txt").unlink()
    assert not any(outcome.already_there for outcome in clean(tmp_path, corpus, **fields))


def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(InputError, match=f"that {RECORD} does not list"):
        clean(tmp_path, corpus, out=str(corpus))
    assert (corpus / "notes.txt").read_text(encoding="utf-8") == "one  \n\n\n two\n"
    assert not (corpus / RECORD).exists()


def test_a_killed_run_resumes(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the record and the rename, and with a partial file left behind."""
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "notes.txt":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        clean(tmp_path, corpus)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "notes.txt").exists()
    (tmp_path / "out" / "notes.txt.partial").write_text(
        "left over by kill -9, and longer than the file", encoding="utf-8"
    )
    done = {outcome.name: outcome.already_there for outcome in clean(tmp_path, corpus)}
    assert done == {"childes.train": True, "notes.txt": False, "open_subtitles.train": False}
    assert (tmp_path / "out" / "notes.txt").read_text(encoding="utf-8") == "one\n\n two\n"
    assert not list((tmp_path / "out").glob("*.partial"))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, corpus: Path, run: Run) -> None:
    (corpus / "empty.txt").write_text("  \n\n", encoding="utf-8")
    arguments = ("logit-cache", "clean", "--text", f"{corpus}/*", "--out", tmp_path / "out", "--family", "qed=not*")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "childes.train         childes (name): 20 → 17 bytes, 2 → 2 lines\n" in done.stdout
    assert "notes.txt             qed (--family): 13 → 10 bytes" in done.stdout
    assert "empty.txt             plain (no family in the name): 4 → 0 bytes, 2 → 0 lines\n" in done.stdout
    assert f"warning: {corpus}/empty.txt: nothing is left" in done.stderr
    assert "clean: " in done.stderr, "progress"
    assert (tmp_path / "out" / "childes.train").read_text(encoding="utf-8") == "more juice?\nyes.\n"
    again = run(*arguments, "--json")
    found = json.loads(again.stdout)
    assert [item["already_there"] for item in found["files"]] == [True] * 4
    assert found["files"][0]["entry"]["bytes_out"] == 17


def test_refusals_of_the_command(tmp_path: Path, corpus: Path, run: Run) -> None:
    out = tmp_path / "out"

    def clean(*arguments: object, text: object = f"{corpus}/*.train") -> object:
        return run("logit-cache", "clean", "--text", text, "--out", out, *arguments)

    refused(clean(text=f"{corpus}/*.none"), f"{corpus}/*.none: the pattern matches no file")
    (tmp_path / "childes.train").write_text("x", encoding="utf-8")
    refused(clean("--text", tmp_path / "childes.train"), "would both become childes.train", str(corpus))
    refused(clean("--family", "childs=*"), "--family childs=*", "one of aochildes")
    refused(clean("--family", "qed=*.dev"), "--family qed=*.dev", "matches none")
    refused(clean("--family", "qed=*", "--family", "cbt=child*"), "childes.train cannot be both qed and cbt")
    refused(clean("--text", "hub:babylm"), "hub:babylm: expected a plain text file")
    refused(clean(text=f"name={corpus}/*.train"), "files are cleaned under their own names")
    refused(run("logit-cache", "clean", "--out", out), "--text is missing")
    refused(run("logit-cache", "clean", "--text", corpus, "--out", "s3://bucket/x"), "a folder of this machine")
    refused(run("logit-cache", "clean", "--text", corpus, "--out", corpus / "notes.txt"), "a folder was expected")
    for name in ("rows.jsonl", "a.txt.gz", "a.txt.partial"):
        (tmp_path / name).write_text("", encoding="utf-8")
        refused(clean(text=tmp_path / name), name)
    assert not out.exists()
    (corpus / "qed.train").write_bytes(b"caf\xc3\xa9\nna\xefve\n")
    refused(clean(), f"{corpus}/qed.train: byte 8 is not valid UTF-8")
    assert sorted(path.name for path in out.iterdir()) == ["childes.train", RECORD, "open_subtitles.train"]
    (out / RECORD).write_text('{"kind": "training report"}', encoding="utf-8")
    refused(clean(), f"{out}/{RECORD}: not the record of a cleaning")
