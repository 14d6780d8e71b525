"""Metrics on plain arrays, by ADM's conventions (EVALUATION.md). N images, D features, K classes.

Libraries do the linear algebra and SSIM. The metrics themselves are ours where the best-kept one, torch-fidelity, loses
digits (a Frechet distance of singular covariances), time (the same; precision and recall) or a class without chances
(0 log 0 in the inception score); it agrees with all of them elsewhere, as the tests check.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from scipy import linalg, special
from torch import Tensor

from dod_models.features import MeanCov
from dod_models.manifolds import Cloud, inside

SHUFFLE_SEED = 2020  # torch-fidelity's, so that shuffled scores agree
NEGATIVE = 1e-4  # of a covariance's largest variance: what a float32 sum leaves of a singular one is below it
IMAGES_AT_ONCE = 16  # of SSIM

# Lengths that must be equal are checked by the functions themselves, in production too.
Vector = Float[np.ndarray, " _"]
Matrix = Float[np.ndarray, "_ _"]
Root = Float[np.ndarray, "_ _"]
Rows = Float[np.ndarray, "_ _"] | Float[Tensor, "_ _"]
Images = UInt8[np.ndarray, "_ _ _ _"]


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated images inside of the real manifold, of real ones inside of the generated one."""

    precision: float
    recall: float


def check_count(count: int, width: int) -> None:
    """ValueError unless there are more images than features."""
    if count <= width:
        raise ValueError(
            f"{count} images for {width} features: their covariance is singular and the FID meaningless; "
            f"raise the number of samples above {width}"
        )


def covariance_root(sigma: Matrix) -> Root:
    """R (D, r) with R R^T = sigma of rank r, by a Cholesky decomposition whose pivots fall (LAPACK's pstrf).

    Variance below D eps of the largest counts as rounding and is dropped. ValueError unless sigma is a covariance.
    """
    sigma = _symmetric(sigma, "sigma")
    factor, pivots, rank, _ = linalg.lapack.dpstrf(sigma, lower=1)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    left = np.abs(sigma - root @ root.T).max(initial=0)
    if left > NEGATIVE * np.abs(sigma).max(initial=0):
        raise ValueError(
            f"sigma is no covariance: {left:.3g} of it, at the most, is in no product R R^T; "
            "sum it in float64, as features.MeanCov does"
        )
    return root


def frechet_distance(mu1: Vector, sigma1: Matrix, mu2: Vector, sigma2: Matrix, *, root2: Root | None = None) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: FID and sFID (Heusel et al. 2017, equation 6).

    |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2), where the last trace is the sum of the singular
    values of R1^T R2. `root2` is covariance_root(sigma2), where it is at hand. Exact to 1e-12 of the traces for any
    ranks, but that variance below D eps of a covariance's largest counts as none. ValueError if shapes differ, a value
    is not finite, a sigma is no covariance or `root2` is not of sigma2.
    """
    sigma1, sigma2 = _symmetric(sigma1, "sigma1"), _symmetric(sigma2, "sigma2")
    mu1, mu2 = (_finite(mu, name).astype(np.float64) for mu, name in ((mu1, "mu1"), (mu2, "mu2")))
    width = len(sigma1)
    if not mu1.shape == mu2.shape == (width,) == (len(sigma2),):
        raise ValueError(
            f"mu1 {mu1.shape}, sigma1 {sigma1.shape}, mu2 {mu2.shape}, sigma2 {sigma2.shape}: give (D,), (D, D) twice"
        )
    root2 = covariance_root(sigma2) if root2 is None else _finite(root2, "root2")
    if len(root2) != width or not math.isclose(np.square(root2).sum(), np.trace(sigma2), rel_tol=1e-4):
        raise ValueError(f"root2 {root2.shape} is not the root of sigma2; give covariance_root(sigma2)")
    product = covariance_root(sigma1).T @ root2
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * _singular_sum(product, width)
    return max(float(distance), 0.0)  # below zero by rounding alone: the singular values are those of true roots


def inception_score(logits: Rows, splits: int, shuffle: bool) -> float:
    """Mean over `splits` equal runs of rows of exp E KL(p(y|x) | p(y)); `logits` (N, K) before the softmax.

    ADM does not shuffle, so samples must not be sorted by class (Salimans et al. 2016, section 4). ValueError if there
    are fewer rows than splits or a logit is not finite.
    """
    values = _finite(logits, "logits", ndim=2)
    if not 1 <= splits <= len(values):
        raise ValueError(f"{splits} splits of {len(values)} rows of logits; give 1 to {len(values)}")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(len(values)) if shuffle else np.arange(len(values))
    bounds = [index * len(values) // splits for index in range(splits + 1)]
    scores = []
    for begin, end in pairwise(bounds):
        given = special.softmax(values[order[begin:end]].astype(np.float64), axis=1)
        divergence = special.rel_entr(given, given.mean(axis=0)).sum(axis=1)
        scores.append(math.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(generated: Rows, real: Rows, k: int) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 to 3) of features (N, D) and (M, D).

    An image is inside a manifold if it is no farther from one of its images than that one's k-th neighbour. Decisions
    are float64's, and a squared distance within `manifolds.TIE` of both squared norms of the radius is a tie, which
    counts as inside. Beside the features: under 200 MB at D = 2048. ValueError for unequal widths, k < 1 or k >= N, M.
    """
    x, y = _pair(generated, real)
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(
            f"k = {k} neighbours in sets of {len(x)} and {len(y)} images; give 1 to {min(len(x), len(y)) - 1}"
        )
    centre = y.mean(axis=0, dtype=np.float64).astype(np.result_type(x, y, np.float32))
    x_inside, y_inside = inside(Cloud.of(x, centre), Cloud.of(y, centre), k)
    return PrecisionRecall(float(x_inside.double().mean()), float(y_inside.double().mean()))


