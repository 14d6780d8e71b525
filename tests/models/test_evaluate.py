import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.functional.image import peak_signal_noise_ratio

from dod_models import evaluate
from dod_models.evaluate import inception_score, psnr, score, ssim, statistics
from dod_models.features import FeatureSet


def features(count: int = 300, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feature_set(rows: torch.Tensor) -> FeatureSet:
    return FeatureSet(rows, torch.zeros(len(rows), 4))


def images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_statistics_are_the_sample_s_own():
    rows = features()
    found = statistics(rows)
    centred = rows - rows.mean(dim=0)
    np.testing.assert_allclose(found["mu"], rows.mean(dim=0), atol=1e-14)
    np.testing.assert_allclose(found["sigma"], centred.T @ centred / 299, atol=1e-12)


def test_the_fid_of_a_shift_is_its_square():
    shift = torch.tensor([3.0, -4.0, 0, 0, 0, 0])
    found = score(feature_set(features() + shift), feature_set(features()))
    assert found["fid"] == pytest.approx(25, abs=1e-12)


def test_dropped_modes_cost_recall_and_outliers_cost_precision():
    centres = torch.tensor([[0.0] * 6, [100.0] * 6])
    two_modes = features() + centres[torch.arange(300) % 2]
    one_mode = features(seed=1) + centres[0]
    lacking, wild = (
        score(feature_set(one_mode), feature_set(two_modes)),
        score(feature_set(two_modes), feature_set(one_mode)),
    )
    assert lacking["precision"] > 0.8
    assert lacking["recall"] < 0.5
    assert wild["precision"] < 0.5
    assert wild["recall"] > 0.8


@pytest.mark.parametrize("name", ["generated", "reference"])
def test_features_that_are_not_finite_are_refused(name):
    good, bad = feature_set(features()), feature_set(features().index_fill(0, torch.tensor([5]), math.nan))
    sets = (bad, good) if name == "generated" else (good, bad)
    with pytest.raises(ValueError, match=f"features of the {name} images are not finite"):
        score(*sets)


def test_the_inception_score_is_1_without_knowledge_and_the_number_of_classes_with_all():
    assert inception_score(np.zeros((300, 4)), 10, False) == pytest.approx(1, abs=1e-12)
    for certain in (50.0, 5000.0):  # the second one's other chances are zero
        balanced = certain * np.eye(4)[np.arange(280) % 4]
        assert inception_score(balanced, 10, False) == pytest.approx(4, abs=1e-9)
        assert inception_score(balanced[:1].repeat(300, axis=0), 10, False) == pytest.approx(1, abs=1e-9)


def test_the_inception_score_of_two_classes_known_in_part():
    """p = (a, 1 - a) or (1 - a, a) equally often: the divergence is log 2 + a log a + (1 - a) log (1 - a)."""
    for a in (0.5, 0.7, 0.99):
        logits = np.log([[a, 1 - a], [1 - a, a]] * 20)
        assert inception_score(logits, 5, False) == pytest.approx(2 * a**a * (1 - a) ** (1 - a), abs=1e-12)


def test_the_inception_score_of_a_sorted_set_needs_the_shuffle():
    logits = 50 * np.eye(10)[np.repeat(np.arange(10), 100)]
    assert inception_score(logits, 10, False) == pytest.approx(1, abs=1e-9)
    assert inception_score(logits, 10, True) > 9


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(7, 60), st.integers(1, 7), st.booleans())
def test_the_inception_score_agrees_with_torch_fidelity(seed, count, splits, shuffle):
    logits = 5 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    expected = isc_features_to_metric(logits, splits, shuffle)["inception_score_mean"]
    assert inception_score(logits, splits, shuffle) == pytest.approx(expected, rel=1e-12)
    assert inception_score(logits.numpy(), splits, shuffle) == pytest.approx(expected, rel=1e-12)


