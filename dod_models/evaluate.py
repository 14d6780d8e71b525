"""Metrics on sets of features and on pixels, by torch-fidelity's per-metric functions (EVALUATION.md)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dod_models.features import FeatureSet, MeanCov

Vector = Float[np.ndarray, " D"]
Matrix = Float[np.ndarray, "D D"]
Root = Float[np.ndarray, "D r"]
Rows = Float[np.ndarray, "N D"] | Float[torch.Tensor, "N D"]

INCEPTION_SCORE_SPLITS = 10
NEIGHBOURHOOD = 3  # k of precision and recall


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated images inside of the real manifold, of real ones inside of the generated one."""

    precision: float
    recall: float


def check_count(count: int, width: int) -> None:
    """ValueError unless there are more images than features."""
    raise NotImplementedError


def covariance_root(sigma: Matrix) -> Root:
    """R (D, r) of full column rank with R R^T = sigma."""
    raise NotImplementedError


def frechet_distance(mu1: Vector, sigma1: Matrix, mu2: Vector, sigma2: Matrix, *, root2: Root | None = None) -> float:
    """Squared 2-Wasserstein distance of two Gaussians; `root2` is covariance_root(sigma2), where it is at hand."""
    raise NotImplementedError


def inception_score(logits: Rows, splits: int, shuffle: bool) -> float:
    """Mean over splits of exp E KL(p(y|x) | p(y))."""
    raise NotImplementedError


def precision_recall(generated: Rows, real: Rows, k: int) -> PrecisionRecall:
    """Improved precision and recall of two sets of features."""
    raise NotImplementedError


def kernel_distance(x: Rows, y: Rows, subset_size: int, num_subsets: int, seed: int) -> float:
    """KID: the mean of unbiased MMD^2 over random subsets."""
    raise NotImplementedError


def ssim(images: UInt8[np.ndarray, "N H W C"], originals: UInt8[np.ndarray, "N H W C"]) -> Float[np.ndarray, " N"]:
    """Each image's structural similarity."""
    raise NotImplementedError


def jackknife_error(parts: Sequence[MeanCov], statistic: Callable[[MeanCov], float]) -> float:
    """Standard error of a statistic of all rows, by leaving out one of the equal parts at a time."""
    raise NotImplementedError


def statistics(features: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean (D) and covariance (D, D) in float64; ValueError unless there are more images than features."""
    count, width = features.shape
    if count <= width:
        raise ValueError(
            f"{count} images for {width} features: their covariance is singular and the FID meaningless; "
            f"raise the number of samples above {width}"
        )
    rows = features.double().numpy()
    return {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}


def score(generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
    """FID, inception score, precision and recall of `generated` against the reference `real`.

    Samples must not be sorted by class: the inception score is computed without a shuffle, as ADM does.
    """
    for name, values in (("generated", generated.features), ("reference", real.features)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"features of the {name} images are not finite; look at the images they come from")
    fid = fid_statistics_to_metric(statistics(generated.features), statistics(real.features), False)
    isc = isc_features_to_metric(generated.logits, INCEPTION_SCORE_SPLITS, False)
    prc = prc_features_to_metric(
        generated.features, real.features, prc_neighborhood=NEIGHBOURHOOD, save_cpu_ram=True, verbose=False
    )
    return {
        "fid": fid["frechet_inception_distance"],
        "inception_score": isc["inception_score_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }


def psnr(images: UInt8[np.ndarray, "N H W C"], originals: UInt8[np.ndarray, "N H W C"]) -> Float[np.ndarray, " N"]:
    """Each image's peak signal-to-noise ratio, in dB."""
    squared = (images.astype(np.float64) - originals) ** 2
    error = np.maximum(squared.mean(axis=(1, 2, 3)), 1e-10)
    ratio: np.ndarray = 10 * np.log10(255**2 / error)
    return ratio
