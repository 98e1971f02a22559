"""Identity of vocabularies, tokenizers and streams: digests, sizes, differences."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from pydantic import ValidationError

from storage.errors import InputError
from storage.format.identity import (
    contradicting_ids,
    differing_ids,
    few,
    stream_sha256,
    tokenizer_fingerprint,
    vocabulary_sha256,
    vocabulary_size,
)
from storage.format.manifest.entry import Encoding, Windowing
from storage.format.manifest.shared import ArrayLayout
from storage.format.manifest.teacher import Teacher

VOCABULARY = {"<pad>": 0, "über": 1, "cat": 2, "dog": 7}


def test_digest_is_of_canonical_json_sorted_by_id() -> None:
    expected = hashlib.sha256('[[0,"<pad>"],[1,"über"],[2,"cat"],[7,"dog"]]'.encode()).hexdigest()
    assert vocabulary_sha256(VOCABULARY) == expected
    assert vocabulary_sha256(dict(reversed(VOCABULARY.items()))) == expected
    assert vocabulary_sha256({**VOCABULARY, "dog": 8}) != expected
    assert vocabulary_sha256({"a": 0, "b": 0}) == vocabulary_sha256({"b": 0, "a": 0})


def test_size_is_the_largest_id_and_one() -> None:
    assert vocabulary_size(VOCABULARY) == 8
    with pytest.raises(InputError, match="no tokens"):
        vocabulary_size({})


def test_differing_ids_are_named_with_both_strings() -> None:
    theirs = {"<pad>": 0, "über": 1, "dog": 2, "more": 9}
    assert differing_ids(VOCABULARY, theirs) == {
        2: "id 2: 'cat' here, 'dog' in the model's",
        7: "id 7: 'dog' here, nothing in the model's",
        9: "id 9: nothing here, 'more' in the model's",
    }
    assert differing_ids(VOCABULARY, dict(VOCABULARY)) == {}
    assert differing_ids({"a": 0, "b": 0}, {"a": 0}) == {0: "id 0: 'a' and 'b' here, 'a' in the model's"}
    assert list(contradicting_ids(VOCABULARY, theirs, below=3)) == [2]
    assert contradicting_ids(VOCABULARY, theirs, below=2) == {}


def test_lines_beyond_the_most_are_counted() -> None:
    lines = [f"line {i}" for i in range(12)]
    assert few(lines, most=3) == ["line 0", "line 1", "line 2", "and 9 more ids"]
    assert few(lines, most=12) == lines


def _files(**changes: object) -> dict[str, bytes]:
    whole = {"model": {"merges": ["a b"]}, "normalizer": None, "padding": None, "truncation": None, **changes}
    return {"tokenizer.json": json.dumps(whole).encode(), "tokenizer_config.json": b"{}"}


def test_fingerprint_covers_behaviour_and_not_how_it_was_called() -> None:
    plain = tokenizer_fingerprint(_files(), VOCABULARY)
    assert tokenizer_fingerprint(_files(padding={"length": 8}, truncation={"max_length": 8}), VOCABULARY) == plain
    reordered = dict(reversed(json.loads(_files()["tokenizer.json"]).items()))
    assert tokenizer_fingerprint({"tokenizer.json": json.dumps(reordered, indent=4).encode()}, VOCABULARY) == plain
    assert tokenizer_fingerprint(_files(normalizer={"type": "NFKC"}), VOCABULARY) != plain
    assert tokenizer_fingerprint(_files(), {**VOCABULARY, "new": 8}) != plain


def test_fingerprint_without_tokenizer_json_covers_all_files() -> None:
    files = {"spiece.model": b"one", "tokenizer_config.json": b"{}"}
    plain = tokenizer_fingerprint(files, VOCABULARY)
    assert tokenizer_fingerprint(dict(reversed(files.items())), VOCABULARY) == plain
    assert tokenizer_fingerprint({**files, "spiece.model": b"two"}, VOCABULARY) != plain
    assert tokenizer_fingerprint(files, {**VOCABULARY, "cat": 3}) != plain


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_fingerprint_of_a_broken_file_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer_fingerprint({"tokenizer.json": content}, VOCABULARY)


def test_stream_digest_follows_its_equation() -> None:
    tokens = np.arange(2_500_011, dtype=np.uint32) % 50_021
    starts = np.array([0, 17, 1_048_577], dtype=np.uint64)
    mask = tokens % 3 == 0
    parts = b"tokens" + tokens.astype("<u4").tobytes() + b"documents" + starts.astype("<u8").tobytes()
    assert stream_sha256(tokens, starts, None) == hashlib.sha256(parts).hexdigest()
    assert stream_sha256(tokens.astype(np.uint16), starts, None) == hashlib.sha256(parts).hexdigest()
    masked = hashlib.sha256(parts + b"loss_mask" + mask.astype("u1").tobytes()).hexdigest()
    assert stream_sha256(tokens, starts, mask) == masked


def test_records_that_contradict_themselves_are_none() -> None:
    with pytest.raises(ValidationError, match="shard 10 is not a multiple of chunk 4"):
        ArrayLayout(shard=10, chunk=4, compression="zstd")
    with pytest.raises(ValidationError, match="has more than 65536 chunks of 1"):
        ArrayLayout(shard=65_537, chunk=1, compression="zstd")
    with pytest.raises(ValidationError, match="stride 3 is larger than context 2"):
        Windowing(context_tokens=2, stride_tokens=3)
    for kind, step in (("codes", None), ("float32", 0.03125)):
        with pytest.raises(ValidationError, match="step_nats goes with codes"):
            Encoding.model_validate({"kind": kind, "step_nats": step, "mantissa_bits": 12})
    member = {
        "source": "m", "architecture": "M", "weights_sha256": "0" * 64, "config_sha256": "0" * 64, "dtype": "float32",
        "head_columns": 1, "parameters": 1,
    }  # fmt: skip
    for combine, members in (("single", 2), ("mixture", 1)):
        with pytest.raises(ValidationError, match="one weight per member"):
            Teacher.model_validate({"combine": combine, "members": [member] * members, "weights": [1.0] * members})
