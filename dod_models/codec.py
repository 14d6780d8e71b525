"""The codec between images and latents: diffusers' AutoencoderKL and a scale factor.

One class serves Stable Diffusion's VAE and the small one trained on a small data set. Pixels are uint8 (B, H, W, C);
latents are scaled so that their standard deviation is about 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from dod_models import artifact
from dod_models.config import this_process
from dod_models.flow import Latent
from dod_models.pixels import to_pixels, to_signal

SCHEMA = "codec/1"
Pixels = UInt8[np.ndarray, "B height width channels"]  # C, H and W are the latent's
BATCH = 100  # images at a time, at most
BATCH_PIXELS = 2**19  # 8 images of 256 pixels: their activations take about 1 GB
RECONSTRUCTIONS = "reconstructions.safetensors"  # features of the held-out images after the codec


def batch_size(image_size: int) -> int:
    """How many images of this side go through a codec at a time; on a CPU the last bits may depend on it."""
    return max(1, min(BATCH, BATCH_PIXELS // image_size**2))


def device() -> torch.device:
    """The GPU where there is one; each process on a machine has its own as long as there are enough."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", this_process().local_rank % torch.cuda.device_count())


class Codec:
    """A frozen autoencoder. `scale` multiplies what it encodes (0.18215 for Stable Diffusion)."""

    def __init__(self, vae: Any, *, scale: float) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.scale = scale

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.vae.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @classmethod
    def load(cls, folder: Path) -> "Codec":
        """Read a finished stage `codec`, its weights checked against the manifest."""
        manifest = artifact.verify(folder, schema=SCHEMA)
        return cls(load_vae(folder / "vae"), scale=manifest["about"]["scale"])

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> tuple[Latent, Latent]:
        """Mean and standard deviation of the scaled latents' posterior."""
        posterior = self.vae.encode(to_signal(pixels).to(self.vae.device)).latent_dist
        return posterior.mean * self.scale, posterior.std * self.scale

    @torch.inference_mode()
    def decode(self, z: Latent) -> Pixels:
        """Scaled latents -> uint8 pixels."""
        return to_pixels(self.vae.decode(z.to(self.vae.device) / self.scale).sample)

    def decode_all(self, z: Latent) -> Iterator[UInt8[np.ndarray, "_ H W C"]]:
        """`decode` block by block, so that memory stays bounded."""
        return (self.decode(part) for part in z.split(batch_size(z.shape[-1] * self.factor)))


def load_vae(folder: Path) -> Any:
    """diffusers' AutoencoderKL from the folder of its config and weights, on this process's device."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return vae.to(device())
