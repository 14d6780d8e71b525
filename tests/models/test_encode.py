import shutil

import numpy as np
import pytest

from dod_models import artifact
from dod_models.codec import Codec
from dod_models.data import LatentShards
from dod_models.encode import EncodeConfig, build_latents, encode_batch, shards_of
from dod_models.images import ImageFolder

from . import tiny


@pytest.fixture(scope="module")
def codec(pipeline):
    return Codec.load(pipeline.codec)


def moments(codec: Codec, pixels: np.ndarray):
    return np.stack([m.numpy() for m in codec.encode(pixels[None].copy())], axis=1)[0]


@pytest.mark.parametrize("index", [0, 39, 40, 89])  # shards hold 40
def test_a_row_holds_the_moments_of_its_image_and_of_the_mirror_image(pipeline, codec, index):
    shards = LatentShards(pipeline.latents)
    pixels = ImageFolder(pipeline.dataset, "train").read(index, size=tiny.SIZE, channels=1)
    for view, shown in ((0, pixels), (1, pixels[:, ::-1])):
        expected = moments(codec, shown)
        np.testing.assert_allclose(shards.gather([index], [view])[0], expected, rtol=1e-3, atol=1e-4)  # fp16
    seen, mirrored = shards.gather([index, index], [0, 1])[:, 0]
    assert np.abs(seen - mirrored).max() > 0.01


def test_labels_and_origin_are_kept(pipeline):
    shards = LatentShards(pipeline.latents)
    assert shards.labels.tolist() == ImageFolder(pipeline.dataset, "train").labels.tolist()
    about = artifact.read_manifest(pipeline.latents, schema="latents/1")["about"]
    assert about["codec"] == artifact.sha256_file(pipeline.codec / "manifest.json")
    assert (shards.views, shards.shape, shards.num_classes, len(shards)) == (2, (4, 4, 4), 3, 90)


def test_the_facts_are_mean_and_deviation_of_the_means(pipeline):
    shards = LatentShards(pipeline.latents)
    means = shards.gather([i for i in range(90) for _ in range(2)], [0, 1] * 90)[:, 0].astype(np.float64)
    expected = {"count": 90, "mean": means.mean(), "std": means.std()}
    assert pipeline.facts["latents"] == pytest.approx(expected, rel=1e-6)


def test_without_mirror_images_there_is_one_view(pipeline, tmp_path):
    inputs = {"dataset": pipeline.dataset, "codec": pipeline.codec, "state": tmp_path / "state"}
    build_latents(EncodeConfig(mirror=False), **inputs, out=tmp_path / "latents")
    plain, both = LatentShards(tmp_path / "latents"), LatentShards(pipeline.latents)
    assert plain.views == 1
    for index in (0, 50, 89):
        np.testing.assert_allclose(plain.gather([index], [0]), both.gather([index], [0]), atol=2e-3)


SETTINGS = EncodeConfig(shard_size=7)  # 13 shards, the last one with 6 images


def build(pipeline, root, name="latents"):
    """The stage with its work in progress below `root`; its facts."""
    inputs = {"dataset": pipeline.dataset, "codec": pipeline.codec, "state": root / "state"}
    return build_latents(SETTINGS, **inputs, out=root / name)


@pytest.fixture(scope="module")
def undisturbed(pipeline, tmp_path_factory):
    """Digests and facts of one process that nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    facts = build(pipeline, root)
    return tiny.digests(root / "latents"), facts


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_changes_no_byte(pipeline, undisturbed, tmp_path, monkeypatch, world):
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert build(pipeline, tmp_path) == {}
        assert not (tmp_path / "latents").exists()
        written = {p.name for p in tmp_path.rglob("shard-*.npy")}
        assert written == {f"shard-{s:05}.npy" for s in range(13) if s % world >= rank}
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    (work,) = (tmp_path / "state").iterdir()
    inputs = {"dataset": pipeline.dataset, "codec": pipeline.codec, "state": tmp_path / "state"}
    assert shards_of(SETTINGS, **inputs) == (work, 13)
    monkeypatch.setattr("dod_models.encode.encode_batch", None)  # nothing is left to encode
    facts = build(pipeline, tmp_path)
    assert (tiny.digests(tmp_path / "latents"), facts) == undisturbed


def test_a_killed_run_goes_on_with_the_shards_that_lack(pipeline, undisturbed, tmp_path, caplog):
    moment = "/done/.shard-00005.npy.json.partial"  # the shard is in place, but no note says that it is whole
    paths = {"dataset": pipeline.dataset, "codec": pipeline.codec, "state": tmp_path / "state"}
    tiny.kill(moment, "latents", SETTINGS, tmp_path / "latents", threads=2, **paths)
    assert build(pipeline, tmp_path) == undisturbed[1]
    assert "latents: going on from 35 of 90 images" in caplog.text  # shards 0 to 4
    assert tiny.digests(tmp_path / "latents") == undisturbed[0]


def test_a_shard_that_was_damaged_meanwhile_is_encoded_again(pipeline, undisturbed, tmp_path, caplog):
    build(pipeline, tmp_path)
    (shard,) = (tmp_path / "state").glob("*/out/shard-00003.npy")
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    build(pipeline, tmp_path, "again")
    assert "making a shard again" in caplog.text and "shard-00003.npy: sha256 is" in caplog.text
    assert tiny.digests(tmp_path / "again") == tiny.digests(tmp_path / "latents") == undisturbed[0]


def test_other_inputs_or_settings_do_not_go_on_from_this_work(pipeline, tmp_path):
    build(pipeline, tmp_path)
    shutil.copytree(pipeline.codec, tmp_path / "codec")
    manifest = artifact.read_json(tmp_path / "codec" / "manifest.json")
    artifact.write_json(tmp_path / "codec" / "manifest.json", manifest | {"config": "other"})
    inputs = {"dataset": pipeline.dataset, "codec": tmp_path / "codec", "state": tmp_path / "state"}
    (before,) = (tmp_path / "state").iterdir()
    build_latents(SETTINGS, **inputs, out=tmp_path / "other")
    (after,) = (tmp_path / "state").iterdir()  # what was finished before is gone
    assert after.name != before.name


def test_a_second_process_of_the_same_rank_is_kept_out(pipeline, tmp_path):
    build(pipeline, tmp_path)
    (work,) = (tmp_path / "state").glob("*/out")
    with artifact.locked(work), pytest.raises(BlockingIOError, match="another process is writing here"):
        build(pipeline, tmp_path)


def test_numbers_beyond_fp16_are_refused(codec):
    pixels = np.zeros((1, tiny.SIZE, tiny.SIZE, 1), dtype=np.uint8)
    huge = Codec(codec.vae, scale=1e9)
    with pytest.raises(ValueError, match="the codec gave numbers that fp16 can't hold"):
        encode_batch(huge, pixels, mirror=False)
