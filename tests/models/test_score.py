import json
import shutil

import numpy as np
import pytest

from dod_models import artifact, cost, draws
from dod_models.checkpoint import SCHEMA as CHECKPOINT_SCHEMA
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.codec import Codec
from dod_models.evaluator import Evaluator, Gathered
from dod_models.features import SCHEMA as REFERENCE_SCHEMA
from dod_models.features import FeatureSet
from dod_models.model import ModelConfig
from dod_models.sample import Samples
from dod_models.score import ScoreConfig, build_metrics, shards_of

from . import tiny

INPUTS = ("checkpoint", "reference", "codec", "stage1", "stage2")


@pytest.fixture(scope="module")
def evaluator(pipeline):
    return Evaluator.load(pipeline.reference)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_stage_s_scores_are_those_of_its_decoded_samples(pipeline, evaluator, stage):
    images = Codec.load(pipeline.codec).decode(Samples.load(pipeline.root / stage).latents)
    row = pipeline.facts["metrics"][stage]
    expected = evaluator.score(Gathered.of([evaluator.features([images])], count=70))
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert row["num_samples"] == 70
    assert json.loads((pipeline.root / "metrics").read_text()) == pipeline.facts["metrics"]


def test_a_stage_s_cost_is_that_of_all_stages_up_to_it(pipeline):
    model = artifact.read_manifest(pipeline.checkpoint, schema=CHECKPOINT_SCHEMA)["about"]["model"]
    described = cost.describe(ModelConfig.model_validate(model))
    rows = cost.per_sample(described, [cost.Spent(2), cost.Spent(2, 2)])  # two steps, the second stage's guided
    for stage, row in zip(("stage1", "stage2"), rows, strict=True):
        found = pipeline.facts["metrics"][stage]
        assert found["evaluations"] == pipeline.facts[stage]["evaluations"]
        assert {name: found[name] for name in row} == pytest.approx(row)


def test_floors_are_held_out_images_and_their_reconstructions_at_equal_count(pipeline, evaluator):
    for name, folder, file, schema in (
        ("floor", pipeline.reference, "val.safetensors", REFERENCE_SCHEMA),
        ("codec", pipeline.codec, "reconstructions.safetensors", CODEC_SCHEMA),
    ):
        every, order = FeatureSet.load(folder, file, schema=schema), draws.permutation(0, 0, 90)[:70]
        taken = Gathered.of([FeatureSet(*(values[order] for values in every))], count=70)
        row = pipeline.facts["metrics"][name]
        assert row == pytest.approx({**evaluator.score(taken), "num_samples": 70}, rel=1e-9)


