import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dod_models import draws, evaluate
from dod_models.codec import Codec
from dod_models.evaluator import Evaluator, Gathered, Moments, Real
from dod_models.features import Extractor, FeatureSet, MeanCov


def feature_set(count: int, seed: int) -> FeatureSet:
    rng = torch.Generator().manual_seed(seed)
    return FeatureSet(*(torch.randn(count, width, generator=rng) for width in (6, 9, 4)))


def gathered(whole: FeatureSet) -> Gathered:
    return Gathered.of([whole], count=len(whole.features))


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
    scores = evaluator.score(gathered(found))
    assert evaluator.distance(gathered(found)) == scores["fid"]
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
    assert evaluator.score(gathered(found))["fid_error"] == pytest.approx(expected, rel=1e-12) and expected > 0


@pytest.mark.parametrize("sizes", [[203], [1, 200, 2], [100, 103]])
def test_parts_give_what_the_whole_gives(evaluator, sizes):
    whole = feature_set(203, 1)
    columns = [values.split(sizes) for values in whole]
    found = Gathered.of((FeatureSet(*part) for part in zip(*columns, strict=True)), count=203)
    assert torch.equal(found.features, whole.features) and torch.equal(found.logits, whole.logits)
    assert evaluator.score(found) == pytest.approx(evaluator.score(gathered(whole)), rel=1e-12)


@pytest.mark.parametrize("count", [None, 20])
def test_mixing_keeps_what_belongs_to_an_image_together_and_loses_none(tmp_path, monkeypatch, count):
    rows = torch.arange(50.0)[:, None]
    FeatureSet(rows, 3 * rows.expand(-1, 4), 2 * rows).save(tmp_path / "sorted.safetensors")
    monkeypatch.setattr("dod_models.features.ROWS_AT_ONCE", 15)
    found = Gathered.mixed(tmp_path / "sorted.safetensors", count=count)
    order = draws.permutation(0, 0, 50)[:count]
    assert found.features[:, 0].tolist() == order.tolist() != sorted(order)
    assert torch.equal(found.logits, 2 * found.features)
    np.testing.assert_allclose(found.spatial.mean, 3 * order.mean() * np.ones(4), rtol=1e-12)
    assert found.spatial.count == len(order) == (count or 50)


class Wide(Extractor):
    """Features of no meaning; `most` is how many batches' spatial features were in memory at once."""

    name = digest = "wide"

    def __init__(self) -> None:
        self.most = 0
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def part(self, pixels: np.ndarray) -> FeatureSet:
        spatial = torch.zeros(len(pixels), 9)
        self.alive.add(spatial)
        self.most = max(self.most, len(self.alive))
        return FeatureSet(spatial[:, :6].clone(), spatial, spatial[:, :4].clone())


class Grey(Codec):
    """Decodes without a net."""

    def __init__(self) -> None:
        pass

    def decode_all(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        return (np.zeros((len(part), 1, 1, 1), np.uint8) for part in latents.split(10))


def test_the_spatial_features_of_no_more_than_two_batches_are_in_memory(evaluator):
    """What grows with the count is what a score needs: features and logits."""
    extractor = Wide()
    found = Evaluator(extractor, evaluator.real).gathered(Grey(), torch.zeros(200, 4, 2, 2), 200, name="")
    assert len(found.features) == len(found.logits) == found.spatial.count == 200
    assert 1 <= extractor.most <= 2


def test_images_and_their_features_come_on_one_thread(evaluator):
    threads, before = [], torch.get_num_threads()

    class Counting(Wide):
        def part(self, pixels: np.ndarray) -> FeatureSet:
            threads.append(torch.get_num_threads())
            return super().part(pixels)

    def batches() -> Iterator[np.ndarray]:
        for _ in range(2):
            threads.append(torch.get_num_threads())
            yield np.zeros((3, 1, 1, 1), np.uint8)

    torch.set_num_threads(2)
    try:
        for _ in Evaluator(Counting(), evaluator.real).parts(batches()):
            assert torch.get_num_threads() == 2  # the caller's own
    finally:
        torch.set_num_threads(before)
    assert threads == [1] * 4


def test_of_a_stored_set_no_more_than_two_slices_are_in_memory(tmp_path, monkeypatch):
    feature_set(50, 0).save(tmp_path / "set.safetensors")
    extractor, zeros = Wide(), np.zeros((5, 1, 1, 1), np.uint8)
    monkeypatch.setattr(FeatureSet, "slices", lambda path: (extractor.part(zeros) for _ in range(10)))
    assert Gathered.mixed(tmp_path / "set.safetensors").spatial.count == 50
    assert 1 <= extractor.most <= 2


def test_no_more_images_than_numbers_of_either_kind_are_refused(evaluator):
    evaluator.score(gathered(feature_set(10, 1)))
    with pytest.raises(ValueError, match=r"9 images for 9 features: .* raise the number of samples above 9"):
        evaluator.score(gathered(feature_set(9, 1)))


def test_too_few_held_out_images_have_all_scores_but_fid_and_sfid(evaluator, caplog, monkeypatch):
    monkeypatch.setattr("dod_models.evaluator.INCEPTION_SCORE_SPLITS", 5)
    enough, few = gathered(feature_set(10, 1)), gathered(feature_set(9, 1))
    assert evaluator.score_held_out(enough, name="split val") == evaluator.score(enough)
    assert caplog.text == ""
    found = evaluator.score_held_out(few, name="split val")
    assert evaluator.score(enough).keys() - found.keys() == {"fid", "fid_error", "sfid"}
    assert "split val: 9 images for 9 features: no FID and no sFID, which would take 10" in caplog.text


def test_features_that_are_not_finite_are_refused(evaluator):
    found = feature_set(20, 1)
    for values in found:
        before = values[3, 0].item()
        values[3, 0] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            evaluator.score(gathered(found))
        values[3, 0] = before
