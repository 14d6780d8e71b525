import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dod_models import features
from dod_models.features import MeanCov


def rows(seed: int, count: int, width: int, offset: float) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((count, width))
    return drawn * np.logspace(0, 2, width) + offset


def seen(values: np.ndarray) -> MeanCov:
    found = MeanCov(values.shape[1])
    found.update(values)
    return found


def assert_equal_to_numpy(found: MeanCov, values: np.ndarray) -> None:
    """To 1e-12 of the mean's size, and to 1e-12 of the rows' spread, however far from zero they lie."""
    spread = values.std(axis=0, ddof=1)
    exact = np.cov(values - values[0], rowvar=False)
    assert found.count == len(values)
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-12, atol=1e-12 * spread.max())
    np.testing.assert_array_less(np.abs(found.covariance - exact), 1e-12 * np.outer(spread, spread) + 1e-300)
    np.testing.assert_array_equal(found.covariance, found.covariance.T)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(2, 60),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    data=st.data(),
)
def test_any_split_and_any_order_of_merges_give_the_same(seed, count, offset, data):
    values = rows(seed, count, 3, offset)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    parts = []
    for piece in np.split(values, cuts):
        found = MeanCov(3)
        for batch in np.array_split(piece, data.draw(st.integers(1, 3))):
            found.update(batch)
        parts.append(found)
    while len(parts) > 1:
        into = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        into.merge(parts.pop(data.draw(st.integers(0, len(parts) - 1))))
        parts.append(into)
    assert_equal_to_numpy(parts[0], values)


def test_rows_are_taken_in_blocks_and_left_as_they_were(monkeypatch):
    values = rows(0, 25, 4, 10)
    kept = values.copy()
    whole = seen(values)
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 7)
    assert_equal_to_numpy(seen(values), values)
    np.testing.assert_array_equal(values, kept)
    np.testing.assert_allclose(seen(values).covariance, whole.covariance, rtol=1e-12)


def test_merging_leaves_the_other_as_it_was():
    values = rows(0, 9, 2, 0)
    empty, other = MeanCov(2), seen(values)
    empty.merge(other)
    empty.update(values)
    assert_equal_to_numpy(other, values)
    assert_equal_to_numpy(empty, np.concatenate([values, values]))


def test_sums_of_float32_tensors_are_in_float64():
    values = torch.from_numpy(rows(0, 50, 3, 1e3)).float()
    found = MeanCov(3)
    found.update(values)
    assert_equal_to_numpy(found, values.double().numpy())


def test_what_cannot_be_averaged_is_refused():
    found = MeanCov(3)
    with pytest.raises(ValueError, match="the mean of no rows"):
        _ = found.mean
    with pytest.raises(ValueError, match=r"rows of shape \(4, 2\) for a mean of width 3"):
        found.update(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="a mean of width 2 cannot join one of width 3"):
        found.merge(MeanCov(2))
    with pytest.raises(ValueError, match="features are not finite; look at the images"):
        found.update(np.array([[0.0, np.inf, 0.0]]))
    found.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="the covariance of 1 row"):
        _ = found.covariance
