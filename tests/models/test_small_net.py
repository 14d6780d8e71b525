import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dod_models.small_net import SmallNet, SmallNetConfig, SmallNetExtractor, augment, train_net

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, size=(20, 16, 16, 1), dtype=np.uint8)


def net() -> SmallNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallNet(1, 3)


def test_features_ignore_how_images_are_batched():
    """Batch norm and dropout are those of evaluation."""
    extractor = SmallNetExtractor(net(), "digest")
    whole, parts = extractor([IMAGES]), extractor(np.array_split(IMAGES, 6))
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(extractor([IMAGES]).logits, whole.logits)


def test_logits_are_the_net_s_own_and_features_are_its_pooled_activations():
    trained = net()
    found = SmallNetExtractor(trained, "digest")([IMAGES])
    signal = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(found.logits, trained(signal))
    torch.testing.assert_close(found.features, trained.convolutions(signal).flatten(2).mean(dim=2))
    assert found.features.min() >= 0  # behind a ReLU


@pytest.mark.parametrize("size, side", [(16, 2), (32, 4), (64, 4)])
def test_spatial_features_are_the_first_channels_place_by_place_and_few(size, side):
    images = rng.integers(0, 256, size=(3, size, size, 1), dtype=np.uint8)
    extractor = SmallNetExtractor(net(), "digest")
    maps = extractor.net.convolutions(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    found = extractor([images]).spatial.reshape(3, side, side, 7)
    expected = F.avg_pool2d(maps, maps.shape[-1] // side)
    for row, column, channel in ((0, 0, 0), (side - 1, 1, 3), (1, side - 1, 6)):
        torch.testing.assert_close(found[:, row, column, channel], expected[:, channel, row, column])


def test_a_net_survives_the_disk(tmp_path):
    trained = net().eval()
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    found = SmallNetExtractor.load(tmp_path / "net.safetensors", "digest")
    assert torch.equal(found([IMAGES]).logits, SmallNetExtractor(trained, "digest")([IMAGES]).logits)
    assert (found.name, found.digest) == ("small-net-64", "digest")


def test_training_is_repeatable_and_its_seed_counts():
    labels = torch.arange(20) % 3
    nets = [train_net(SmallNetConfig(epochs=2, batch_size=10, seed=seed), IMAGES, labels, 3) for seed in (0, 0, 1)]
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
