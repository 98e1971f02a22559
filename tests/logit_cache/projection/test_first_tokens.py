"""First tokens against the exact next-token distributions of a source of bytes under both tokenizers."""

from __future__ import annotations

import itertools

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from logit_cache.projection.first_tokens import first_tokens
from logit_cache.projection.spelling import Spelling

LETTERS = "abc"
NEXT = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.45, 0.05, 0.5]])  # a Markov source's P(next letter | letter)
DEPTH = 7  # letters that are read on; of longer ones no token depends


def spelling(*merges: str) -> Spelling:
    """A byte-level BPE of three letters with these merges, in their order."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: id for id, token in enumerate([*sorted(letters), *(m.replace(" ", "") for m in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(m.split()) for m in merges]))  # type: ignore[misc]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Spelling({"tokenizer.json": backend.to_str().encode()}, len(vocabulary), "here")


def next_tokens(tokens: Spelling, after: int) -> np.ndarray:
    """The exact distribution of the next token after a letter [V]: over all texts of DEPTH letters."""
    found = np.zeros(tokens.size)
    texts = list(itertools.product(range(3), repeat=DEPTH))
    first = tokens.first(["".join(LETTERS[each] for each in text).encode() for text in texts])
    for text, id in zip(texts, first, strict=True):
        found[id] += np.prod([NEXT[a, b] for a, b in itertools.pairwise((after, *text))])
    return found


TEACHER = ("a b", "b c", "c c", "a a")
STUDENTS = {"coarser": ("a b", "ab c", "c c", "b b"), "finer": ("b c",)}


def test_errors_are_of_the_ids_that_are_uncertain() -> None:
    teacher = spelling(*TEACHER)
    for student in (spelling(*merges) for merges in STUDENTS.values()):
        first = first_tokens(teacher, student)
        for after in range(3):
            p, exact = next_tokens(teacher, after), next_tokens(student, after)
            projected = np.bincount(first.ids, weights=p, minlength=student.size)
            error = np.abs(projected - exact).sum() / 2
            assert error <= p[first.uncertain].sum() + 1e-12
            if not p[first.uncertain].any():
                assert error < 1e-12
    assert first_tokens(teacher, spelling(*STUDENTS["coarser"])).uncertain.any()


def test_into_single_letters_it_is_exact() -> None:
    teacher, student = spelling(*TEACHER), spelling()
    first = first_tokens(teacher, student)
    for after in range(3):
        projected = np.bincount(first.ids, weights=next_tokens(teacher, after), minlength=student.size)
        np.testing.assert_allclose(projected, next_tokens(student, after), atol=1e-12)
    spelled = [b"a", b"ab", b"bc", b"cc", b"aa"]
    assert not any(first.uncertain[teacher.first([data])[0]] for data in spelled)
