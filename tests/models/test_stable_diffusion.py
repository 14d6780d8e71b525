import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dod_models import artifact
from dod_models import stable_diffusion as sd
from dod_models.codec import SCHEMA, Codec
from dod_models.data import LatentShards
from dod_models.dataset import DatasetConfig, build_dataset
from dod_models.encode import EncodeConfig, build_latents
from dod_models.fit_codec import CodecConfig, build_codec
from dod_models.images import center_crop
from dod_models.pixels import to_pixels, to_signal
from dod_models.reference import ReferenceConfig, build_reference

from . import full_size, tiny

EMPTY_SHA = "0" * 64


@pytest.fixture(scope="module")
def codec(stable_diffusion) -> Codec:
    return sd.load(str(stable_diffusion)).codec


def crop(name: str, size: int = 64) -> np.ndarray:
    return center_crop(Image.fromarray(full_size.photograph(name)), size)


def test_it_is_the_published_architecture(codec):
    assert sum(p.numel() for p in codec.vae.parameters()) == 83_653_863
    assert (codec.scale, codec.factor, codec.channels, codec.latent_channels) == (0.18215, 8, 3, 4)


def test_published_names_of_weights_reach_the_layers_they_mean(codec, stable_diffusion):
    from safetensors.torch import load_file

    published, loaded = load_file(stable_diffusion / sd.WEIGHTS), codec.vae.state_dict()
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = "encoder.mid_block.attentions.0.{}.weight"
        assert torch.equal(published[name.format(old)], loaded[name.format(new)])
    assert len(published) == len(loaded)


def test_photographs_are_encoded_to_scaled_posteriors(codec):
    pixels = np.stack([crop("china"), crop("flower")])
    mean, std = codec.encode(pixels)
    with torch.inference_mode():
        posterior = codec.vae.encode(to_signal(pixels)).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 8)
    torch.testing.assert_close(mean, 0.18215 * posterior.mean)
    torch.testing.assert_close(std, 0.18215 * posterior.std)
    with torch.inference_mode():
        decoded = codec.vae.decode(mean / 0.18215).sample
    assert np.array_equal(codec.decode(mean), to_pixels(decoded))


def test_latents_of_photographs_hold_both_views_whatever_the_number_of_threads(codec, stable_diffusion, tmp_path):
    """The stages at full size: ImageNet's layout of JPEGs -> index -> moments of image and mirror image."""
    images = full_size.write_photographs(tmp_path / "images")
    build_dataset(DatasetConfig(root=str(images)), out=tmp_path / "dataset")
    with artifact.writing(tmp_path / "codec", schema=SCHEMA, config="") as folder:
        shutil.copytree(stable_diffusion, folder.path / "vae")
        folder.about = {"scale": codec.scale, "image_size": 64}
    inputs = {name: tmp_path / name for name in ("dataset", "codec", "state")}
    facts = build_latents(EncodeConfig(), **inputs, out=tmp_path / "latents")
    torch.set_num_threads(2)
    try:
        build_latents(EncodeConfig(), **inputs | {"state": tmp_path / "again"}, out=tmp_path / "of-two-threads")
    finally:
        torch.set_num_threads(1)
    assert tiny.digests(tmp_path / "of-two-threads") == tiny.digests(tmp_path / "latents")
    shards = LatentShards(tmp_path / "latents")
    assert (shards.shape, shards.views, shards.labels.tolist()) == ((4, 8, 8), 2, [0, 0, 1, 1])
    assert facts["count"] == 4
    with Image.open(images / "train" / "flower" / "1.JPEG") as image:
        pixels = center_crop(image, 64)
    for view, shown in enumerate((pixels, pixels[:, ::-1])):
        mean, std = codec.encode(shown[None].copy())
        np.testing.assert_allclose(shards.gather([3], [view])[0], (mean[0], std[0]), rtol=1e-3, atol=1e-4)  # fp16


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The same architecture with few channels, for stages that must see more images than features."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL.from_config({**full_size.VAE, "block_out_channels": [4, 8, 8, 8], "norm_num_groups": 4})
    folder = tmp_path_factory.mktemp("narrow-vae")
    vae.save_pretrained(folder, safe_serialization=True)
    return folder


