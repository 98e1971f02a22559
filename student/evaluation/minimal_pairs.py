"""Minimal pairs: which of two sentences that differ in one point of grammar a model finds more probable.

Legend: `N` pairs, `S` sentences, `B` sentences of a batch, `T` tokens of the longest of them, `P` = B·T positions,
`W` columns of the model's head.

``log p(x) = sum_t log softmax(logits(prefix, x_1 … x_{t-1}))[x_t]`` in nats, over all tokens of the sentence and all W
columns, given one prefix token: the tokenizer's BOS, or EOS where it has none. A pair is right when the good sentence
is strictly the more probable. lm-eval's `multiple_choice` tasks score alike with an empty context, but for ties, which
they count right. Like lm-eval's own `blimp`, a sentence is scored with a space in front unless it is to be scored as
written; tokenizers that put the space there themselves (all that this project trains) make no difference.

The pairs have BLiMP's format (Warstadt et al. 2020): a folder of JSONL files.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.errors import InputError
from storage.files import local_path
from storage.progress import Advance
from student.evaluation import standard_errors
from student.evaluation.blimp import GROUP_OF, GROUP_OF_TERM
from student.evaluation.held_out import BATCH_LOGITS, head_columns, next_token_logprobs
from student.evaluation.report import GroupScore, PairScores, ParadigmScore
from student.labels import NOT_TRAINED

CLOSE_NATS = 1e-4
"""Pairs closer than this are decided by the order of float32 sums: two programs may disagree about them."""

Sentence = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two sentences as written; `paradigm` is BLiMP's UID or the file's name, `group` the phenomenon it belongs to."""

    good: str
    bad: str
    paradigm: str
    group: str


def read_pairs(folder: str | Path, limit: int | None = None) -> list[Pair]:
    """The pairs of all `*.jsonl` files of a folder, in the order of the files' names; `limit` per paradigm.

    A line is a JSON object with `sentence_good` and `sentence_bad`. `UID` names its paradigm (else the file's name
    does), `linguistics_term` its group (else the paradigm's group in `PHENOMENA`, else the paradigm is a group of its
    own). Other fields are ignored.

    Raises InputError, with file and line, for a missing folder, one without pairs, a line that is no JSON object, a
    missing or empty sentence, and a paradigm of two groups.
    """
    path = local_path(folder)
    if not path.is_dir():
        raise InputError(f"{folder}: expected a folder of JSONL files with minimal pairs, found no folder there")
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise InputError(f"{folder}: expected JSONL files with minimal pairs, found no file named *.jsonl in it")
    pairs: list[Pair] = []
    groups: dict[str, str] = {}
    counts: dict[str, int] = defaultdict(int)
    for file in files:
        for where, row in _rows(file):
            pair = _pair(row, where, file.stem)
            first = groups.setdefault(pair.paradigm, pair.group)
            if first != pair.group:
                raise InputError(
                    f"{where}: paradigm {pair.paradigm} is of group {pair.group} here and of {first} before: "
                    "give all its lines one linguistics_term"
                )
            counts[pair.paradigm] += 1
            if limit is None or counts[pair.paradigm] <= limit:
                pairs.append(pair)
    if not pairs:
        raise InputError(f"{folder}: expected minimal pairs, found only empty files: take another folder")
    return pairs


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Location and object of each line that is not blank."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: expected a JSON object, found {line.strip()[:40]!r} ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row


def _pair(row: Mapping[str, Any], where: str, stem: str) -> Pair:
    for name in ("sentence_good", "sentence_bad"):
        if name not in row:
            raise InputError(
                f"{where}: expected the fields sentence_good and sentence_bad, found {', '.join(row) or 'none'}: "
                "rename the fields as BLiMP has them"
            )
        if not isinstance(row[name], str) or not row[name].strip():
            raise InputError(
                f"{where}: expected a sentence as {name}, found {row[name]!r}: fill it in or drop the line"
            )
    paradigm, term = row.get("UID") or stem, row.get("linguistics_term")
    if not isinstance(paradigm, str) or not isinstance(term, str | None):
        raise InputError(f"{where}: expected strings as UID and linguistics_term, found {paradigm!r} and {term!r}")
    group = GROUP_OF_TERM.get(term, term) if term else GROUP_OF.get(paradigm, paradigm)
    return Pair(row["sentence_good"], row["sentence_bad"], paradigm, group)


def sentences_of(pairs: Sequence[Pair]) -> list[str]:
    """Good, bad, good, bad, … as written."""
    return [text for pair in pairs for text in (pair.good, pair.bad)]


def prefix_id(tokenizer: Any) -> int:
    """The token that starts every sentence: BOS, or EOS where there is no BOS. Raises InputError without either."""
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise InputError(
        f"{tokenizer.name_or_path}: expected a tokenizer with a BOS or an EOS token to start sentences with, found "
        "neither: set bos_token in its tokenizer_config.json to the token that began the model's training texts"
    )