def kernel_distance(x: Rows, y: Rows, subset_size: int, num_subsets: int, seed: int) -> float:
    """KID (Binkowski et al. 2018, section 4): the mean of unbiased MMD^2 over random subsets, kernel (x.y / D + 1)^3.

    Unbiased, so near zero or below it for equal distributions. Subsets of features (N, D) and (M, D) are drawn without
    replacement by numpy's default generator. ValueError for unequal widths or a subset that the sets cannot fill.
    """
    first, second = _pair(x, y)
    if not 2 <= subset_size <= min(len(first), len(second)) or num_subsets < 1:
        raise ValueError(
            f"{num_subsets} subsets of {subset_size} out of {len(first)} and {len(second)} images; "
            f"give at least 1, of 2 to {min(len(first), len(second))}"
        )
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(num_subsets):
        a, b = (rows[rng.choice(len(rows), subset_size, replace=False)].astype(np.float64) for rows in (first, second))
        within = [kernel.sum() - kernel.trace() for kernel in (_kernel(a, a), _kernel(b, b))]
        distances.append(sum(within) / (subset_size * (subset_size - 1)) - 2 * _kernel(a, b).mean())
    return float(np.mean(distances))


def psnr(images: Images, originals: Images) -> Float[np.ndarray, " N"]:
    """Each image's peak signal-to-noise ratio, in dB; that of equal images, which has no bound, is 148.1."""
    _same_shape(images, originals)
    squared = (images.astype(np.float64) - originals) ** 2
    error = np.maximum(squared.mean(axis=(1, 2, 3)), 1e-10)
    ratio: np.ndarray = 10 * np.log10(255**2 / error)
    return ratio


def ssim(images: Images, originals: Images) -> Float[np.ndarray, " N"]:
    """Each image's structural similarity in [-1, 1] (Wang et al. 2004): 11 x 11 Gaussian window, sigma 1.5.

    torchmetrics' values on [0, 1], in float64: borders are mirrored and count. ValueError if an image is narrower than
    6 pixels, which leave nothing to mirror.
    """
    # Two seconds, that only those who ask for it should wait.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _same_shape(images, originals)
    if min(images.shape[1:3]) < 6:
        raise ValueError(f"images of {images.shape[1]} x {images.shape[2]} pixels; SSIM's window takes 6 x 6 or more")
    found = [np.empty(0)]
    for begin in range(0, len(images), IMAGES_AT_ONCE):
        pair = (torch.from_numpy(given[begin : begin + IMAGES_AT_ONCE] / 255.0) for given in (images, originals))
        rebuilt, original = (signal.permute(0, 3, 1, 2).contiguous() for signal in pair)
        values = structural_similarity_index_measure(rebuilt, original, data_range=1.0, reduction="none")
        found.append(np.asarray(values))
    return np.concatenate(found)


def jackknife_error(parts: Sequence[MeanCov], statistic: Callable[[MeanCov], float]) -> float:
    """Standard error of `statistic` of all rows, by leaving out one part at a time (Efron & Stein 1981, equation 1.4).

    ValueError if there are fewer than 2 parts, or if their counts differ by more than one row.
    """
    counts = [part.count for part in parts]
    if len(parts) < 2 or max(counts) - min(counts) > 1:
        raise ValueError(f"a jackknife over parts of {counts} rows; give two or more of equal counts")
    values = []
    for left_out in range(len(parts)):
        rest = MeanCov(parts[0].width)
        for index, part in enumerate(parts):
            if index != left_out:
                rest.merge(part)
        values.append(statistic(rest))
    return math.sqrt((len(parts) - 1) * np.var(values))


def _finite(values: Rows | Vector | Matrix, name: str, *, ndim: int | None = None) -> np.ndarray:
    array = np.asarray(values)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; give {ndim} dimensions")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: not all values are finite; look at the images they come from")
    return array


def _symmetric(sigma: Matrix, name: str) -> Matrix:
    matrix = _finite(sigma, name, ndim=2).astype(np.float64)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} has shape {matrix.shape}; give a covariance (D, D)")
    if np.abs(matrix - matrix.T).max(initial=0) > 1e-6 * np.abs(matrix).max(initial=0):
        raise ValueError(f"{name} is not symmetric; give a covariance")
    return matrix


def _pair(x: Rows, y: Rows) -> tuple[np.ndarray, np.ndarray]:
    first, second = _finite(x, "the first set's features", ndim=2), _finite(y, "the second set's features", ndim=2)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of widths {first.shape[1]} and {second.shape[1]}; compare those of one extractor")
    return first, second


def _same_shape(images: Images, originals: Images) -> None:
    if images.shape != originals.shape:
        raise ValueError(f"images of shape {images.shape} against originals of shape {originals.shape}; give pairs")


def _singular_sum(product: Float[np.ndarray, "r s"], width: int) -> float:
    """Sum of the singular values of R1^T R2.

    Squares of singular values take a fifth of the time, and lose no digits here: the roots' columns fall in length, and
    LAPACK's reduction from the first column down keeps such a matrix's small eigenvalues. Two singular covariances may
    have directions that they do not share, whose zeros would be the root of an eps: only these go the long way.
    """
    wide = product if product.shape[0] <= product.shape[1] else product.T
    squares = linalg.eigvalsh(wide @ wide.T, lower=True) if wide.size else np.zeros(1)
    if len(wide.T) < width and squares[0] < width * np.finfo(np.float64).eps * squares[-1]:
        return float(linalg.svdvals(wide).sum())
    return float(np.sqrt(np.maximum(squares, 0)).sum())


def _kernel(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "N M"]:
    kernel: np.ndarray = (a @ b.T / a.shape[1] + 1) ** 3
    return kernel
