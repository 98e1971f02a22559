"""The data set card of a shared cache: README.md in the hub's card format, written for people, not for programs.

Text in a cache's records (names of sources, teachers and revisions) comes from whoever made the cache and is not
trusted. It is rendered as code spans that it cannot close, on one line, without control characters; the front matter
and the commands contain none of it.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from logit_cache.describe import describe_cache
from storage.cache.reader import LogitCache
from storage.errors import InputError
from storage.format.manifest import TeacherEntry

_LICENSE = re.compile(r"^[a-z0-9][a-z0-9.+-]{0,63}$")
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)
_MOST_SOURCES = 20
_MOST_TEXT = 200
_EXAMPLE_ROWS = 8


def card_text(cache: LogitCache, *, license: str | None = None) -> str:
    """The card of a cache: front matter, contents and gaps, how to open it, how to check it.

    `license` is an identifier of the hub's list (`apache-2.0`, `cc-by-4.0`, `other`, …); None becomes `unknown`. Reads
    records, receipts and their indexes, no array. Raises InputError for a licence that is not an identifier, and the
    errors of opening the entries (CorruptCache, FormatError, StoreUnavailable).
    """
    if license is not None and not _LICENSE.match(license):
        raise InputError(
            f"licence {license!r}: expected an identifier of the hub's list, such as apache-2.0, cc-by-4.0 or other"
        )
    found = describe_cache(cache)
    blocks = [
        _front_matter(found, license),
        f"# {_title(found)}",
        _introduction(found),
        "## Token stream",
        _stream(found),
        "## Teachers",
        *[_entry(name, entry, cache.teacher(name).entry) for name, entry in found["teachers"].items()],
        *([] if found["teachers"] else ["None yet: `cache-logits` adds one."]),
        "## Reading it",
        *_reading(found),
        "## Checking it",
        _checking(found),
        "## Licence",
        f"`{license}`." if license is not None else "Not specified by whoever shared this cache.",
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(found: dict[str, Any], license: str | None) -> str:
    from huggingface_hub import DatasetCardData

    tokens = found["corpus"]["tokens"]
    data: dict[str, Any] = {
        "license": license if license is not None else "unknown",
        "pretty_name": _title(found),
        "tags": ["logit-cache", "knowledge-distillation", "zarr"],
        "task_categories": ["text-generation"],
        "size_categories": [next((name for bound, name in _SIZES if tokens < bound), "n>1T")],
    }
    return f"---\n{DatasetCardData(**data).to_yaml(original_order=list(data))}\n---"


def _title(found: dict[str, Any]) -> str:
    """Made of entry names, whose characters and length the format restricts; never of free text."""
    names = list(found["teachers"])
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"Next-token distributions of {shown}" if names else "A token stream for distillation"


def _introduction(found: dict[str, Any]) -> str:
    entries = [entry for entry in found["teachers"].values() if entry["positions_cached"]]
    size = f", {sum(entry['stored_bytes'] for entry in entries):,} bytes" if entries else ""
    return (
        f"A [Zarr v3](https://zarr.dev) group in format {found['format_version']} of logit-cache: the next-token "
        f"distributions of teacher models at each of {found['corpus']['tokens']:,} positions of a text{size}. Student "
        f"models are distilled from it without running a teacher. It contains JSON and arrays, and no code."
    )


def _stream(found: dict[str, Any]) -> str:
    corpus, tokenizer = found["corpus"], found["tokenizer"]
    sources = [
        f"  - {_quoted(source['name'])}: {source['documents']:,} documents, {source['text_bytes']:,} bytes"
        for source in corpus["sources"][:_MOST_SOURCES]
    ]
    if len(corpus["sources"]) > _MOST_SOURCES:
        sources.append(f"  - and {len(corpus['sources']) - _MOST_SOURCES:,} more, in `zarr.json`")
    lines = [
        f"- {corpus['tokens']:,} tokens in {corpus['documents']:,} documents; {corpus['text_bytes']:,} bytes of text, "
        f"{corpus['text_bytes_per_token']:.2f} per token",
        f"- sha256 of the stream (tokens, document starts, loss mask): `{corpus['stream_sha256']}`",
        "- loss mask: "
        + ("yes, it marks the tokens to train on" if corpus["has_loss_mask"] else "none, every token counts"),
        f"- tokenizer: {tokenizer['vocabulary_size']:,} ids, in the folder `tokenizer`; "
        f"fingerprint `{tokenizer['fingerprint']}`, vocabulary `{tokenizer['vocabulary_sha256']}`",
        *(["- **incomplete**: parts of the token stream are missing"] if not corpus["complete"] else []),
        "- sources:" if sources else "- sources: not recorded",
        *sources,
    ]
    return "\n".join(lines) + "\n\n" + _disclosure(found)


def _disclosure(found: dict[str, Any]) -> str:
    if found["corpus"]["tokens_included"]:
        return (
            "**The text is included**: it can be decoded from the tokens with the tokenizer, so its licence and its "
            "privacy apply to the cache."
        )
    labelled = any(entry["targets"]["has_label_logprob"] for entry in found["teachers"].values())
    return (
        "**The text is not included, and still leaks.** The tokens were left out; whoever has the same text attaches "
        "it by its digest. But a teacher that knows a text predicts its words: the most probable id alone is "
        "often the next token"
        + (", and `label_logprob` identifies it wherever its id is stored. " if labelled else ". ")
        + "Do not share targets of a text that must stay secret."
    )


def _entry(name: str, entry: dict[str, Any], record: TeacherEntry) -> str:
    targets, windowing = entry["targets"], entry["windowing"]
    lines = [f"### {name}", ""]
    if entry["combine"] == "single":
        lines += _member("- model: ", entry["teacher"][0])
    else:
        lines.append(f"- {entry['combine']} of {len(entry['teacher'])} models that read the same windows:")
        for weight, member in zip(record.teacher.weights, entry["teacher"], strict=True):
            lines += _member(f"  - weight {weight:g}: ", member)
    share = entry["positions_cached"] / entry["positions"]
    sampled = "" if targets["seed"] is None else f", seed {targets['seed']}, temperature {targets['temperature']:g}"
    pruned = "" if targets["top_p"] is None else f", rows cut at a cumulative mass of {targets['top_p']:g}"
    lines += [
        f"- targets: {targets['method']}, k = {targets['k']}{pruned}{sampled}"
        + ("" if targets["has_label_logprob"] else "; without `label_logprob`"),
        f"- coverage: {entry['positions_cached']:,} of {entry['positions']:,} positions ({share:.2%})",
        f"- windows: {windowing['context_tokens']} tokens, every {windowing['stride_tokens']}"
        + (", within documents" if windowing["isolate_documents"] else ", across documents")
        + (", each begun with BOS" if windowing.get("begin_id") is not None else ""),
        f"- encoding: {_encoding(entry['encoding'])}; {entry['layout']['compression']}, shards of "
        f"{entry['layout']['shard']:,} positions, chunks of {entry['layout']['chunk']:,}",
        f"- sha256 of this entry's record: `{entry['record_sha256']}`",
    ]
    if record.derived_from is not None:
        lines.append(
            f"- derived, not computed by its teacher; sha256 of the source entry's record: `{record.derived_from}`"
        )
    if entry["bytes_per_token"] is not None:
        lines.append(f"- size: {entry['stored_bytes']:,} bytes, {entry['bytes_per_token']:.1f} per token")
    if entry["summary"] is not None:
        lines += _summary(entry["summary"])
    if entry["fidelity"] is not None:
        lines.append(_fidelity(entry["fidelity"]))
    return "\n".join(lines)


def _member(bullet: str, member: dict[str, Any]) -> list[str]:
    revision = "" if member["revision"] is None else f", revision {_quoted(member['revision'])}"
    code = "; **made with the model's own code** (`trust_remote_code`)" if member["trust_remote_code"] else ""
    below = " " * (bullet.index("-") + 2)
    return [
        f"{bullet}{_quoted(member['source'])}{revision}, {_quoted(member['architecture'])}, "
        f"{member['parameters']:,} parameters, run in {member['dtype']}{code}",
        f"{below}- weights sha256 `{member['weights_sha256']}`",
        f"{below}- configuration sha256 `{member['config_sha256']}`",
    ]


def _encoding(encoding: dict[str, Any]) -> str:
    if encoding["kind"] == "codes":
        return f"log-probs in whole steps of {encoding['step_nats']:g} nats"
    return "log-probs as float32"


def _summary(summary: dict[str, Any]) -> list[str]:
    residual = max(0.0, 1 - summary["head_mass"])
    lines = [
        f"- stored head mass: {summary['head_mass']:.4f} on average, so {residual:.4f} is outside the stored ids; "
        f"below 0.5 at {summary['positions_with_head_mass_below_0.5']:.2%} of the positions, "
        f"below 0.9 at {summary['positions_with_head_mass_below_0.9']:.2%}, "
        f"below 0.99 at {summary['positions_with_head_mass_below_0.99']:.2%}",
        f"- entropy: {summary['entropy']:.3f} nats on average",
    ]
    if summary["cross_entropy"] is not None:
        lines.append(
            f"- loss on this text: {summary['cross_entropy']:.4f} nats per token, "
            f"perplexity {summary['perplexity']:.2f}"
        )
    return lines


def _fidelity(report: dict[str, Any]) -> str:
    residual, bucket = report["residual_mass"], report["divergences"]["bucket"]["forward"]
    tail = "sampled" if "sampled" in report["gradients"] else "bucket"
    angle = report["gradients"][tail]["tempered"]["mean"]
    return (
        f"- fidelity, measured against the full distributions at {report['positions']:,} positions: "
        f"{residual['mean']:.4f} of the mass outside the stored ids, at most {residual['q95']:.4f} at 95 % of them"
        + ("" if bucket is None else f"; KL(full, stored with an even tail) {bucket:.4f} nats")
        + ("" if angle is None else f"; mean gradient with tail {tail} {angle:.1f} degrees from the dense one")
        + "; the full report is the entry's `fidelity.json`"
    )


def _reading(found: dict[str, Any]) -> list[str]:
    example = next(
        ((name, entry, start) for name, entry in found["teachers"].items() if (start := _first(entry)) is not None),
        None,
    )
    if example is None:
        return ["No teacher targets are cached yet."]
    name, entry, start = example
    stop = min(start + _EXAMPLE_ROWS, entry["positions"])
    if entry["missing"]:
        stop = min([stop, *(first for first, _ in entry["missing"] if first > start)])
    rows = f"{start}:{stop}"
    if entry["encoding"]["kind"] == "codes":
        values = [
            'step = entry.attrs["logit_cache"]["encoding"]["step_nats"]',
            f'codes = entry["logprob_codes"][{rows}].astype(int)',
            f'logprobs = entry["top_logprob"][{rows}][:, None] - step * numpy.cumsum(codes, axis=1)',
        ]
    else:
        values = [f'logprobs = entry["logprobs"][{rows}]']
    plain = [
        "import numpy",
        "import zarr",
        "",
        'cache = zarr.open_group(".", mode="r")  # this folder, or a URL of it',
        f'entry = cache["teachers/{name}"]',
        f'token_ids = entry["token_ids"][{rows}]  # most probable first',
        *values,
        f'kept = entry["kept"][{rows}]  # number of valid columns of each row',
        f'tail = numpy.exp(entry["log_tail"][{rows}])  # the mass outside the certain ids',
    ]
    checked = [
        "from storage import LogitCache",
        "",
        'cache = LogitCache.open(".")  # this folder, or a URL of it',
        f'targets = cache.teacher("{name}").read({start}, {stop})',
        "targets.token_ids, targets.logprobs, targets.log_tail",
    ]
    return [
        "Row `t` is a teacher's distribution of token `t + 1` given its window up to token `t`. With logit-cache, "
        "which checks everything that it returns:",
        "```python\n" + "\n".join(checked) + "\n```",
        "With any Zarr v3 reader, which returns fill values (the largest integer, NaN) for missing rows: check first.",
        "```python\n" + "\n".join(plain) + "\n```",
    ]


def _first(entry: dict[str, Any]) -> int | None:
    """The first position that is cached, or None."""
    if not entry["positions_cached"]:
        return None
    missing = entry["missing"]
    return int(missing[0][1]) if missing and missing[0][0] == 0 else 0


def _checking(found: dict[str, Any]) -> str:
    commands = ["logit-cache verify . --deep  # every byte against the sha256 in its receipt"]
    if found["teachers"]:
        commands.append(
            f"logit-cache audit . --name {next(iter(found['teachers']))} --teacher MODEL"
            "  # runs the model again on random windows and compares with the stored targets"
        )
    return (
        "```console\n" + "\n".join(commands) + "\n```\n\n"
        "A receipt detects damage, but does not prove who wrote it. Where there is a `model.sig`, `logit-cache pull` "
        "with `--verify-key PUB.pem` checks its maker's signature of all receipts. This page is not signed, and no "
        "command relies on it."
    )


def _quoted(text: str) -> str:
    """Untrusted text as a Markdown code span: one line, printable, cut, behind a fence that it does not contain."""
    line = " ".join(text.split())
    shown = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c for c in line)
    if len(shown) > _MOST_TEXT:
        shown = shown[: _MOST_TEXT - 1] + "…"
    shown = shown or "(empty)"
    runs = {len(run) for run in re.findall("`+", shown)}
    fence = "`" * next(length for length in range(1, len(runs) + 2) if length not in runs)
    space = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{space}{shown}{space}{fence}"
