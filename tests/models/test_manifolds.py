import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dod_models import manifolds
from dod_models.evaluate import kernel_distance, precision_recall


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_definition(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """From differences, whose squares are equal where distances are."""
    x, y = generated.astype(np.float64), real.astype(np.float64)
    x_radii, y_radii = (np.sort(cdist(rows, rows, "sqeuclidean"))[:, k] for rows in (x, y))
    between = cdist(x, y, "sqeuclidean")
    precision = (between <= y_radii).any(axis=1).mean()
    return precision, (between <= x_radii[:, None]).any(axis=0).mean()


def by_float32(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """From a difference of squares about the real mean, all in float32."""
    x, y = (rows - real.mean(axis=0) for rows in (generated, real))
    within, other, between = (
        np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T for a, b in ((x, x), (y, y), (x, y))
    )
    x_radii, y_radii = (np.sort(squared)[:, k] for squared in (within, other))
    return (between <= y_radii).any(axis=1).mean(), (between <= x_radii[:, None]).any(axis=0).mean()


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(5, 60), st.integers(5, 60), st.integers(1, 4))
def test_random_sets_agree_with_the_definition_and_with_torch_fidelity(seed, width, num_generated, num_real, k):
    generated, real = normal(seed, num_generated, width) * 0.8, normal(seed + 1, num_real, width)
    found = precision_recall(generated, real, k)
    theirs = prc_features_to_metric(
        torch.from_numpy(generated).double(),
        torch.from_numpy(real).double(),
        prc_neighborhood=k,
        save_cpu_ram=True,
        verbose=False,
    )
    assert found == pytest.approx(by_definition(generated, real, k), abs=1e-12)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)  # they count in float32


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(5, 30), st.integers(5, 30), st.integers(1, 4))
def test_ties_count_as_inside_and_duplicates_as_neighbours(seed, width, num_generated, num_real, k):
    """Points of a small lattice, far from zero, many of them equal: half of all comparisons are ties."""
    rng = np.random.default_rng(seed)
    generated, real = (1000 + rng.integers(0, 4, (count, width)) / 2 for count in (num_generated, num_real))
    assert precision_recall(generated, real, k) == pytest.approx(by_definition(generated, real, k), abs=1e-12)


@pytest.mark.parametrize("rows_at_once", [7, 50, 1024])
def test_blocks_of_any_size_give_the_same(monkeypatch, rows_at_once):
    generated, real = normal(0, 120, 5), normal(1, 99, 5) * 1.3
    monkeypatch.setattr(manifolds, "ROWS_AT_ONCE", rows_at_once)
    assert precision_recall(generated, real, 3) == pytest.approx(by_definition(generated, real, 3), abs=1e-12)


def test_clusters_that_float32_cannot_tell_apart_are_told_apart():
    """Clusters of size 1, ten thousands away from each other and from zero: their squares differ in the ninth digit."""
    centres = normal(2, 10, 64) * 1e4
    sets = [1e4 + centres[np.arange(300) % 10] + normal(seed, 300, 64) * scale for seed, scale in ((3, 0.95), (4, 1))]
    generated, real = (rows.astype(np.float64) for rows in sets)
    exact = by_definition(generated, real, 3)
    assert precision_recall(generated, real, 3) == pytest.approx(exact, abs=1e-12)
    assert 0.3 < exact[0] < 1
    assert 0.1 < exact[1] < 0.99


@pytest.mark.parametrize("spare", [0, 4, 500])
def test_what_float32_cannot_decide_is_decided_in_float64(monkeypatch, spare):
    """Half of the images lie in clusters of size 1, a thousand apart, the others spread; some are there twice."""
    centres = normal(2, 10, 64) * 1e3
    sets = []
    for seed, scale in ((3, 0.95), (4, 1)):
        rows = centres[np.arange(300) % 10] + normal(seed, 300, 64) * scale
        rows[150:] = normal(seed + 2, 150, 64) * (700 * scale)
        sets.append(np.concatenate([rows, rows[::20]]))
    generated, real = sets
    exact = by_definition(generated, real, 3)
    monkeypatch.setattr(manifolds, "SPARE", spare)
    assert precision_recall(generated, real, 3) == pytest.approx(exact, abs=1e-12)
    assert all(abs(found - true) > 0.01 for found, true in zip(by_float32(generated, real, 3), exact, strict=True))


