import math

import numpy as np
import pytest
import torch
from PIL import Image

from dod_models import artifact, draws
from dod_models.artifact import DamagedError
from dod_models.checkpoint import load_checkpoint, save_checkpoint
from dod_models.picture import GAP, MARGIN
from dod_models.sample import SCHEMA, SampleConfig, Samples, build_stage, sample_stage

from . import tiny

EULER = SampleConfig(solver="euler", num_steps=3, guidance=2.0, batch_size=4)


def run(count: int, *, previous: torch.Tensor | None, config: SampleConfig = EULER, stage: int = 2):
    model = tiny.random_model(tiny.config()).requires_grad_(False)
    labels = draws.labels_for(0, range(count), 3)
    return sample_stage(
        model, config, stage=stage, labels=labels, previous=None if previous is None else previous[:count]
    )


@pytest.mark.parametrize("prior", [False, True])
def test_a_sample_ignores_how_many_others_there_are(prior):
    previous = draws.noise_for(9, "any", range(7), (4, 4, 4)) if prior else None
    few, many = run(3, previous=previous)[0], run(7, previous=previous)[0]
    assert torch.equal(few, many[:3])
    assert (many[1:] - many[:-1]).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_a_sample_is_nearly_the_same_in_another_batch_size():
    other = EULER.model_copy(update={"batch_size": 3})
    torch.testing.assert_close(run(7, previous=None, config=other)[0], run(7, previous=None)[0], rtol=1e-4, atol=1e-4)


def test_stages_have_noise_of_their_own():
    assert not torch.equal(run(2, previous=None, stage=1)[0], run(2, previous=None, stage=2)[0])


def test_the_prior_reaches_the_samples():
    priors = draws.noise_for(9, "any", range(8), (4, 4, 4))
    first, second = run(4, previous=priors[:4])[0], run(4, previous=priors[4:])[0]
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_evaluations_are_counted_per_sample():
    assert run(7, previous=None)[1] == (3, 3)  # micro-batches are padded, which nobody counts
    assert run(7, previous=None, config=EULER.model_copy(update={"guidance": 1.0}))[1] == (3, 0)


def test_latents_that_are_not_finite_are_an_error():
    model = tiny.random_model(tiny.config()).requires_grad_(False)
    model.final.out.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"stage 1: latents are not finite; lower guidance \(2.0\)"):
        sample_stage(model, EULER, stage=1, labels=torch.tensor([0]), previous=None)


# --- Stages on disk


def test_the_stages_on_disk_are_those_of_the_checkpoint(pipeline):
    model, _ = load_checkpoint(pipeline.checkpoint, decay=0.9)
    first, second = Samples.load(pipeline.stage1), Samples.load(pipeline.stage2)
    labels = draws.labels_for(0, range(70), 3)
    assert torch.equal(first.labels, labels)
    assert torch.equal(second.labels, labels)
    config, guided_config = SampleConfig(**tiny.SAMPLING), SampleConfig(**tiny.GUIDED)
    assert torch.equal(first.latents, sample_stage(model, config, stage=1, labels=labels, previous=None)[0])
    again, _ = sample_stage(model, guided_config, stage=2, labels=labels, previous=first.latents)
    assert torch.equal(second.latents, again)


def test_evaluations_are_stated_for_each_stage_and_in_all(pipeline, tmp_path):
    stated = {}
    for stage in ("stage1", "stage2"):
        facts = pipeline.facts[stage]
        assert artifact.read_manifest(pipeline.root / stage, schema=SCHEMA)["about"].items() > (
            facts.items() - {("num_samples", 70)}
        )
        stated[stage] = {name: value for name, value in facts.items() if name.endswith("evaluations")}
    assert stated["stage1"] == {"evaluations": 2, "stage_evaluations": 2, "null_evaluations": 0}
    assert stated["stage2"] == {"evaluations": 2 + 4, "stage_evaluations": 4, "null_evaluations": 2}


def test_samples_state_their_origin(pipeline):
    first, second = (artifact.read_manifest(p, schema=SCHEMA)["about"] for p in (pipeline.stage1, pipeline.stage2))
    assert first["weights"] == second["weights"] == artifact.sha256_file(pipeline.checkpoint / "manifest.json")
    assert first["previous"] is None
    assert second["previous"] == artifact.sha256_file(pipeline.stage1 / "manifest.json")
    assert second["sampling"] == SampleConfig(**tiny.GUIDED).model_dump(mode="json")


