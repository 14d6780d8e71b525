import shutil

import numpy as np
import pytest
import torch

from dod_models import artifact
from dod_models.artifact import DamagedError
from dod_models.codec import SCHEMA, Codec, batch_size
from dod_models.evaluate import psnr
from dod_models.evaluator import load_extractor
from dod_models.features import FeatureSet
from dod_models.fit_codec import CodecConfig, build_codec, measure_scale, small_vae, train_vae
from dod_models.images import ImageFolder
from dod_models.pixels import to_pixels, to_signal
from dod_models.stable_diffusion import CONFIG, WEIGHTS

from . import tiny


@pytest.fixture(scope="module")
def codec(pipeline):
    return Codec.load(pipeline.codec)


def images(pipeline, split: str) -> np.ndarray:
    return np.concatenate(list(ImageFolder(pipeline.dataset, split).blocks(size=tiny.SIZE, channels=1)))


def test_every_pixel_value_survives_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    signal = to_signal(pixels)
    assert (signal.min().item(), signal.max().item()) == (-1, 1)
    assert np.array_equal(to_pixels(signal), pixels)


def test_pixels_are_those_of_adm():
    decoded = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 5.0]).view(1, 1, 1, 6)
    assert to_pixels(decoded).flatten().tolist() == [0, 0, 128, 255, 255, 255]  # 127.5 x + 128, clamped, cut off
    assert to_pixels(torch.tensor([-0.996]).view(1, 1, 1, 1)).item() == 1


def test_channels_go_last_and_come_back_first():
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, 4, 6, 3), dtype=np.uint8)
    assert to_signal(pixels)[1, 2, 3, 5].item() == pytest.approx(pixels[1, 3, 5, 2] / 127.5 - 1)
    assert np.array_equal(to_pixels(to_signal(pixels)), pixels)


def test_scaled_latents_of_the_training_images_have_unit_spread(pipeline, codec):
    mean, std = codec.encode(images(pipeline, "train"))
    drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx(1, abs=0.02)


def test_the_scale_is_measured_over_posteriors_not_means(pipeline, codec):
    pixels = images(pipeline, "train")
    assert measure_scale(codec.vae, pixels) == pytest.approx(codec.scale, rel=1e-5)
    posterior = codec.vae.encode(to_signal(pixels)).latent_dist
    draws = torch.cat([posterior.sample(torch.Generator().manual_seed(i)) for i in range(20)])
    assert measure_scale(codec.vae, pixels) == pytest.approx(1 / draws.std().item(), rel=0.01)


def test_the_scale_cancels_in_a_reconstruction(pipeline, codec):
    pixels = images(pipeline, "val")[:5]
    mean, std = codec.encode(pixels)
    other = Codec(codec.vae, scale=4 * codec.scale)
    torch.testing.assert_close(other.encode(pixels)[0], 4 * mean)
    torch.testing.assert_close(other.encode(pixels)[1], 4 * std)
    assert np.array_equal(other.decode(4 * mean), codec.decode(mean))  # a power of two: exact


def test_the_loaded_codec_is_the_trained_one(pipeline, codec):
    """Its reconstructions have the features that were stored before the weights went to disk."""
    stored = FeatureSet.load(pipeline.codec, "reconstructions.safetensors", schema=SCHEMA)
    originals = images(pipeline, "val")
    rebuilt = codec.decode(codec.encode(originals)[0])
    assert torch.equal(load_extractor(pipeline.reference)([rebuilt]).features, stored.features)
    assert pipeline.facts["codec"]["psnr"] == pytest.approx(psnr(rebuilt, originals).mean(), abs=1e-9)


def test_reconstructions_tell_more_than_the_mean_image(pipeline):
    originals = images(pipeline, "val")
    blank = np.broadcast_to(images(pipeline, "train").mean(axis=0).astype(np.uint8), originals.shape)
    assert pipeline.facts["codec"]["psnr"] > psnr(blank, originals).mean() + 1


