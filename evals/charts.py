"""Line charts as SVG text, for pages that load nothing: no script, no font and no picture from elsewhere.

A chart is 440 x 240 units, and as wide as its place on the page: two stand side by side on a desk and one
below the other on a telephone, where its letters are still read. Colors are classes (evals/report.css),
so a page has them for a light and for a dark room. The values under the pointer are the browser's own
tooltip of a `<title>`, which is also what a screen reader reads.
"""

import html
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from evals.report import visible

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 30
# Classes of colors in evals/report.css; what is beyond takes them again, in dashes.
NUM_COLORS = 8
# A curve with more points is drawn by the lowest and the highest of each group.
MOST_POINTS = 600
# A curve of single measurements has a dot at each of them, if there are at most so many; all of them
# are among the steps that a pointer can read.
MOST_DOTS = 40
# Steps whose values a pointer can read; those of curves with few points are always among them.
MOST_TOOLTIPS = 160
# The axis is a logarithm where the highest point is so many times the median.
LOG_FROM = 30


class Curve(NamedTuple):
    """A line of a chart. points: (x, y), ascending in x; y is None where there is no number.

    color: from 0 on. faint: drawn thin and pale, as the single values behind their mean. dotted: with a
    dot at each point, as for what is measured now and then.
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    color: int = 0
    faint: bool = False
    dotted: bool = False

    @property
    def has_dots(self) -> bool:
        """Of a single point there would be no line."""
        return len(self.points) == 1 or (self.dotted and len(self.points) <= MOST_DOTS)


class LineChart(NamedTuple):
    """A chart, ready for a page. legend: (label, svg) of each curve. svg: the picture."""

    title: str
    legend: list[tuple[str, str]]
    svg: str


class Axis(NamedTuple):
    """Where values lie. place: from a value to a coordinate. ticks: (value, label)."""

    place: Callable[[float], float]
    ticks: list[tuple[float, str]]


def line_chart(
    title: str, curves: Sequence[Curve], from_zero: bool = False, x_name: str = "step"
) -> LineChart | None:
    """Returns the chart of the curves that have a point, None where none has one.

    from_zero: whether the vertical axis begins at 0, as for what is compared by its size.
    """
    curves = [curve for curve in curves if values_of(curve)]
    if not curves:
        return None
    xs = sorted({x for curve in curves for x, y in curve.points if y is not None})
    across = x_axis(xs[0], xs[-1])
    values = [value for curve in curves for value in values_of(curve)]
    up = y_axis(values, from_zero)
    parts = [*drawn_axes(across, up)]
    # What is faint lies behind the others.
    for curve in sorted(curves, key=lambda each: not each.faint):
        parts.append(drawn_curve(curve, across, up))
    parts += tooltips(curves, xs, across, x_name)
    summary = f"{title}; {x_name} {xs[0]:g} to {xs[-1]:g}"
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{html.escape(visible(summary))}">{"".join(parts)}</svg>'
    )
    return LineChart(title, [(curve.label, key_of_curve(curve)) for curve in curves], svg)


def values_of(curve: Curve) -> list[float]:
    return [y for _, y in curve.points if y is not None]


# ---- axes ----


def x_axis(low: float, high: float) -> Axis:
    """Returns the horizontal axis, of whole numbers."""
    if low == high:
        low, high = low - 1, high + 1
    scale = (WIDTH - LEFT - RIGHT) / (high - low)
    step = max(1, nice_step(high - low, 6))
    ticks = labelled(multiples(step, low, high), step)
    return Axis(lambda x: LEFT + (x - low) * scale, ticks)


def y_axis(values: Sequence[float], from_zero: bool) -> Axis:
    """Returns the vertical axis of some values; a logarithmic one where few of them are much higher
    than the others."""
    low, high = min(values), max(values)
    room = HEIGHT - TOP - BOTTOM
    if low > 0 and high > LOG_FROM * statistics.median(values):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        scale = room / (last - first)
        powers = range(first, last + 1, max(1, (last - first) // 6 + 1))
        ticks = [(10.0**power, tick_label(10.0**power, 10.0**power, "")) for power in powers]
        return Axis(lambda y: HEIGHT - BOTTOM - (math.log10(y) - first) * scale, ticks)
    # What nearly begins at 0 begins there, so that its height says something.
    if from_zero or 0 <= low < 0.25 * high:
        low = min(0.0, low)
    if low == high:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    step = nice_step(high - low, 5)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    scale = room / (high - low)
    ticks = labelled(multiples(step, low, high), step)
    return Axis(lambda y: HEIGHT - BOTTOM - (y - low) * scale, ticks)


def nice_step(span: float, count: int) -> float:
    """Returns 1, 2 or 5 times a power of 10, of which about `count` fill a span."""
    power = 10.0 ** math.floor(math.log10(span / count))
    for factor in (1, 2, 5):
        if span / (factor * power) <= count:
            return factor * power
    return 10 * power


def multiples(step: float, low: float, high: float) -> list[float]:
    """Returns the multiples of a step from low to high, but for rounding."""
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def labelled(values: Sequence[float], step: float) -> list[tuple[float, str]]:
    """Returns ticks with their labels, all in the unit of the largest and with as many digits as their
    step asks for: 0.25, 2e-4, 15k, 1.5M."""
    largest = max(map(abs, values))
    unit, letter = 1.0, ""
    for size, least, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if largest >= least:
            unit, letter = size, name
            break
    return [(value, tick_label(value / unit, step / unit, letter)) for value in values]


def tick_label(value: float, step: float, letter: str) -> str:
    if value == 0:
        return "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals <= 4:
        return f"{value:,.{decimals}f}{letter}"
    digits, power = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(power)}{letter}"


# ---- what is drawn ----


def drawn_axes(across: Axis, up: Axis) -> list[str]:
    """Returns the lines and labels of both axes."""
    parts = []
    for value, label in up.ticks:
        y = up.place(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    bottom = HEIGHT - BOTTOM
    for value, label in across.ticks:
        x = across.place(value)
        parts.append(
            f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<line class="tick" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    )
    return parts


def classes_of(curve: Curve) -> str:
    """Returns the classes of a curve's lines and dots."""
    dashes = " dashed" if curve.color >= NUM_COLORS else ""
    return f"c{curve.color % NUM_COLORS}{dashes}{' faint' if curve.faint else ''}"


