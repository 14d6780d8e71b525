import shutil

import numpy as np
import pytest
import torch

from dod_models import artifact, cost
from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec
from dod_models.config import TOOK
from dod_models.data import LatentShards
from dod_models.evaluator import Evaluator
from dod_models.images import ImageFolder
from dod_models.probe import Features, exact
from dod_models.sample import SampleConfig, Samples, draw_grid, sample_stage
from dod_models.sweeps import Sweep, SweepConfig, build_sweeps

from . import tiny

INPUTS = ("reference", "codec", "dataset", "latents", "stage1", "stage2")


def settings(*rows, **others):
    values = {"num_samples": 70, "stage1": tiny.SAMPLING, "stage2": tiny.GUIDED, "rows": rows, **others}
    return SweepConfig.model_validate(values)


def sweep(pipeline, root, *rows, **others):
    """The table of the stage with its work in progress below `root`."""
    inputs = {name: pipeline.root / name for name in INPUTS} | {"checkpoint": pipeline.checkpoint}
    places = {"state": root / "state", "picture": root / "sweep.png", "out": root / "sweeps.json"}
    return build_sweeps(settings(*rows, **others), **inputs, **places)


def test_a_row_of_the_sweep_that_changes_nothing_repeats_the_metrics(pipeline, tmp_path):
    table = sweep(
        pipeline,
        tmp_path,
        {"stage": 1, "guidance": 1.0},
        {"stage": 2, "guidance": [2.0]},
        {"stage": 2, "guidance": 3.0, "num_steps": 1, "null_branch": "label"},
        {"stage": 2, "guidance": 2.0, "guidance_interval": [0.25, 1.0]},
    )
    first, second, third, fourth = table.values()
    for row, number in ((first, 1), (second, 2)):
        assert row["kind"] == f"stage{number}" and row["guidance"] == number
        assert pipeline.facts["metrics"][f"stage{number}"].items() <= row.items()
    assert second["evaluations"] == 2 + 4  # stage 1's too
    assert third["evaluations"] == 2 + 2
    assert third["fid"] != second["fid"]
    assert fourth["evaluations"] == 2 + 3  # the first of its two steps is not guided
    assert fourth["fid"] != second["fid"]
    names = ["stage2 guidance=3 euler steps=1 null=label", "stage2 guidance=2 euler steps=2 null=both t=0.25-1"]
    assert list(table)[2:] == names
    assert artifact.read_json(tmp_path / "sweeps.json") == table
    assert [path.name for path in (tmp_path / "state").iterdir()] == [TOOK]
    seconds = artifact.read_json(tmp_path / "state" / TOOK)
    assert list(seconds) == sorted(table) and min(seconds.values()) > 0


def test_a_row_states_the_gflops_of_a_sample(pipeline, tmp_path):
    label = {"stage": 3, "guidance": 2.0, "null_branch": "label"}
    table = sweep(pipeline, tmp_path, {"stage": 1, "guidance": 1.0}, label, {"stage": "reconstruction", "guidance": 2})
    for kind, price in cost.describe(tiny.config())["gflops"].items():
        one, two, lem = price["stage1"], price["stage2"], price["lem"]
        found = [row[f"gflops_{kind}"] for row in table.values()]
        second = lem + 2 * (two + one)
        assert found == pytest.approx([2 * one, 2 * one + second + lem + 4 * two, second], rel=1e-12)


def test_a_list_of_scales_is_a_row_for_each():
    assert list(
        settings({"stage": "reconstruction", "guidance": [1, 1.5]}, {"stage": 1, "guidance": [2]}).variants()
    ) == [
        "reconstruction guidance=1 euler steps=2",
        "reconstruction guidance=1.5 euler steps=2 null=both",
        "stage1 guidance=2 euler steps=2 null=both",
    ]


def test_stage_3_starts_from_the_samples_of_stage_2(pipeline, tmp_path):
    (row,) = sweep(pipeline, tmp_path, {"stage": 3, "guidance": 2.0}).values()
    model, _ = load_checkpoint(pipeline.checkpoint, decay=0.9)
    previous, labels = Samples.load(pipeline.stage2)
    guided = SampleConfig.model_validate(tiny.GUIDED)
    latents, _ = sample_stage(model, guided, stage=3, labels=labels, previous=previous)
    evaluator = Evaluator.load(pipeline.reference)
    wanted = evaluator.score(evaluator.gathered(Codec.load(pipeline.codec), latents, 70, name="stage 3"))
    assert wanted.items() <= row.items()
    assert row["kind"] == "stage3" and row["evaluations"] == 2 + 4 + 4
    stages = [(f"stage {n}", Samples.load(pipeline.root / f"stage{n}").latents) for n in (1, 2)]
    draw_grid(tmp_path / "own.png", [*stages, ("stage 3", latents)], labels, Codec.load(pipeline.codec))
    assert (tmp_path / "sweep.png").read_bytes() == (tmp_path / "own.png").read_bytes()


