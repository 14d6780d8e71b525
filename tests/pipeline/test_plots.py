"""Figures show the numbers they were given, equal figures have equal bytes, and what must not be compared isn't."""

import io
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from dod_pipeline import canvas, plots

ROWS = [{"step": 50, "loss": 1.9, "samples": 3200}, {"step": 100, "loss": 0.5, "samples": 6400}]
STAGES: dict[str, list[canvas.Estimate]] = {
    "stage 1": [(100, 2.0, None), (200, 1.5, None)],
    "stage 2": [(200, 0.5, None), (100, 1.0, None)],
}
FLOORS = {"held-out": 0.04, "codec": 0.08}
PLANE = {"stage 1": [(100, 0.6, 0.7)], "stage 2": [(100, 0.8, 0.65)]}
PATH: dict[str, canvas.Estimate] = {"stage 1": (0.5, 2.0, 0.1), "stage 2": (2.0, 1.0, 0.05)}  # GFLOPs, FID, its error
VARIANTS: dict[str, list[canvas.Estimate]] = {
    "stage 1, guided": [(1.0, 1.4, None), (1.0, 1.2, 0.1)],
    "stage 3": [(4.0, 0.9, None)],
}
GUIDED: dict[str, list[canvas.Estimate]] = {
    "stage 2": [(3.0, 0.9, None), (1.0, 2.0, 0.1), (2.0, 0.7, None)],
    "rFID": [(2.0, 0.5, None), (1.0, 0.4, None)],
}
BARS: dict[str, tuple[float, float | None]] = {
    "stage 1": (2.0, 0.1),
    "stage 2": (1.0, None),
    "stage 3, guidance 1.5": (0.9, None),
}


def figures() -> dict[str, Figure]:
    return {
        "loss": plots.loss_curve(ROWS),
        "fid": plots.over_steps(STAGES, FLOORS, metric="fid"),
        "plane": plots.precision_recall(PLANE, {"held-out": (0.9, 0.9)}),
        "cost": plots.over_gflops(PATH, VARIANTS),
        "guidance": plots.over_guidance(GUIDED),
        "bars": plots.stage_bars(BARS, FLOORS),
    }


def lines(figure: Figure) -> list[list[tuple[float, float]]]:
    """The points of every line of the first axes."""
    return [list(map(tuple, np.asarray(line.get_xydata()).tolist())) for line in figure.axes[0].get_lines()]


def intervals(figure: Figure) -> list[list[tuple[float, float]]]:
    """The ends of every error bar of the first axes."""
    bars = [bar for bar in figure.axes[0].collections if isinstance(bar, LineCollection)]
    return [list(map(tuple, segment.tolist())) for bar in bars for segment in map(np.asarray, bar.get_segments())]


def curves(figure: Figure) -> list[list[tuple[float, float]]]:
    """The points of every line that belongs to no error bar."""
    caps = {
        id(cap)
        for container in figure.axes[0].containers
        if isinstance(container, ErrorbarContainer)
        for cap in container[1]
    }
    drawn = [line for line in figure.axes[0].get_lines() if id(line) not in caps]
    return [list(map(tuple, np.asarray(line.get_xydata()).tolist())) for line in drawn]


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.axes[0].texts}


@pytest.mark.parametrize("kind", ["loss", "fid", "plane", "cost", "guidance", "bars"])
def test_equal_figures_have_equal_bytes(kind: str):
    one, two = figures()[kind], figures()[kind]
    assert canvas.png(one) == canvas.png(two)
    assert canvas.svg(one) == canvas.svg(two)
    assert canvas.png(one) == canvas.png(one)  # saving changes nothing


def test_a_picture_is_a_whole_file_of_its_kind():
    figure = figures()["fid"]
    with Image.open(io.BytesIO(canvas.png(figure))) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300 and len(picture.getcolors(1 << 24) or []) > 20
    assert ElementTree.fromstring(canvas.svg(figure)).tag.endswith("svg")


def test_the_loss_curve_draws_the_rows_and_names_the_last_value():
    figure = plots.loss_curve(ROWS)
    assert lines(figure) == [[(50, 1.9), (100, 0.5)]]
    assert texts(figure) == {"0.500"}


