"""Small caches with made-up targets, for tests that need a cache and no teacher."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from storage.cache.corpus_writer import write_corpus
from storage.cache.writer import EntryWriter
from storage.format.identity import stream_sha256
from storage.format.layout import entry_layout, stream_layout
from storage.format.manifest.cache import CacheRecord, Corpus, CorpusSource, Rollouts, Tokenizer
from storage.format.manifest.entry import Encoding, Execution, Targets, TeacherEntry, Windowing
from storage.format.manifest.projected import NextTokens, ProjectedFrom
from storage.format.manifest.shared import ArrayLayout, Versions
from storage.format.manifest.teacher import Teacher, TeacherIdentity
from storage.format.targets import SparseTargets

SHA = "0" * 64


def dense_targets(logits: np.ndarray, k: int, labels: np.ndarray, start: int = 0) -> SparseTargets:
    """Top-k targets of dense logits [T, V], computed in float64; labels of -1 have no log-prob."""
    z = logits.astype(np.float64)
    top = z.max(axis=1, keepdims=True)
    logp = z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True))
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    head = np.take_along_axis(logp, order, axis=1)
    outside = np.ones_like(logp, dtype=bool)
    np.put_along_axis(outside, order, False, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log((np.exp(logp) * outside).sum(axis=1))
        tail_half = np.log((np.exp(logp / 2) * outside).sum(axis=1))
    rows, vocabulary = logits.shape
    label = np.where(labels >= 0, np.take_along_axis(logp, labels.clip(0)[:, None], axis=1)[:, 0], np.nan)
    count = np.full(rows, k, dtype=np.uint16)
    return SparseTargets(
        start=start,
        token_ids=order.astype(np.uint16 if vocabulary <= 65_535 else np.uint32),
        kept=count,
        certain=count,
        log_tail=tail.astype(np.float32),
        log_tail_half=tail_half.astype(np.float32),
        label_logprob=label.astype(np.float32),
        entropy=-(np.exp(logp) * logp).sum(axis=1).astype(np.float32),
        logprobs=head.astype(np.float32),
    )


def varopt_targets(
    logits: np.ndarray, k: int, labels: np.ndarray, temperature: float = 1.0, seed: int = 0
) -> SparseTargets:
    """VarOpt targets of dense logits [T, V], row by row from the definition."""
    rng, rows = np.random.default_rng(seed), len(logits)
    every = dense_targets(logits, logits.shape[1], labels)
    logp = every.logprobs.astype(np.float64)  # [T, V], descending
    columns, certain = np.empty((rows, k), dtype=np.int64), np.empty(rows, dtype=np.uint16)
    for row, mass in enumerate(np.exp(logp / temperature)):
        rest = mass[::-1].cumsum()[::-1]
        j = next((j for j in range(k) if mass[j] * (k - j) < rest[j]), k)
        by_id = j + np.argsort(every.token_ids[row, j:])
        points = (rng.random() + np.arange(k - j)) * rest[min(j, len(rest) - 1)] / max(k - j, 1)
        drawn = by_id[np.searchsorted(mass[by_id].cumsum(), points).clip(max=max(len(by_id) - 1, 0))]
        columns[row], certain[row] = [*range(j), *sorted(drawn)], j
    outside = np.where(np.arange(logits.shape[1]) < certain[:, None], -np.inf, logp)
    return replace(
        every,
        token_ids=np.take_along_axis(every.token_ids, columns, axis=1),
        logprobs=np.take_along_axis(every.logprobs, columns, axis=1),
        kept=np.full(rows, k, dtype=np.uint16),
        certain=certain,
        log_tail=np.logaddexp.reduce(outside, axis=1).astype(np.float32),
        log_tail_half=np.logaddexp.reduce(outside / 2, axis=1).astype(np.float32),
    )


def without_rows(targets: SparseTargets, rows: np.ndarray) -> SparseTargets:
    """The targets without those of some rows, bool [T], as a teacher leaves them that does not score these."""
    values = {
        "token_ids": np.iinfo(targets.token_ids.dtype).max, "kept": 0, "certain": 0, "logprobs": -np.inf,
        "log_tail": np.nan, "log_tail_half": np.nan, "label_logprob": np.nan, "entropy": np.nan,
    }  # fmt: skip
    return replace(
        targets,
        **{
            name: np.where(rows.reshape(-1, *[1] * (array.ndim - 1)), values[name], array).astype(array.dtype)
            for name, array in targets.arrays().items()
        },
    )


def random_sample(positions: int, vocabulary_size: int, k: int, temperature: float = 1.0) -> SparseTargets:
    """VarOpt targets of random logits, from sharp to flat, as version 2 lays them out: some rows have no certain id."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(positions, vocabulary_size)) * rng.uniform(0.1, 6, (positions, 1))
    labels = np.append(rng.integers(0, vocabulary_size, positions - 1), -1)
    found = varopt_targets(logits, k, labels, temperature)
    order = np.argsort(np.where(found.is_certain, np.arange(k) - k, found.token_ids.astype(np.int64)), axis=1)
    per_id = {name: np.take_along_axis(getattr(found, name), order, axis=1) for name in ("token_ids", "logprobs")}
    return replace(found, **per_id)


