"""Cutting documents into pieces: the tokens are those of the whole, and do not depend on how it was read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.saved import FAST, sample_text, tiny_tokenizer

from logit_cache.corpus import pieces
from logit_cache.corpus.documents import Chunk
from logit_cache.corpus.pieces import Encoded, Encoder, Piece, cut, encode, trained_tokens


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1_000)
    monkeypatch.setattr(pieces, "MARGIN_CHARACTERS", 200)
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 7_000)


class Recorder(Encoder):
    """An encoder that keeps the texts it received."""

    def __init__(self, kind: str) -> None:
        super().__init__(tiny_tokenizer(kind))
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str], offsets: Sequence[bool]) -> list[Encoded]:
        self.batches.append(list(texts))
        return super().__call__(texts, offsets)


def chunks(documents: Sequence[str], block: int = 997) -> Iterator[Chunk]:
    for text in documents:
        for start in range(0, len(text), block):
            yield Chunk(0, text[start : start + block], False)
        yield Chunk(0, "", True)


def ids_of(documents: Sequence[str], encoder: Encoder, block: int = 997) -> list[list[int]]:
    result: list[list[int]] = []
    for piece, ids, _ in encode(cut(chunks(documents, block)), encoder):
        if piece.opens:
            result.append([])
        result[-1].extend(ids.tolist())
    return result


def whole_ids(kind: str, text: str) -> list[int]:
    found: list[int] = tiny_tokenizer(kind)(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


@pytest.mark.parametrize("kind", FAST)
def test_tokens_of_pieces_are_those_of_the_whole_document(kind: str) -> None:
    text = sample_text()[:60_000]
    encoder = Recorder(kind)
    assert ids_of([text, "", "short", text[:1_201]], encoder) == [
        whole_ids(kind, text),
        whole_ids(kind, "short"),
        whole_ids(kind, text[:1_201]),
    ]
    # Real text needs no seam, so nothing was tokenised twice.
    assert sum(len(batch) for batch in encoder.batches) < 70
    assert max(map(len, encoder.batches)) > 1


@pytest.mark.parametrize("kind", FAST)
def test_tokens_do_not_depend_on_how_the_text_is_read(kind: str) -> None:
    text = sample_text()[5_000:12_000] + "=" * 2_000 + sample_text()[:3_000]
    expected = ids_of([text], Encoder(tiny_tokenizer(kind)), block=len(text))
    for block in (1, 333, 1_000, 4_096):
        assert ids_of([text], Encoder(tiny_tokenizer(kind)), block) == expected


@pytest.mark.parametrize("run", ["=" * 5_000, "\n" * 4_000, "日" * 3_000, " " * 3_001, "ab" * 2_500])
@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_long_runs_lose_and_repeat_nothing(kind: str, run: str) -> None:
    text = f"before {run} after the run, {sample_text()[:3_000]}"
    tokenizer = tiny_tokenizer(kind)
    encoder = Recorder(kind)
    ids = ids_of([text], encoder)[0]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_seams_are_made_where_neighbours_disagree() -> None:
    # Runs of "=" make tokens of several, and the margins begin at another phase than the run does.
    text = "x" + "=" * 5_000
    encoder = Recorder("gpt2")
    ids = ids_of([text], encoder)[0]
    again = [batch[0] for batch in encoder.batches if len(batch) == 1]
    assert again
    assert all(len(piece) <= 1_200 for piece in again)
    expected = [i for start in range(0, len(text), 1_000) for i in whole_ids("gpt2", text[start : start + 1_000])]
    assert ids == expected


def test_a_tokenizer_without_offsets_is_cut_at_the_same_positions() -> None:
    text = sample_text()[:5_000]
    encoder = Recorder("bytes")
    assert ids_of([text, "short"], encoder) == [whole_ids("bytes", text), whole_ids("bytes", "short")]


@pytest.mark.parametrize("kind", ["seeds", "bytes"])
def test_the_batches_of_a_tokenizer_are_bounded(kind: str) -> None:
    encoder = Recorder(kind)
    most = 0
    read = 0

    def counted() -> Iterator[Chunk]:
        nonlocal read
        for _ in range(120):
            read += 997
            yield Chunk(0, sample_text()[:997], False)
        for _ in range(500):
            read += 50
            yield Chunk(0, sample_text()[:50], True)

    done = 0
    for piece, _, _ in encode(cut(counted()), encoder):
        done += len(piece.own)
        most = max(most, read - done)
    assert done == read
    assert max(sum(map(len, batch)) for batch in encoder.batches) <= 7_000
    assert max(len(text) for batch in encoder.batches for text in batch) <= 1_000 + 2 * 200
    # Never more than two batches and the piece that is being put together.
    assert most < 2 * 7_000 + 3_000


def test_documents_are_cut_after_lines_or_before_spaces() -> None:
    prose = ("word " * 15 + "\n") * 200
    found = list(cut(chunks([prose])))
    assert "".join(piece.own for piece in found) == prose
    assert [piece.opens for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.closes for piece in found] == [False] * (len(found) - 1) + [True]
    assert all(piece.own.endswith("\n") for piece in found)
    for before, after in itertools.pairwise(found):
        assert after.text[: after.start] == before.own[-200:]
        assert before.text[before.stop :] == after.own[:200] or after.closes
    assert all(piece.own.startswith(" ") for piece in list(cut(chunks(["word " * 2_000])))[1:])
    assert [len(piece.own) for piece in cut(chunks(["x" * 2_300]))] == [1_000, 1_000, 300]


@settings(max_examples=150, deadline=None)
@given(
    documents=st.lists(st.text(st.sampled_from("ab \n\r日e\u0301"), max_size=6_000), max_size=4),
    block=st.integers(1, 2_500),
)
def test_pieces_cover_every_document_once(documents: list[str], block: int) -> None:
    texts: list[str] = []
    for piece in cut(chunks(documents, block)):
        assert 0 < len(piece.own) <= 1_200
        if piece.opens:
            texts.append("")
        texts[-1] += piece.own
    assert texts == [text for text in documents if text]


def test_trained_ranges_follow_the_pieces() -> None:
    text = sample_text()[:9_000]
    ranges = ((100, 1_050), (1_100, 1_101), (2_500, 5_555), (8_990, 9_000))
    trained: list[bool] = []
    parts: list[Piece] = []
    for piece, ids, mask in encode(cut([Chunk(0, text, True, ranges)]), Encoder(tiny_tokenizer("gpt2"))):
        assert mask is not None
        assert mask.shape == ids.shape
        trained.extend(mask.tolist())
        parts.append(piece)
    encoded = tiny_tokenizer("gpt2")(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"])
    expected = np.zeros(len(offsets), dtype=bool)
    for start, stop in ranges:
        inside = [i for i, (a, b) in enumerate(offsets) if set(range(a, b)) & set(range(start, stop))]
        expected[inside] = True
    assert len(parts) > 5
    assert trained == expected.tolist()


def test_trained_tokens_know_trimmed_and_empty_offsets() -> None:
    # "a  b c" as a | two spaces (no width) | b | " c" trimmed to c; two tokens can share one character.
    offsets = np.array([[0, 1], [3, 3], [3, 4], [5, 6], [5, 6]])
    assert trained_tokens(offsets, [(1, 3)]).tolist() == [False, True, False, False, False]
    assert trained_tokens(offsets, [(4, 5)]).tolist() == [False, False, False, True, False]
    assert trained_tokens(offsets, [(0, 1), (5, 6)]).tolist() == [True, False, False, True, True]
    assert trained_tokens(offsets, []).tolist() == [False] * 5
    assert trained_tokens(np.zeros((0, 2), dtype=np.int64), [(0, 1)]).tolist() == []
