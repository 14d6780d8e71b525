"""Stable Diffusion's VAE, which the paper's baselines use: a pinned revision, found on this machine and checked.

Nothing is downloaded: a run must not depend on the network, nor on what a repository holds today.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from dod_models import artifact
from dod_models.codec import Codec, load_vae
from dod_models.config import local_copy

log = logging.getLogger(__name__)

REPOSITORY = "stabilityai/sd-vae-ft-ema"
# The one that public code pins, wherever it pins one; its weights take 334,643,276 bytes.
REVISION = "f04b2c4b98319346dad8c65879f680b1997b204a"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
SHA256 = re.compile("[0-9a-f]{64}")


class Found(NamedTuple):
    """The VAE's codec, and what its weights are."""

    codec: Codec
    origin: dict[str, str]  # for the manifest


def load(path: str | None, *, revision: str = REVISION, sha256: str | None = None) -> Found:
    """The VAE from a folder or s3:// prefix, or at `revision` from the Hugging Face cache; weights of digest `sha256`.

    FileNotFoundError that says how to provide it; ValueError where the weights are others.
    """
    folder = cached(revision) if path is None else local_copy(path)
    missing = [name for name in (CONFIG, WEIGHTS) if folder is None or not (folder / name).is_file()]
    if folder is None or missing:
        raise FileNotFoundError(
            f"codec.path: {path or 'not set'}: no VAE there ({' and '.join(missing)} missing). Provide it in one of "
            f"three ways: with network access run `hf download {REPOSITORY} {CONFIG} {WEIGHTS} --revision {revision}`, "
            "which fills the Hugging Face cache; or copy these two files and set codec.path in params.yaml to their "
            "folder; or upload them, and set codec.path to their s3://BUCKET/PREFIX"
        )
    digest = artifact.sha256_file(folder / WEIGHTS)
    stated = sha256 or hub_digest(folder / WEIGHTS)
    if stated not in (None, digest):
        raise ValueError(
            f"{folder / WEIGHTS}: sha256 is {digest}, {'codec.sha256' if sha256 else 'the Hugging Face cache'} says "
            f"{stated}: these are other weights, or damaged ones; fetch them again, or correct codec.sha256"
        )
    if sha256 is None:
        log.info(f"codec: {REPOSITORY}: sha256 of the weights is {digest}; codec.sha256 in params.yaml would pin it")
    vae = load_vae(folder)
    origin = {"repository": REPOSITORY, "sha256": digest} | ({"revision": revision} if path is None else {})
    return Found(Codec(vae, scale=float(vae.config.scaling_factor)), origin)


def cached(revision: str) -> Path | None:
    """The revision's folder in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(REPOSITORY, WEIGHTS, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def hub_digest(weights: Path) -> str | None:
    """The sha256 that the hub stated of a file in its cache, where large files are kept under it as their name."""
    name = weights.resolve().name
    return name if SHA256.fullmatch(name) else None
