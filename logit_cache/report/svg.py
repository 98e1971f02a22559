"""Charts as SVG text: line charts, scatter plots and rows of dots, for a page without scripts.

A chart is 400 units wide, so that it is readable in a narrow window and fits beside another one in a wide one. Colours
are CSS classes of the page (`s-student`, `s-control`, …), which has a dark and a light scheme; here are only shapes,
labels and coordinates. All text is escaped. Axes have ticks at round numbers, without those whose labels would overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from markupsafe import Markup, escape

WIDTH = 400
HEIGHT = 250
# The widest character of tick labels (12 units high), over system fonts: labels must not touch.
_CHARACTER = 7.7
# The same for words, which are narrower than digits.
_LETTER = 7.0
_TOP, _RIGHT, _GAP = 12, 14, 8
_MOST_DOTS = 40
_MOST_LETTERS = 26

Marker = Literal["circle", "ring", "square", "diamond"]
MARKERS: dict[str, Marker] = {"student": "circle", "control": "ring", "live": "diamond"}


@dataclass(frozen=True)
class Line:
    """A line through points in the order of x. `thin` is for one seed among several, `dots` makes the points visible,
    `stairs` holds each value until the next point."""

    label: str
    style: str
    points: tuple[tuple[float, float], ...]
    thin: bool = False
    dots: bool = False
    stairs: bool = False


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot; `title` is its tooltip."""

    x: float | str
    y: float
    title: str
    style: str
    hollow: bool = False


@dataclass(frozen=True)
class Mark:
    """A value in a row, with the range of its seeds or its interval, and the values of the seeds."""

    style: str
    title: str
    value: float
    low: float
    high: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    label: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Axis:
    """A range of values mapped to coordinates; `log` is for values above 0, `whole` for integer ticks only."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most about `most` round numbers within the range, with their labels."""
        ticks = (log_ticks if self.log else even_ticks)(self.low, self.high, most)
        return [tick for tick in ticks if not self.whole or abs(tick[0] - round(tick[0])) < 1e-6]


def even_ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, with their labels."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if _count(low, high, step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    values = [(first + i) * step for i in range(_count(low, high, step))]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals > 5:
        return [(value, f"{value:.4g}") for value in values]
    if max(abs(low), abs(high)) >= 1e4 and step >= 100:
        return [(value, _short(value)) for value in values]
    # Adding 0.0 turns a negative zero into 0.
    return [(value, f"{value + 0.0:,.{decimals}f}".replace("-", "−")) for value in values]


def log_ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Powers of ten, and 2 and 5 times them if there is room; `even_ticks` in a range too short for these."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [((1, 2, 5), 1), *(((1,), every) for every in range(1, len(decades) + 1))]
    for factors, every in choices:
        values = [factor * 10.0**decade for decade in decades if decade % every == 0 for factor in factors]
        values = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if 2 <= len(values) <= most:
            return [(value, _short(value)) for value in values]
    return even_ticks(low, high, 4)


def _count(low: float, high: float, step: float) -> int:
    return math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1


def _short(value: float) -> str:
    """`20000` → `20k`; small numbers in their shortest form."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g}{letter}"
    return f"{value:g}".replace("e-0", "e-")


def limits(values: Sequence[float], *, log: bool = False, pad: float = 0.05) -> tuple[float, float]:
    """The range of an axis for values (at least one): their range, padded by the fraction `pad`."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** pad, 1.05)
        return low / room, high * room
    span, size = high - low, max(abs(low), abs(high))
    # Values that differ only by rounding count as one.
    room = pad * span if span > 1e-9 * size else 0.1 * size or 1.0
    return low - room, high + room


def _can_be_drawn(*values: float) -> bool:
    """Whether numbers are finite and below 1e30, as the arithmetic of an axis needs; diverged runs have others."""
    return all(math.isfinite(value) and abs(value) < 1e30 for value in values)


