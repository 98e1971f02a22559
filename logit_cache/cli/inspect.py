"""`logit-cache inspect`: the contents of a cache, or of some positions."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from storage.errors import InputError, one_line_errors
from storage.files import check_output, write_output
from storage.text import columns, counted, printable, size
from student.cli_command import command, json_option


@command("logit-cache inspect run/train --at 1234\nlogit-cache inspect run/train --at 0:200 --html page.html")
@click.argument("url")
@click.option("--at", metavar="A[:B]", help="Show one position, or those from A on and before B, with tokens as text.")
@click.option("--html", metavar="FILE", help="Write the positions of --at as a page; an older one is replaced.")
@json_option()
def inspect(url: str, at: str | None, html: str | None, as_json: bool) -> None:
    """Show the contents of a cache: sizes, coverage, provenance, summaries, or single positions."""
    with one_line_errors():
        from storage import LogitCache

        if html is not None and (at is None or as_json):
            raise InputError("--html writes the positions of --at as a page: give --at A:B with it, and no --json")
        path = None if html is None else check_output(html, "--html")
        span = None if at is None else _span(at)
        cache = LogitCache.open(url)
        if span is None:
            from logit_cache.describe import describe_cache

            found: Any = describe_cache(cache, lengths=True)
            text = cache_text(found)
        elif path is None:
            from logit_cache.passage.positions import describe_positions
            from logit_cache.passage.token_text import TokenTexts

            each = describe_positions(cache, TokenTexts(cache), *span)
            found = each if ":" in str(at) else each[0]
            text = "\n\n".join(map(position_text, each))
        else:
            from logit_cache.report.page import passage_page

            write_output(path, passage_page(cache, *span))
            click.echo(f"{path}: written", err=True)
            return
        click.echo(json.dumps(found, indent=2) if as_json else text)


def _span(at: str) -> tuple[int, int]:
    """`5` is 5..6, `5:9` is 5..9, which excludes its end."""
    match = re.fullmatch(r"([0-9]{1,15})(?::([0-9]{1,15}))?", at)
    if match is None:
        raise InputError(f"--at {at}: expected a position, such as 1234, or a range A:B, such as 1200:1300")
    start = int(match[1])
    return start, start + 1 if match[2] is None else int(match[2])


def cache_text(found: dict[str, Any]) -> str:
    """A cache on a screen: one block for the stream, one for each teacher."""
    corpus, tokenizer = found["corpus"], found["tokenizer"]
    lines = [
        f"{found['url']}  (format {found['format_version']})",
        f"  tokens      {corpus['tokens']:,} in {counted(corpus['documents'], 'document')}"
        + ("" if corpus["complete"] else ", INCOMPLETE: run logit-cache tokenize again")
        + ("" if corpus["tokens_included"] else ", not in here: shared without its tokens"),
        f"  text        {counted(corpus['text_bytes'], 'byte')}, {corpus['text_bytes_per_token']:.2f} per token",
        *(f"  {line}" for line in source_lines(corpus["sources"], corpus.get("source_tokens"))),
        f"  tokenizer   {counted(tokenizer['vocabulary_size'], 'id')}, fingerprint {tokenizer['fingerprint'][:16]}…",
    ]
    made = {
        "begins with the tokenizer's BOS": corpus.get("begins_with_bos"),
        "chat template": corpus.get("template_sha256", "")[:16],
        "variables": corpus.get("template_variables"),
        "date": corpus.get("date"),
        "skipped rows": corpus.get("skipped_rows"),
        "rollouts of": _rollouts_text(corpus.get("rollouts")),
    }
    shown = [name if value is True else f"{name} {value}" for name, value in made.items() if value]
    if shown:
        lines.append(f"  text made   {', '.join(shown)}")
    if "document_tokens" in corpus:
        lines += [f"  {line}" for line in stream_lines(corpus)]
    for name, entry in found["teachers"].items():
        lines += ["", *_entry_lines(name, entry)]
    if not found["teachers"]:
        lines += ["", "  no teacher yet: run cache-logits"]
    # Sources, architectures and revisions are text of whoever made the cache.
    return "\n".join(map(printable, lines))


def _rollouts_text(found: dict[str, Any] | None) -> str | None:
    if found is None:
        return None
    return (
        f"{found['source']} (weights sha256 {found['weights_sha256'][:16]}…; temperature {found['temperature']:g}, "
        f"top-p {found['top_p']:g}, top-k {found['top_k']})"
    )


def source_lines(sources: list[dict[str, Any]], tokens: list[int] | None, most: int = 8) -> list[str]:
    """The first sources with their documents and, where they are known, tokens."""
    rows = [[source["name"], counted(source["documents"], "document")] for source in sources[:most]]
    for row, number in zip(rows, tokens or (), strict=False):
        row.append(counted(number, "token"))
    lines = columns(rows) if rows else ["not recorded"]
    if len(sources) > most:
        lines.append(f"and {len(sources) - most:,} more")
    return [f"{'' if number else 'sources':12}{line}" for number, line in enumerate(lines)]


def stream_lines(found: dict[str, Any]) -> list[str]:
    """Lengths of documents, and what is trained on, by `describe_stream`."""
    lengths, trained = found["document_tokens"], found["trained_tokens"]
    return [
        f"documents   {counted(lengths['median'], 'token')} in the median, 95 % at most "
        f"{lengths['percentile_95']:,}, the longest {lengths['longest']:,}",
        "trained on  all tokens" if trained is None else f"trained on  {counted(trained, 'token')}, by the loss mask",
    ]


def _entry_lines(name: str, entry: dict[str, Any]) -> list[str]:
    from logit_cache import describe

    state = "complete"
    if not entry["complete"]:
        first, last = entry["missing"][0]
        state = f"{100 * entry['positions_cached'] / entry['positions']:.1f} % cached, first missing {first}..{last}"
    made_of = [describe.member_in_words(member) for member in entry["teacher"]]
    if entry["combine"] != "single":
        shares = zip(entry["weights"], made_of, strict=True)
        made_of = [f"{entry['combine']} of " + " and ".join(f"{share:g} {member}" for share, member in shares)]
    kinds = ("weights_sha256", "adapter_sha256")
    digests = ", ".join(f"{member[kind][:16]}…" for member in entry["teacher"] for kind in kinds if member.get(kind))
    tokenizer = entry["teacher"][0].get("tokenizer")  # of a model behind a server
    weights = f"sha256 {digests}" if digests else f"not verified; tokenizer {tokenizer}" if tokenizer else "not known"
    with_targets, made = entry["positions_with_targets"], describe.made_in_words(entry)
    if entry["positions_per_second"]:
        device = entry["execution"]["device_type"]
        made += f", {entry['positions_per_second']:,.0f} positions/s per worker on {device}"
    lines = [
        f"teacher {name}: {made_of[0]}",
        f"  coverage    {entry['positions_cached']:,} of {entry['positions']:,} positions, {state}"
        + ("" if with_targets == entry["positions_cached"] else f"; targets at {with_targets:,} of them"),
        f"  targets     {describe.targets_in_words(entry['targets'])}, of {entry['vocabulary_size']:,} ids",
        f"  stored      {describe.stored_in_words(entry)}",
        f"  serves      {describe.losses_in_words(entry)}",
        f"  windows     {describe.windowing_in_words(entry['windowing'])}",
        f"  weights     {weights}",
        f"  made        {made}",
    ]
    of = describe.origin_in_words(entry)
    lines += [f"{'' if number else '  from':14}{line}" for number, line in enumerate(of)]
    if with_targets:
        per_target = f", {entry['bytes_per_target']:.1f} per position with targets"
        per_id = entry["bytes_per_kept_id"]
        lines.append(
            f"  size        {size(entry['stored_bytes'])}, {entry['bytes_per_token']:.1f} bytes per token"
            + ("" if with_targets == entry["positions_cached"] else per_target)
            + ("" if per_id is None else f", {per_id:.2f} per id")
            + f" ({entry['encoding']['kind']})"
        )
    summary = entry["summary"]
    if summary:
        known = [
            "" if summary["cross_entropy"] is None else f"loss {summary['cross_entropy']:.4f} nats",
            "" if summary["perplexity"] is None else f"perplexity {summary['perplexity']:.2f}",
            "" if summary["entropy"] is None else f"mean entropy {summary['entropy']:.3f} nats",
        ]
        if any(known):
            lines.append(f"  teacher     {', '.join(filter(None, known))}")
        if summary["head_mass"] is not None:
            lines.append(
                f"  head mass   mean {summary['head_mass']:.4f}; below 0.5 in "
                f"{100 * summary['positions_with_head_mass_below_0.5']:.1f} % of positions, below 0.9 in "
                f"{100 * summary['positions_with_head_mass_below_0.9']:.1f} %, below 0.99 in "
                f"{100 * summary['positions_with_head_mass_below_0.99']:.1f} %"
            )
    if entry["fidelity"]:
        lines += _fidelity_lines(entry["fidelity"])
    return lines


def _fidelity_lines(found: dict[str, Any]) -> list[str]:
    residual, divergences, stored = found["residual_mass"], found["divergences"], found["size"]

    def degrees(angle: dict[str, float | None]) -> str:
        return " / ".join("–" if value is None else f"{value:.1f}" for value in (angle["positions"], angle["mean"]))

    means = [
        f"{name} {item['mean_forward']:.4f}" + (f" (noise {item['mean_noise']:.4f})" if item["mean_noise"] else "")
        for name, item in divergences.items()
        if item["mean_forward"] is not None
    ]
    lines = [
        f"  fidelity    on {found['positions']:,} positions: mass outside the stored ids {residual['mean']:.4f} "
        f"(median {residual['q50']:.4f}, 95 % {residual['q95']:.4f}, at most {residual['maximum']:.4f})",
        f"    KL(full, stored)  {_distances(divergences)}quantisation alone {found['quantisation']:.1e} nats",
    ]
    if means:
        lines.append(f"    KL of the means   {', '.join(means)}")
    if found["gradients"]:
        lines.append(
            "    gradient to dense, degrees, of all positions / of their mean; uniform student | tempered student:"
        )
    angles = [
        (name, degrees(angle["uniform"]), "|", degrees(angle["tempered"])) for name, angle in found["gradients"].items()
    ]
    lines += [f"      {line}" for line in columns(angles)]
    if found["calibration"]:
        errors = [f"{name} {100 * value:.1f}" for name, value in found["calibration"]["stored"].items()]
        full = f"teacher {100 * found['calibration']['full']:.1f} %"
        lines.append(f"    calibration error {'; '.join([full, *([', '.join(errors)] if errors else [])])}")
    lines.append(
        f"    bytes             {stored['bytes_per_id']:.2f} for each of {stored['mean_kept']:.1f} ids, "
        f"{stored['overhead_bytes_per_token']:.1f} beside them per token"
    )
    for title, key in (("mass outside", "k_for_residual_mass"), ("KL, even tail", "k_for_forward")):
        needed = ", ".join(
            f"{item['at_most']:g}: {item['k']:,}"
            + (f" (~{item['bytes_per_token']:.0f} bytes)" if item["bytes_per_token"] is not None else "")
            for item in found[key]
        )
        lines.append(f"    k for a {title} of at most  {needed}")
    return lines


def _distances(divergences: dict[str, Any]) -> str:
    """KL(full, stored) of the bucket; none where it is no treatment of these targets."""
    if "bucket" not in divergences:
        return ""
    even, shaped = (
        "infinite" if value is None else f"{value:.4f}"
        for value in (divergences[name]["forward"] for name in ("bucket", "bucket-unigram"))
    )
    return f"{even} with an even tail, {shaped} with one like the text's; "


def position_text(found: dict[str, Any]) -> str:
    following = found["next"]
    lines = [
        f"position {found['position']}",
        f"  context  …{found['context']!r}",
        "  next     "
        + (f"{following['text']!r} (id {following['id']})" if following else "none: the stream ends here"),
    ]
    for name, row in found["teachers"].items():
        if row is None:
            lines += ["", f"teacher {name}: not cached here yet"]
            continue
        label = "" if row["label_logprob"] is None else f", next token at {row['label_logprob']:.3f} nats"
        if not row["certain"] + row["sampled"]:
            found_here = "no ids stored" if row["without_ids"] else "no targets here"
            lines += ["", f"teacher {name}: {found_here}{label}"]
            continue
        masses = [f"{counted(row['certain'], 'certain id')} {row['certain_mass']:.4f}"]
        if row["sampled"]:
            weight = f"each stands for {row['sampled_weight']:.5f}"
            mass = "" if row["sampled_mass"] is None else f" {row['sampled_mass']:.4f}"
            masses.append(f"{counted(row['sampled'], 'sampled id')}{mass} ({weight})")
        if row["outside_mass"] is not None:
            masses.append(f"all others {row['outside_mass']:.2e}")
        entropy = "" if row["entropy"] is None else f" entropy {row['entropy']:.3f} nats"
        lines += ["", f"teacher {name}:{entropy}{label}", f"  mass     {', '.join(masses)}"]
        for item in row["top"]:
            probability = f"{'–':>8}" if item["probability"] is None else f"{item['probability']:8.5f}"
            kind = "sampled  " if item["sampled"] else ""
            lines.append(f"  {probability}  {item['id']:>7}  {kind}{item['text']!r}")
    return "\n".join(lines)
