"""Tables fit a terminal, and rows of an older or another kind are shown for what they have."""

from typing import Any

import pytest

from dod_pipeline import tables

Captured = pytest.CaptureFixture[str]
SCORES: dict[str, float] = {"fid": 6.14, "fid_error": 0.05, "sfid": 141.21, "kid": -0.00012, "inception_score": 215.84}
SCORES |= {"precision": 0.825, "recall": 0.528, "num_samples": 50000}
OLD = {"fid": 0.636, "inception_score": 5.614, "precision": 0.753, "recall": 0.674, "num_samples": 1500}


def cells(out: str) -> list[list[str]]:
    """The cells of the printed rows, heads excepted."""
    lines = out.splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def test_the_error_is_shown_as_half_the_95_percent_interval():
    assert tables.cell(SCORES, "fid") == "6.140 ± 0.098"
    assert (tables.cell(SCORES, "kid"), tables.cell(SCORES, "precision")) == ("-0.00012", "0.825")
    assert (tables.cell(OLD, "fid"), tables.cell(OLD, "kid")) == ("0.636", "-")


def test_results_of_every_metric_fit_in_120_columns(capsys: Captured):
    tables.results("imagenet-400k", {"stage1": SCORES, "stage2": SCORES, "floor": SCORES, "codec": SCORES})
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    for text in (*tables.METRICS.values(), "6.140 ± 0.098", "141.210", "-0.00012", "215.840", "50000"):
        assert text in out


def test_results_made_before_a_metric_have_a_dash_for_it(capsys: Captured):
    tables.results("mnist-1500", {"stage1": OLD})
    assert cells(capsys.readouterr().out)[0] == ["stage 1", "0.636", "-", "-", "5.614", "0.753", "0.674", "1500"]


def test_a_sweep_is_printed_by_kinds(capsys: Captured):
    similar = {"kind": "reconstruction", "guidance": 2.0, "rfid": 0.25, "psnr": 15.125, "ssim": 0.5}
    table: dict[str, dict[str, Any]] = {
        "stage2 guidance=2": SCORES | {"kind": "stage2", "guidance": 2.0, "evaluations": 30.0},
        "reconstruction guidance=2": similar | {"num_samples": 70, "evaluations": 20.0},
        "probe": {"kind": "probe", "top1": 0.875, "num_train": 3500, "num_test": 1500},
    }
    tables.sweep("mnist-1500", table)
    out = capsys.readouterr().out
    assert out.index("sweep of mnist-1500") < out.index("reconstruction of mnist-1500")
    assert cells(out)[1] == ["reconstruction guidance=2", "20", "0.250", "15.12", "0.500", "70"]
    assert out.endswith("linear probe of mnist-1500: top-1 87.5 % of 1,500 images, fitted on 3,500\n")
    tables.sweep("mnist-1500", {"probe": table["probe"]})
    assert "reconstruction" not in capsys.readouterr().out


def test_a_sweep_is_printed_by_guidance(capsys: Captured):
    scales = {scale: SCORES | {"kind": "stage2", "guidance": scale, "evaluations": 30.0} for scale in (1.5, 10.0, 2.0)}
    tables.sweep("mnist-1500", {f"guidance={scale:g}": row for scale, row in scales.items()})
    assert [line[0] for line in cells(capsys.readouterr().out)] == ["guidance=1.5", "guidance=2", "guidance=10"]


def test_side_by_side_has_the_rows_with_fid_that_all_have(capsys: Captured):
    both: dict[str, dict[str, Any]] = {"stage2": OLD, "probe": {"kind": "probe", "top1": 0.5}}
    tables.side_by_side({"one": both, "two": both | {"stage3": OLD}})
    assert cells(capsys.readouterr().out) == [["stage2", "-", "0.636", "0.636", "0.636"]]
