"""A cache described for people: contents, sizes, coverage, provenance, summaries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from storage.cache.reader import LogitCache, TeacherTargets
from storage.format.manifest.entry import TARGET_FIELDS, Targets
from storage.format.manifest.receipts import ShardStatistics
from storage.text import counted


def describe_cache(cache: LogitCache, lengths: bool = False) -> dict[str, Any]:
    """The whole cache as JSON data. Log-probs and losses in nats, sizes in bytes, masses as fractions.

    lengths: with those of `describe_stream`, for which arrays are read.
    """
    record = cache.record
    corpus = record.corpus
    missing = cache.missing_tokens() if corpus.tokens_included else []
    return {
        "url": cache.url,
        "format_version": record.format_version,
        "corpus": {
            "tokens": corpus.positions,
            "documents": corpus.documents,
            "text_bytes": corpus.text_bytes,
            "text_bytes_per_token": corpus.text_bytes / corpus.positions,
            "stream_sha256": corpus.stream_sha256,
            "has_loss_mask": corpus.has_loss_mask,
            "tokens_included": corpus.tokens_included,
            "complete": not missing,
            "sources": [source.model_dump() for source in corpus.sources],
            **corpus.added(),
            **(describe_stream(cache) if lengths and corpus.tokens_included and not missing else {}),
        },
        "tokenizer": record.tokenizer.model_dump(),
        "created_with": record.created_with.libraries,
        "teachers": {name: describe_entry(cache.teacher(name)) for name in cache.teachers},
    }


def describe_stream(cache: LogitCache) -> dict[str, Any]:
    """Lengths of documents in tokens, the tokens of each source in the record, and those that are trained on, of a
    complete stream."""
    positions, starts = cache.record.corpus.positions, cache.document_starts.astype(np.int64)
    lengths = np.diff(starts, append=positions)
    median, most = (int(np.quantile(lengths, share, method="inverted_cdf")) for share in (0.5, 0.95))
    mask, numbers, sources = cache.loss_mask, cache.document_sources, cache.record.corpus.sources
    by_source = None if numbers is None else np.bincount(numbers, weights=lengths, minlength=len(sources))
    return {
        "document_tokens": {"median": median, "percentile_95": most, "longest": int(lengths.max())},
        "source_tokens": None if by_source is None else by_source.astype(np.int64).tolist(),
        "trained_tokens": None if mask is None else int(cache.positions(True).count_before(np.array([positions]))[0]),
    }


def describe_entry(targets: TeacherTargets) -> dict[str, Any]:
    """One teacher entry as JSON data: sums from the receipts, `fidelity` from its report; no array is read.

    bytes_per_token: per cached position; bytes_per_target: per position with targets; bytes_per_kept_id: K in each row,
    or, where rows differ in size, as many as the fidelity report found, None without one.
    """
    entry = targets.entry
    missing = targets.missing()
    covered = entry.positions - sum(stop - start for start, stop in missing)
    stored = targets.stored_bytes()
    statistics, seconds = targets.statistics()
    with_targets = 0 if statistics is None else statistics.positions
    report = targets.fidelity()
    kept = float(entry.targets.k) if entry.targets.whole_rows else report.size.mean_kept if report else None
    return {
        "format_version": entry.format_version,
        "made": entry.made,
        "derived_from": entry.derived_from,
        "imported_from": None if entry.imported_from is None else entry.imported_from.model_dump(),
        "projected_from": None if entry.projected_from is None else entry.projected_from.model_dump(),
        "teacher": [m.model_dump() for m in entry.teacher.members],
        "combine": entry.teacher.combine,
        "weights": list(entry.teacher.weights),
        "architecture": loaded[0].architecture if (loaded := entry.teacher.loaded) else None,
        "vocabulary_size": entry.vocabulary_size,
        "targets": entry.targets.model_dump(),
        "windowing": entry.windowing.model_dump(),
        "encoding": entry.encoding.model_dump(),
        "layout": entry.layout.model_dump(),
        "execution": entry.execution.model_dump(),
        "created_with": entry.created_with.libraries,
        "record_sha256": targets.record_sha256,
        "positions": entry.positions,
        "positions_cached": covered,
        "positions_with_targets": with_targets,
        "complete": not missing,
        "missing": missing[:100],
        "stored_bytes": stored,
        "bytes_per_token": stored / covered if covered else None,
        "bytes_per_target": stored / with_targets if with_targets else None,
        "bytes_per_kept_id": stored / (with_targets * kept) if with_targets and kept else None,
        "positions_per_second": covered / seconds if seconds else None,
        "summary": summarise(statistics) if statistics and with_targets else None,
        "fidelity": report.model_dump() if report else None,
    }


def member_in_words(member: dict[str, Any]) -> str:
    """One of the teachers of a described entry: a model that was loaded, one behind a server, or one that is named."""
    if "engine" in member:
        model = "" if member["model"] in (None, member["source"]) else f" as {member['model']}"
        return f"{member['source']} (served by {member['engine']}{model}, weights {member['weights']})"
    if "parameters" not in member:
        return f"{member['source']} (not loaded: nothing else is known of it)"
    name = f"{member['source']} with {member['adapter']}" if member.get("adapter") else member["source"]
    return f"{name} ({member['architecture']}, {member['parameters']:,} parameters, {member['dtype']})"


def summarise(sums: ShardStatistics) -> dict[str, float | None]:
    """The receipts' sums as means: loss (nats) and perplexity per labelled position, the others per position."""
    loss = sums.label_nats / sums.labelled if sums.labelled else None
    return {
        "cross_entropy": loss,
        "perplexity": math.exp(min(loss, 700.0)) if loss is not None else None,
        "entropy": None if sums.entropy_nats is None else sums.entropy_nats / sums.positions,
        **{
            name: None if total is None else total / sums.positions
            for name, total in (
                ("head_mass", sums.head_mass),
                ("positions_with_head_mass_below_0.5", sums.head_mass_below_half),
                ("positions_with_head_mass_below_0.9", sums.head_mass_below_90),
                ("positions_with_head_mass_below_0.99", sums.head_mass_below_99),
            )
        },
    }