@pytest.mark.parametrize("unit", [1e-25, 1e-17, 1e17, 1e25])
def test_the_unit_does_not_matter_even_where_float32_s_squares_would_not_hold(unit):
    generated, real = normal(0, 120, 5).astype(np.float64), normal(1, 99, 5) * 1.3
    assert precision_recall(generated * unit, real * unit, 3) == precision_recall(generated, real, 3)


def test_precision_and_recall_by_hand():
    """Radii with k = 1: real 1, 1, 8, 12 and generated 0.5, 0.5, 89.5."""
    real = np.array([[0.0], [1], [9], [21]])
    generated = np.array([[0.5], [1], [90.5]])
    assert precision_recall(generated, real, 1) == (2 / 3, 1)  # 90.5 lies outside; its ball of 89.5 holds all but 0.5
    assert precision_recall(generated[:2], real, 1) == (1, 0.5)


def test_a_set_covers_itself_even_where_all_its_images_are_one():
    assert precision_recall(normal(0, 50, 8), normal(0, 50, 8), 3) == (1, 1)
    assert precision_recall(np.full((10, 8), 0.1), np.full((12, 8), 0.1), 3) == (1, 1)
    assert precision_recall(normal(0, 50, 8), normal(0, 50, 8) + 1000, 3) == (0, 0)


@pytest.mark.parametrize(
    ("generated", "real", "k", "message"),
    [
        (np.zeros((9, 2)), np.zeros((9, 3)), 3, "features of widths 2 and 3; compare those of one extractor"),
        (np.zeros((9, 2)), np.zeros((3, 2)), 3, "k = 3 neighbours in sets of 9 and 3 images; give 1 to 2"),
        (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k = 0 neighbours"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), 3, "the first set's features: not all values are finite"),
        (np.zeros((9, 2)), np.full((9, 2), np.inf), 3, "the second set's features: not all values are finite"),
    ],
)
def test_sets_that_have_no_manifolds_are_refused(generated, real, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(generated, real, k)


def test_kernel_distance_by_hand():
    """Kernel (x y + 1)^3: 1 within {0, 1}, 27 within {1, 2}, and between them 1, 1, 8 and 27."""
    x, y = np.array([[0.0], [1]]), np.array([[1.0], [2]])
    assert kernel_distance(x, y, 2, 3, 0) == pytest.approx(1 + 27 - 2 * 37 / 4, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 30))
def test_whole_sets_agree_with_torch_fidelity(seed, width, count):
    x, y = normal(seed, count, width).astype(np.float64), normal(seed + 1, count, width) * 1.5 + 0.5
    theirs = kid_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y.astype(np.float64)),
        kid_subsets=1,
        kid_subset_size=count,
        verbose=False,
    )
    expected = theirs["kernel_inception_distance_mean"]
    assert kernel_distance(x, y, count, 2, seed) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_subsets_of_any_size_have_one_mean_which_is_zero_for_equal_distributions():
    """Within 4 standard errors of 4000 subsets of 2: the unbiased estimate's mean is that of the whole sets."""
    x, y = normal(0, 40, 3), normal(1, 40, 3) + 0.5
    whole = kernel_distance(x, y, 40, 1, 0)
    few = np.array([kernel_distance(x, y, 2, 1, seed) for seed in range(4000)])
    assert abs(few.mean() - whole) < 4 * few.std() / np.sqrt(4000)
    equal = np.array([kernel_distance(normal(2 * i, 10, 3), normal(2 * i + 1, 10, 3), 10, 1, 0) for i in range(1000)])
    assert abs(equal.mean()) < 4 * equal.std() / np.sqrt(1000)


def test_the_seed_draws_the_subsets():
    x, y = normal(0, 40, 3), normal(1, 40, 3)
    assert kernel_distance(x, y, 5, 10, 7) == kernel_distance(x, y, 5, 10, 7)
    assert kernel_distance(x, y, 5, 10, 7) != kernel_distance(x, y, 5, 10, 8)


@pytest.mark.parametrize(("size", "number"), [(1, 1), (6, 1), (5, 0)])
def test_subsets_that_cannot_be_filled_are_refused(size, number):
    with pytest.raises(ValueError, match=rf"{number} subsets of {size} out of 9 and 5 images; give .* of 2 to 5"):
        kernel_distance(normal(0, 9, 2), normal(1, 5, 2), size, number, 0)
