"""Records become a picture or a table: series by stage, floors, and a refusal of what must not be compared."""

from pathlib import Path
from typing import Any

import pytest

from dod_pipeline import canvas, cli, curves, history, ledger, plots, records

from .test_history import SHA, record
from .test_plots import intervals

Captured = pytest.CaptureFixture[str]


def put(**changes: Any) -> None:
    """A record in the current folder's history."""
    records.append(record(**changes))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a history of two steps."""
    monkeypatch.chdir(tmp_path)
    for step in (4, 6):
        for stage, fid in (("floor", 0.1), ("codec", 0.2), (1, 12.0 - step), (2, 9.0 - step)):
            put(row=f"{step}-{stage}", step=step, checkpoint=f"tiny-{step}", stage=stage, metrics={"fid": fid})
    return tmp_path


def selected(**filters: str) -> tuple[dict[str, list[canvas.Estimate]], dict[str, float]]:
    return curves.over_steps(history.query(ledger.HISTORY, metric="fid", **filters))


def test_records_become_series_by_stage_and_floors(here: Path):
    assert selected() == (
        {"stage 1": [(4, 8.0, None), (6, 6.0, None)], "stage 2": [(4, 5.0, None), (6, 3.0, None)]},
        {"held-out": 0.1, "codec": 0.2},
    )


def test_the_index_says_of_a_metric_what_the_records_say(here: Path):
    put(
        row="z",
        step=8,
        checkpoint="tiny-8",
        stage=2,
        guidance=None,
        metrics={"sfid": 9.0, "fid_error": 0.1, "fid": 2.0},
    )
    found = history.Selection(ledger.HISTORY, metric="fid")
    told = found.measured()
    assert len(told) == 9
    for brief, whole in zip(told, found.records(), strict=True):
        assert brief == {name: whole[name] for name in brief}
        assert whole.keys() - brief.keys() == {"kind", "sources"}


def test_other_settings_of_a_stage_are_a_series_of_their_own_and_the_newest_of_equal_ones_counts(here: Path):
    put(row="z", stage=2, guidance=4.0, metrics={"fid": 2.0})
    put(row="zz", stage=1, metrics={"fid": 5.5})
    series, _ = selected()
    assert series["stage 2, guidance 4.0"] == [(6, 2.0, None)]
    assert series["stage 2, guidance 1.0"] == [(4, 5.0, None), (6, 3.0, None)]
    assert series["stage 1"] == [(4, 8.0, None), (6, 5.5, None)]


def test_the_error_of_a_record_comes_with_its_metric(here: Path):
    put(row="z", step=8, checkpoint="tiny-8", stage=2, metrics={"sfid": 9.0, "fid_error": 0.1, "fid": 2.0})
    series, _ = selected(stage="2")
    assert series == {"stage 2": [(4, 5.0, None), (6, 3.0, None), (8, 2.0, 0.1)]}
    assert intervals(plots.over_steps(series, {}, metric="fid"))[0][0] == pytest.approx((8, 1.804))


def test_history_plot_writes_the_picture(here: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["history", "--plot", "new/fid.png", "--experiment", "tiny"]) == 0
    assert capsys.readouterr().out == "wrote new/fid.png\n"
    series, floors = selected()
    title = "70 images, small-net-64"
    assert Path("new/fid.png").read_bytes() == canvas.png(plots.over_steps(series, floors, metric="fid", title=title))


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"num_samples": 50}, "num_samples is 50 or 70"),
        ({"reference": "f" * 64}, "reference is 0123456789ab or ffffffffffff"),
        (
            {"extractor": {"name": "inception", "digest": SHA}},
            "extractor is inception (0123456789ab) or small-net-64 (",
        ),
    ],
)
def test_what_must_not_be_compared_is_not_drawn_together(
    here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], what: str
):
    put(row="z", experiment="other", checkpoint="other-6", **changes)
    assert cli.main(["history", "--plot", "fid.png"]) == 1
    message = capsys.readouterr().err
    assert f"these 9 records must not be compared: {what}" in message
    assert "separate them with --experiment (other, tiny) or --checkpoint (other-6, tiny-4, tiny-6) or " in message
    assert not Path("fid.png").exists()
    assert cli.main(["history", "--plot", "fid.png", "--experiment", "tiny"]) == 0


def test_a_condition_separates_what_no_name_does(here: Path):
    put(row="z", num_samples=50, metrics={"fid": 1.0})
    with pytest.raises(ValueError, match="num_samples is 50 or 70; separate them with --where num_samples="):
        selected()


def test_floors_alone_have_no_step(here: Path):
    with pytest.raises(ValueError, match="only floors match, which have no step; leave --stage out"):
        selected(stage="floor")


def test_a_point_costs_what_is_spent_over_the_cheapest_way_by_what_is_gained(here: Path, capsys: Captured):
    ways = [(1, None, 10.0, 6.0, 7.0), (2, 2.0, 40.0, 3.0, 28.0), (2, 8.0, 40.0, 6.5, None), (2, 4.0, 40.0, 2.0, None)]
    for stage, guidance, gflops, fid, seconds in ways:
        said = {
            "stage": stage,
            "guidance": guidance,
            "gflops_true": gflops,
            "seconds": seconds,
            "metrics": {"fid": fid},
        }
        put(row=f"{stage}-{guidance}", step=8, checkpoint="tiny-8", **said)
    first, *rest = curves.cost_per_point(history.query(ledger.HISTORY, metric="fid"))
    assert (first.stage, first.gained, first.seconds, first.gflops_per_point) == (1, 0.0, 0.1, None)
    told = {line.guidance: (line.gained, line.gflops_per_point, line.seconds_per_point) for line in rest}
    assert told == {2.0: (3.0, 10.0, pytest.approx(0.1)), 8.0: (-0.5, None, None), 4.0: (4.0, 7.5, None)}
    assert cli.main(["history", "--cost", "--csv", "--checkpoint", "tiny-8", "--where", "guidance!=8"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("tiny-8,1,,")
    (best, *_) = curves.cost_per_point(history.query(ledger.HISTORY, metric="fid"), higher=True)
    assert best.gained == 0
    with pytest.raises(ValueError, match="none of these records says what its samples took"):
        curves.cost_per_point(history.query(ledger.HISTORY, metric="fid", checkpoint="tiny-4"))