def line_chart(
    lines: Sequence[Line],
    label: str,
    x_label: str,
    *,
    x_log: bool = False,
    y_log: bool = False,
    y_range: tuple[float, float] | None = None,
    from_zero: bool = False,
    x_name: str = "step",
) -> Markup:
    """Lines over a common x, clipped to `y_range`; "" if no point can be drawn. `label` is for screen readers."""
    kept = [_drawable(line, x_log, y_log) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return Markup("")
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points]
    y_low, y_high = y_range or limits(ys, log=y_log)
    x_low, x_high = limits(xs, log=x_log, pad=0.02)
    if from_zero:
        y_low, x_low = 0.0, min(0.0, min(xs))
    counted = x_high - x_low > 1 and all(x == round(x) for x in xs)
    frame, x, y = _frame((x_low, x_high), (y_low, y_high), x_label, x_log=x_log, y_log=y_log, counted=counted)
    inner = []
    for line in sorted(kept, key=lambda line: not line.thin):
        inner.append(_path(line, x, y))
    # A nested SVG clips its content without a clip-path, whose id several charts could share.
    left, top = x.start, y.stop
    width, height = x.stop - left, y.start - top
    cut = f'<svg x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" '
    cut += f'viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}">{"".join(inner)}</svg>'
    dots = [_dots(line, x, y, x_name) for line in kept if not line.thin]
    return _svg(HEIGHT, label, [*frame, cut, *dots])


def _drawable(line: Line, x_log: bool, y_log: bool) -> Line:
    points = tuple(
        (x, y) for x, y in line.points if _can_be_drawn(x, y) and (x > 1e-30 or not x_log) and (y > 1e-30 or not y_log)
    )
    return replace(line, points=points)


def _path(line: Line, x: Axis, y: Axis) -> str:
    points = [(f"{x(a):.1f}", f"{y(b):.1f}") for a, b in line.points]
    between = "H{}V{}" if line.stairs else "L{} {}"
    steps = "M{} {}".format(*points[0]) + "".join(between.format(*point) for point in points[1:])
    kind = "thin" if line.thin else "line"
    return (
        f'<g class="s-{escape(line.style)}"><path class="{kind}" d="{steps}"><title>{escape(line.label)}</title>'
        "</path></g>"
    )


def _dots(line: Line, x: Axis, y: Axis, x_name: str) -> str:
    """Points with tooltips: all of a line, or at most 40 of a longer one."""
    every = max(1, math.ceil(len(line.points) / _MOST_DOTS))
    marks = []
    for a, b in line.points[::every]:
        if not y.low <= b <= y.high:
            continue
        title = escape(f"{line.label}, {x_name} {a:,.6g}: {b:.6g}")
        shape = f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="7" class="target"/>'
        if line.dots or len(line.points) == 1:
            shape += f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6" class="dot"/>'
        marks.append(f"<g>{shape}<title>{title}</title></g>")
    return f'<g class="s-{escape(line.style)}">{"".join(marks)}</g>'


def scatter(dots: Sequence[Dot], label: str, x_label: str) -> Markup:
    """Dots over numbers or names; numbers above 0 that span more than a decade get a log scale. "" without dots."""
    shown = [dot for dot in dots if _can_be_drawn(dot.y, 0.0 if isinstance(dot.x, str) else dot.x)]
    if not shown:
        return Markup("")
    y_range = limits([dot.y for dot in shown])
    numbers = [float(dot.x) for dot in shown if not isinstance(dot.x, str)]
    if len(numbers) == len(shown):
        log = min(numbers) > 1e-30 and max(numbers) > 10 * min(numbers)
        frame, x, y = _frame(limits(numbers, log=log), y_range, x_label, x_log=log)
        at = [x(value) for value in numbers]
    else:
        names = sorted({str(dot.x) for dot in shown})
        frame, x, y = _frame((-0.5, len(names) - 0.5), y_range, x_label, x_names=names)
        at = [x(names.index(str(dot.x))) for dot in shown]
    marks = []
    for center, dot in zip(at, shown, strict=True):
        kind = "ring" if dot.hollow else "dot"
        marks.append(
            f'<g class="s-{escape(dot.style)}"><circle cx="{center:.1f}" cy="{y(dot.y):.1f}" r="4.5" class="{kind}">'
            f"<title>{escape(dot.title)}</title></circle></g>"
        )
    return _svg(HEIGHT, label, [*frame, *marks])


