import numpy as np
import pytest

from dod_models import artifact
from dod_models.codec import Codec
from dod_models.data import LatentShards
from dod_models.encode import EncodeConfig, build_latents, encode_batch
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
        np.testing.assert_allclose(np.stack(shards.moments(index, view)), expected, rtol=1e-3, atol=1e-4)  # fp16
    assert np.abs(shards.moments(index, 0)[0] - shards.moments(index, 1)[0]).max() > 0.01


def test_labels_and_origin_are_kept(pipeline):
    shards = LatentShards(pipeline.latents)
    assert shards.labels.tolist() == ImageFolder(pipeline.dataset, "train").labels.tolist()
    about = artifact.read_manifest(pipeline.latents, schema="latents/1")["about"]
    assert about["codec"] == artifact.sha256_file(pipeline.codec / "manifest.json")
    assert (shards.views, shards.shape, shards.num_classes, len(shards)) == (2, (4, 4, 4), 3, 90)


def test_the_facts_are_mean_and_deviation_of_the_means(pipeline):
    shards = LatentShards(pipeline.latents)
    means = np.stack([shards.moments(i, view)[0] for i in range(90) for view in range(2)]).astype(np.float64)
    expected = {"count": 90, "mean": means.mean(), "std": means.std()}
    assert pipeline.facts["latents"] == pytest.approx(expected, rel=1e-6)


def test_without_mirror_images_there_is_one_view(pipeline, tmp_path):
    inputs = {"dataset": pipeline.dataset, "codec": pipeline.codec, "state": tmp_path / "state"}
    build_latents(EncodeConfig(mirror=False), **inputs, out=tmp_path / "latents")
    plain, both = LatentShards(tmp_path / "latents"), LatentShards(pipeline.latents)
    assert plain.views == 1
    for index in (0, 50, 89):
        np.testing.assert_allclose(plain.moments(index, 0), both.moments(index, 0), atol=2e-3)


def test_numbers_beyond_fp16_are_refused(codec):
    pixels = np.zeros((1, tiny.SIZE, tiny.SIZE, 1), dtype=np.uint8)
    huge = Codec(codec.vae, scale=1e9)
    with pytest.raises(ValueError, match="the codec gave numbers that fp16 can't hold"):
        encode_batch(huge, pixels, mirror=False)
