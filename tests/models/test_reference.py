import weakref

import numpy as np
import pytest
import torch

from dod_models import artifact
from dod_models.dataset import DatasetConfig, build_dataset
from dod_models.evaluator import Evaluator, load_extractor
from dod_models.features import SCHEMA, Extractor, FeatureSet
from dod_models.images import ImageFolder
from dod_models.reference import STATISTICS, ReferenceConfig, build_reference, measured, some_of

from . import full_size, tiny


def test_stored_features_are_those_of_the_real_images_under_the_stored_net(pipeline):
    extractor = load_extractor(pipeline.reference)
    for split in ("train", "val"):
        images = np.concatenate(list(ImageFolder(pipeline.dataset, split).blocks(size=tiny.SIZE, channels=1)))
        stored = FeatureSet.load(pipeline.reference, f"{split}.safetensors", schema=SCHEMA)
        assert torch.equal(extractor([images]).features, stored.features)
        assert torch.equal(extractor([images]).logits, stored.logits)


def test_a_share_of_the_training_images_is_spread_over_all_classes(pipeline, tmp_path):
    config = ReferenceConfig(image_size=tiny.SIZE, channels=1, epochs=1, num_images=75)
    facts = build_reference(config, dataset=pipeline.dataset, out=tmp_path / "reference")
    rows = {"train": [i * 90 // 75 for i in range(75)], "val": list(range(90))}  # of 90, 30 in each class
    for split in ("train", "val"):
        folder = ImageFolder(pipeline.dataset, split)
        images = np.stack([folder.read(i, size=tiny.SIZE, channels=1) for i in rows[split]])
        stored = FeatureSet.load(tmp_path / "reference", f"{split}.safetensors", schema=SCHEMA)
        found = load_extractor(tmp_path / "reference")([images]).features
        torch.testing.assert_close(found, stored.features, rtol=0, atol=1e-5)  # other blocks, other last bits
    assert np.bincount(folder.labels[rows["train"]]).tolist() == [25, 25, 25]
    hits = stored.logits.argmax(dim=1) == torch.arange(3).repeat_interleave(30)
    assert facts["accuracy"] == pytest.approx(hits.double().mean().item())


@pytest.mark.parametrize("count", [None, 90, 1000])
def test_no_more_images_are_taken_than_there_are(pipeline, count):
    assert list(ImageFolder(pipeline.dataset, "train").spread(count)) == list(range(90))


def test_numbers_carry_the_extractor_s_name_and_digest(pipeline):
    about = artifact.read_manifest(pipeline.reference, schema=SCHEMA)["about"]
    extractor = load_extractor(pipeline.reference)
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


class Colours(Extractor):
    """Features that anyone can compute: the first pixels' channels, and as logits the image's number."""

    name, digest = "colours", "0" * 64

    def part(self, pixels):
        flat = torch.from_numpy(pixels).flatten(1).double()
        return FeatureSet(flat[:, :5], flat[:, 5:11], flat[:, :1])


def test_moments_are_those_of_all_images_whatever_the_blocks_and_some_features_are_kept():
    images = np.random.default_rng(0).integers(0, 256, size=(101, 4, 4, 3), dtype=np.uint8)
    kept = np.array([0, 6, 7, 50, 100])
    for count in (7, 101):
        real, some = measured(Colours(), iter(np.array_split(images, -(-101 // count))), kept=kept)
        rows = images.reshape(101, -1).astype(np.float64)
        for found, columns in ((real.pooled, rows[:, :5]), (real.spatial, rows[:, 5:11])):
            np.testing.assert_allclose(found.mean, columns.mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(found.covariance, np.cov(columns, rowvar=False), rtol=1e-10, atol=1e-9)
            np.testing.assert_allclose(found.root @ found.root.T, found.covariance, rtol=1e-9, atol=1e-9)
        assert np.array_equal(some.features, rows[kept, :5]) and torch.equal(real.some, some.features)


def test_one_block_of_images_is_held_at_a_time():
    seen, most = [], []

    class Block(np.ndarray):
        pass

    def blocks():
        for _ in range(20):
            block = np.zeros((10, 4, 4, 3), dtype=np.uint8).view(Block)
            seen.append(weakref.ref(block))
            most.append(sum(ref() is not None for ref in seen))
            yield block

    class Shallow(Colours):
        def part(self, pixels):
            return super().part(np.array(pixels))

    measured(Shallow(), blocks(), kept=np.arange(3))
    assert max(most) <= 2


def test_the_kept_images_are_a_fixed_random_choice_without_repeats():
    assert some_of(3500).tolist() == list(range(3500))
    found = some_of(1_281_167)
    assert len(set(found.tolist())) == 10_000 and np.array_equal(found, some_of(1_281_167))
    assert np.abs(np.histogram(found, 10, (0, 1_281_167))[0] - 1000).max() < 150


@pytest.fixture(scope="module")
def published_reference(inception_weights, tmp_path_factory):
    """Stage `reference` with Inception and a file like ADM's, on six held-out images."""
    root = tmp_path_factory.mktemp("published")
    build_dataset(DatasetConfig(root=str(tiny.write_images(root / "images", per_class=2))), out=root / "dataset")
    arrays = full_size.write_statistics(root / STATISTICS, count=5, size=32)
    config = ReferenceConfig(
        extractor="inception",
        weights=str(inception_weights),
        weights_sha256=artifact.sha256_file(inception_weights),
        statistics=str(root),
        image_size=32,
        channels=3,
    )
    assert build_reference(config, dataset=root / "dataset", out=root / "reference") == {}
    return root, arrays, config


def test_published_statistics_are_taken_as_they_are_and_their_digest_is_recorded(published_reference):
    root, arrays, config = published_reference
    evaluator = Evaluator.load(root / "reference")
    for moments, end in ((evaluator.real.pooled, ""), (evaluator.real.spatial, "_s")):
        assert moments.mean.dtype == np.float64
        assert np.array_equal(moments.mean, arrays[f"mu{end}"].astype(np.float64))
        assert np.array_equal(moments.covariance, arrays[f"sigma{end}"])
    found = evaluator.features([arrays["arr_0"]])
    assert torch.equal(evaluator.real.some, found.features)
    about = artifact.read_manifest(root / "reference", schema=SCHEMA)["about"]
    assert about["statistics"] == artifact.sha256_file(root / STATISTICS)
    assert about["extractor"] == {"name": "inception-2015-12-05", "digest": config.weights_sha256}
    held_out = FeatureSet.load(root / "reference", "val.safetensors", schema=SCHEMA)
    assert held_out.features.shape == (6, 2048) and held_out.spatial.shape == (6, 2023)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"statistics_sha256": "0" * 64}, "reference.statistics_sha256 says 0000"),
        ({"image_size": 64}, r"arr_0 is uint8 \(5, 32, 32, 3\), expected uint8 \(any, 64, 64, 3\)"),
        ({"statistics": "/nowhere"}, "no file /nowhere. It is published at https://openaipublic"),
        ({"statistics": None, "num_images": 2}, "2 images for 2048 features"),
    ],
)
def test_other_statistics_are_refused(published_reference, tmp_path, change, message):
    root, _, config = published_reference
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_reference(config.model_copy(update=change), dataset=root / "dataset", out=tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_statistics_are_inception_s():
    with pytest.raises(ValueError, match="weights and statistics are Inception's; set extractor: inception"):
        ReferenceConfig.parse({"statistics": "file.npz"}, place="params.yaml")