def drawn_curve(curve: Curve, across: Axis, up: Axis) -> str:
    """Returns the path of a curve, with a gap where there is no number, and its dots."""
    words = []
    pen = "M"
    for x, y in thinned(curve.points):
        if y is None:
            pen = "M"
            continue
        words.append(f"{pen}{across.place(x):.1f} {up.place(y):.1f}")
        pen = "L"
    parts = [f'<path class="{classes_of(curve)}" d="{"".join(words)}"/>']
    if curve.has_dots:
        for x, y in curve.points:
            if y is not None:
                place = f'cx="{across.place(x):.1f}" cy="{up.place(y):.1f}"'
                parts.append(f'<circle class="{classes_of(curve)}" {place} r="3"/>')
    return "".join(parts)


def thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Returns at most about MOST_POINTS of the points: of each group the lowest and the highest, so
    that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = 2 * len(points) / MOST_POINTS
    chosen: list[tuple[float, float | None]] = []
    for number in range(MOST_POINTS // 2):
        group = points[int(number * size) : int((number + 1) * size)]
        there = [point for point in group if point[1] is not None]
        if not there:
            chosen.append((group[0][0], None))
            continue
        ends = {min(there, key=lambda point: point[1]), max(there, key=lambda point: point[1])}
        chosen += sorted(ends)
    return chosen


def tooltips(curves: Sequence[Curve], xs: list[float], across: Axis, x_name: str) -> list[str]:
    """Returns a strip for each step that a pointer can read, with the values of all curves there."""
    values = [{x: y for x, y in curve.points if y is not None} for curve in curves]
    every = math.ceil(len(xs) / MOST_TOOLTIPS)
    chosen = set(xs[::every]) | {xs[-1]}
    for points in values:
        if len(points) <= MOST_DOTS:
            chosen |= set(points)
    places = sorted(chosen)
    parts = []
    for number, x in enumerate(places):
        left = LEFT if number == 0 else (across.place(places[number - 1]) + across.place(x)) / 2
        right: float = WIDTH - RIGHT
        if number + 1 < len(places):
            right = (across.place(places[number + 1]) + across.place(x)) / 2
        lines = [f"{x_name} {x:,.0f}"]
        for curve, points in zip(curves, values, strict=True):
            if x in points:
                lines.append(f"{curve.label}: {points[x]:.6g}")
        text = html.escape(visible("\n".join(lines)))
        parts.append(
            f'<rect class="at" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}"'
            f' height="{HEIGHT - TOP - BOTTOM}"><title>{text}</title></rect>'
        )
    return parts


def key_of_curve(curve: Curve) -> str:
    """Returns the picture of a line that stands before its label in the legend."""
    classes = classes_of(curve)
    dot = ""
    if curve.has_dots:
        dot = f'<circle class="{classes}" cx="13" cy="6" r="3"/>'
    line = f'<path class="{classes}" d="M1 6L25 6"/>'
    return f'<svg class="key" viewBox="0 0 26 12" aria-hidden="true">{line}{dot}</svg>'