def test_floors_are_of_mixed_classes(pipeline):
    """The index is sorted by class: the first 70 of 90 would hold ten images of the last class."""
    every = FeatureSet.load(pipeline.reference, "val.safetensors", schema=REFERENCE_SCHEMA)
    place = {row.numpy().tobytes(): i for i, row in enumerate(every.logits)}
    taken = Gathered.mixed(pipeline.reference / "val.safetensors", count=30)
    order = [place[row.numpy().tobytes()] for row in taken.logits]
    assert np.bincount(np.array(order) // 30, minlength=3).min() >= 4


def test_real_images_score_better_than_samples_of_a_model_that_barely_trained(pipeline):
    rows = pipeline.facts["metrics"]
    for name in ("fid", "sfid", "kid"):
        assert rows["floor"][name] < rows["codec"][name] < rows["stage1"][name]


def test_too_few_samples_are_an_error(pipeline, tmp_path):
    with pytest.raises(
        ValueError, match=r"stage1: 70 samples, evaluation\.num_samples is 80; sample more, or ask for fewer"
    ):
        build(pipeline, tmp_path, ScoreConfig(num_samples=80))
    assert list(tmp_path.iterdir()) == []


# 70 samples in batches of 7: a shard takes whole batches, so these make five shards of 14 for each stage.
SETTINGS = ScoreConfig(num_samples=70, shard_size=10)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr("dod_models.codec.BATCH", 7)


def build(pipeline, root, config=SETTINGS, name="metrics.json"):
    """The stage with its work in progress below `root`; its facts."""
    inputs = {name: getattr(pipeline, name) for name in INPUTS}
    return build_metrics(config, **inputs, state=root / "state", out=root / name)


@pytest.fixture(scope="module")
def undisturbed(pipeline, tmp_path_factory):
    """Bytes of one process that nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dod_models.codec.BATCH", 7)
        build(pipeline, root)
    return (root / "metrics.json").read_bytes()


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_changes_no_byte(pipeline, undisturbed, small_batches, tmp_path, monkeypatch, world):
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert build(pipeline, tmp_path) == {}
        assert not (tmp_path / "metrics.json").exists()
        assert len(list(tmp_path.rglob("*.safetensors"))) == sum(s % world >= rank for s in range(10))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    (work,) = (tmp_path / "state").iterdir()
    inputs = {name: getattr(pipeline, name) for name in INPUTS}
    assert shards_of(SETTINGS, **inputs, state=tmp_path / "state") == (work, 10)
    monkeypatch.setattr(Evaluator, "features", None)  # nothing is left to do
    build(pipeline, tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == undisturbed


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_the_size_of_a_shard_changes_nothing(pipeline, undisturbed, small_batches, tmp_path, size):
    found = build(pipeline, tmp_path, ScoreConfig(num_samples=70, shard_size=size))
    for stage, row in json.loads(undisturbed).items():
        assert found[stage] == pytest.approx(row, rel=1e-12)


def test_a_killed_run_goes_on_with_the_shards_that_lack(pipeline, undisturbed, small_batches, tmp_path, monkeypatch):
    moment = (
        "/done/.stage1-00000042.safetensors.json.partial"  # the shard is in place, but no note says that it is whole
    )
    paths = {name: getattr(pipeline, name) for name in INPUTS} | {"state": tmp_path / "state"}
    tiny.kill(moment, "metrics", SETTINGS, tmp_path / "metrics.json", threads=2, **paths)
    taken, features = [], Evaluator.features

    def counted(self, batches):
        taken.append(1)
        return features(self, batches)

    monkeypatch.setattr(Evaluator, "features", counted)
    build(pipeline, tmp_path)
    assert len(taken) == 7  # of ten: three of stage 1 were whole
    assert (tmp_path / "metrics.json").read_bytes() == undisturbed


@pytest.fixture
def taken(pipeline, small_batches, tmp_path, monkeypatch):
    """Both of two processes have taken their share, and nobody has summed up."""
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        for rank in "01":
            patch.setenv("RANK", rank)
            build(pipeline, tmp_path)


def test_a_shard_that_was_damaged_meanwhile_is_made_again(pipeline, undisturbed, taken, tmp_path, caplog):
    (shard,) = tmp_path.glob("state/*/out/stage2-00000014.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    build(pipeline, tmp_path, name="again.json")
    assert "making a shard again" in caplog.text and "stage2-00000014.safetensors: sha256 is" in caplog.text
    assert (tmp_path / "again.json").read_bytes() == undisturbed


def test_other_inputs_do_not_go_on_from_this_work(pipeline, taken, tmp_path, monkeypatch):
    (before,) = (tmp_path / "state").iterdir()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    shutil.copytree(pipeline.stage1, tmp_path / "stage1")
    manifest = artifact.read_json(tmp_path / "stage1" / "manifest.json")
    artifact.write_json(tmp_path / "stage1" / "manifest.json", manifest | {"config": "other"})
    inputs = {name: getattr(pipeline, name) for name in INPUTS} | {"stage1": tmp_path / "stage1"}
    build_metrics(SETTINGS, **inputs, state=tmp_path / "state", out=tmp_path / "other.json")
    assert len({before, *(tmp_path / "state").iterdir()}) == 2


def test_finished_work_is_removed_and_that_of_others_stays(pipeline, taken, tmp_path):
    (tmp_path / "state" / "other").mkdir()
    build(pipeline, tmp_path)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["other"]


def test_a_second_process_of_the_same_rank_is_kept_out(pipeline, taken, tmp_path):
    (work,) = tmp_path.glob("state/*/out")
    with artifact.locked(work), pytest.raises(BlockingIOError, match="another process is writing here"):
        build(pipeline, tmp_path)


def test_decoding_in_blocks_changes_no_more_than_a_grey_level(pipeline, evaluator, monkeypatch):
    codec, latents = Codec.load(pipeline.codec), Samples.load(pipeline.stage1).latents
    whole = evaluator.gathered(codec, latents, 20, name="")
    monkeypatch.setattr("dod_models.codec.BATCH", 7)
    parts = evaluator.gathered(codec, latents, 20, name="")
    np.testing.assert_allclose(parts.features, whole.features, rtol=1e-3, atol=1e-3)
