"""Metrics on sets of features and on pixels, by torch-fidelity's per-metric functions (EVALUATION.md)."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dod_models.features import FeatureSet

INCEPTION_SCORE_SPLITS = 10
NEIGHBOURHOOD = 3  # k of precision and recall


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