def targets_in_words(targets: dict[str, Any], quoted: Callable[[str], str] = str) -> str:
    """The `targets` of a described entry: `varopt, k = 64, seed 7, temperature 2, 24 ids certain`.

    quoted: how names that somebody else gave are shown.
    """
    text = f"{targets['method']}, k = {targets['k']}" if targets["k"] else "no ids, the label alone"
    if targets.get("sample_size") == "threshold":
        text += " or fewer by a threshold"
    if targets["top_p"] is not None:
        text += f", rows cut at a cumulative mass of {targets['top_p']:g}"
    if targets["seed"] is not None:
        text += f", seed {targets['seed']}, temperature {targets['temperature']:g}"
    if targets["head_ids"] is not None:
        text += f", {counted(targets['head_ids'], 'id')} certain"
    if targets.get("sampling") == "pivotal":
        text += ", pivotal sampling"
    if targets.get("order") == "embeddings":
        text += ", in the order of the teacher's embeddings"
    for earlier in targets.get("shrunk_from") or ():
        text += f", sampled from a sample of {counted(earlier['k'], 'id')} (seed {earlier['seed']})"
    if targets.get("positions") in ("trained", "some"):
        text += f", at {targets['positions']} positions"
    if targets.get("sources"):
        text += f", in documents of {', '.join(map(quoted, targets['sources']))}"
    return text


def stored_in_words(entry: dict[str, Any]) -> str:
    """What a described entry stores: `format 2: ids, log-probs of the certain ones, mass outside them, entropy`."""
    targets = Targets.model_validate(entry["targets"])
    if not targets.k:
        return f"format {entry['format_version']}: log-probs of the text's own tokens"
    fields = [name for name in TARGET_FIELDS if targets.has(name)]
    if targets.method == "top-k":
        fields = [name for name in fields if name != "sampled-logprobs"]
    mass = "mass outside them" if targets.has("tail") else "mass outside them not known"
    return f"format {entry['format_version']}: " + ", ".join(["ids", "log-probs of the certain ones", mass, *fields])


def losses_in_words(entry: dict[str, Any]) -> str:
    """The losses that the targets of a described entry serve."""
    stored = Targets.model_validate(entry["targets"])
    if not stored.k:
        return "lightning-opd, where the text is rollouts of the student"
    if not stored.has("tail"):
        return "forward KL with tail renormalise"
    found = []
    if stored.method == "varopt":
        found.append(f"forward KL with tail sampled, at temperature {stored.temperature:g}")
    if entry["made"] == "projected" and stored.method == "top-k":
        return "every divergence with tail bucket, at temperature 1, of ids whose mass is a lower bound"
    if stored.method == "top-k" or stored.has("sampled-logprobs"):
        temperature = "any temperature from 1 on" if stored.has("half-tail") else "temperature 1"
        which = "every divergence" if stored.method == "top-k" else "every divergence but tail-aware-kl"
        found.append(f"{which} with tail bucket, at {temperature}")
    return "; ".join(found)