def test_blocks_do_not_change_what_is_decoded(codec, monkeypatch):
    z = torch.randn(7, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("dod_models.codec.BATCH_PIXELS", 3 * tiny.SIZE**2)
    parts = list(codec.decode_all(z))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert np.abs(codec.decode(z).astype(int) - np.concatenate(parts)).max() <= 1


def test_large_images_go_through_in_small_batches():
    assert [batch_size(side) for side in (16, 32, 64, 128, 256, 512, 4096)] == [100, 100, 100, 32, 8, 2, 1]


def test_a_damaged_codec_is_refused_and_its_file_named(pipeline, tmp_path):
    shutil.copytree(pipeline.codec, tmp_path / "codec")
    weights = next((tmp_path / "codec" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match=f"{weights.name}: sha256"):
        Codec.load(tmp_path / "codec")


def test_training_is_repeatable():
    pixels = np.random.default_rng(0).integers(0, 256, size=(16, 16, 16, 1), dtype=np.uint8)
    config = CodecConfig(widths=(8, 8), groups=4, steps=2, batch_size=4)
    first, second = (train_vae(config, pixels).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def kept(pipeline, codec, tmp_path):
    """The finished codec put aside: weights, and a config that holds the scale."""
    folder = tmp_path / "kept"
    shutil.copytree(pipeline.codec / "vae", folder)
    config = artifact.read_json(folder / CONFIG)
    artifact.write_json(folder / CONFIG, config | {"scaling_factor": codec.scale})
    return folder


def test_a_finished_codec_is_taken_as_it_is(pipeline, codec, kept, tmp_path):
    """Whatever images there are: the latents stay the same to the bit."""
    digest = artifact.sha256_file(kept / WEIGHTS)
    config = CodecConfig(source="finished", path=str(kept), sha256=digest, image_size=tiny.SIZE, seed=7)
    facts = build_codec(config, dataset=pipeline.dataset, reference=pipeline.reference, out=tmp_path / "codec")
    again = Codec.load(tmp_path / "codec")
    assert again.scale == codec.scale == facts["scale"]
    assert artifact.sha256_file(tmp_path / "codec" / "vae" / WEIGHTS) == digest
    pixels = images(pipeline, "val")
    assert all(torch.equal(a, b) for a, b in zip(again.encode(pixels), codec.encode(pixels), strict=True))
    about = artifact.read_manifest(tmp_path / "codec", schema=SCHEMA)["about"]
    assert about["weights"] == {"sha256": digest}


def test_a_finished_codec_is_named_by_its_digest(pipeline, kept, tmp_path):
    inputs = {"dataset": pipeline.dataset, "reference": pipeline.reference, "out": tmp_path / "codec"}
    with pytest.raises(ValueError, match="path and sha256: needed with source 'finished'"):
        CodecConfig(source="finished", path=str(kept))
    other = CodecConfig(source="finished", path=str(kept), sha256="0" * 64)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: sha256 is \w+, codec\.sha256 says 0+; correct one of them"):
        build_codec(other, **inputs)
    (kept / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{WEIGHTS}: not there; bring it back, or correct codec\.path"):
        build_codec(other, **inputs)
    assert not (tmp_path / "codec").exists()


def test_a_diverging_training_is_an_error_that_names_the_step():
    pixels = np.random.default_rng(0).integers(0, 256, size=(16, 16, 16, 1), dtype=np.uint8)
    config = CodecConfig(widths=(8, 8), groups=4, steps=21, batch_size=4, learning_rate=1e20)
    with pytest.raises(FloatingPointError, match=r"codec: the loss is \w+ at step 20; lower"):
        train_vae(config, pixels)


def test_the_small_autoencoder_halves_the_side_once_a_level():
    vae = small_vae(CodecConfig(widths=(8, 8, 8), groups=4))
    mean = Codec(vae, scale=1.0).encode(np.zeros((1, 32, 32, 1), dtype=np.uint8))[0]
    assert mean.shape == (1, 4, 32 // Codec(vae, scale=1.0).factor, 8)
    assert artifact.MANIFEST not in vae.config
