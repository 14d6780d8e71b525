"""A report draws what there are rows for, and joins only what can be compared."""

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure

from dod_models.sample import SampleConfig
from dod_models.sweeps import SweepConfig
from dod_pipeline import figures
from dod_pipeline.figures import Evaluated, Row

from .test_plots import curves, intervals

SAMPLING: Row = {"solver": "euler", "num_steps": 10, "null_branch": "label", "guidance_interval": (0.0, 1.0)}


def row(fid: float, **changes: Any) -> Row:
    """Scores of 70 images."""
    return {"fid": fid, "precision": 0.5, "recall": 0.4, "num_samples": 70} | changes


def one(*, sweep: dict[str, Row] | None = None, step: int = 6, **changes: Any) -> Evaluated:
    """A checkpoint whose stage 2 was sampled with guidance 2; `changes` are of every row."""
    fids = {"floor": 0.1, "codec": 0.2, "stage1": 2.0, "stage2": 1.0}
    scores = {name: row(fid, **changes) for name, fid in fids.items()}
    for name, gflops in (("stage1", 0.5), ("stage2", 2.0)):
        scores[name] |= {"gflops_paper": gflops}
    sampling = {"stage1": SAMPLING | {"guidance": 1.0}, "stage2": SAMPLING | {"guidance": 2.0}}
    return Evaluated(step, scores, sampling, sweep or {})


def swept(kind: str, guidance: float, fid: float, *, more: str = "", **changes: Any) -> dict[str, Row]:
    """A row of a sweep under its name."""
    null = f" null=label{more}" if guidance != 1 else ""
    values = {"kind": kind, "guidance": guidance, "gflops_paper": 3.0} | changes
    return {f"{kind} guidance={guidance:g} euler steps=10{null}": row(fid) | values}


def drawn(figure: Figure | None) -> list[list[tuple[float, float]]]:
    assert figure is not None
    return curves(figure)


def named(figure: Figure | None) -> list[str]:
    """The legend below a figure."""
    assert figure is not None
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_an_experiments_own_stage_has_the_words_that_a_sweep_gives_its_rows():
    for changes in (
        {},
        {"solver": "dopri5"},
        {"guidance": 1.5, "null_branch": "prior", "guidance_interval": (0.1, 0.5)},
    ):
        config = SampleConfig.model_validate({"solver": "euler", "guidance": 2.0, "num_samples": 4} | changes)
        asked = {
            "num_samples": 4,
            "stage1": config,
            "stage2": config,
            "rows": [{"stage": 2, "guidance": config.guidance}],
        }
        (name,) = SweepConfig.model_validate(asked).variants()
        assert figures.sampled(config.model_dump(mode="json")) == set(figures.way(name).split())


def test_a_line_joins_the_experiments_own_scale_with_those_that_differ_in_guidance_alone():
    sweep = swept("stage2", 1.0, 1.7) | swept("stage2", 3.0, 0.8) | swept("stage2", 4.0, 0.5, more=" t=0.1-0.5")
    sweep |= {"stage2 guidance=3 euler steps=99 null=label": row(0.1) | {"kind": "stage2", "guidance": 3.0}}
    figure = figures.over_guidance(one(sweep=sweep))
    own, _, interval, _ = drawn(figure)
    assert own == [(1.0, 1.7), (2.0, 1.0), (3.0, 0.8)]
    assert interval == [(1.0, 1.7), (4.0, 0.5)]  # without guidance there is no interval to differ in
    assert named(figure) == ["stage 2: lowest 0.800 at 3", "stage 2, t=0.1-0.5: lowest 0.500 at 4"]


def test_reconstruction_is_drawn_by_its_rfid():
    rows = [swept("reconstruction", scale, 99.0, rfid=rfid) for scale, rfid in ((1.0, 0.7), (2.0, 0.3))]
    figure = figures.over_guidance(one(sweep=rows[0] | rows[1]))
    assert drawn(figure)[0] == [(1.0, 0.7), (2.0, 0.3)] and named(figure) == ["rFID: lowest 0.300 at 2"]


