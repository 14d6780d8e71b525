import numpy as np
import pytest
import torch

from dod_models import artifact
from dod_models.features import SCHEMA, Extractor, FeatureSet
from dod_models.images import ImageFolder
from dod_models.reference import ReferenceConfig, augment, build_reference, train_net

from . import tiny


def test_stored_features_are_those_of_the_real_images_under_the_stored_net(pipeline):
    extractor = Extractor.load(pipeline.reference)
    for split in ("train", "val"):
        images = np.concatenate(list(ImageFolder(pipeline.dataset, split).blocks(size=tiny.SIZE, channels=1)))
        stored = FeatureSet.load(pipeline.reference, f"{split}.safetensors", schema=SCHEMA)
        assert torch.equal(extractor([images]).features, stored.features)
        assert torch.equal(extractor([images]).logits, stored.logits)


def test_a_share_of_the_training_images_is_spread_over_all_classes(pipeline, tmp_path):
    config = ReferenceConfig(image_size=tiny.SIZE, channels=1, epochs=1, num_images=9)
    facts = build_reference(config, dataset=pipeline.dataset, out=tmp_path / "reference")
    rows = {"train": [0, 10, 20, 30, 40, 50, 60, 70, 80], "val": list(range(90))}  # of 90, 30 in each class
    for split in ("train", "val"):
        folder = ImageFolder(pipeline.dataset, split)
        images = np.stack([folder.read(i, size=tiny.SIZE, channels=1) for i in rows[split]])
        stored = FeatureSet.load(tmp_path / "reference", f"{split}.safetensors", schema=SCHEMA)
        found = Extractor.load(tmp_path / "reference")([images]).features
        torch.testing.assert_close(found, stored.features, rtol=0, atol=1e-5)  # other blocks, other last bits
    assert folder.labels[rows["train"]].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    hits = stored.logits.argmax(dim=1) == torch.arange(3).repeat_interleave(30)
    assert facts["accuracy"] == pytest.approx(hits.double().mean().item())


@pytest.mark.parametrize("count", [None, 90, 1000])
def test_no_more_images_are_taken_than_there_are(pipeline, count):
    assert list(ImageFolder(pipeline.dataset, "train").spread(count)) == list(range(90))


def test_numbers_carry_the_extractor_s_name_and_digest(pipeline):
    about = artifact.read_manifest(pipeline.reference, schema=SCHEMA)["about"]
    extractor = Extractor.load(pipeline.reference)
    weights = artifact.sha256_file(pipeline.reference / "extractor.safetensors")
    assert about["extractor"] == {"name": "small-net-64", "digest": weights}
    assert (extractor.name, extractor.digest) == ("small-net-64", weights)
    assert about["dataset"] == artifact.sha256_file(pipeline.dataset / "manifest.json")


def test_the_net_learns_its_classes(pipeline):
    facts = pipeline.facts["reference"]
    assert facts["accuracy"] > 0.6  # of three
    stored = FeatureSet.load(pipeline.reference, "val.safetensors", schema=SCHEMA)
    labels = torch.from_numpy(ImageFolder(pipeline.dataset, "val").labels)
    assert facts["accuracy"] == pytest.approx((stored.logits.argmax(dim=1) == labels).double().mean().item())


def test_training_is_repeatable_and_its_seed_counts():
    pixels = np.random.default_rng(0).integers(256, size=(20, 16, 16, 1), dtype=np.uint8)
    labels = torch.arange(20) % 3
    nets = [train_net(ReferenceConfig(epochs=2, batch_size=10, seed=seed), pixels, labels, 3) for seed in (0, 0, 1)]
    weights = [net.classify.weight for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_augmentation_shifts_and_adds_noise_of_the_stated_size():
    signal = torch.randn(40, 1, 16, 16)
    rng = np.random.default_rng(0)
    assert torch.equal(augment(signal, rng, max_shift=0, noise=0.0), signal)
    noise = augment(signal, rng, max_shift=0, noise=0.25) - signal
    assert noise.std().item() == pytest.approx(0.25, rel=0.05)
    shifts = {(down, right): signal.roll((down, right), (2, 3)) for down in (-1, 0, 1) for right in (-1, 0, 1)}
    drawn = [augment(signal, rng, max_shift=1, noise=0.0) for _ in range(60)]
    found = {shift for shift, image in shifts.items() for one in drawn if torch.equal(one, image)}
    assert found == set(shifts)
    assert all(any(torch.equal(one, image) for image in shifts.values()) for one in drawn)