def entry_2(entry: TeacherEntry, *fields: Any, **changes: Any) -> TeacherEntry:
    """An entry as one of version 2 that stores some fields; `encoding` is its kind, the rest changes its targets."""
    codes, made = changes.pop("encoding", "codes") == "codes", changes.pop("made", "cached")
    targets = {"positions": "all", "tail": "exact", "fields": fields, "k": entry.targets.k, **changes}
    if targets.get("method") == "varopt":
        targets = {"seed": 0, "sampling": "systematic", "order": "ids", **targets}
    encoding = Encoding(
        kind="codes" if codes else "float32",
        step_nats=1 / 32 if codes else None,
        value_step_nats=1 / 256 if codes else None,
        sampled_step_nats=1 / 2 if codes and "sampled-logprobs" in fields else None,
    )
    origin = projected_from() if made == "projected" else None
    changed = {
        "format_version": 2, "made": made, "targets": Targets(**targets), "encoding": encoding, "projected_from": origin
    }  # fmt: skip
    return TeacherEntry.model_validate(dict(entry) | changed)


def projected_from() -> ProjectedFrom:
    """What a projected entry says of its source, made up."""
    digests = ("entry_sha256", "stream_sha256", "tokenizer_fingerprint", "vocabulary_sha256")
    counts = ("shared_positions", "trained_positions", "shared_trained_positions", "sampled_positions")
    none = NextTokens(positions=0, right=0)
    made_up: dict[str, Any] = dict.fromkeys(digests, SHA) | dict.fromkeys(counts, 0)
    return ProjectedFrom(
        **made_up, vocabulary_size=1, certain=none, uncertain=none, uncertain_mass=0.0, most_uncertain=0.5
    )


