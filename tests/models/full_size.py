"""Things of the size that the paper works with: Stable Diffusion's VAE, Inception, and photographs."""

import hashlib
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3

from dod_models import inception, npz
from dod_models.stable_diffusion import CONFIG, WEIGHTS

PHOTOGRAPHS = Path(sklearn.datasets.__file__).parent / "images"  # china.jpg and flower.jpg, 640x427

VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
# Of the config.json in Stability's sister repository sd-vae-ft-mse, of equal length, as public code states it.
CONFIG_SHA256 = "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"

# The published weights carry the names that attention layers had in 2022.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write_vae(folder: Path) -> Path:
    """config.json as published, and weights of the published names and shapes, unless that was done."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if (folder / WEIGHTS).exists():
        return folder
    folder.mkdir()
    text = json.dumps(VAE, indent=2) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == CONFIG_SHA256
    (folder / CONFIG).write_text(text)
    torch.manual_seed(0)
    weights = AutoencoderKL.from_config(VAE).state_dict()
    named = {re.sub("|".join(OLD_NAMES), lambda m: OLD_NAMES[m[0]], name): w for name, w in weights.items()}
    save_file(named, folder / WEIGHTS)
    return folder


def write_inception(folder: Path) -> Path:
    """A file like torch-fidelity's of Inception's weights, but random, unless that was done; returns its path."""
    path: Path = folder / inception.WEIGHTS
    if not path.exists():
        folder.mkdir()
        kind = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
        torch.manual_seed(0)
        with mock.patch.object(kind, "load_state_dict"):  # the layers' own random ones
            net = inception.network({})
        with torch.no_grad():
            for weights in net.parameters():
                weights.mul_(6**0.5 if weights.ndim == 4 else 1)  # lest the signal fade from layer to layer
        torch.save(net.state_dict(), path)
    return path


def write_statistics(path: Path, *, count: int, size: int) -> dict[str, np.ndarray]:
    """An npz file with the keys and shapes of ADM's reference, of few images and covariances of rank 5."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"arr_0": rng.integers(0, 256, size=(count, size, size, 3), dtype=np.uint8)}
    for end, width in (("", inception.WIDTH), ("_s", inception.SPATIAL_WIDTH)):
        rows = rng.normal(size=(width, 5))
        arrays |= {f"mu{end}": rng.normal(size=width).astype(np.float32), f"sigma{end}": rows @ rows.T}
    npz.write(path, {name: npz.Column(a.shape, a.dtype.type, [a]) for name, a in arrays.items()})
    return arrays


def write_photographs(root: Path) -> Path:
    """The photographs, whole and in parts, as a data set of two classes in both splits: all of them JPEG files."""
    for split, boxes in (("train", [(0, 0, 640, 427), (40, 20, 400, 420)]), ("val", [(100, 0, 640, 400)])):
        for path in sorted(PHOTOGRAPHS.glob("*.jpg")):
            folder = root / split / path.stem
            folder.mkdir(parents=True)
            with Image.open(path) as image:
                for number, box in enumerate(boxes):
                    image.crop(box).save(folder / f"{number}.JPEG", quality=92)
    return root


def photograph(name: str) -> np.ndarray:
    """uint8 (427, 640, 3)."""
    with Image.open(PHOTOGRAPHS / f"{name}.jpg") as image:
        return np.asarray(image)
