"""Descriptions from `logit_cache.inspect` as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from storage.progress import duration

if TYPE_CHECKING:
    from logit_cache.status import EntryStatus


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A line for each row, cells below one another: the first to the left, the others to the right."""
    first, *others = (max(map(len, cells)) for cells in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]


def cache_text(found: dict[str, Any]) -> str:
    """A cache on a screen: one block for the stream, one for each teacher."""
    corpus, tokenizer = found["corpus"], found["tokenizer"]
    sources = ", ".join(source["name"] for source in corpus["sources"][:4])
    more = len(corpus["sources"]) - 4
    lines = [
        f"{found['url']}  (format {found['format_version']})",
        f"  tokens      {corpus['tokens']:,} in {corpus['documents']:,} documents"
        + ("" if corpus["complete"] else ", INCOMPLETE: run logit-cache tokenize again")
        + ("" if corpus["tokens_included"] else ", not in here: shared without its tokens"),
        f"  text        {corpus['text_bytes']:,} bytes, {corpus['text_bytes_per_token']:.2f} per token",
        f"  sources     {sources}{f' and {more} more' if more > 0 else ''}",
        f"  tokenizer   {tokenizer['vocabulary_size']:,} ids, fingerprint {tokenizer['fingerprint'][:16]}…",
    ]
    if corpus["has_loss_mask"]:
        lines.append("  loss mask   yes")
    for name, entry in found["teachers"].items():
        lines += ["", *_entry_lines(name, entry)]
    if not found["teachers"]:
        lines += ["", "  no teacher yet: run cache-logits"]
    return "\n".join(lines)


def _entry_lines(name: str, entry: dict[str, Any]) -> list[str]:
    windowing, targets = entry["windowing"], entry["targets"]
    share = 100 * entry["positions_cached"] / entry["positions"]
    state = "complete" if entry["complete"] else f"{share:.1f} % cached, first missing {entry['missing'][0]}"
    made_of = [
        f"{member['source']} ({member['architecture']}, {member['parameters']:,} parameters, {member['dtype']})"
        for member in entry["teacher"]
    ]
    if entry["combine"] != "single":
        shares = zip(entry["weights"], made_of, strict=True)
        made_of = [f"{entry['combine']} of " + " and ".join(f"{share:g} {member}" for share, member in shares)]
    digests = ", ".join(f"{member['weights_sha256'][:16]}…" for member in entry["teacher"])
    lines = [
        f"teacher {name}: {made_of[0]}",
        f"  coverage    {entry['positions_cached']:,} of {entry['positions']:,} positions, {state}",
        f"  targets     {targets['method']}, k = {targets['k']}, windows of {windowing['context_tokens']} tokens every "
        f"{windowing['stride_tokens']}{', documents isolated' if windowing['isolate_documents'] else ''}",
        f"  weights     sha256 {digests}",
    ]
    if entry["positions_cached"]:
        lines.append(
            f"  size        {entry['stored_bytes']:,} bytes, {entry['bytes_per_token']:.1f} per token, "
            f"{entry['bytes_per_kept_id']:.2f} per id ({entry['encoding']['kind']})"
        )
    if entry["positions_per_second"]:
        device = entry["execution"]["device_type"]
        lines.append(f"  made at     {entry['positions_per_second']:,.0f} positions/s per worker on {device}")
    summary = entry["summary"]
    if summary:
        if summary["cross_entropy"] is not None:
            lines.append(
                f"  teacher     loss {summary['cross_entropy']:.4f} nats, perplexity {summary['perplexity']:.2f}, "
                f"mean entropy {summary['entropy']:.3f} nats"
            )
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
    residual, divergences, size = found["residual_mass"], found["divergences"], found["size"]
    even, shaped = divergences["bucket"]["forward"], divergences["bucket-unigram"]["forward"]

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
        f"    KL(full, stored)  {_nats(even)} with an even tail, {_nats(shaped)} with one like the text's; "
        f"quantisation alone {found['quantisation']:.1e} nats",
        f"    KL of the means   {', '.join(means)}",
        "    gradient to dense, degrees, of all positions / of their mean; uniform student | tempered student:",
    ]
    for name, angles in found["gradients"].items():
        lines.append(f"      {name:<15} {degrees(angles['uniform']):>12} | {degrees(angles['tempered']):>12}")
    if found["calibration"]:
        stored = ", ".join(f"{name} {100 * value:.1f}" for name, value in found["calibration"]["stored"].items())
        lines.append(f"    calibration error teacher {100 * found['calibration']['full']:.1f} %; {stored}")
    lines.append(
        f"    bytes             {size['bytes_per_id']:.2f} for each of {size['mean_kept']:.1f} ids, "
        f"{size['overhead_bytes_per_token']:.1f} beside them per token"
    )
    for title, key in (("mass outside", "k_for_residual_mass"), ("KL, even tail", "k_for_forward")):
        needed = ", ".join(
            f"{item['at_most']:g}: {item['k']:,}"
            + (f" (~{item['bytes_per_token']:.0f} bytes)" if item["bytes_per_token"] is not None else "")
            for item in found[key]
        )
        lines.append(f"    k for a {title} of at most  {needed}")
    return lines