def test_logits_that_have_no_score_are_refused():
    with pytest.raises(ValueError, match="11 splits of 10 rows of logits; give 1 to 10"):
        inception_score(np.zeros((10, 4)), 11, False)
    with pytest.raises(ValueError, match="logits: not all values are finite"):
        inception_score(np.full((10, 4), np.nan), 2, False)


def test_psnr_is_each_image_s_own():
    originals = np.full((2, 4, 4, 1), 100, dtype=np.uint8)
    rebuilt = originals.copy()
    rebuilt[0] += 1  # 20 log10(255 / 1)
    rebuilt[1] -= 10  # 20 log10(255 / 10); unsigned arithmetic would wrap
    expected = [20 * math.log10(255), 20 * math.log10(25.5)]
    assert psnr(rebuilt, originals) == pytest.approx(expected, abs=1e-9)
    assert psnr(originals, originals) == pytest.approx([20 * math.log10(255) + 100] * 2)  # equal images: error 1e-10


def test_psnr_agrees_with_torchmetrics():
    rebuilt, originals = images(0, 5, 8, 9, 3), images(1, 5, 8, 9, 3)
    pair = (torch.from_numpy(given / 255.0) for given in (rebuilt, originals))
    expected = peak_signal_noise_ratio(*pair, data_range=1.0, dim=(1, 2, 3), reduction="none")
    assert psnr(rebuilt, originals) == pytest.approx(expected.numpy(), rel=1e-7)  # its ln 10 is float32


def test_ssim_of_equal_and_of_plain_images():
    """Without variance only the luminance is left: (2 a b + 0.01^2) / (a^2 + b^2 + 0.01^2)."""
    some = images(0, 3, 12, 13, 3)
    assert ssim(some, some) == pytest.approx([1, 1, 1], abs=1e-12)
    a, b = 51 / 255, 204 / 255
    plain = (np.full((2, 12, 12, 1), value, dtype=np.uint8) for value in (51, 204))
    assert ssim(*plain) == pytest.approx([(2 * a * b + 1e-4) / (a * a + b * b + 1e-4)] * 2, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(6, 30), st.integers(6, 30), st.sampled_from([1, 3]))
def test_ssim_agrees_with_scipy_s_filter(seed, height, width, channels):
    rebuilt, originals = images(seed, 2, height, width, channels), images(seed + 1, 2, height, width, channels)

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, axes=(1, 2), truncate=3.5, mode="mirror")  # 11 x 11

    x, y = rebuilt / 255, originals / 255
    products = 2 * mean(x) * mean(y), mean(x) ** 2 + mean(y) ** 2
    covariance = 2 * (mean(x * y) - mean(x) * mean(y))
    variance = mean(x * x) + mean(y * y) - products[1]
    c1, c2 = 0.01**2, 0.03**2
    expected = (products[0] + c1) * (covariance + c2) / ((products[1] + c1) * (variance + c2))
    assert ssim(rebuilt, originals) == pytest.approx(expected.mean(axis=(1, 2, 3)), abs=1e-9)


def test_ssim_ignores_the_other_images(monkeypatch):
    rebuilt, originals = images(0, 7, 12, 12, 3), images(1, 7, 12, 12, 3)
    whole = ssim(rebuilt, originals)
    monkeypatch.setattr(evaluate, "IMAGES_AT_ONCE", 3)
    assert ssim(rebuilt, originals) == pytest.approx(whole, abs=1e-12)
    assert ssim(rebuilt[:0], originals[:0]).shape == (0,)


def test_images_that_are_no_pairs_are_refused():
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"images of shape \(2, 8, 8, 3\) against originals of shape \(3, 8"):
            measure(images(0, 2, 8, 8, 3), images(0, 3, 8, 8, 3))
    with pytest.raises(ValueError, match="images of 8 x 5 pixels; SSIM's window takes 6 x 6 or more"):
        ssim(images(0, 2, 8, 5, 3), images(0, 2, 8, 5, 3))