def test_the_stage_takes_the_autoencoder_as_it_is_and_says_which(narrow, pipeline, tmp_path):
    colour = ReferenceConfig(image_size=16, channels=3, epochs=1)
    build_reference(colour, dataset=pipeline.dataset, out=tmp_path / "reference")
    digest = artifact.sha256_file(narrow / sd.WEIGHTS)
    config = CodecConfig(source="stable-diffusion", path=str(narrow), sha256=digest, image_size=16, channels=3)
    inputs = {"dataset": pipeline.dataset, "reference": tmp_path / "reference"}
    assert build_codec(config, **inputs, out=tmp_path / "codec")["scale"] == 0.18215
    stored, given = Codec.load(tmp_path / "codec").vae.state_dict(), sd.load(str(narrow)).codec.vae.state_dict()
    assert stored.keys() == given.keys()
    assert all(torch.equal(stored[name], given[name]) for name in given)
    about = artifact.read_manifest(tmp_path / "codec", schema=SCHEMA)["about"]
    assert about["weights"] == {"repository": "stabilityai/sd-vae-ft-ema", "sha256": digest}  # no revision: a folder


def test_other_weights_than_the_pinned_ones_are_refused_with_both_digests(narrow):
    digest = artifact.sha256_file(narrow / sd.WEIGHTS)
    with pytest.raises(ValueError, match=rf"{sd.WEIGHTS}: sha256 is {digest}, codec.sha256 says {EMPTY_SHA}: these"):
        sd.load(str(narrow), sha256=EMPTY_SHA)
    assert sd.load(str(narrow), sha256=digest).origin["sha256"] == digest


@pytest.fixture
def hub(narrow, tmp_path, monkeypatch):
    """A Hugging Face cache as `hf download` fills it: blobs named by their digest, a snapshot of links to them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-ema"
    snapshot = folder / "snapshots" / sd.REVISION
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    names = {sd.CONFIG: "a" * 40, sd.WEIGHTS: artifact.sha256_file(narrow / sd.WEIGHTS)}
    for name, blob in names.items():
        shutil.copy(narrow / name, folder / "blobs" / blob)
        (snapshot / name).symlink_to(folder / "blobs" / blob)
    return snapshot


def test_the_pinned_revision_is_taken_from_the_hugging_face_cache(hub):
    digest = artifact.sha256_file(hub / sd.WEIGHTS)
    found = sd.load(None)
    assert found.origin == {"repository": sd.REPOSITORY, "revision": sd.REVISION, "sha256": digest}
    assert re.fullmatch("[0-9a-f]{40}", sd.REVISION)
    with pytest.raises(FileNotFoundError, match=f"--revision {'0' * 40}"):
        sd.load(None, revision="0" * 40)


def test_a_blob_of_the_cache_that_is_not_what_the_hub_named_it_is_refused(hub):
    blob = (hub / sd.WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=rf"sha256 is \w+, the Hugging Face cache says {blob.name}: these are other"):
        sd.load(None)


@pytest.mark.parametrize("path", [None, "/nowhere/vae", "a folder without weights"])
def test_without_the_autoencoder_the_error_names_three_ways_to_provide_it(path, monkeypatch, tmp_path):
    from importlib.metadata import entry_points

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if path and "without" in path:
        path = str(tmp_path)
        (tmp_path / sd.CONFIG).write_text("{}")
    with pytest.raises(FileNotFoundError) as caught:
        sd.load(path)
    message = str(caught.value)
    assert message.startswith(f"codec.path: {path or 'not set'}: no VAE there (")
    assert f"{sd.WEIGHTS} missing" in message
    command = message.split("`")[1]
    assert command == (f"hf download stabilityai/sd-vae-ft-ema config.json {sd.WEIGHTS} --revision {sd.REVISION}")
    assert command.split()[0] in {point.name for point in entry_points(group="console_scripts")}
    assert "set codec.path in params.yaml to their folder" in message
    assert "s3://BUCKET/PREFIX" in message
    assert "\n" not in message