def test_a_metric_over_steps_draws_each_stage_in_order_and_each_floor_across():
    figure = plots.over_steps(STAGES, FLOORS, metric="fid")
    assert sorted(lines(figure)) == sorted(
        [[(0, 0.04), (1, 0.04)], [(0, 0.08), (1, 0.08)], [(100, 2.0), (200, 1.5)], [(100, 1.0), (200, 0.5)]]
    )
    styles = {line.get_ydata()[0]: line.get_linestyle() for line in figure.axes[0].get_lines()}  # type: ignore[index]
    assert (styles[0.04], styles[0.08]) == ("--", ":")  # apart from each other without colour
    assert texts(figure) == {"held-out  0.040", "codec  0.080", "● stage 1  1.500", "■ stage 2  0.500"}
    assert figure.axes[0].get_ylabel() == "FID"


def test_a_single_step_stands_in_the_middle_of_its_axis():
    figure = plots.over_steps({"stage 1": [(1500, 1.4, None)]}, FLOORS, metric="fid")
    left, right = figure.axes[0].get_xlim()
    assert (left + right) / 2 == 1500 and left < right
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1,500"]


@pytest.mark.parametrize(
    "metric, top, scale",
    [("fid", 4.0, "log"), ("fid", 0.1, "linear"), ("precision", 0.9, "linear")],  # above a floor of 0.04
)
def test_a_wide_span_is_logarithmic_and_a_rate_never(metric: str, top: float, scale: str):
    figure = plots.over_steps({"stage 1": [(1, top, None)]}, {"held-out": 0.04}, metric=metric)
    assert figure.axes[0].get_yscale() == scale


def test_an_error_becomes_the_95_percent_interval_of_its_own_point():
    rows: dict[str, list[canvas.Estimate]] = {"stage 1": [(100, 2.0, 0.1), (200, 1.5, None)]}
    rows["stage 2"] = [(200, 1.0, 0.05)]
    figure = plots.over_steps(rows, {}, metric="fid")
    assert np.array(intervals(figure)) == pytest.approx(
        np.array([[(100, 1.804), (100, 2.196)], [(200, 0.902), (200, 1.098)]])
    )
    assert texts(figure) == {"● stage 1  1.500", "■ stage 2  1.000 ± 0.098"}
    assert intervals(plots.over_steps(STAGES, {}, metric="fid")) == []


def test_an_axis_holds_the_whole_interval_but_no_logarithm_of_what_is_not_positive():
    wide = plots.over_steps({"stage 1": [(1, 1.0, 0.3), (2, 20.0, 9.0), (3, 2.0, 2.0)]}, {}, metric="fid").axes[0]
    low, high = wide.get_ylim()
    assert wide.get_yscale() == "log" and 0 < low < 1 - 1.96 * 0.3 and high > 20 + 1.96 * 9


def test_cost_joins_the_stages_and_leaves_variants_hollow_and_apart():
    figure = plots.over_gflops(PATH, VARIANTS)
    joined, one, two, guided, third = curves(figure)
    assert joined == [(0.5, 2.0), (2.0, 1.0)] and (one, two) == ([(0.5, 2.0)], [(2.0, 1.0)])
    assert guided == [(1.0, 1.4), (1.0, 1.2)] and third == [(4.0, 0.9)]
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert drawn["stage 1"].get_markerfacecolor() == drawn["stage 1"].get_color() != "none"
    assert drawn["stage 1, guided"].get_markerfacecolor() == drawn["stage 3"].get_markerfacecolor() == "none"
    assert drawn["stage 1, guided"].get_color() == drawn["stage 1"].get_color()
    assert drawn["stage 1, guided"].get_linestyle() == "None"
    assert len(intervals(figure)) == 3
    assert figure.axes[0].get_xscale() == "log" and "as the paper counts" in figure.axes[0].get_xlabel()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*PATH, *VARIANTS]


def test_guidance_draws_every_series_in_order_and_rings_the_lowest():
    figure = plots.over_guidance(GUIDED)
    two, ring, reconstructed, other_ring = curves(figure)
    assert two == [(1.0, 2.0), (2.0, 0.7), (3.0, 0.9)] and ring == [(2.0, 0.7)]
    assert reconstructed == [(1.0, 0.4), (2.0, 0.5)] and other_ring == [(1.0, 0.4)]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["stage 2: lowest 0.700 at 2", "rFID: lowest 0.400 at 1"]
    assert figure.axes[0].get_ylabel() == "FID, rFID"
    assert plots.over_guidance({"stage 2": GUIDED["stage 2"]}).axes[0].get_ylabel() == "FID"


