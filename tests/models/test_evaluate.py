import math

import numpy as np
import pytest
import torch

from dod_models.evaluate import psnr, score, statistics
from dod_models.features import FeatureSet


def features(count: int = 300, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feature_set(rows: torch.Tensor, logits: torch.Tensor | None = None) -> FeatureSet:
    return FeatureSet(rows, torch.zeros(len(rows), 4) if logits is None else logits)


def test_statistics_are_the_sample_s_own():
    rows = features()
    found = statistics(rows)
    centred = rows - rows.mean(dim=0)
    np.testing.assert_allclose(found["mu"], rows.mean(dim=0), atol=1e-14)
    np.testing.assert_allclose(found["sigma"], centred.T @ centred / 299, atol=1e-12)


def test_fewer_images_than_features_are_refused():
    statistics(features(7, 6))
    with pytest.raises(ValueError, match=r"6 images for 6 features: .* raise the number of samples above 6"):
        statistics(features(6, 6))


def test_the_fid_of_a_shift_is_its_square():
    shift = torch.tensor([3.0, -4.0, 0, 0, 0, 0])
    found = score(feature_set(features() + shift), feature_set(features()))
    assert found["fid"] == pytest.approx(25, abs=1e-6)


def test_the_fid_of_a_scaling_is_the_distance_of_the_roots():
    """Covariances S and 4 S commute, so the distance is tr S + 4 tr S - 2 tr 2 S = tr S."""
    rows = features() - features().mean(dim=0)
    found = score(feature_set(2 * rows), feature_set(rows))
    assert found["fid"] == pytest.approx(float(rows.square().sum() / 299), rel=1e-8)


def test_the_fid_is_symmetric_and_zero_for_equal_sets():
    a, b = feature_set(features()), feature_set(features(seed=1) * 1.5 + 1)
    assert score(a, b)["fid"] == pytest.approx(score(b, a)["fid"], rel=1e-9)
    assert score(a, a)["fid"] == pytest.approx(0, abs=1e-8)


def test_the_inception_score_is_1_without_knowledge_and_the_number_of_classes_with_all():
    rows = feature_set(features())
    assert score(rows, rows)["inception_score"] == pytest.approx(1, abs=1e-6)
    certain = 50.0 * torch.eye(4)[torch.arange(300) % 4]
    balanced = score(feature_set(features(), certain[: 4 * 70]), rows)
    assert balanced["inception_score"] == pytest.approx(4, abs=1e-4)
    one_class = score(feature_set(features(), certain[:1].expand(300, 4)), rows)
    assert one_class["inception_score"] == pytest.approx(1, abs=1e-6)


def test_precision_and_recall_of_equal_and_of_distant_sets():
    rows = feature_set(features())
    same, far = score(rows, rows), score(feature_set(features() + 1000), rows)
    assert (same["precision"], same["recall"]) == (1, 1)
    assert (far["precision"], far["recall"]) == (0, 0)


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


def test_psnr_is_each_image_s_own():
    originals = np.full((2, 4, 4, 1), 100, dtype=np.uint8)
    images = originals.copy()
    images[0] += 1  # 20 log10(255 / 1)
    images[1] -= 10  # 20 log10(255 / 10); unsigned arithmetic would wrap
    expected = [20 * math.log10(255), 20 * math.log10(25.5)]
    assert psnr(images, originals) == pytest.approx(expected, abs=1e-9)
    assert psnr(originals, originals) == pytest.approx([20 * math.log10(255) + 100] * 2)  # equal images: error 1e-10
