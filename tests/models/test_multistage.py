import numpy as np
import pytest
import torch
from PIL import Image

from dod_models import artifact, draws, multistage
from dod_models.artifact import DamagedError
from dod_models.checkpoint import load_checkpoint, save_checkpoint
from dod_models.codec import Codec
from dod_models.multistage import build_stage, shards_of
from dod_models.picture import GAP, MARGIN
from dod_models.sample import SCHEMA, SampleConfig, Samples, sample_rows, sample_stage

from . import tiny


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
    inputs = {"checkpoint": pipeline.checkpoint, "codec": pipeline.codec, "state": tmp_path / "state"}
    facts = build_stage(SampleConfig(**tiny.GUIDED), **inputs, previous=pipeline.stage2, out=tmp_path / "stage3")
    assert (facts["stage"], facts["evaluations"], facts["stage_evaluations"]) == (3, 2 + 4 + 4, 4)
    third, second = Samples.load(tmp_path / "stage3"), Samples.load(pipeline.stage2)
    assert torch.equal(third.labels, second.labels)
    model, _ = load_checkpoint(pipeline.checkpoint, decay=0.9)
    config = SampleConfig(**tiny.GUIDED)
    again, _ = sample_stage(model, config, stage=3, labels=second.labels, previous=second.latents)
    assert torch.equal(third.latents, again)


def test_stage_1_can_be_guided(pipeline, tmp_path):
    inputs = {"checkpoint": pipeline.checkpoint, "codec": pipeline.codec, "state": tmp_path / "state"}
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
        inputs = {"checkpoint": tmp_path / "checkpoint", "codec": pipeline.codec, "state": tmp_path / "state"}
        build_stage(config, **inputs, out=tmp_path / "stage1")
        found = Samples.load(tmp_path / "stage1")
        model.requires_grad_(False)
        assert torch.equal(found.latents, sample_stage(model, config, stage=1, labels=found.labels, previous=None)[0])


def test_a_different_number_of_samples_is_refused(pipeline, tmp_path):
    config = SampleConfig(**{**tiny.GUIDED, "num_samples": 71})
    inputs = {"checkpoint": pipeline.checkpoint, "codec": pipeline.codec, "state": tmp_path / "state"}
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


# --- Shards

# 70 samples in micro-batches of 4, four of which make a shard: five shards, the last one of 6 samples and padded.
SETTINGS = SampleConfig(num_samples=70, batch_size=4, rtol=0.03, atol=0.03, guidance=2.0, ema_decay=0.9, seed=3)
STARTS = range(0, 70, 16)


@pytest.fixture(scope="module")
def given(pipeline, tmp_path_factory):
    """Inputs of stage 2; for random weights dopri5 needs more evaluations in some micro-batches than in others."""
    checkpoint = tmp_path_factory.mktemp("given") / "checkpoint"
    weights = tiny.random_model(tiny.config()).state_dict()
    save_checkpoint(checkpoint, {0.9: weights}, tiny.config(), about={})
    return {"checkpoint": checkpoint, "codec": pipeline.codec, "previous": pipeline.stage1}


def build(given, root, config=SETTINGS, name="stage2"):
    """The stage with its work in progress below `root`; its facts."""
    return build_stage(config, **given, state=root / "state", out=root / name)


