"""What all figures share: style, colours and markers, axes, labels, error bars; figure -> PNG or SVG.

No display and no global figure: `Figure` objects only. Colours differ in lightness too, and every series has a marker
of its own, so that a grey print and a colour-blind reader lose nothing.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from dod_pipeline.tables import INTERVAL

STYLE: Any = {  # matplotlib types every key; a literal is not inferred as such
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#777777",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.8,
    "lines.markersize": 7,
    "svg.fonttype": "path",  # the page looks the same where the font is missing
    "svg.hashsalt": "dod",
}
WIDTH, HEIGHT = 4.3, 3.1  # inches: small enough that text stays legible when a phone scales it down
LINE = 13  # points between two labels at least
NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "rfid": "rFID",
    "inception_score": "inception score",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "top1": "top-1 of the linear probe",
}
LOG_FROM = 8  # a vertical axis is logarithmic where the largest value is so many times the smallest
UNIT_RANGE = ("precision", "recall", "ssim", "top1")  # from 0 to 1


# Position, value, and the value's standard error where it is known.
Estimate = tuple[float, float, float | None]


class Look(NamedTuple):
    """How a series is drawn."""

    color: str
    marker: str


# Orange is much lighter than the blue: stage 1 and stage 2 can be told apart in grey.
STAGE_LOOKS = {"stage 1": Look("#c06f00", "o"), "stage 2": Look("#00508c", "s"), "stage 3": Look("#00805e", "^")}
GUIDED = {"stage 1": "D", "stage 2": "v", "stage 3": "P"}  # their markers under guidance, where some have none
OTHER_COLORS = ("#b0508a", "#3a8fc4", "#8c2d04", "#444444")
OTHER_MARKERS = ("D", "v", "P", "X", "<", ">")
GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "<": "◀", ">": "▶"}  # of the markers
FLOOR_LOOKS = {"held-out": ("--", "*"), "codec": (":", "d")}  # line and marker
OTHER_FLOOR = ("-.", "p")
FLOOR_COLOR = "#555555"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each series: the first of a stage, whatever follows the stage's name, has the stage's own."""
    others, own = map(Look, cycle(OTHER_COLORS), cycle(OTHER_MARKERS)), dict(STAGE_LOOKS)
    stages = {name: name.split(",")[0] for name in names}
    return {name: own.pop(stage) if stage in own else next(others) for name, stage in stages.items()}


def stage_look(name: str) -> Look:
    """The look of a variant of a stage, e.g. `stage 1, guided`: the stage's colour, and if guided another marker."""
    stage, _, variant = name.partition(", ")
    look = STAGE_LOOKS[stage]
    return look._replace(marker=GUIDED[stage]) if variant == "guided" else look


def floor_look(name: str) -> tuple[str, str]:
    """Line and marker of a floor: the same in every figure, whatever follows its name."""
    return FLOOR_LOOKS.get(name.split(",")[0], OTHER_FLOOR)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """The nearest positions (in least squares) of the same order that are at least `gap` apart, for labels."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    pools: list[tuple[float, int]] = []  # mean and size; monotone regression by pooling neighbours
    for rank, index in enumerate(order):
        mean, size = positions[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    shifted = [mean for mean, size in pools for _ in range(size)]
    found = [0.0] * len(positions)
    for rank, index in enumerate(order):
        found[index] = shifted[rank] + rank * gap
    return found


def blank(*, labels: Sequence[str] = (), title: str | None = None) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, wider and higher where long or many labels will stand at the right."""
    widest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    width = WIDTH + 0.075 * max(0, widest - 16)
    figure = Figure(figsize=(width, max(HEIGHT, 0.22 * len(labels) + 0.8)), layout="constrained")
    axes = figure.subplots()
    if title:
        axes.set_title(title, loc="left", color="#333333")
    return figure, axes


def reach(points: Sequence[Estimate]) -> list[float]:
    """The values and the ends of their intervals, for an axis that is to show them; a zero would end a log axis."""
    ends = [v + sign * INTERVAL * e for _, v, e in points if e is not None for sign in (-1, 1)]
    return [*(value for _, value, _ in points), *(end for end in ends if end > 0)]


def error_bars(axes: Axes, points: Sequence[Estimate], *, color: str) -> None:
    """95 % intervals of those points whose error is known."""
    known = [(x, y, INTERVAL * error) for x, y, error in points if error is not None]
    if known:
        x, y, half = zip(*known, strict=True)
        axes.errorbar(x, y, yerr=half, fmt="none", ecolor=color, elinewidth=1.3, capsize=3.5, capthick=1.3)


def label_at_right(figure: Figure, axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Write each name at the right of the axes, at the height of its value, none over another. Last step of a plot."""
    notes = {
        name: axes.annotate(
            name, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(8, 0), textcoords="offset points",
            va="center", color=color, annotation_clip=False,
        )
        for name, (y, color) in ends.items()
    }  # fmt: skip
    figure.draw_without_rendering()  # sets the limits and the layout
    points = 72 / figure.dpi
    heights = [float(axes.transData.transform((0, y))[1]) * points for y, _ in ends.values()]
    for note, before, after in zip(notes.values(), heights, spread(heights, LINE), strict=True):
        note.set_position((8, after - before))


def scale_steps(axes: Axes, steps: Sequence[float]) -> None:
    """A horizontal axis of whole steps, from a bit before the first to a bit after the last."""
    first, last = min(steps), max(steps)
    margin = 0.06 * (last - first) or 0.5 * max(last, 1)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(set(steps)) <= 4:  # few enough to name each
        axes.set_xticks(sorted(set(steps)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("training step")


def scale_gflops(axes: Axes, gflops: Sequence[float]) -> None:
    """A horizontal axis of costs: logarithmic, for what is compared is how many times more one takes."""
    axes.set_xscale("log")
    label_decades(axes.xaxis)
    low, high = min(gflops), max(gflops)
    margin = (high / low) ** 0.08 * 1.1
    axes.set_xlim(low / margin, high * margin)


def label_decades(axis: XAxis | YAxis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade of a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def scale_values(axes: Axes, values: Sequence[float], *, metric: str) -> None:
    """A vertical axis for a metric: logarithmic where its values span much, else with room around them."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_FROM and metric not in UNIT_RANGE:
        axes.set_yscale("log")
        label_decades(axes.yaxis)
        axes.set_ylim(low / 1.35, high * 1.35)
        return
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
    axes.set_ylim(low - margin, high + margin)


def png(figure: Figure, *, dpi: int = 160) -> bytes:
    """The figure as a PNG file."""
    return saved(figure, kind="png", dpi=dpi, metadata={"Software": None})


def svg(figure: Figure) -> str:
    """The figure as SVG text, which scales in a page and in print."""
    return saved(figure, kind="svg", dpi=72, metadata={"Date": None, "Creator": None}).decode()


def saved(figure: Figure, *, kind: str, dpi: int, metadata: dict[str, None]) -> bytes:
    """The bytes that matplotlib writes; without time or version they depend on the figure alone."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()