def test_the_probe_is_fitted_to_training_images_and_scored_on_held_out_ones(pipeline, tmp_path):
    (row,) = sweep(pipeline, tmp_path, probe=True).values()
    lem = load_checkpoint(pipeline.checkpoint, decay=0.9)[0].lem
    shards, held_out, codec = LatentShards(pipeline.latents), ImageFolder(pipeline.dataset, "val"), pipeline.codec
    (pixels,) = held_out.blocks(size=tiny.SIZE, channels=1)
    latents = {"train": torch.from_numpy(shards.gather(range(90), [0] * 90)[:, 0].astype(np.float32))}
    latents["test"] = Codec.load(codec).encode(pixels)[0]
    with torch.no_grad():
        rows = {split: lem.encode(z).flatten(1).numpy() for split, z in latents.items()}
    train, test = Features(rows["train"], shards.labels.numpy()), Features(rows["test"], held_out.labels)
    assert row == {"kind": "probe", "top1": exact(train, test), "num_train": 90, "num_test": 90}
    assert row["top1"] > 0.5  # chance is a third


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"stage": 2, "guidance": 2.0, "null_branch": "lable"}, "null_branch"),
        ({"stage": 2, "guidance": -1.0}, "guidance"),
        ({"stage": 2, "guidance": [1.0, -1.0]}, "guidance"),
        ({"stage": 2, "guidance": 2.0, "guidance_interval": [0.5, 0.2]}, "guidance_interval"),
        ({"stage": 4, "guidance": 2.0}, "stage"),  # nothing has its samples of stage 3
        ({"stage": 1, "guidance": 2.0, "null_branch": "prior"}, "stage1 guidance=2 .*no prior to drop in stage 1"),
    ],
)
def test_a_row_that_cannot_be_sampled_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        settings(row)


ROWS = (
    {"stage": 1, "guidance": [1.0, 2.0]},
    {"stage": 3, "guidance": 2.0},
    {"stage": "reconstruction", "guidance": [1.0, 2.0]},
)


@pytest.fixture(scope="module")
def undisturbed(pipeline, tmp_path_factory):
    """The file of a sweep that nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    sweep(pipeline, root, *ROWS, probe=True)
    return (root / "sweeps.json").read_bytes()


def test_a_killed_sweep_goes_on_with_the_rows_that_lack(pipeline, undisturbed, tmp_path, caplog):
    inputs = {name: pipeline.root / name for name in INPUTS} | {"checkpoint": pipeline.checkpoint}
    fourth = Sweep(settings(*ROWS), inputs, tmp_path / "state").folders["reconstruction guidance=1 euler steps=2"]
    paths = inputs | {"state": tmp_path / "state", "picture": tmp_path / "sweep.png"}
    tiny.kill(
        f"{fourth.name}/.row.json.partial", "sweeps", settings(*ROWS, probe=True), tmp_path / "sweeps.json", **paths
    )
    assert len(list(tmp_path.glob("state/*/row.json"))) == 3
    sweep(pipeline, tmp_path, *ROWS, probe=True)
    assert (tmp_path / "sweeps.json").read_bytes() == undisturbed
    told = [record.message for record in caplog.records if record.name == "dod_models.sweeps"]
    assert told == [
        "sweeps: row 4 of 6: reconstruction guidance=1 euler steps=2",
        "sweeps: row 5 of 6: reconstruction guidance=2 euler steps=2 null=both",
        "sweeps: row 6 of 6: probe",
    ]
    assert [path.name for path in (tmp_path / "state").iterdir()] == [TOOK]
    seconds = artifact.read_json(tmp_path / "state" / TOOK)  # those of rows that were done before too
    assert len(seconds) == 5 and min(seconds.values()) > 0


def test_a_table_with_a_scale_more_goes_on_from_the_rows_that_are_done(pipeline, tmp_path, monkeypatch):
    made: list[str] = []

    def row(self, name, title):
        if "guidance=3" in name and len(made) == 2:
            made.append("")
            raise OSError("stopped")
        made.append(name)
        return {"kind": name}

    monkeypatch.setattr("dod_models.sweeps.Sweep.row", row)
    with pytest.raises(OSError, match="stopped"):
        sweep(pipeline, tmp_path, {"stage": 2, "guidance": [1.0, 2.0, 3.0]})
    (tmp_path / "state" / "other").mkdir()
    found = sweep(pipeline, tmp_path, {"stage": 2, "guidance": [0.5, 1.0, 2.0, 3.0]})
    assert [name.split()[1] for name in found] == [f"guidance={scale}" for scale in ("0.5", "1", "2", "3")]
    assert [name.split()[1] for name in made[3:]] == ["guidance=0.5", "guidance=3"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["other", TOOK]


def test_other_inputs_or_settings_do_not_go_on_from_these_rows(pipeline, tmp_path, monkeypatch):
    def stop(self, name, title):
        if name == "probe":
            raise OSError("stopped")
        return {"kind": name}

    monkeypatch.setattr("dod_models.sweeps.Sweep.row", stop)
    for seed in (0, 1):
        with pytest.raises(OSError, match="stopped"):
            sweep(pipeline, tmp_path, {"stage": 1, "guidance": 1.0}, probe={"seed": seed})
    assert len(list((tmp_path / "state").iterdir())) == 3  # stage 1 is shared, each probe has its own
    moved = tmp_path / "moved"
    shutil.copytree(pipeline.root, moved, ignore=lambda *_: ["images"])
    manifest = artifact.read_json(moved / "stage2" / "manifest.json")
    artifact.write_json(moved / "stage2" / "manifest.json", manifest | {"config": "other"})
    with pytest.raises(OSError, match="stopped"):
        sweep(tiny.Pipeline(moved, {}), tmp_path, {"stage": 1, "guidance": 1.0}, probe={"seed": 1})
    assert len(list((tmp_path / "state").iterdir())) == 5