def test_where_rows_lack_a_figure_is_left_out():
    assert figures.over_guidance(one()) is None
    assert figures.over_guidance(one(sweep=swept("stage3", 2.0, 0.9))) is None  # one scale is no line
    assert figures.over_gflops(one()) is not None
    old = one()
    for name in ("stage1", "stage2"):
        del old.scores[name]["gflops_paper"]
    assert figures.over_gflops(old) is None


def test_cost_has_the_stages_of_the_experiment_and_the_variants_by_stage_and_guidance():
    sweep = swept("stage1", 1.0, 1.9) | swept("stage1", 2.0, 1.2) | swept("stage3", 2.0, 0.9, gflops_paper=4.0)
    sweep |= swept("reconstruction", 2.0, 0.01) | {"probe": {"kind": "probe", "top1": 0.5}}
    figure = figures.over_gflops(one(sweep=sweep))
    assert drawn(figure)[0] == [(0.5, 2.0), (2.0, 1.0)]
    assert drawn(figure)[3:] == [[(3.0, 1.9)], [(3.0, 1.2)], [(4.0, 0.9)]]
    assert named(figure) == ["stage 1", "stage 2", "stage 1, unguided", "stage 1, guided", "stage 3, guided"]


@pytest.mark.parametrize("kind, draw", [("stage1", figures.over_gflops), ("stage3", figures.stage_bars)])
def test_a_variant_of_another_count_is_not_drawn_beside_the_rest(kind: str, draw: Callable[[Evaluated], Figure]):
    alike = draw(one(sweep=swept(kind, 2.0, 0.5)))
    other, without = draw(one(sweep=swept(kind, 2.0, 0.5, num_samples=50))), draw(one())
    assert drawn(other) == drawn(without) and len(other.axes[0].patches) == len(without.axes[0].patches)
    assert (drawn(alike), len(alike.axes[0].patches)) != (drawn(without), len(without.axes[0].patches))


def test_bars_take_stage_3_at_the_guidance_nearest_to_that_of_stage_2():
    sweep = swept("stage3", 4.0, 0.7) | swept("stage3", 1.5, 0.9, fid_error=0.1) | swept("stage3", 1.0, 1.1)
    figure = figures.stage_bars(one(sweep=sweep))
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == ["stage 1", "stage 2", "stage 3\nguidance 1.5"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [2.0, 1.0, 0.9]  # type: ignore[attr-defined]
    assert len(intervals(figure)) == 1
    exact = figures.stage_bars(one(sweep=sweep | swept("stage3", 2.0, 0.8)))
    assert exact.axes[0].get_xticklabels()[2].get_text() == "stage 3"


def test_a_bar_of_stage_3_that_was_sampled_otherwise_is_left_out():
    sweep = swept("stage3", 2.0, 0.8)
    (row,) = sweep.values()
    otherwise = {"stage3 guidance=2 euler steps=99 null=label": row}
    assert len(figures.stage_bars(one(sweep=sweep)).axes[0].patches) == 3
    assert len(figures.stage_bars(one(sweep=otherwise)).axes[0].patches) == 2


def test_steps_have_every_checkpoint_of_the_newest_count_with_its_intervals():
    others = [one(step=2, num_samples=50), one(step=4, fid_error=0.02)]
    figure = figures.over_steps([*others, one(step=6)])
    assert [(4.0, 2.0), (6.0, 2.0)] in drawn(figure) and [(4.0, 1.0), (6.0, 1.0)] in drawn(figure)
    assert [ends[0][0] for ends in intervals(figure)] == [4.0, 4.0]
    newest = figures.plane([*others, one(step=6)]).axes[0].get_lines()[0]
    assert len(newest.get_xdata()) == 2  # type: ignore[arg-type]
