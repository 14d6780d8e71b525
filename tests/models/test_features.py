import numpy as np
import pytest
import torch

from dod_models import artifact
from dod_models.artifact import DamagedError
from dod_models.features import SCHEMA, Extractor, FeatureSet, SmallNet

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, size=(20, 16, 16, 1), dtype=np.uint8)


def net() -> SmallNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallNet(1, 3)


def test_features_ignore_how_images_are_batched():
    """Batch norm and dropout are those of evaluation."""
    extractor = Extractor(net(), "digest")
    whole, parts = extractor([IMAGES]), extractor(np.array_split(IMAGES, 6))
    torch.testing.assert_close(parts.features, whole.features, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=1e-6)
    assert torch.equal(extractor([IMAGES]).logits, whole.logits)


def test_logits_are_the_net_s_own_and_features_are_its_pooled_activations():
    trained = net()
    found = Extractor(trained, "digest")([IMAGES])
    signal = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(found.logits, trained(signal))
    torch.testing.assert_close(found.features, trained.convolutions(signal).flatten(2).mean(dim=2))
    assert found.features.min() >= 0  # behind a ReLU


def test_sets_survive_the_disk_and_damage_is_named(tmp_path):
    found = Extractor(net(), "digest")([IMAGES])
    with artifact.writing(tmp_path / "set", schema=SCHEMA, config="") as folder:
        found.save(folder.path / "val.safetensors")
    loaded = FeatureSet.load(tmp_path / "set", "val.safetensors", schema=SCHEMA)
    assert torch.equal(loaded.features, found.features)
    assert torch.equal(loaded.logits, found.logits)
    path = tmp_path / "set" / "val.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(DamagedError, match=r"val.safetensors: sha256"):
        FeatureSet.load(tmp_path / "set", "val.safetensors", schema=SCHEMA)


def test_mixing_keeps_features_and_logits_of_an_image_together_and_loses_none():
    count = 50
    sorted_set = FeatureSet(torch.arange(count * 1.0)[:, None], 2 * torch.arange(count * 1.0)[:, None])
    mixed = sorted_set.mixed()
    assert torch.equal(mixed.logits, 2 * mixed.features)
    assert torch.equal(mixed.features.sort(dim=0).values, sorted_set.features)
    assert not torch.equal(mixed.features, sorted_set.features)
    assert torch.equal(sorted_set.mixed(20).features, mixed.features[:20])  # the order is fixed
