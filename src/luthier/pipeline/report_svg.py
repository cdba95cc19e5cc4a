"""A line chart as numbers: ticks, points on the canvas and a sentence that says what is to be seen.

The page's template draws it, so no markup is written here and none can slip in. Points that are not finite cannot be
drawn; they are counted. A long line keeps the lowest and the highest value of each stretch, so no spike is lost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

__all__ = ["FRAME", "Chart", "Frame", "Line", "Tick", "chart", "smoothed"]

Point = tuple[float, float]

_STRETCHES = 200


@dataclass(frozen=True, slots=True)
class Frame:
    """The canvas and, on it, the edges of the field between the axes, y downwards."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


FRAME = Frame(width=360, height=214, left=50, right=350, top=10, bottom=178)


@dataclass(frozen=True, slots=True)
class Line:
    """Points in the order of steps: (step, value), or (x, y) on the canvas. kind: how it looks, as a class of CSS."""

    label: str
    kind: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis, in canvas units, and its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What the template draws. num_left_out: points that are not finite."""

    title: str
    description: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    num_left_out: int


def chart(title: str, lines: Sequence[Line], *, from_zero: bool = False) -> Chart:
    """The lines on shared axes. from_zero: the value axis shows 0 too."""
    finite = [Line(line.label, line.kind, [p for p in line.points if math.isfinite(p[1])]) for line in lines]
    points = [point for line in finite for point in line.points]
    steps, values = [x for x, _ in points], [y for _, y in points] + [0.0] * (from_zero or not points)
    x_axis = _widened(min(steps, default=0), max(steps, default=1))
    y_values = _ticks(*_widened(min(values), max(values)))
    y_axis = (y_values[0], y_values[-1])
    x_values = [x for x in _ticks(*x_axis, smallest=1) if x_axis[0] <= x <= x_axis[1]]

    def place(point: Point) -> Point:
        return _scaled(point[0], x_axis, FRAME.left, FRAME.right), _scaled(point[1], y_axis, FRAME.bottom, FRAME.top)

    return Chart(
        title=title,
        description=" ".join(_in_words(line) for line in finite if line.kind != "smooth"),
        x_ticks=[Tick(place((x, y_axis[0]))[0], _label(x)) for x in x_values],
        y_ticks=[Tick(place((x_axis[0], y))[1], _label(y)) for y in y_values],
        lines=[Line(line.label, line.kind, [place(p) for p in _thinned(line.points)]) for line in finite],
        num_left_out=sum(len(line.points) for line in lines) - len(points),
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each value's mean over its neighbours, a twentieth of the run to either side; fewer at the ends, evenly."""
    finite = [point for point in points if math.isfinite(point[1])]
    sums = list(accumulate((y for _, y in finite), initial=0.0))
    means = []
    for i, (x, _) in enumerate(finite):
        reach = min(len(finite) // 20, i, len(finite) - 1 - i)
        means.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return means


def _widened(low: float, high: float) -> tuple[float, float]:
    room = 0.0 if high > low else abs(low) / 10 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, *, smallest: float = 0.0) -> list[float]:
    """Three to seven round numbers, 1, 2 or 5 times a power of ten apart, that enclose the range."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    apart = max(smallest, min((n * power for n in (1, 2, 5, 10)), key=lambda step: abs(step - rough)))
    return [i * apart for i in range(math.floor(low / apart), math.ceil(high / apart) + 1)]


def _scaled(value: float, axis: tuple[float, float], start: float, end: float) -> float:
    return round(start + (value - axis[0]) / (axis[1] - axis[0]) * (end - start), 1)


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= 2 * _STRETCHES:
        return list(points)
    bounds = [i * len(points) // _STRETCHES for i in range(_STRETCHES + 1)]
    stretches = [points[start:end] for start, end in pairwise(bounds)]
    kept = [{min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])} for s in stretches]
    return sorted({points[0], points[-1]}.union(*kept))


def _label(value: float) -> str:
    if value == 0 or 1e-2 <= abs(value) < 1e6:
        return f"{value:,.6g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _in_words(line: Line) -> str:
    if not line.points:
        return f"{line.label}: no values."
    (x, first), (end, last) = line.points[0], line.points[-1]
    values = [y for _, y in line.points]
    return (
        f"{line.label}: {first:.4g} at step {x:g}, {last:.4g} at step {end:g}; "
        f"lowest {min(values):.4g}, highest {max(values):.4g}."
    )