def test_bars_stand_on_zero_and_reach_their_values_with_the_floors_across():
    figure = plots.stage_bars(BARS, FLOORS)
    (axes,) = figure.axes
    bars = [bar.get_path().get_extents(bar.get_patch_transform()) for bar in axes.patches]
    assert [(bar.y0, bar.y1) for bar in bars] == [(0, 2.0), (0, 1.0), (0, 0.9)]
    assert curves(figure) == [[(0, 0.04), (1, 0.04)], [(0, 0.08), (1, 0.08)]]
    assert np.array(intervals(figure)) == pytest.approx(np.array([[(0, 1.804), (0, 2.196)]]))
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 2.196
    assert texts(figure) == {"2.000", "1.000", "0.900", "held-out  0.040", "codec  0.080"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["stage 1", "stage 2", "stage 3\nguidance 1.5"]


def test_no_two_series_look_alike_and_a_stage_keeps_its_look():
    names = ["stage 2, guidance 4", "stage 1", "stage 2, guidance 1", "stage 3", "rFID"]
    found = canvas.looks(names)
    assert (
        found["stage 2, guidance 4"] == canvas.STAGE_LOOKS["stage 2"]
        and found["stage 1"] == canvas.STAGE_LOOKS["stage 1"]
    )
    assert len({look.marker for look in found.values()}) == len(names)
    variants = [canvas.stage_look(f"stage {n}{more}") for n in (1, 2, 3) for more in ("", ", guided")]
    assert len({look.marker for look in variants}) == 6 and len({look.color for look in variants}) == 3


def test_the_plane_has_recall_to_the_right_and_precision_upwards():
    figure = plots.precision_recall({"stage 1": [(200, 0.6, 0.7), (100, 0.5, 0.8)]}, {"held-out": (0.9, 0.85)})
    path, newest, floor = figure.axes[0].get_lines()
    assert lines(figure) == [[(0.8, 0.5), (0.7, 0.6)], [(0.7, 0.6)], [(0.85, 0.9)]]
    assert path.get_markerfacecolor() == "white" and newest.get_markerfacecolor() == newest.get_color()
    assert floor.get_linestyle() == "None"
    assert not any(line.get_clip_on() for line in (path, newest, floor))  # at 0 or 1 a point is seen whole
    assert figure.axes[0].get_xlabel().startswith("recall") and figure.axes[0].get_ylabel().startswith("precision")


def test_labels_on_one_height_are_drawn_apart():
    figure = plots.over_steps({f"run {n}": [(1, 1.0, None)] for n in range(4)}, {}, metric="fid")
    figure.draw_without_rendering()
    boxes = sorted(text.get_window_extent().y0 for text in figure.axes[0].texts)
    gaps = np.diff(boxes) * 72 / figure.dpi
    assert gaps == pytest.approx([canvas.LINE] * 3, abs=1e-6)


@given(st.lists(st.floats(0, 100), max_size=8), st.floats(0.1, 20))
def test_spread_keeps_order_and_distance_and_moves_no_more_than_it_must(positions: list[float], gap: float):
    found = canvas.spread(positions, gap)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    ranked, before = [found[i] for i in order], [positions[i] for i in order]
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(ranked))
    assert sum(found) == pytest.approx(sum(positions), abs=1e-6)  # least squares leaves the mean where it was
    if all(b - a >= gap for a, b in pairwise(before)):
        assert found == pytest.approx(positions, abs=1e-9)


def test_two_labels_at_one_height_move_half_a_gap_each():
    assert canvas.spread([5.0, 5.0, 40.0], 4.0) == [3.0, 7.0, 40.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: plots.loss_curve([]),
        lambda: plots.over_steps({}, FLOORS, metric="fid"),
        lambda: plots.precision_recall({}, {}),
        lambda: plots.over_gflops({}, {}),
        lambda: plots.over_guidance({"stage 2": []}),
        lambda: plots.stage_bars({}, FLOORS),
    ],
)
def test_nothing_to_plot_is_an_error(call: Any):
    with pytest.raises(ValueError, match="nothing to plot"):
        call()
