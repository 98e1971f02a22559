"""Plain Parquet, and what holds of every import: alignment, sums, ids, segments of shards, resume, destinations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.imported import (
    K,
    Known,
    V,
    columns,
    imported,
    imports,
    known,
    same_targets,
    tokenizer_folder,
    whole,
    write,
)
from support.caches.small import make_corpus
from support.commands import in_process, refused, succeeded

from logit_cache.importing.files import source_files
from logit_cache.importing.survey import Survey
from logit_cache.sharing.card import card_text
from storage import LogitCache
from storage.cache.writer import EntryWriter, ShardWriter


@pytest.fixture(scope="module")
def data() -> Known:
    return known()


def test_values_tails_and_segment_ends(data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", columns(data))
    entry = imported(tmp_path, path, "parquet", "--encoding", "float32", "--shard-tokens", 16, "--chunk-tokens", 8)
    same_targets(entry, data)
    record = entry.entry
    assert (record.made, record.targets.positions, record.targets.tail) == ("imported", "some", "exact")
    assert record.windowing.isolate_documents
    assert record.windowing.context_tokens == max(map(len, data.tokens))
    found = record.imported_from
    assert found is not None
    assert (found.values, found.alignment.reading, found.alignment.given) == ("logprobs", "after", False)
    assert found.alignment.rows == sum(len(tokens) - 2 for tokens in data.tokens)
    assert found.alignment.after_nats > found.alignment.of_nats + 1


def test_codes_are_within_the_stated_error(data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", columns(data))
    same_targets(imported(tmp_path, path, "parquet"), data, atol=1.5 / 32)


def test_a_smaller_k_gives_its_mass_to_the_tail(data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", columns(data))
    same_targets(imported(tmp_path, path, "parquet", "-k", 3, "--encoding", "float32"), data, k=3)


@pytest.mark.parametrize("kind", ["logits", "closed", "centred"])
def test_numbers_without_a_normaliser_have_an_unknown_tail(kind: str, data: Known, tmp_path: Path) -> None:
    found = columns(data)
    for number, rows in enumerate(found["logprobs"]):
        values = np.array(rows)
        if kind == "logits":
            values = values + 7.5
        elif kind == "closed":
            values = values - np.logaddexp.reduce(values, axis=1)[:, None]
        else:
            values = values - data.logprobs[number][:-1].mean(axis=1)[:, None]
        found["logprobs"][number] = values.tolist()
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    same_targets(entry, data, renormalised=True)
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.values == "unnormalised"
    shown = succeeded(in_process("logit-cache", "inspect", tmp_path / "cache")).stdout
    assert "mass outside them not known" in shown
    assert "numbers without a normaliser" in shown


def test_probabilities_are_found(data: Known, tmp_path: Path) -> None:
    found = columns(data)
    found["exp_logits"] = [np.exp(np.array(rows)).tolist() for rows in found.pop("logprobs")]
    found["index"] = found.pop("token_ids")
    for ids, values in zip(found["index"], found["exp_logits"], strict=True):
        for row, numbers in zip(ids, values, strict=True):
            row += [V + 1, 0 if 0 not in row else 2 if 2 not in row else 3]
            numbers += [1e-9, 0.0]  # a column of a padded head, and an id without any probability
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    same_targets(entry, data)
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.values == "probabilities"


def test_values_that_contradict_what_is_said_are_refused(data: Known, tmp_path: Path) -> None:
    found = columns(data)
    found["logprobs"] = [(np.array(rows) + 7.5).tolist() for rows in found["logprobs"]]
    path = write(tmp_path / "d.parquet", found)
    refused(imports(tmp_path, path, "parquet", "--values", "logprobs"), "more than 1", "--values logits")
    refused(imports(tmp_path, path, "parquet", "--values", "probabilities"), "add up to more than 1")


def test_rows_of_their_own_token_are_found_and_moved(data: Known, tmp_path: Path) -> None:
    """Row i about token i: one row more at the front, about a token without context."""
    found = columns(data)
    for number in range(len(data.tokens)):
        found["token_ids"][number].insert(0, list(range(K)))
        found["logprobs"][number].insert(0, [-np.log(V)] * K)
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    same_targets(entry, data)
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.alignment.reading == "of"


def test_unclear_alignment_is_refused_with_the_numbers(data: Known, tmp_path: Path) -> None:
    """Rows about the token after the next one are neither; said to be one, they are taken as that."""
    found = columns(data)
    for name in ("token_ids", "logprobs"):
        found[name] = [rows[1:] for rows in found[name]]
    path = write(tmp_path / "d.parquet", found)
    done = imports(tmp_path, path, "parquet")
    refused(done, "not clear which token", "mean log-prob", "--alignment after")
    assert not (tmp_path / "cache").exists()
    entry = imported(tmp_path, path, "parquet", "--alignment", "after")
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.alignment.given
    right = write(tmp_path / "right.parquet", columns(data))
    refused(imports(tmp_path, right, "parquet", "--alignment", "of", out="other"), "--alignment says", "that follows")


def test_ids_outside_the_vocabulary(data: Known, tmp_path: Path) -> None:
    """Columns of a padded head are left out, with what they had; more than a trace of mass is another vocabulary."""
    found = columns(data)
    for ids, values in zip(found["token_ids"], found["logprobs"], strict=True):
        for row, numbers in zip(ids, values, strict=True):
            row.append(V + 3)
            numbers.append(-15.0)
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    same_targets(entry, data)
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.dropped_ids == sum(len(tokens) - 1 for tokens in data.tokens)
    assert 0 < entry.entry.imported_from.dropped_mass < 1e-5
    found["token_ids"][1][4][0] = V + 1
    path = write(tmp_path / "wrong.parquet", found)
    refused(imports(tmp_path, path, "parquet", out="other"), "row 1: in row 4", "outside the vocabulary")


def test_garbage_ids_without_a_finite_log_prob_are_left_out(data: Known, tmp_path: Path) -> None:
    found = columns(data)
    found["token_ids"][0][5] += [4_000_000_000, found["token_ids"][0][5][0]]
    found["logprobs"][0][5] += [-np.inf, float("nan")]
    found["token_ids"][2][3], found["logprobs"][2][3] = [1, 2], [-np.inf, -np.inf]
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    rows = [list(range(len(tokens) - 1)) for tokens in data.tokens]
    rows[2].remove(3)
    same_targets(entry, data, rows)  # type: ignore[arg-type]
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.dropped_ids == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": 5}, ("the id", "twice")),
        ({"input_ids": V}, (f"it holds the token {V}", "--tokenizer")),
        ({"logprobs": np.inf}, ("infinite number",)),
        ({"token_ids": 1.5}, ("whole numbers as ids",)),
    ],
)
def test_rows_without_sense_are_refused(
    change: dict[str, Any], words: tuple[str, ...], data: Known, tmp_path: Path
) -> None:
    found = columns(data)
    ((name, value),) = change.items()
    if name == "token_ids":
        kind = type(value)
        found[name] = [[[kind(i) for i in row] for row in rows] for rows in found[name]]
        found[name][1][7][:2] = [value, value]
    elif name == "input_ids":
        found[name][1][7] = value
    else:
        found[name][1][7][0] = value
    path = write(tmp_path / "d.parquet", found)
    refused(imports(tmp_path, path, "parquet"), "d.parquet row 1", *words)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("column", ["input_ids", "token_ids", "logprobs", "loss_mask"])
@pytest.mark.parametrize("value", ["text", [["text"]], [[[1]]], 5])
def test_columns_of_another_type_are_refused(column: str, value: Any, data: Known, tmp_path: Path) -> None:
    found = columns(data)
    path = write(tmp_path / "d.parquet", found | {column: [value] * len(data.tokens)})
    refused(imports(tmp_path, path, "parquet"), "d.parquet")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", ["another number", "a document less", "a document more", "a token more"])
def test_a_file_that_changes_between_the_passes_leaves_no_complete_entry(
    change: str, data: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, path = columns(data), tmp_path / "d.parquet"
    write(path, found)
    decided = Survey.decided

    def then_changed(self: Survey) -> Any:
        surveyed = decided(self)
        if change == "another number":
            found["logprobs"][0][3][7] -= 0.5
        elif change == "a token more":
            found["input_ids"][2].append(5)
        else:
            for name, rows in found.items():
                found[name] = rows[:-1] if change == "a document less" else [*rows, rows[0]]
        write(path, found)
        return surveyed

    monkeypatch.setattr(Survey, "decided", then_changed)
    refused(imports(tmp_path, path, "parquet"), "d.parquet", "changed while it was imported")
    assert LogitCache.open(tmp_path / "cache").teacher("t").missing()


def test_files_of_several_folders_are_in_one_order(tmp_path: Path) -> None:
    names = ["b/1.parquet", "a/10.parquet", "a/2.parquet", "c/1.parquet"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = source_files(f"{tmp_path}/*/*.parquet", (".parquet",))
    assert [str(path.relative_to(tmp_path)) for path in found] == [names[2], names[1], names[0], names[3]]


def test_padding_masks_and_double_bos(data: Known, tmp_path: Path) -> None:
    """Padding is cut; the loss mask says which tokens are trained on; BOS twice is kept and counted."""
    found = columns(data)
    trained = [np.arange(len(tokens)) % 3 == 0 for tokens in data.tokens]
    found["loss_mask"] = [[*mask.tolist(), False, False] for mask in trained]
    found["attention_mask"] = [[1] * len(tokens) + [0, 0] for tokens in data.tokens]
    found["input_ids"] = [[*tokens.tolist(), 0, 0] for tokens in data.tokens]
    found["input_ids"][3][:2] = [1, 1]
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    data = Known([*data.tokens[:3], np.array(found["input_ids"][3][:-2])], data.logprobs)
    same_targets(entry, data)
    mask = LogitCache.open(tmp_path / "cache").loss_mask
    assert mask is not None
    expected = np.concatenate([np.append(one[1:], False) for one in trained])
    np.testing.assert_array_equal(mask.read(0, len(mask)), expected)
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.decisions == ("1 documents begin with BOS twice, as their teacher read them",)


def test_a_killed_import_resumes_and_a_changed_file_is_refused(
    data: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.parquet", columns(data))
    options = ("--shard-tokens", 16, "--chunk-tokens", 8)
    once = whole(imported(tmp_path, path, "parquet", *options, out="once"))
    commit, count = EntryWriter.commit, 0

    def killed(self: EntryWriter, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return commit(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(EntryWriter, "commit", killed)
        assert imports(tmp_path, path, "parquet", *options).returncode == 1
    assert len(LogitCache.open(tmp_path / "cache").teacher("t").missing()) == 1
    shutil.copy(path, tmp_path / "kept.parquet")
    found = columns(data)
    found["logprobs"][0][0][0] -= 0.01
    write(path, found)
    refused(imports(tmp_path, path, "parquet", *options), "sha256", "another --name")
    shutil.copy(tmp_path / "kept.parquet", path)
    entry = imported(tmp_path, path, "parquet", *options)
    for name, values in whole(entry).arrays().items():
        np.testing.assert_array_equal(values, once.arrays()[name])


def test_an_import_that_was_killed_while_it_wrote_tokens_resumes(
    data: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.parquet", columns(data))

    def killed(self: ShardWriter, *arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "commit", killed)
        assert imports(tmp_path, path, "parquet").returncode == 1
    assert LogitCache.open(tmp_path / "cache").missing_tokens()
    same_targets(imported(tmp_path, path, "parquet"), data, atol=1.5 / 32)


def test_what_is_known_of_an_imported_entry_goes_with_it(data: Known, tmp_path: Path) -> None:
    """Into the card, and into an entry that is made from it."""
    path = write(tmp_path / "data.parquet", columns(data))
    entry = imported(tmp_path, path, "parquet", "--teacher", "their-70b")
    card = card_text(LogitCache.open(tmp_path / "cache"))
    for words in ("`their-70b`, which was not loaded here", "from somebody else's file", "rows are about the token"):
        assert words in card
    cache = tmp_path / "cache"
    succeeded(in_process("logit-cache", "recompress", cache, "--name", "t", "--to", "small", "-k", 3))
    small = LogitCache.open(cache).teacher("small").entry
    assert (small.made, small.imported_from) == ("recompressed", entry.entry.imported_from)


def test_documents_without_any_target_are_part_of_the_text(data: Known, tmp_path: Path) -> None:
    found = columns(data)
    found["token_ids"][2] = found["logprobs"][2] = [[] for _ in data.tokens[2]]
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    rows = [range(len(tokens) - 1) for tokens in data.tokens]
    same_targets(entry, data, [*rows[:2], range(0), rows[3]])


def test_an_entry_is_added_to_a_cache_of_the_same_tokens(data: Known, tmp_path: Path) -> None:
    """Its loss mask may be its own; other tokens are refused, and nothing is written."""
    path = write(tmp_path / "data.parquet", columns(data))
    tokens, starts = np.concatenate(data.tokens).astype(np.uint16), data.starts.astype(np.uint64)
    make_corpus(str(tmp_path / "cache"), tokens, V, starts, loss_mask=tokens % 2 == 0)
    done = in_process(
        "logit-cache", "import", path, "--format", "parquet", "--out", tmp_path / "cache", "--name", "t",
        "--encoding", "float32",
    )  # fmt: skip
    succeeded(done)
    same_targets(LogitCache.open(tmp_path / "cache").teacher("t"), data)
    tokens[5] ^= 1
    make_corpus(str(tmp_path / "other"), tokens, V, starts)
    refused(imports(tmp_path, path, "parquet", out="other"), "stream_sha256", "a new --out")
    assert LogitCache.open(tmp_path / "other").teachers == ()
    make_corpus(str(tmp_path / "vocabulary"), tokens, V + 1, starts)
    refused(
        imports(tmp_path, path, "parquet", "--tokenizer", tokenizer_folder(tmp_path), out="vocabulary"), "tokenizer"
    )


def test_what_a_format_does_not_have_is_refused(data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", columns(data))
    refused(imports(tmp_path, path, "parquet", "--targets", "varopt"), "whole distributions")
    refused(imports(tmp_path, path, "none"), "--format none", "parquet")
    refused(in_process("logit-cache", "import", path, "--out", tmp_path / "c", "--name", "t"), "--format is missing")
    refused(
        in_process("logit-cache", "import", path, "--format", "parquet", "--out", tmp_path / "c", "--name", "t"),
        "--tokenizer",
    )
    assert not (tmp_path / "c").exists()


def test_guess_by_content(data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", columns(data))
    done = succeeded(in_process("logit-cache", "import", path, "--guess", "--json"))
    assert json.loads(done.stdout) == {"format": "parquet"}
    other = write(tmp_path / "other.parquet", {"text": ["a"]})
    refused(in_process("logit-cache", "import", other, "--guess"), "none of those", "--format")
    refused(imports(tmp_path, other, "parquet"), "expected Parquet with input_ids", "none of those")


def test_ids_that_are_not_the_most_probable_ones_are_refused(data: Known, tmp_path: Path) -> None:
    """Sampled ids have log-probs over the vocabulary too, and would be taken for the top of every row."""
    found = columns(data, k=V, rows=None)
    rng = np.random.default_rng(0)
    for number, tokens in enumerate(data.tokens):
        for row in range(len(tokens)):
            sampled = np.unique(rng.choice(V, K, p=np.exp(data.logprobs[number][row])))
            found["token_ids"][number][row] = sampled.tolist()
            found["logprobs"][number][row] = data.logprobs[number][row][sampled].tolist()
    path = write(tmp_path / "d.parquet", found)
    refused(imports(tmp_path, path, "parquet"), "leave more mass to the others", "not the most probable")