def random_stream(vocabulary_size: int, positions: int, k: int) -> tuple[np.ndarray, SparseTargets]:
    """Tokens uint16 [N], and top-k targets of random logits that have them as labels; always the same."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary_size, positions).astype(np.uint16)
    labels = np.append(tokens[1:].astype(np.int64), -1)
    return tokens, dense_targets(rng.normal(size=(positions, vocabulary_size)) * 3, k, labels)


def stream_record(positions: int, vocabulary_size: int, documents: int = 1, **corpus: Any) -> CacheRecord:
    """The record of a cache of that many tokens, none of which need exist; `corpus`: what else is known of them."""
    made_up = {"stream_sha256": SHA, "has_loss_mask": False, "document_separator": None, "sources": ()}
    sizes = {"positions": positions, "documents": documents, "text_bytes": 4 * positions}
    return CacheRecord(
        corpus=Corpus.model_validate({**made_up, **sizes, **corpus}),
        tokenizer=Tokenizer(vocabulary_size=vocabulary_size, vocabulary_sha256=SHA, fingerprint=SHA),
        tokens_layout=stream_layout(positions),
        documents_layout=stream_layout(documents),
        created_with=Versions(libraries={}),
    )


def make_corpus(
    url: str,
    tokens: np.ndarray,
    vocabulary_size: int,
    document_starts: np.ndarray | None = None,
    loss_mask: np.ndarray | None = None,
    tokenizer_files: dict[str, bytes] | None = None,
    tokens_layout: ArrayLayout | None = None,
    document_sources: Sequence[str] = (),
    rollouts: Rollouts | None = None,
) -> CacheRecord:
    """A cache of a token stream with a word-level tokenizer whose words are `t0`, `t1`, …

    document_sources: the names of the documents' sources; of none, and not a model's rollouts, the stream is one of
    version 1.
    """
    starts = np.zeros(1, dtype=np.uint64) if document_starts is None else document_starts.astype(np.uint64)
    if tokenizer_files is None:
        tokenizer_files = word_tokenizer(vocabulary_size)
    record = stream_record(
        len(tokens),
        vocabulary_size,
        len(starts),
        stream_sha256=stream_sha256(tokens, starts, loss_mask),
        has_loss_mask=loss_mask is not None,
        sources=(CorpusSource(name="made-up", documents=len(starts), text_bytes=4 * len(tokens)),),
    )
    names = sorted(set(document_sources))
    if names:
        counts = Counter(document_sources)
        sources = tuple(CorpusSource(name=name, documents=counts[name], text_bytes=0) for name in names)
        corpus = record.corpus.model_copy(update={"sources": sources, "document_sources": True})
        record = record.model_copy(update={"format_version": 2, "corpus": corpus})
    if rollouts is not None:
        corpus = record.corpus.model_copy(update={"rollouts": rollouts})
        record = record.model_copy(update={"format_version": 2, "corpus": corpus})
    if tokens_layout is not None:
        record = record.model_copy(update={"tokens_layout": tokens_layout})
    numbers = np.array([names.index(name) for name in document_sources], dtype=np.uint16) if names else None
    arrays = {"tokens": tokens, "document_starts": starts, "document_sources": numbers, "loss_mask": loss_mask}
    write_corpus(url, record, tokenizer_files, {name: a for name, a in arrays.items() if a is not None})
    return record


def word_tokenizer(vocabulary_size: int) -> dict[str, bytes]:
    """Files of a tokenizer that AutoTokenizer opens: one word per id."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    backend = Backend(WordLevel({f"t{i}": i for i in range(vocabulary_size)}, unk_token="t0"))
    backend.pre_tokenizer = WhitespaceSplit()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "t0", "bos_token": "t1", "eos_token": "t1"}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def make_entry(record: CacheRecord, k: int, **changes: Any) -> TeacherEntry:
    """A teacher entry for a cache, with made-up provenance."""
    encoding = changes.pop("encoding", "codes")
    shard_tokens, chunk_tokens = changes.pop("shard_tokens", None), changes.pop("chunk_tokens", None)
    windowing = changes.pop("windowing", Windowing(context_tokens=16, stride_tokens=16))
    return TeacherEntry(
        positions=record.corpus.positions,
        vocabulary_size=record.tokenizer.vocabulary_size,
        stream_sha256=record.corpus.stream_sha256,
        tokenizer_fingerprint=record.tokenizer.fingerprint,
        teacher=Teacher(
            members=(
                TeacherIdentity(
                    source="made-up",
                    architecture="None",
                    weights_sha256=changes.pop("weights_sha256", SHA),
                    config_sha256=SHA,
                    dtype="float32",
                    head_columns=record.tokenizer.vocabulary_size,
                    parameters=0,
                ),
            )
        ),
        targets=Targets(k=k, has_label_logprob=True),
        windowing=windowing,
        encoding=Encoding(
            kind=encoding,
            step_nats=1 / 32 if encoding == "codes" else None,
            mantissa_bits=12 if encoding == "codes" else 23,
        ),
        layout=entry_layout(
            record.corpus.positions, k, windowing.stride_tokens, shard_tokens=shard_tokens, chunk_tokens=chunk_tokens
        ),
        execution=Execution(device_type="cpu", batch_windows=1, attention="none", head="general"),
        created_with=Versions(libraries={}),
        **changes,
    )


def make_entry_2(record: CacheRecord, k: int, fields: tuple[str, ...] = (), **changes: Any) -> TeacherEntry:
    """An entry of version 2, with made-up provenance; `changes` of `make_entry` and of `entry_2`."""
    of_targets = {name: changes.pop(name) for name in ("made", *Targets.model_fields) if name in changes}
    encoding = changes.get("encoding", "codes")
    return entry_2(make_entry(record, max(1, k), **changes), *sorted(fields), encoding=encoding, **of_targets, k=k)


def write_entry(
    url: str | Path, name: str, entry: TeacherEntry, targets: SparseTargets, missing: Collection[int] = ()
) -> None:
    """Commit the shards of an entry, but for some that are to be missing, from the targets of the whole stream."""
    writer = EntryWriter.open(str(url), name, entry)
    writer.sampling_order(lambda: np.random.default_rng(1).permutation(entry.vocabulary_size))
    for shard in sorted(set(writer.pending()).difference(missing)):
        start = shard * entry.layout.shard
        writer.commit(shard, targets.rows(start, min(start + entry.layout.shard, entry.positions)))
    writer.finish()