def shards(root):
    """First samples of the shards that are there and whole."""
    notes = root.glob("state/*/done/samples-*.safetensors.json")
    return sorted(int(note.name.removeprefix("samples-").split(".")[0]) for note in notes)


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory):
    """Digests and facts of one process that nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    facts = build(given, root)
    model, _ = load_checkpoint(given["checkpoint"], decay=0.9)
    first, found = Samples.load(given["previous"]), Samples.load(root / "stage2")
    latents, own = sample_stage(model, SETTINGS, stage=2, labels=first.labels, previous=first.latents)
    assert torch.equal(found.latents, latents)
    assert (facts["stage_evaluations"], facts["null_evaluations"]) == (own.total, own.null)
    assert own.null % 1 > 0
    return tiny.digests(root / "stage2"), facts


@pytest.fixture
def made(monkeypatch):
    """First samples of the shards that are made from now on."""
    found = []

    def counted(*arguments, rows, **options):
        found.append(rows.start)
        return sample_rows(*arguments, rows=rows, **options)

    monkeypatch.setattr(multistage, "sample_rows", counted)
    return found


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_number_of_processes_changes_no_byte(given, undisturbed, made, tmp_path, monkeypatch, world):
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert build(given, tmp_path) == {}
        assert not (tmp_path / "stage2").exists()
        assert shards(tmp_path) == [start for i, start in enumerate(STARTS) if i % world >= rank]
    assert sorted(made) == list(STARTS)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    facts = build(given, tmp_path)
    assert len(made) == len(STARTS)  # nothing was left to do
    assert (tiny.digests(tmp_path / "stage2"), facts) == undisturbed


def test_the_shards_are_told_before_they_are_made(given, undisturbed, tmp_path):
    folder, count = shards_of(SETTINGS, **given, state=tmp_path / "state")
    assert not folder.exists()
    build(given, tmp_path)
    assert len(list(folder.glob("out/samples-*.safetensors"))) == count == len(STARTS)


# The third shard is in place, but no note says that it is whole; or all are, and the output is about to be renamed.
MOMENTS = {"/done/.samples-00000032.safetensors.json.partial": STARTS[2:], "/.stage2.partial": []}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_with_the_shards_that_lack(given, undisturbed, made, tmp_path, caplog, moment):
    tiny.kill(moment, "stage2", SETTINGS, tmp_path / "stage2", **given, state=tmp_path / "state")
    assert build(given, tmp_path) == undisturbed[1]
    assert made == list(MOMENTS[moment])
    assert ("stage 2: going on from 32 of 70 samples" in caplog.text) == bool(made)
    assert tiny.digests(tmp_path / "stage2") == undisturbed[0]


def test_a_shard_that_was_damaged_meanwhile_is_made_again(given, undisturbed, made, tmp_path, caplog):
    build(given, tmp_path)
    (shard,) = tmp_path.glob("state/*/out/samples-00000048.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    build(given, tmp_path, name="again")
    assert "making a shard again" in caplog.text and "samples-00000048.safetensors: sha256 is" in caplog.text
    assert made == [*STARTS, 48]
    assert tiny.digests(tmp_path / "again") == undisturbed[0]


@pytest.mark.parametrize("other", ["config", "code"])
def test_other_settings_or_code_do_not_go_on_from_this_work(given, made, tmp_path, monkeypatch, other):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    config = SETTINGS.model_copy(update={"solver": "euler", "num_steps": 1})
    build(given, tmp_path, config)
    if other == "code":
        monkeypatch.setattr("dod_models.source.code", lambda module: {module: "another"})
    else:
        config = config.model_copy(update={"seed": 4})
    build(given, tmp_path, config)
    assert made == 2 * list(STARTS[::2])
    assert len(list((tmp_path / "state").iterdir())) == 2  # what was not finished is left to others


def test_finished_work_stays_until_it_is_recorded_or_other_work_is_finished(given, undisturbed, made, tmp_path):
    build(given, tmp_path)
    build(given, tmp_path, name="again")  # as after a dvc that was killed before it recorded the output
    assert made == list(STARTS)
    assert tiny.digests(tmp_path / "again") == undisturbed[0]
    (before,) = (tmp_path / "state").iterdir()
    build(given, tmp_path, SETTINGS.model_copy(update={"solver": "euler", "num_steps": 1}))
    (after,) = (tmp_path / "state").iterdir()
    assert after != before
    artifact.forget_finished(tmp_path / "state")
    assert list((tmp_path / "state").iterdir()) == []


def test_latents_that_are_not_finite_are_in_no_shard(given, tmp_path, monkeypatch):
    monkeypatch.setattr("dod_models.sample.integrate", lambda velocity, noise, config: noise / 0)
    with pytest.raises(FloatingPointError, match=r"stage 2: latents are not finite; lower guidance \(2.0\)"):
        build(given, tmp_path)
    assert list(tmp_path.rglob("*.safetensors*")) == []


def test_a_second_process_of_the_same_rank_is_kept_out(given, tmp_path):
    folder, _ = shards_of(SETTINGS, **given, state=tmp_path / "state")
    with artifact.locked(folder / "out"), pytest.raises(BlockingIOError, match="another process is writing here"):
        build(given, tmp_path)
