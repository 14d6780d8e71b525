"""Plain rows -> figures; figure -> PNG or SVG, the same bytes every time. Import it late: matplotlib takes a second.

No display and no global figure: `Figure` objects only. Colours differ in lightness too, and every series has a marker
of its own, so that a grey print and a colour-blind reader lose nothing.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

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
NAMES = {"fid": "FID", "inception_score": "inception score", "psnr": "PSNR, dB"}
LOG_FROM = 8  # a vertical axis is logarithmic where the largest value is so many times the smallest
UNIT_RANGE = ("precision", "recall")  # from 0 to 1


class Look(NamedTuple):
    """How a series is drawn."""

    color: str
    marker: str


# Orange is much lighter than the blue: stage 1 and stage 2 can be told apart in grey.
STAGE_LOOKS = {"stage 1": Look("#c06f00", "o"), "stage 2": Look("#00508c", "s")}
OTHER_COLORS = ("#00805e", "#b0508a", "#3a8fc4", "#8c2d04", "#444444")
OTHER_MARKERS = ("^", "D", "v", "P", "X", "<", ">")
GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "<": "◀", ">": "▶"}  # of the markers
FLOOR_STYLES = ("--", ":", "-.")
FLOOR_MARKERS = ("*", "d", "p")
FLOOR_COLOR = "#555555"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each series; `stage 1` and `stage 2` always have the same one."""
    others = map(Look, cycle(OTHER_COLORS), cycle(OTHER_MARKERS))
    return {name: STAGE_LOOKS.get(name) or next(others) for name in names}


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


def scale_values(axes: Axes, values: Sequence[float], *, metric: str) -> None:
    """A vertical axis for a metric: logarithmic where its values span much, else with room around them."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_FROM and metric not in UNIT_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.35, high * 1.35)
        return
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
    axes.set_ylim(low - margin, high + margin)


@matplotlib.rc_context(STYLE)
def loss_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Training loss over steps, from rows of `step` and `loss`; the last value is written at the line's end."""
    if not rows:
        raise ValueError("the training curve is empty: nothing to plot")
    figure, axes = blank()
    color = STAGE_LOOKS["stage 2"].color
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color=color, marker="o" if len(rows) == 1 else "")
    scale_steps(axes, [0, *steps])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("training loss")
    label_at_right(figure, axes, {f"{losses[-1]:.3f}": (losses[-1], color)})
    return figure


@matplotlib.rc_context(STYLE)
def over_steps(
    series: Mapping[str, Sequence[tuple[float, float]]],
    floors: Mapping[str, float],
    *,
    metric: str,
    title: str | None = None,
) -> Figure:
    """A metric over training steps: a line for each series of (step, value), a horizontal one for each floor.

    Each is named at the right, with its last value.
    """
    points = [point for rows in series.values() for point in rows]
    if not points:
        raise ValueError(f"no stage has {metric}: nothing to plot over steps")
    drawn = looks([name for name, rows in series.items() if rows])
    names = {n: f"{GLYPHS[look.marker]} {n}  {sorted(series[n])[-1][1]:.3f}" for n, look in drawn.items()}
    floor_names = {name: f"{name}  {value:.3f}" for name, value in floors.items()}
    figure, axes = blank(labels=[*names.values(), *floor_names.values()], title=title)
    ends: dict[str, tuple[float, str]] = {}
    for (name, value), style in zip(floors.items(), cycle(FLOOR_STYLES), strict=False):
        axes.axhline(value, color=FLOOR_COLOR, linestyle=style, linewidth=1.4)
        ends[floor_names[name]] = (value, FLOOR_COLOR)
    for name, look in drawn.items():
        steps, values = zip(*sorted(series[name]), strict=True)
        axes.plot(steps, values, color=look.color, marker=look.marker)
        ends[names[name]] = (values[-1], look.color)
    scale_steps(axes, [step for step, _ in points])
    scale_values(axes, [*(value for _, value in points), *floors.values()], metric=metric)
    axes.set_ylabel(NAMES.get(metric, metric))
    label_at_right(figure, axes, ends)
    return figure


@matplotlib.rc_context(STYLE)
def precision_recall(
    series: Mapping[str, Sequence[tuple[float, float, float]]], floors: Mapping[str, tuple[float, float]]
) -> Figure:
    """The plane of recall and precision: a path for each series of (step, precision, recall), a point for each floor.

    A path's last point, which is named, is the newest step.
    """
    rows = {name: sorted(points) for name, points in series.items() if points}
    if not rows:
        raise ValueError("no stage has precision and recall: nothing to plot")
    figure, axes = blank()
    for name, look in looks(list(rows)).items():
        _, precisions, recalls = zip(*rows[name], strict=True)
        axes.plot(recalls, precisions, color=look.color, marker=look.marker, label=name)
    for (name, (precision, recall)), marker in zip(floors.items(), cycle(FLOOR_MARKERS), strict=False):
        axes.plot(recall, precision, color=FLOOR_COLOR, marker=marker, linestyle="", markersize=9, label=name)
    values = [value for points in rows.values() for _, *pair in points for value in pair]
    values += [value for pair in floors.values() for value in pair]
    low, high = max(0.0, min(values) - 0.06), min(1.0, max(values) + 0.06)
    axes.set(
        xlim=(low, high), ylim=(low, high), aspect="equal", xlabel="recall (variety)", ylabel="precision (fidelity)"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, handletextpad=0.3, borderaxespad=0)
    return figure


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
