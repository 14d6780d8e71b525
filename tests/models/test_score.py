import json

import numpy as np
import pytest
import torch

from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.codec import Codec
from dod_models.evaluate import score
from dod_models.evaluator import Evaluator
from dod_models.features import SCHEMA as REFERENCE_SCHEMA
from dod_models.features import Extractor, FeatureSet
from dod_models.sample import Samples
from dod_models.score import ScoreConfig, build_metrics, floors


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
    evaluator, codec = Evaluator.load(pipeline.reference), Codec.load(pipeline.codec)
    latents = Samples.load(pipeline.stage1).latents
    whole = evaluator.decoded(codec, latents, 20, name="")
    monkeypatch.setattr("dod_models.codec.BATCH", 7)
    parts = evaluator.decoded(codec, latents, 20, name="")
    torch.testing.assert_close(parts.features, whole.features, rtol=1e-3, atol=1e-3)  # one grey level
