"""Teachers, distilled student and control side by side: a table for a terminal, and one page with the curves."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logit_cache.text import columns

_HEAD = ("", "parameters", "tokens seen", "held-out loss", "perplexity", "ECE", "KL to teachers")


@dataclass(frozen=True)
class Comparison:
    """Results of the demo: `entries` as of `logit_cache.describe.describe_entry`, others training reports as JSON."""

    title: str
    tokens: int
    vocabulary_size: int
    kept_ids: int
    entries: dict[str, dict[str, Any]]
    teachers: dict[str, dict[str, Any]]
    student: dict[str, Any]
    control: dict[str, Any]

    def model_rows(self) -> list[tuple[str, ...]]:
        """One row per model, with the columns of `_HEAD`. Losses in nats per token."""
        named = [(f"teacher {name}", report) for name, report in self.teachers.items()]
        named += [("student, distilled", self.student), ("student, without distillation", self.control)]
        return [(name, *_model_cells(report)) for name, report in named]

    def cache_rows(self) -> list[tuple[str, ...]]:
        """One row per teacher entry: bytes per token and per id, positions per second, mean head mass."""
        return [
            (
                name,
                f"{entry['bytes_per_token']:.1f}",
                f"{entry['bytes_per_kept_id']:.2f}",
                f"{entry['positions_per_second']:,.0f}" if entry["positions_per_second"] else "not measured",
                f"{entry['summary']['head_mass']:.4f}",
            )
            for name, entry in self.entries.items()
        ]

    def verdict(self) -> str:
        """Which student is better and by how much, in two sentences."""
        distilled = self.student["held_out"]["cross_entropy"]
        control = self.control["held_out"]["cross_entropy"]
        best = min(self.teachers.items(), key=lambda item: item[1]["held_out"]["cross_entropy"])
        best_loss = best[1]["held_out"]["cross_entropy"]
        gain = control - distilled
        if abs(gain) < 0.005:
            first = "Distillation made no difference here"
        else:
            first = f"The student {'with' if gain > 0 else 'without'} distillation is better"
        teacher = "beats" if distilled < best_loss else "does not reach"
        return (
            f"{first}: held-out loss {distilled:.4f} with it, {control:.4f} without ({-gain:+.4f} nats per token; "
            f"one seed, same steps and order of data). It {teacher} the better teacher ({best[0]}, {best_loss:.4f})."
        )

    def kl_is(self) -> str:
        """How the held-out KL relates to the dense one, as the end of a sentence."""
        if any(item["lower_bound"] for item in self.student["held_out"]["kl"].values()):
            return "a lower bound, as all ids beyond the stored ones count as one outcome"
        return "estimated from the stored sample of the teachers' ids, without bias"

    def table(self) -> str:
        """Verdict and tables as text for a terminal."""
        cache_head = ("cache", "bytes/token", "bytes/id", "positions/s", "mean head mass")
        return "\n".join(
            [
                f"{self.tokens:,} tokens, vocabulary {self.vocabulary_size:,}, {self.kept_ids} ids stored per position",
                "",
                *_aligned(cache_head, self.cache_rows()),
                "",
                *_aligned(_HEAD, self.model_rows()),
                "",
                self.verdict(),
                f"KL is in nats per token, {self.kl_is()}.",
            ]
        )


def _model_cells(report: dict[str, Any]) -> tuple[str, ...]:
    held_out = report["held_out"]
    kl = ", ".join(f"{name} {item['nats']:.3f}" for name, item in held_out["kl"].items())
    return (
        f"{report['parameters'] / 1e6:.2f}M",
        f"{report['tokens_seen']:,}",
        f"{held_out['cross_entropy']:.4f}",
        f"{held_out['perplexity']:.2f}",
        f"{100 * held_out['ece']:.2f} %",
        kl or "–",
    )


def _aligned(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    rule = tuple("-" * max(len(row[column]) for row in [head, *rows]) for column in range(len(head)))
    return columns([head, rule, *rows])


_STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1e; --paper: #fbfbfa; --line: #d8d8d4; --soft: #6a6d70; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --paper: #17191b; --line: #3a3d40; --soft: #a0a3a6; }
  figure { filter: invert(0.9) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 70rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } .note { color: var(--soft); font-size: .9rem; }
"""


def write_page(comparison: Comparison, path: Path) -> None:
    """Write a self-contained HTML page: verdict, tables, curves. It needs no network."""
    cache_head = ("cache", "bytes per token", "bytes per id", "positions per second", "mean head mass")
    body = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(comparison.title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(comparison.title)}</h1>
<p>{html.escape(comparison.verdict())}</p>
<h2>Held-out loss during training</h2>
<figure role="img" aria-label="Held-out cross-entropy against training steps">{_curves(comparison)}</figure>
<h2>Models</h2>{_html_table(_HEAD, comparison.model_rows())}
<p class="note">Losses and KL in nats per token; KL is {comparison.kl_is()}.</p>
<h2>Caches</h2>{_html_table(cache_head, comparison.cache_rows())}
<p class="note">{comparison.tokens:,} tokens, vocabulary {comparison.vocabulary_size:,}, {comparison.kept_ids} ids
per position; positions per second of one worker on this machine, from the tokens to the committed shard.</p>
</body></html>
"""
    path.write_text(body, encoding="utf-8")


def _html_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _curves(comparison: Comparison) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text as text, and no date or random ids, so that the same run gives the same page.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "logit-cache"}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        for label, report, color in (
            ("student, distilled", comparison.student, "#0b6e99"),
            ("student, without distillation", comparison.control, "#b5541c"),
        ):
            points = [(entry["step"], entry["eval_loss"]) for entry in report["eval_log"]]
            points.append((report["steps"], report["held_out"]["cross_entropy"]))
            points = sorted(dict(points).items())
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, color=color)
        for (name, report), dashes in zip(comparison.teachers.items(), ((4, 3), (1, 2)), strict=False):
            loss = report["held_out"]["cross_entropy"]
            axes.axhline(loss, color="#555555", linewidth=1, dashes=dashes, label=f"teacher {name}, at its end")
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("held-out loss, nats per token")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
