import pytest

from dod_models import artifact
from dod_models.sweeps import SweepConfig, build_sweeps

from . import tiny


def sweep(pipeline, out, *rows):
    values = {"num_samples": 70, "stage1": tiny.SAMPLING, "stage2": tiny.GUIDED, "rows": rows}
    inputs = {name: pipeline.root / name for name in ("reference", "codec", "stage1")}
    return build_sweeps(SweepConfig.model_validate(values), checkpoint=pipeline.checkpoint, **inputs, out=out)


def test_a_row_of_the_sweep_that_changes_nothing_repeats_the_metrics(pipeline, tmp_path):
    table = sweep(
        pipeline,
        tmp_path / "sweeps.json",
        {"stage": 1, "guidance": 1.0},
        {"stage": 2, "guidance": 2.0},
        {"stage": 2, "guidance": 3.0, "num_steps": 1, "null_branch": "label"},
        {"stage": 2, "guidance": 2.0, "guidance_interval": [0.25, 1.0]},
    )
    first, second, third, fourth = table.values()
    assert first == pipeline.facts["metrics"]["stage1"]
    assert second == pipeline.facts["metrics"]["stage2"]
    assert second["evaluations"] == 2 + 4  # stage 1's too
    assert third["evaluations"] == 2 + 2
    assert third["fid"] != second["fid"]
    assert fourth["evaluations"] == 2 + 3  # the first of its two steps is not guided
    assert fourth["fid"] != second["fid"]
    names = ["stage2 guidance=3 euler steps=1 null=label", "stage2 guidance=2 euler steps=2 null=both t=0.25-1"]
    assert list(table)[2:] == names
    assert artifact.read_json(tmp_path / "sweeps.json") == table


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"stage": 2, "guidance": 2.0, "null_branch": "lable"}, "null_branch"),
        ({"stage": 2, "guidance": -1.0}, "guidance"),
        ({"stage": 2, "guidance": 2.0, "guidance_interval": [0.5, 0.2]}, "guidance_interval"),
        ({"stage": 3, "guidance": 2.0}, "stage"),  # it would start from stage 1
    ],
)
def test_a_row_that_cannot_be_sampled_is_refused(pipeline, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        sweep(pipeline, tmp_path / "sweeps.json", row)
