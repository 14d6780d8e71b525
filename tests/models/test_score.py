import json

import numpy as np
import pytest
import torch

from dod_models import artifact
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.codec import Codec
from dod_models.evaluate import score
from dod_models.features import SCHEMA as REFERENCE_SCHEMA
from dod_models.features import Extractor, FeatureSet
from dod_models.sample import Samples
from dod_models.score import ScoreConfig, SweepConfig, build_metrics, build_sweeps, decoded, floors

from . import tiny


@pytest.fixture(scope="module")
def real(pipeline):
    return FeatureSet.load(pipeline.reference, "train.safetensors", schema=REFERENCE_SCHEMA)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_stage_s_scores_are_those_of_its_decoded_samples(pipeline, real, stage):
    images = Codec.load(pipeline.codec).decode(Samples.load(pipeline.root / stage).latents)
    expected = score(Extractor.load(pipeline.reference)([images]), real)
    evaluations = pipeline.facts[stage]["evaluations"]
    row = pipeline.facts["metrics"][stage]
    assert row == pytest.approx({**expected, "num_samples": 70, "evaluations": evaluations}, rel=1e-5)
    assert json.loads((pipeline.root / "metrics").read_text()) == pipeline.facts["metrics"]


def test_floors_are_held_out_images_and_their_reconstructions_at_equal_count(pipeline, real):
    for name, folder, file, schema in (
        ("floor", pipeline.reference, "val.safetensors", REFERENCE_SCHEMA),
        ("codec", pipeline.codec, "reconstructions.safetensors", CODEC_SCHEMA),
    ):
        every = FeatureSet.load(folder, file, schema=schema)
        taken = floors(pipeline.reference, pipeline.codec, 70)[name]
        known = {row.numpy().tobytes() for row in every.features}
        assert len({row.numpy().tobytes() for row in taken.features} & known) == len(
            {r.numpy().tobytes() for r in taken.features}
        )
        row = pipeline.facts["metrics"][name]
        assert row == pytest.approx({**score(taken, real), "num_samples": 70}, rel=1e-9)


def test_floors_are_of_mixed_classes(pipeline):
    """The index is sorted by class: the first 70 of 90 would hold ten images of the last class."""
    every = FeatureSet.load(pipeline.reference, "val.safetensors", schema=REFERENCE_SCHEMA)
    place = {row.numpy().tobytes(): i for i, row in enumerate(every.logits)}
    order = [place[row.numpy().tobytes()] for row in floors(pipeline.reference, pipeline.codec, 30)["floor"].logits]
    assert np.bincount(np.array(order) // 30, minlength=3).min() >= 4


def test_real_images_score_better_than_samples_of_a_model_that_barely_trained(pipeline):
    rows = pipeline.facts["metrics"]
    assert rows["floor"]["fid"] < rows["codec"]["fid"] < rows["stage1"]["fid"]


def test_too_few_samples_are_an_error(pipeline, tmp_path):
    inputs = {name: pipeline.root / name for name in ("reference", "codec", "stage1", "stage2")}
    with pytest.raises(
        ValueError, match=r"stage1: 70 samples, evaluation\.num_samples is 80; sample more, or ask for fewer"
    ):
        build_metrics(ScoreConfig(num_samples=80), **inputs, out=tmp_path / "metrics.json")
    assert not (tmp_path / "metrics.json").exists()


def test_decoding_in_blocks_changes_nothing(pipeline, monkeypatch):
    extractor, codec = Extractor.load(pipeline.reference), Codec.load(pipeline.codec)
    latents = Samples.load(pipeline.stage1).latents
    whole = decoded(extractor, codec, latents, 20, name="")
    monkeypatch.setattr("dod_models.codec.BATCH", 7)
    parts = decoded(extractor, codec, latents, 20, name="")
    torch.testing.assert_close(parts.features, whole.features, rtol=1e-3, atol=1e-3)  # one grey level


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
