"""The papers' code and ours read the same: windows, steps, order and token ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.commands import ROOT
from tokenizers import Tokenizer
from tokenizers.models import BPE

from student.data.blocks import Blocks


@pytest.fixture(scope="module")
def study() -> object:
    folder = str(ROOT / "tests/benchmarks/studies")
    sys.path.insert(0, folder)
    try:
        import papers_code
    finally:
        sys.path.remove(folder)
    return papers_code


@pytest.mark.parametrize("tokens", [1_025, 2_048, 2_049, 3_000])
def test_a_trimmed_stream_has_the_same_whole_windows_and_steps_in_both(study, tokens: int) -> None:
    size = study.trimmed(tokens)
    blocks = Blocks.of(size, None, study.WINDOW, "fixed", 0)
    theirs = [(start, study.WINDOW) for start in range(0, size // study.WINDOW * study.WINDOW, study.WINDOW)]
    assert blocks.spans(range(len(blocks))) == theirs
    assert len(theirs) % study.BATCH == 0
    assert tokens - study.WINDOW * study.BATCH < size <= tokens


def test_merges_of_the_older_form_make_the_same_ids(study, tmp_path: Path) -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "abb": 3}
    new = json.loads(Tokenizer(BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "b")])).to_str())
    old = study.with_old_merges(new)
    assert old["model"]["merges"] == ["a b", "ab b"]
    assert study.with_old_merges(old) == old
    assert Tokenizer.from_str(json.dumps(old)).encode("abbaab").ids == [3, 0, 2]


def test_each_epoch_has_its_own_order(study) -> None:
    order = study.EpochOrder([[0, 1, 2], [2, 0, 1]])
    assert (len(order), list(order), list(order), order.begun) == (3, [0, 1, 2], [2, 0, 1], 2)


def test_curves_are_compared_where_they_are_farthest(study) -> None:
    assert study.greatest_difference([1.0, 2.0], [1.5, 1.75]) == 0.5
    assert study.greatest_difference([1.0, 2.0], [2.0, 8.0], relative=True) == 0.75
