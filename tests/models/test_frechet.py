import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torch_fidelity.metric_fid import fid_statistics_to_metric

from benchmarks.closed_forms import Gaussians, gaussians, mapped
from dod_models.evaluate import check_count, covariance_root, frechet_distance, jackknife_error
from dod_models.features import MeanCov

CASES = {case.name: case for case in gaussians(64)}


def is_exact(found: float, case: Gaussians) -> bool:
    return found == pytest.approx(case.distance, rel=0, abs=1e-13 * case.size)


@pytest.mark.parametrize("name", CASES)
def test_the_distance_is_the_closed_form_both_ways(name):
    case = CASES[name]
    assert is_exact(frechet_distance(case.mu1, case.sigma1, case.mu2, case.sigma2), case)
    assert is_exact(frechet_distance(case.mu2, case.sigma2, case.mu1, case.sigma1), case)


def test_width_2048_loses_no_digits():
    case = mapped("", np.logspace(0, -8, 2048), 0)
    assert is_exact(frechet_distance(case.mu1, case.sigma1, case.mu2, case.sigma2), case)


def gaussian(seed: int, width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    found = MeanCov(width)
    found.update(np.random.default_rng(seed).standard_normal((rows, width)) * np.logspace(0, -2, width))
    return found.mean, found.covariance


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_random_gaussians_agree_with_scipy_s_matrix_root_and_with_torch_fidelity(seed, width):
    (mu1, sigma1), (mu2, sigma2) = gaussian(seed, width, 3 * width + 3), gaussian(seed + 1, width, 3 * width + 3)
    trace = np.trace(linalg.sqrtm(sigma1 @ sigma2)).real
    by_scipy = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2) - 2 * trace
    first, second = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
    by_fidelity = fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
    found = frechet_distance(mu1, sigma1, mu2, sigma2)
    assert found == pytest.approx(by_scipy, rel=1e-9, abs=1e-10)
    assert found == pytest.approx(by_fidelity, rel=1e-9, abs=1e-10)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.data())
def test_the_root_is_one_of_the_rank_s_width(seed, width, data):
    rows = data.draw(st.integers(2, 2 * width))
    _, sigma = gaussian(seed, width, rows)
    root = covariance_root(sigma)
    assert root.shape == (width, min(rows - 1, width))
    np.testing.assert_allclose(root @ root.T, sigma, rtol=0, atol=1e-14)


def test_a_cached_root_gives_the_same_bits():
    case = CASES["2 x 2 planes, turned"]
    cached = frechet_distance(*case[1:5], root2=covariance_root(case.sigma2))
    assert cached == frechet_distance(*case[1:5])


def test_float32_statistics_are_taken_in_float64():
    (mu1, sigma1), (mu2, sigma2) = gaussian(0, 8, 40), gaussian(1, 8, 40)
    arrays = [array.astype(np.float32) for array in (mu1, sigma1, mu2, sigma2)]
    assert frechet_distance(*arrays) == frechet_distance(*(array.astype(np.float64) for array in arrays))
    few = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    assert covariance_root(few.T @ few).shape[0] == 64  # singular but for its rounding, and no error


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mu1", np.zeros(3), r"mu1 \(3,\), sigma1 \(2, 2\), mu2 \(2,\), sigma2 \(2, 2\): give"),
        ("sigma2", np.eye(3), r"sigma2 \(3, 3\): give"),
        ("sigma1", np.zeros((2, 3)), r"sigma1 has shape \(2, 3\); give a covariance"),
        ("sigma1", np.array([[1, np.nan], [np.nan, 1]]), "sigma1: not all values are finite; look at the images"),
        ("mu2", np.array([np.inf, 0]), "mu2: not all values are finite"),
        ("sigma2", np.array([[1.0, 0.5], [0, 1]]), "sigma2 is not symmetric"),
        ("sigma1", np.diag([1.0, -1]), "sigma is no covariance: 1 of it, .* sum it in float64"),
        ("sigma1", np.array([[0.0, 1], [1, 0]]), "sigma is no covariance: 1 of it"),
        ("root2", 2 * np.eye(2), r"root2 \(2, 2\) is not the root of sigma2"),
        ("root2", np.ones((4, 1)), r"root2 \(4, 1\) is not the root of sigma2"),
    ],
)
def test_what_has_no_distance_is_named(name, value, message):
    given = {"mu1": np.zeros(2), "sigma1": np.eye(2), "mu2": np.zeros(2), "sigma2": np.eye(2), name: value}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**given)


def test_fewer_images_than_features_are_refused():
    check_count(7, 6)
    with pytest.raises(ValueError, match=r"6 images for 6 features: .* raise the number of samples above 6"):
        check_count(6, 6)


def parts(rows: np.ndarray, count: int) -> list[MeanCov]:
    found = []
    for piece in np.array_split(rows, count):
        found.append(MeanCov(rows.shape[1]))
        found[-1].update(piece)
    return found


def test_the_jackknife_of_a_mean_is_the_spread_of_the_parts_means():
    rows = np.random.default_rng(0).standard_normal((60, 1))
    means = rows.reshape(12, 5).mean(axis=1)
    exact = means.std(ddof=1) / np.sqrt(12)
    assert jackknife_error(parts(rows, 12), lambda found: found.mean[0]) == pytest.approx(exact, rel=1e-12)


def test_the_jackknife_of_a_distance_is_the_spread_of_repeated_draws():
    """120 draws of 300 rows: the estimated variance of the distance to a fixed Gaussian against the distances' own."""

    def distance(found: MeanCov) -> float:
        return frechet_distance(found.mean, found.covariance, np.full(3, 2.0), np.eye(3))

    draws = np.random.default_rng(0).standard_normal((120, 300, 3))
    distances = [distance(parts(rows, 1)[0]) for rows in draws]
    variances = [jackknife_error(parts(rows, 10), distance) ** 2 for rows in draws]
    assert np.mean(variances) == pytest.approx(np.var(distances), rel=0.25)


def test_a_jackknife_needs_two_equal_parts():
    rows = np.zeros((7, 2))
    jackknife_error(parts(rows, 2), lambda found: found.mean[0])  # 4 rows and 3
    with pytest.raises(ValueError, match=r"a jackknife over parts of \[7\] rows; give two or more"):
        jackknife_error(parts(rows, 1), lambda found: found.mean[0])
    with pytest.raises(ValueError, match=r"parts of \[7, 4\] rows; give two or more of equal counts"):
        jackknife_error([*parts(rows, 1), *parts(rows[:4], 1)], lambda found: found.mean[0])


def test_torch_rows_give_a_distance():
    found = parts(np.random.default_rng(0).standard_normal((20, 3)), 1)[0]
    again = MeanCov(3)
    again.update(torch.from_numpy(np.random.default_rng(0).standard_normal((20, 3))))
    assert frechet_distance(found.mean, found.covariance, again.mean, again.covariance) == pytest.approx(0, abs=1e-14)
