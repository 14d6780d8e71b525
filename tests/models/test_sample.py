import math

import numpy as np
import pytest
import torch
from PIL import Image

from dod_models import artifact, draws
from dod_models.artifact import DamagedError
from dod_models.checkpoint import load_checkpoint
from dod_models.picture import GAP, MARGIN
from dod_models.sample import (
    SCHEMA,
    GuidedVelocity,
    SampleConfig,
    Samples,
    build_stage,
    integrate,
    per_sample_norm,
    sample_stage,
)

from . import tiny


def growth(x, t):
    """dz/dt = z: from 1 at t = 0 to e at t = 1."""
    return x


ONES = torch.ones(2, 1, 1, 1, dtype=torch.float64)


def global_error(num_steps: int) -> float:
    end = integrate(growth, ONES, SampleConfig(solver="euler", num_steps=num_steps))
    return abs(end[0].item() - math.e)


def test_euler_is_compound_interest():
    end = integrate(growth, ONES, SampleConfig(solver="euler", num_steps=10))
    assert end.flatten().tolist() == pytest.approx([1.1**10] * 2, rel=1e-6)


def test_euler_is_first_order():
    assert math.log2(global_error(64) / global_error(128)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("num_steps", [1, 7, 30])
def test_euler_calls_the_velocity_once_a_step_from_noise_on(num_steps):
    times = []

    def velocity(x, t):
        times.append(t.tolist())
        return torch.zeros_like(x)

    integrate(velocity, ONES, SampleConfig(solver="euler", num_steps=num_steps))
    expected = [[n / num_steps] * 2 for n in range(num_steps)]
    assert np.array(times) == pytest.approx(np.array(expected), abs=1e-6)


def test_dopri5_meets_its_tolerance():
    end = integrate(growth, ONES, SampleConfig(solver="dopri5", num_steps=1))
    assert abs(end[0].item() - math.e) < 1e-3 * math.e  # one Euler step gives 2, ten give 2.59


def test_a_straight_path_needs_one_step():
    data = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for solver in ("euler", "dopri5"):
        end = integrate(lambda x, t: data - noise, noise, SampleConfig(solver=solver, num_steps=1))
        torch.testing.assert_close(end, data, rtol=0, atol=1e-5)


def test_the_error_norm_is_that_of_the_worst_sample():
    rows = torch.zeros(10, 1, 2, 2)
    rows[3] = 3.0
    rows[5, 0, 0, 0] = 4.0  # root mean square 2
    assert per_sample_norm(rows).item() == pytest.approx(3)


def test_easy_samples_do_not_loosen_a_hard_one_s_tolerance():
    hard = ONES[:1].float()

    def velocity(x, t):
        return 20 * torch.cos(30 * t).view(-1, 1, 1, 1) * x  # a sample at zero stays there

    alone = integrate(velocity, hard, SampleConfig(solver="dopri5", num_steps=1))
    crowd = torch.cat([hard, torch.zeros(999, 1, 1, 1)])
    together = integrate(velocity, crowd, SampleConfig(solver="dopri5", num_steps=1))
    torch.testing.assert_close(together[:1], alone, rtol=1e-6, atol=0)


# --- Guidance


@pytest.fixture(scope="module")
def scene():
    model = tiny.random_model(tiny.config()).requires_grad_(False)
    rng = torch.Generator().manual_seed(2)
    x, z = torch.randn(2, 5, 4, 4, 4, generator=rng)
    return model, x, torch.full((5,), 0.4), torch.tensor([0, 1, 2, 0, 1]), model.embed_sample(z)


def guided(scene, prior: bool = True, **options):
    model, x, t, labels, sample = scene
    velocity = GuidedVelocity(model, labels, sample if prior else None, SampleConfig(**options))
    return velocity(x, t), velocity


def test_scale_1_is_the_conditional_velocity_at_one_evaluation(scene):
    model, x, t, labels, sample = scene
    found, velocity = guided(scene, guidance=1.0)
    assert torch.equal(found, model.velocity(x, t, labels, sample))
    assert velocity.evaluations == 1


@pytest.mark.parametrize("null_branch", ["both", "label", "prior"])
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_is_its_formula_for_every_null_branch(scene, scale, null_branch):
    model, x, t, labels, sample = scene
    nothing = torch.full((5,), 3)
    free = {
        "both": model.velocity(x, t, nothing),
        "label": model.velocity(x, t, nothing, sample),
        "prior": model.velocity(x, t, labels),
    }[null_branch]
    conditional = model.velocity(x, t, labels, sample)
    expected = (1 - scale) * free + scale * conditional
    found, velocity = guided(scene, guidance=scale, null_branch=null_branch, channels="all")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert velocity.evaluations == 2
    three, _ = guided(scene, guidance=scale, null_branch=null_branch)  # "first3" is the default
    assert torch.equal(three[:, :3], found[:, :3])
    assert torch.equal(three[:, 3], conditional[:, 3])


def test_stage_1_drops_its_label(scene):
    model, x, t, labels, _ = scene
    free, conditional = model.velocity(x, t, torch.full((5,), 3)), model.velocity(x, t, labels)
    expected = free + 3 * (conditional - free)
    for null_branch in ("both", "label"):
        found, _ = guided(scene, prior=False, guidance=3.0, null_branch=null_branch, channels="all")
        torch.testing.assert_close(found, expected)


def test_dropping_a_prior_that_is_not_there_is_refused(scene):
    with pytest.raises(ValueError, match="null_branch 'prior' drops nothing in stage 1"):
        guided(scene, prior=False, guidance=2.0, null_branch="prior")
    found, _ = guided(scene, prior=False, guidance=1.0, null_branch="prior")  # guidance is off
    assert found.isfinite().all()


# --- Stages

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
    assert run(7, previous=None)[1] == 6  # three steps, each twice
    assert run(7, previous=None, config=EULER.model_copy(update={"guidance": 1.0}))[1] == 3
    adaptive = run(3, previous=None, config=EULER.model_copy(update={"solver": "dopri5", "batch_size": 3}))[1]
    assert adaptive >= 12
    assert adaptive % 2 == 0


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
    assert pipeline.facts["stage1"] == {"stage": 1, "num_samples": 70, "evaluations": 2}
    assert pipeline.facts["stage2"] == {"stage": 2, "num_samples": 70, "evaluations": 2 + 4}  # stage 1's too


def test_samples_state_their_origin(pipeline):
    first, second = (artifact.read_manifest(p, schema=SCHEMA)["about"] for p in (pipeline.stage1, pipeline.stage2))
    assert first["weights"] == second["weights"] == artifact.sha256_file(pipeline.checkpoint / "manifest.json")
    assert first["previous"] is None
    assert second["previous"] == artifact.sha256_file(pipeline.stage1 / "manifest.json")
    assert second["sampling"] == SampleConfig(**tiny.GUIDED).model_dump()


def test_a_third_stage_follows_the_second(pipeline, tmp_path):
    inputs = {"checkpoint": pipeline.checkpoint, "codec": pipeline.codec}
    facts = build_stage(SampleConfig(**tiny.GUIDED), **inputs, previous=pipeline.stage2, out=tmp_path / "stage3")
    assert facts == {"stage": 3, "num_samples": 70, "evaluations": 2 + 4 + 4}
    third, second = Samples.load(tmp_path / "stage3"), Samples.load(pipeline.stage2)
    assert torch.equal(third.labels, second.labels)
    model, _ = load_checkpoint(pipeline.checkpoint, decay=0.9)
    config = SampleConfig(**tiny.GUIDED)
    again, _ = sample_stage(model, config, stage=3, labels=second.labels, previous=second.latents)
    assert torch.equal(third.latents, again)


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