def encode(tokenizer: Any, texts: Sequence[str], leading_space: bool = True) -> list[Sentence]:
    """Prefix and tokens of each text, with no other special tokens; a text that starts with the prefix has it once.

    leading_space: tokenize a space and then the text, as lm-eval's `blimp` does.
    """
    first = prefix_id(tokenizer)
    written = [f" {text}" if leading_space else text for text in texts]
    found: list[Sentence] = []
    for text, ids in zip(texts, tokenizer(written, add_special_tokens=False)["input_ids"], strict=True):
        sentence = tuple(ids) if ids and ids[0] == first else (first, *ids)
        if len(sentence) < 2:
            raise InputError(f"{tokenizer.name_or_path}: the sentence {text!r} has no tokens, so nothing to score")
        found.append(sentence)
    return found


def sentence_logprobs(
    model: nn.Module, sentences: Sequence[Sentence], batch_sentences: int = 64, advance: Advance | None = None
) -> Tensor:
    """``log p(x_1 … x_n | x_0)`` of each sentence of ids: float64 [S], nats, on the CPU.

    Sentences are sorted by length, the longest first, and each distinct one is scored once. Batches are padded on the
    right, where no scored position attends, have at most `batch_sentences` rows, and shrink where B·T·W is large.
    Log-probs are float32, whatever the model's dtype, and summed in float64. `advance` is called with the number of
    sentences done. Raises InputError when a log-prob is NaN.
    """
    device = next(model.parameters()).device
    columns = head_columns(model)
    indices: dict[Sentence, list[int]] = defaultdict(list)
    for index, sentence in enumerate(sentences):
        indices[sentence].append(index)
    todo = sorted(indices, key=lambda sentence: (-len(sentence), sentence))
    result = torch.zeros(len(sentences), dtype=torch.float64)
    was_training = model.training
    model.eval()
    while todo:
        tokens = len(todo[0]) - 1
        rows = max(1, min(batch_sentences, BATCH_LOGITS // (tokens * columns)))
        batch, todo = todo[:rows], todo[rows:]
        inputs = torch.tensor([[*s[:-1], *[s[-2]] * (tokens + 1 - len(s))] for s in batch], device=device)
        labels = torch.tensor([[*s[1:], *[NOT_TRAINED] * (tokens + 1 - len(s))] for s in batch], device=device)
        with torch.no_grad():
            logits = model(input_ids=inputs, use_cache=False).logits  # [B, T, W]
            logprobs = next_token_logprobs(logits.flatten(0, 1), labels.flatten())  # [P]
        sums = logprobs.view(len(batch), tokens).sum(1)
        if bool(sums.isnan().any()):
            raise InputError(
                f"the model gives {int(sums.isnan().sum())} of {len(batch)} sentences the log-probability NaN: its "
                "weights are broken, or overflow in its dtype (then take bfloat16 or float32)"
            )
        for sentence, value in zip(batch, sums, strict=True):
            result[indices[sentence]] = value
        if advance is not None:
            advance(sum(len(indices[sentence]) for sentence in batch))
    model.train(was_training)
    return result


def score_pairs(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    leading_space: bool = True,
    batch_sentences: int = 64,
    advance: Advance | None = None,
) -> Tensor:
    """Log-probabilities of the good and the bad sentence of each pair: float64 [N, 2], nats.

    Raises InputError as `encode` and `sentence_logprobs` do.
    """
    sentences = encode(tokenizer, sentences_of(pairs), leading_space)
    return sentence_logprobs(model, sentences, batch_sentences, advance).view(-1, 2)


def tally(pairs: Sequence[Pair], logprobs: Tensor) -> PairScores:
    """Accuracies from the log-probabilities [N, 2] of pairs, good first; ties are wrong."""
    margin = logprobs[:, 0] - logprobs[:, 1]
    by_paradigm: dict[str, list[bool]] = defaultdict(list)
    for pair, is_right in zip(pairs, (margin > 0).tolist(), strict=True):
        by_paradigm[pair.paradigm].append(is_right)
    by_group: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    group_of = {pair.paradigm: pair.group for pair in pairs}
    paradigms: dict[str, ParadigmScore] = {}
    for name, found in sorted(by_paradigm.items()):
        outcomes = np.array(found, dtype=np.float64)
        by_group[group_of[name]].append(outcomes)
        paradigms[name] = ParadigmScore(
            pairs=len(found),
            accuracy=fmean(found),
            stderr=standard_errors.of_outcomes([outcomes]),
            group=group_of[name],
            right="".join("1" if is_right else "0" for is_right in found),
        )
    groups = {
        name: GroupScore(
            pairs=sum(map(len, found)),
            accuracy=float(np.concatenate(found).mean()),
            stderr=standard_errors.of_outcomes(found),
        )
        for name, found in sorted(by_group.items())
    }
    return PairScores(
        pairs=len(pairs),
        sha256=_digest(pairs),
        mean_over_groups=fmean(score.accuracy for score in groups.values()),
        mean_over_groups_stderr=standard_errors.of_mean([score.stderr for score in groups.values()]),
        mean_over_paradigms=fmean(score.accuracy for score in paradigms.values()),
        mean_over_paradigms_stderr=standard_errors.of_mean([score.stderr for score in paradigms.values()]),
        tied=int((margin == 0).sum()),
        close=int((margin.abs() < CLOSE_NATS).sum()),
        groups=groups,
        paradigms=paradigms,
    )


def _digest(pairs: Sequence[Pair]) -> str:
    total = hashlib.sha256()
    for pair in pairs:
        total.update(json.dumps([pair.paradigm, pair.good, pair.bad]).encode() + b"\n")
    return total.hexdigest()