def _nats(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"


def position_text(found: dict[str, Any]) -> str:
    """One position on a screen."""
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
        lines += [
            "",
            f"teacher {name}: entropy {row['entropy']:.3f} nats, head mass {row['head_mass']:.4f}, "
            f"tail {row['tail_mass']:.2e}{label}",
        ]
        lines += [f"  {item['probability']:8.5f}  {item['id']:>7}  {item['text']!r}" for item in row["top"]]
    return "\n".join(lines)


def verification_text(found: dict[str, Any], repair: bool) -> str:
    """What `verify` found, most important first."""
    lines = [f"damaged: {problem}" for problem in found["problems"]]
    lines += [f"leftover, never read: {address}" for address in found["leftovers"]]
    for group, ranges in found["missing"].items():
        lines.append(f"not complete: {group} lacks {len(ranges)} ranges, the first {ranges[0][0]}..{ranges[0][1]}")
    lines += [f"removed: {address}" for address in found["repaired"]]
    size = f"{found['objects']:,} objects, {found['bytes']:,} bytes"
    if found["sound"]:
        lines.append(f"sound: {size}")
    elif repair:
        lines.append(f"{size}; run the commands that made the cache again to compute what was damaged")
    else:
        lines.append(f"{len(found['problems'])} damaged of {size}; --repair re-opens damaged shards")
    return "\n".join(lines)


def delivery_text(found: dict[str, Any]) -> str:
    """What `push` or `pull` copied, and what the source did not have."""
    teachers = ", ".join(found["teachers"]) or "no teacher"
    tokens = "with" if found["tokens_included"] else "without"
    lines = [
        f"{found['url']}: {teachers}, {tokens} tokens: {found['copied']:,} objects copied "
        f"({found['copied_bytes']:,} bytes), {found['kept']:,} were there"
    ]
    for group, ranges in found["missing"].items():
        lines.append(
            f"not complete at the source: {group} lacks {len(ranges)} ranges, the first {ranges[0][0]}..{ranges[0][1]}"
        )
    return "\n".join(lines)


def status_text(url: str, entries: Sequence[EntryStatus]) -> str:
    """How far each entry of a cache is."""
    if not entries:
        return f"{url}: no teacher entry yet"
    return "\n\n".join("\n".join(_status_lines(entry)) for entry in entries)


def _status_lines(entry: EntryStatus) -> list[str]:
    lines = [f"teacher {entry.name}: {_how_far(entry)}"]
    if entry.state == "not known":
        return [
            *lines,
            f"  shards      {entry.shards:,}; which ones are there is not known: the server cannot list them",
        ]
    begun = (
        ""
        if entry.complete
        else "; begun without a receipt: "
        + ("not known (too many objects to list)" if entry.shards_begun is None else f"{entry.shards_begun:,}")
    )
    lines += [
        f"  shards      {entry.shards_done:,} done, {entry.shards_missing:,} missing"
        + (f", {entry.shards_in_flight:,} in flight" if entry.shards_in_flight else "")
        + begun,
        f"  positions   {entry.positions_done:,} of {entry.positions:,}",
    ]
    if entry.positions_per_second is not None:
        when = "at the end, " if entry.complete else ""
        own = entry.positions_per_second_per_worker
        lines.append(
            f"  rate        {when}{entry.positions_per_second:,.0f} positions/s, all workers together"
            + (f"; {own:,.0f} by the seconds of a worker" if own is not None else "")
        )
    if entry.seconds_left is not None:
        lines.append(f"  time left   {duration(entry.seconds_left)} at that rate")
    if entry.last_commit is not None and entry.seconds_since_last_commit is not None:
        ago = duration(entry.seconds_since_last_commit)
        hosts = [f"{_printable(item.host)} ({item.shards:,} shards)" for item in entry.hosts[:8]]
        more = f" and {len(entry.hosts) - 8} more" if len(entry.hosts) > 8 else ""
        lines += [
            f"  last shard  {ago} ago, {entry.last_commit}",
            f"  hosts       {', '.join(hosts)}{more}, of the last {entry.receipts_read:,} receipts",
        ]
        if entry.state == "stalled":
            lines.append(
                f"  stalled?    no shard for {ago}, where one takes {duration(entry.shard_seconds or 0)}: if its "
                f"workers have ended, run the same cache-logits command again"
            )
    if entry.shards_failed:
        lines.append(f"  given up    {entry.shards_failed:,} shards; the same cache-logits command tries them again")
        for note in entry.failed:
            last = (note.error.strip().splitlines() or ["?"])[-1]
            lines.append(
                f"    shard {note.shard:,} after {note.attempts:,} attempts on {_printable(note.host)}: "
                f"{_printable(last)[:300]}"
            )
    return lines


def status_line(entry: EntryStatus) -> str:
    """The same in one line."""
    text = f"{entry.name}: {_how_far(entry)}"
    if entry.shards_done is not None:
        text += f", {entry.shards_done:,} of {entry.shards:,} shards"
    if not entry.complete and entry.positions_per_second is not None:
        text += f", {entry.positions_per_second:,.0f} positions/s"
    if entry.seconds_left is not None:
        text += f", {duration(entry.seconds_left)} left"
    if entry.shards_failed:
        text += f", {entry.shards_failed:,} given up"
    if entry.state == "stalled" and entry.seconds_since_last_commit is not None:
        text += f", stalled? no shard for {duration(entry.seconds_since_last_commit)}"
    return text


def _how_far(entry: EntryStatus) -> str:
    if entry.share is None:
        return "not complete"
    # 99.97 % is not all of it.
    return "complete" if entry.complete else f"{math.floor(1000 * entry.share) / 10:.1f} %"


def _printable(text: str) -> str:
    """A name that another lab wrote, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:64])


def forecast_text(found: dict[str, Any]) -> str:
    """What `plan` predicts."""
    speed, size, memory, probe = found["speed"], found["size"], found["memory"], found["probe"]
    time, opening, layout = found["time"], found["opening"], found["entry"]["layout"]
    workers = f"{time['workers']} worker" + ("s" if time["workers"] > 1 else "")
    device = "" if memory["device_bytes"] is None else f" and {_size(memory['device_bytes'])} on the device"
    lines = [
        f"{found['cache']}: {found['tokens']:,} tokens"
        + ("" if found["tokens"] == found["tokens_in_the_cache"] else f" (it has {found['tokens_in_the_cache']:,})"),
        f"  probe       {probe['positions']:,} positions ({probe['pieces']} x "
        f"{probe['positions'] // probe['pieces']:,}) on {probe['device']}, not kept",
        f"  speed       {speed['positions_per_second']:,.0f} positions/s a worker, "
        f"{1e6 * speed['cpu_seconds_per_token']:,.1f} µs of processor time per token",
        f"  time        {_hours(time['hours'])} with {workers}, each like this one and as free as it is now; "
        f"{_hours(time['cpu_hours'])} of processor time in all",
        f"  size        {_size(size['bytes'])}, {size['bytes_per_token']:.1f} bytes per token",
        f"  objects     {size['shards']:,} shards of {layout['shard']:,} positions: {size['objects']:,} objects and "
        f"{size['receipts']:,} receipts; the largest {_size(size['largest_object_bytes'])}, never above "
        f"{_size(size['largest_object_bound_bytes'])}",
        f"  opening     an index of {_size(opening['index_bytes'])}: about {opening['cpu_seconds']:.2g} s and "
        f"{_size(opening['memory_bytes'])} in Python; before it is complete, requests to "
        f"list it on S3: {opening['listing_requests_while_incomplete']:,}",
        f"  memory      {_size(memory['process_bytes'])} seen in the probe{device}; the rows of a shard are "
        f"{_size(memory['shard_rows_bytes'])}, and a worker holds a few times that",
    ]
    return "\n".join([*lines, "", *_break_even_lines(found["break_even"])])


def _break_even_lines(found: dict[str, Any]) -> list[str]:
    epochs = found["runs"] * found["epochs"]
    student, forward = found["student"], found["teacher_forward_seconds_per_token"]
    if student is None:
        compared = (
            f"the teachers' share alone, {1e6 * forward:,.1f} µs per token of a live step; what the student itself "
            f"takes is not compared (--student does)"
        )
    else:
        compared = (
            f"a step of {student['model']} ({student['parameters']:,} parameters, {student['windows']} windows): "
            f"{1e6 * student['live']:,.1f} µs per token with the teachers beside it, {1e6 * student['cached']:,.1f} "
            f"from the cache"
        )
    paid = found["epochs_until_paid"]
    return [
        f"against live distillation, in {found['paid_for']}: {compared}",
        f"  caching     {_hours(found['caching_hours'])}",
        f"  {found['runs']} x {found['epochs']:g} epochs from the cache, caching included: "
        f"{_hours(found['cached_hours'])}; live: {_hours(found['live_hours'])}",
        "  the cache never pays for itself: its step is not cheaper than the live one"
        if paid is None
        else f"  the cache has paid for itself after {paid:.1f} epochs in all"
        + ("" if paid <= epochs else f", more than the {epochs:g} that are planned"),
    ]


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def _hours(hours: float) -> str:
    return duration(3600 * hours) if hours < 48 else f"{hours / 24:,.1f} days"
