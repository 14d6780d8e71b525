"""Plain rows -> figures, the same bytes every time. Import it late: matplotlib takes a second."""

from collections.abc import Mapping, Sequence
from operator import itemgetter

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dod_pipeline.canvas import (
    FLOOR_COLOR,
    GLYPHS,
    HEIGHT,
    NAMES,
    STAGE_LOOKS,
    STYLE,
    Estimate,
    blank,
    error_bars,
    floor_look,
    label_at_right,
    looks,
    reach,
    scale_gflops,
    scale_steps,
    scale_values,
    stage_look,
)
from dod_pipeline.tables import INTERVAL, with_error


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
    series: Mapping[str, Sequence[Estimate]],
    floors: Mapping[str, float],
    *,
    metric: str,
    title: str | None = None,
) -> Figure:
    """A metric over training steps: a line for each series of (step, value, error), a horizontal one for each floor.

    Bars are 95 % intervals. Each series is named at the right, with its last value.
    """
    rows = {name: sorted(points, key=itemgetter(0)) for name, points in series.items() if points}
    if not rows:
        raise ValueError(f"no stage has {metric}: nothing to plot over steps")
    drawn = looks(list(rows))
    names = {n: f"{GLYPHS[look.marker]} {n}  {with_error(*rows[n][-1][1:])}" for n, look in drawn.items()}
    floor_names = {name: f"{name}  {value:.3f}" for name, value in floors.items()}
    figure, axes = blank(labels=[*names.values(), *floor_names.values()], title=title)
    draw_floors(axes, floors)
    ends = {floor_names[name]: (value, FLOOR_COLOR) for name, value in floors.items()}
    for name, look in drawn.items():
        steps, values, _ = zip(*rows[name], strict=True)
        axes.plot(steps, values, color=look.color, marker=look.marker)
        error_bars(axes, rows[name], color=look.color)
        ends[names[name]] = (values[-1], look.color)
    points = [point for found in rows.values() for point in found]
    scale_steps(axes, [step for step, *_ in points])
    scale_values(axes, [*reach(points), *floors.values()], metric=metric)
    axes.set_ylabel(NAMES.get(metric, metric))
    label_at_right(figure, axes, ends)
    return figure


def draw_floors(axes: Axes, floors: Mapping[str, float]) -> None:
    """A horizontal line for each floor, in the style that it has everywhere."""
    for name, value in floors.items():
        axes.axhline(value, color=FLOOR_COLOR, linestyle=floor_look(name)[0], linewidth=1.4, label=name)