def test_a_third_stage_follows_the_second(pipeline, tmp_path):
    inputs = {"checkpoint": pipeline.checkpoint, "codec": pipeline.codec}
    facts = build_stage(SampleConfig(**tiny.GUIDED), **inputs, previous=pipeline.stage2, out=tmp_path / "stage3")
    assert (facts["stage"], facts["evaluations"], facts["stage_evaluations"]) == (3, 2 + 4 + 4, 4)
    third, second = Samples.load(tmp_path / "stage3"), Samples.load(pipeline.stage2)
    assert torch.equal(third.labels, second.labels)
    model, _ = load_checkpoint(pipeline.checkpoint, decay=0.9)
    config = SampleConfig(**tiny.GUIDED)
    again, _ = sample_stage(model, config, stage=3, labels=second.labels, previous=second.latents)
    assert torch.equal(third.latents, again)


def test_stage_1_can_be_guided(pipeline, tmp_path):
    inputs = {"checkpoint": pipeline.checkpoint, "codec": pipeline.codec}
    facts = build_stage(SampleConfig(**tiny.GUIDED), **inputs, out=tmp_path / "stage1")
    assert (facts["evaluations"], facts["null_evaluations"]) == (4, 2)
    guided, plain = Samples.load(tmp_path / "stage1"), Samples.load(pipeline.stage1)
    assert (guided.latents - plain.latents).abs().amax(dim=(1, 2, 3)).min() > 0


def test_the_config_says_which_of_the_averages_samples(pipeline, tmp_path):
    models = {decay: tiny.random_model(tiny.config(), seed=seed) for seed, decay in enumerate((0.999, 0.9999))}
    weights = {decay: model.state_dict() for decay, model in models.items()}
    save_checkpoint(tmp_path / "checkpoint", weights, tiny.config(), about={})
    for decay, model in models.items():
        config = SampleConfig(**{**tiny.SAMPLING, "ema_decay": decay, "num_samples": 3})
        build_stage(config, checkpoint=tmp_path / "checkpoint", codec=pipeline.codec, out=tmp_path / "stage1")
        found = Samples.load(tmp_path / "stage1")
        model.requires_grad_(False)
        assert torch.equal(found.latents, sample_stage(model, config, stage=1, labels=found.labels, previous=None)[0])


def test_a_different_number_of_samples_is_refused(pipeline, tmp_path):
    config = SampleConfig(**{**tiny.GUIDED, "num_samples": 71})
    inputs = {"checkpoint": pipeline.checkpoint, "codec": pipeline.codec}
    with pytest.raises(ValueError, match="stage1 holds 70 samples, num_samples is 71"):
        build_stage(config, **inputs, previous=pipeline.stage1, out=tmp_path / "stage2")


def test_damaged_samples_are_refused(pipeline, tmp_path):
    folder = tmp_path / "stage1"
    with artifact.writing(folder, schema=SCHEMA, config="") as output:
        data = (pipeline.stage1 / "samples.safetensors").read_bytes()
        (output.path / "samples.safetensors").write_bytes(data)
    (folder / "samples.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"samples.safetensors: sha256"):
        Samples.load(folder)


def test_the_grid_shows_each_sample_s_stages_under_each_other(pipeline):
    from dod_models.codec import Codec

    codec = Codec.load(pipeline.codec)
    first, second = Samples.load(pipeline.stage1), Samples.load(pipeline.stage2)
    grid = np.asarray(Image.open(pipeline.stage2 / "grid.png").convert("L"))
    cell = 64  # sixteen pixels, four times enlarged
    for column in range(3):
        index = int((first.labels == column).nonzero()[1])  # the second sample of its class
        for stage, latents in enumerate((first.latents, second.latents)):
            top, left = 28 + (2 + stage) * (cell + GAP) + 3 * GAP, MARGIN + column * (cell + GAP)
            image = codec.decode(latents[index][None])[0, :, :, 0]
            assert np.array_equal(grid[top : top + cell, left : left + cell][::4, ::4], image)