_MADE = {
    "cached": "by its teacher",
    "served": "by its teacher behind a server",
    "imported": "from somebody else's file",
    "projected": "from an entry in another vocabulary",
    "recompressed": "from another entry, without its teacher",
}


def made_in_words(entry: dict[str, Any]) -> str:
    """How the targets of a described entry were made, of which version 1 knows whether from another entry."""
    return _MADE[entry["made"] or ("recompressed" if entry["derived_from"] else "cached")]


_VALUES = {
    "logprobs": "log-probs over the vocabulary",
    "probabilities": "probabilities over the vocabulary",
    "unnormalised": "numbers without a normaliser, made log-probs among the ids of a row",
    "dense": "whole distributions",
}
_READINGS = {"after": "the token that follows", "of": "their own token"}


def imported_in_words(found: dict[str, Any]) -> list[str]:
    """What an entry's `imported_from` says: files, numbers, which token rows are about and on what evidence."""
    files, alignment = found["files"], found["alignment"]
    more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
    given = ", as was said" if alignment["given"] else ""
    lines = [
        f"{found['format']}: {files[0]['name']} (sha256 {files[0]['sha256'][:16]}…){more}",
        f"values: {_VALUES[found['values']]}"
        + ("" if found.get("error_nats") is None else f", within {found['error_nats']:g} nats"),
        f"rows are about {_READINGS[alignment['reading']]}{given}: mean log-prob {alignment['after_nats']:.3f} of the "
        f"token after, {alignment['of_nats']:.3f} of the own, in {counted(alignment['rows'], 'row')}",
    ]
    if found["dropped_ids"]:
        lines.append(
            f"left out: {counted(found['dropped_ids'], 'id')}, at most {found['dropped_mass']:.2g} of a row's mass"
        )
    return [*lines, *found["decisions"]]


def projected_in_words(found: dict[str, Any], positions: int) -> list[str]:
    """What an entry's `projected_from` says: whose targets they are, where there are any, and what is uncertain."""

    def share(part: int, whole: int) -> str:
        return f"{100 * part / whole:.1f} %" if whole else "none"

    by_replies, gap = found.get("aligned") == "replies", found.get("outside_mass")
    right = [
        f"{share(found[kind]['right'], found[kind]['positions'])} of the {found[kind]['positions']:,} {kind} ones"
        for kind in ("certain", "uncertain")
    ]
    return [
        f"an entry (record {found['entry_sha256'][:16]}…) of a tokenizer of {counted(found['vocabulary_size'], 'id')} "
        f"(fingerprint {found['tokenizer_fingerprint'][:16]}…)",
        *(["aligned by the replies of conversations; two chat templates wrote what stands between them"] * by_replies),
        f"shared boundaries: {share(found['shared_positions'], positions)} of the positions, "
        f"{share(found['shared_trained_positions'], found['trained_positions'])} of those that the loss counts",
        f"first tokens of the ids that follow are those of the text for {' and '.join(right)}",
        f"mass of ids whose first token is uncertain: {found['uncertain_mass']:.4f} on average over "
        f"{counted(found['sampled_positions'], 'row')}; rows with more than {found['most_uncertain']:g} are left out",
        *(
            []
            if gap is None
            else [f"probabilities are lower bounds: those of a row lack {gap:.4f} at most, on average"]
        ),
    ]


def origin_in_words(entry: dict[str, Any]) -> list[str]:
    """What a described entry that no teacher made says of what it was made from."""
    projected, imported = entry["projected_from"], entry["imported_from"]
    lines = [] if projected is None else projected_in_words(projected, entry["positions"])
    return lines + ([] if imported is None else imported_in_words(imported))


def windowing_in_words(windowing: dict[str, Any]) -> str:
    """The `windowing` of a described entry: `128 tokens every 64, across documents`."""
    text = f"{counted(windowing['context_tokens'], 'token')} every {windowing['stride_tokens']:,}"
    text += ", within documents" if windowing["isolate_documents"] else ", across documents"
    return text if windowing.get("begin_id") is None else f"{text}, each begun with BOS"
