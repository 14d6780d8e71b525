import numpy as np
import pytest
import torch

from dod_models import evaluate
from dod_models.evaluator import Evaluator, Gathered, Moments, Real
from dod_models.features import FeatureSet, MeanCov


def feature_set(count: int, seed: int) -> FeatureSet:
    rng = torch.Generator().manual_seed(seed)
    return FeatureSet(*(torch.randn(count, width, generator=rng) for width in (6, 9, 4)))


def moments(rows: torch.Tensor) -> Moments:
    return Moments.of(rows.double().mean(dim=0).numpy(), np.cov(rows.double().numpy(), rowvar=False))


@pytest.fixture
def evaluator() -> Evaluator:
    real = feature_set(150, 0)
    found = Evaluator.__new__(Evaluator)  # without an extractor
    found.real = Real(moments(real.features), moments(real.spatial), real.features)
    return found


def test_each_score_is_the_plain_function_of_the_set(evaluator):
    found, real = feature_set(203, 1), feature_set(150, 0)
    scores = evaluator.score(found)
    for name, mine, theirs in (("fid", found.features, real.features), ("sfid", found.spatial, real.spatial)):
        a, b = moments(mine), moments(theirs)
        expected = evaluate.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        assert scores[name] == pytest.approx(expected, rel=1e-9)
    assert scores["kid"] == evaluate.kernel_distance(found.features, real.features, 150, 100, 0)
    assert scores["inception_score"] == evaluate.inception_score(found.logits, 10, False)
    assert (scores["precision"], scores["recall"]) == evaluate.precision_recall(found.features, real.features, 3)


def test_the_error_of_the_fid_is_the_jackknife_s_over_ten_blocks(evaluator):
    found = feature_set(203, 1)
    blocks = [MeanCov(6) for _ in range(10)]
    for block, rows in zip(blocks, np.array_split(found.features.numpy(), 10), strict=True):
        block.update(rows)
    expected = evaluate.jackknife_error(blocks, evaluator.real.pooled.distance)
    assert evaluator.score(found)["fid_error"] == pytest.approx(expected, rel=1e-12) and expected > 0


@pytest.mark.parametrize("sizes", [[203], [1, 200, 2], [100, 103]])
def test_parts_give_what_the_whole_gives(evaluator, sizes):
    whole = feature_set(203, 1)
    columns = [values.split(sizes) for values in whole]
    gathered = Gathered.of((FeatureSet(*part) for part in zip(*columns, strict=True)), count=203)
    assert torch.equal(gathered.features, whole.features) and torch.equal(gathered.logits, whole.logits)
    assert evaluator.score_gathered(gathered) == pytest.approx(evaluator.score(whole), rel=1e-12)


def test_no_more_images_than_numbers_of_either_kind_are_refused(evaluator):
    evaluator.score(feature_set(10, 1))
    with pytest.raises(ValueError, match=r"9 images for 9 features: .* raise the number of samples above 9"):
        evaluator.score(feature_set(9, 1))


def test_features_that_are_not_finite_are_refused(evaluator):
    found = feature_set(20, 1)
    for values in found:
        before = values[3, 0].item()
        values[3, 0] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            evaluator.score(found)
        values[3, 0] = before