def rows_chart(
    rows: Sequence[Row],
    label: str,
    x_label: str,
    *,
    reference: float | None = None,
    x_range: tuple[float, float] | None = None,
    letters: int = 0,
) -> Markup:
    """A row for each name, its marks below each other, and a line at `reference`; "" without marks.

    Charts side by side share their range as `x_range`, and the length of their longest name as `letters`.
    """
    rows = [
        Row(row.label, tuple(m for m in row.marks if _can_be_drawn(m.value, m.low, m.high, *m.values))) for row in rows
    ]
    values = [v for row in rows for m in row.marks for v in (m.low, m.high, m.value, *m.values)]
    if not values:
        return Markup("")
    low, high = x_range or limits(values + ([] if reference is None else [reference]))
    most = max(len(row.marks) for row in rows)
    height_of_row = 17 + 9 * most
    bottom = _TOP + height_of_row * len(rows)
    names = [_cut(row.label, _MOST_LETTERS) for row in rows]
    left = max(min(letters, _MOST_LETTERS), *(len(name) for name in names)) * _LETTER + _GAP
    axis = Axis(low, high, left, WIDTH - _RIGHT)
    parts = _x_axis(axis, bottom, x_label, [])
    for value, _ in axis.ticks(_most_ticks(axis)):
        parts.append(f'<line class="grid" x1="{axis(value):.1f}" x2="{axis(value):.1f}" y1="{_TOP}" y2="{bottom}"/>')
    if reference is not None:
        at = axis(reference)
        parts.append(f'<line class="reference" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        middle = _TOP + height_of_row * (number + 0.5)
        if number and most > 1:
            above = middle - height_of_row / 2
            parts.append(f'<line class="grid" x1="0" x2="{WIDTH - _RIGHT}" y1="{above:.1f}" y2="{above:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - _GAP:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}'
            f"<title>{escape(row.label)}</title></text>"
        )
        for index, mark in enumerate(row.marks):
            parts.append(_mark(mark, axis, middle + 9 * (index - (len(row.marks) - 1) / 2)))
    return _svg(bottom + 40, label, parts)


def _mark(mark: Mark, axis: Axis, y: float) -> str:
    seeds = "".join(f'<circle cx="{axis(v):.1f}" cy="{y:.1f}" r="1.8" class="seed"/>' for v in mark.values)
    return (
        f'<g class="s-{escape(mark.style)}">'
        f'<line class="span" x1="{axis(mark.low):.1f}" x2="{axis(mark.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>{seeds}'
        f"{marker(mark.style, axis(mark.value), y)}<title>{escape(mark.title)}</title></g>"
    )


def marker(style: str, x: float, y: float) -> str:
    """The mark of a style: roles differ in shape as well as in colour."""
    kind = MARKERS.get(style, "square")
    if kind in ("circle", "ring"):
        name = "dot" if kind == "circle" else "ring"
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{name}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if kind == "diamond" else ""
    return f'<rect x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6" class="dot"{turn}/>'


def swatch(style: str) -> Markup:
    """The line and the mark of a series, for a legend."""
    return Markup(
        f'<svg class="swatch" viewBox="0 0 26 12" aria-hidden="true"><g class="s-{escape(style)}">'
        f'<path class="line" d="M1 6H25"/>{marker(style, 13, 6)}</g></svg>'
    )


def _frame(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    *,
    x_log: bool = False,
    y_log: bool = False,
    x_names: Sequence[str] = (),
    counted: bool = False,
) -> tuple[list[str], Axis, Axis]:
    """Grid, ticks and the name of x; and the x and y axes, which map values to coordinates."""
    bottom = HEIGHT - 40
    y = Axis(*y_range, bottom, _TOP, y_log)
    y_ticks = y.ticks(7 if y_log else 5)
    left = max((len(text) for _, text in y_ticks), default=0) * _CHARACTER + _GAP
    x = Axis(*x_range, left, WIDTH - _RIGHT, x_log, counted)
    parts = []
    for value, text in y_ticks:
        at = y(value)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - _GAP:.1f}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    return parts + _x_axis(x, bottom, x_label, x_names), x, y


def _most_ticks(axis: Axis) -> int:
    return max(2, int((axis.stop - axis.start) / (50 if axis.log else 60)))


def _x_axis(x: Axis, bottom: float, x_label: str, names: Sequence[str]) -> list[str]:
    """The x axis: its line, the ticks that have room, and its name."""
    parts = [f'<line class="axis" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{bottom}" y2="{bottom}"/>']
    room = int((x.stop - x.start) / max(1, len(names)) / _CHARACTER)
    ticks = [(i, _cut(name, max(3, room - 1))) for i, name in enumerate(names)] or x.ticks(_most_ticks(x))
    end = 0.0
    for value, text in ticks:
        half = len(text) * _CHARACTER / 2
        at = min(max(x(value), half), WIDTH - half)
        if at - half < end:
            continue
        end = at + half + _GAP / 2
        parts.append(f'<line class="axis" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>')
    name = _cut(x_label, int(WIDTH / _CHARACTER) - 1)
    parts.append(f'<text class="name" x="{WIDTH - _RIGHT}" y="{bottom + 34}" text-anchor="end">{escape(name)}</text>')
    return parts


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(height: float, label: str, parts: Sequence[str]) -> Markup:
    # Every part is made in this module, of numbers and of escaped text.
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