@matplotlib.rc_context(STYLE)
def over_gflops(path: Mapping[str, Estimate], series: Mapping[str, Sequence[Estimate]]) -> Figure:
    """FID over the GFLOPs of a sample (the paper's Fig. 2, right): the lower left is best.

    `path` are the experiment's own stages, joined by a line; `series` are variants of them, hollow, named after the
    stage that they are variants of: `stage 1, guided`.
    """
    points = [*path.values(), *(point for rows in series.values() for point in rows)]
    if not points:
        raise ValueError("no stage has FID and GFLOPs: nothing to plot")
    figure, axes = blank()
    figure.set_figheight(HEIGHT + 0.24 * ((len(path) + len(series) + 1) // 2))
    axes.plot([x for x, *_ in path.values()], [y for _, y, _ in path.values()], color="#777777", zorder=4)
    drawn = [(name, [point], True) for name, point in path.items()]
    drawn += [(name, list(rows), False) for name, rows in series.items()]
    for name, rows, own in drawn:
        color, marker = stage_look(name)
        error_bars(axes, rows, color=color)
        axes.plot(
            [x for x, *_ in rows], [y for _, y, _ in rows], color=color, marker=marker, linestyle="", label=name,
            markerfacecolor=color if own else "none", zorder=5 if own else 3,
        )  # fmt: skip
    scale_gflops(axes, [x for x, *_ in points])
    scale_values(axes, reach(points), metric="fid")
    axes.set(xlabel="GFLOPs of a sample, as the paper counts", ylabel="FID")
    legend_below(figure, columns=2)
    return figure


def legend_below(figure: Figure, *, columns: int) -> None:
    """The names of what is drawn, below the axes, which keep the figure's whole width."""
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, handletextpad=0.5, columnspacing=1.2)


@matplotlib.rc_context(STYLE)
def over_guidance(series: Mapping[str, Sequence[Estimate]]) -> Figure:
    """FID over the guidance scale (the paper's Fig. 4, left); each series' lowest value is ringed, and named below."""
    rows = {name: sorted(points, key=itemgetter(0)) for name, points in series.items() if points}
    if not rows:
        raise ValueError("nothing has FID at some guidance: nothing to plot")
    figure, axes = blank()
    figure.set_figheight(HEIGHT + 0.24 * len(rows))
    for name, look in looks(list(rows)).items():
        scales, values, _ = zip(*rows[name], strict=True)
        scale, lowest, _ = min(rows[name], key=itemgetter(1))
        title = f"{name}: lowest {lowest:.3f} at {scale:g}"
        axes.plot(scales, values, color=look.color, marker=look.marker, label=title)
        error_bars(axes, rows[name], color=look.color)
        axes.plot(scale, lowest, marker="o", markersize=15, markerfacecolor="none", color=look.color)
    points = [point for found in rows.values() for point in found]
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.margins(x=0.08)
    scale_values(axes, reach(points), metric="fid")
    axes.set(xlabel="guidance scale (1: none)", ylabel="FID, rFID" if any("rFID" in name for name in rows) else "FID")
    legend_below(figure, columns=1)
    return figure


@matplotlib.rc_context(STYLE)
def stage_bars(bars: Mapping[str, tuple[float, float | None]], floors: Mapping[str, float]) -> Figure:
    """FID of each stage as a bar from zero (the paper's Fig. 4, right), its value above it, and the floors across."""
    if not bars:
        raise ValueError("no stage has FID: nothing to plot")
    figure, axes = blank(labels=list(floors))
    points = [(float(place), *found) for place, found in enumerate(bars.values())]
    draw_floors(axes, floors)
    for (place, value, error), name in zip(points, bars, strict=True):
        axes.bar(place, value, width=0.62, color=stage_look(name).color)
        error_bars(axes, [(place, value, error)], color="#1c1c1c")
        top = value + INTERVAL * (error or 0)
        axes.annotate(f"{value:.3f}", (place, top), xytext=(0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(bars)), [name.replace(", ", "\n") for name in bars])
    axes.set(ylabel="FID", ylim=(0, 1.12 * max(*reach(points), *floors.values())), xlim=(-0.6, len(bars) - 0.4))
    axes.grid(visible=False, axis="x")
    label_at_right(figure, axes, {f"{name}  {value:.3f}": (value, FLOOR_COLOR) for name, value in floors.items()})
    return figure


@matplotlib.rc_context(STYLE)
def precision_recall(
    series: Mapping[str, Sequence[tuple[float, float, float]]], floors: Mapping[str, tuple[float, float]]
) -> Figure:
    """The plane of recall and precision: a path for each series of (step, precision, recall), a point for each floor.

    A path's last point, the newest step, is filled; earlier ones are hollow.
    """
    rows = {name: sorted(points, key=itemgetter(0)) for name, points in series.items() if points}
    if not rows:
        raise ValueError("no stage has precision and recall: nothing to plot")
    figure, axes = blank()
    for name, look in looks(list(rows)).items():
        _, precisions, recalls = zip(*rows[name], strict=True)
        axes.plot(recalls, precisions, color=look.color, marker=look.marker, markerfacecolor="white")
        axes.plot(recalls[-1:], precisions[-1:], color=look.color, marker=look.marker, linestyle="", label=name)
    for name, (precision, recall) in floors.items():
        _, marker = floor_look(name)
        axes.plot(recall, precision, color=FLOOR_COLOR, marker=marker, linestyle="", markersize=9, label=name)
    values = [value for points in rows.values() for _, *pair in points for value in pair]
    values += [value for pair in floors.values() for value in pair]
    low, high = max(0.0, min(values) - 0.06), min(1.0, max(values) + 0.06)
    axes.set(
        xlim=(low, high), ylim=(low, high), aspect="equal", xlabel="recall (variety)", ylabel="precision (fidelity)"
    )
    for line in axes.lines:
        line.set_clip_on(False)  # a point at 0 or 1 is seen whole
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, handletextpad=0.3, borderaxespad=0)
    return figure
