"""The codec between images and latents: diffusers' AutoencoderKL and a scale factor.

One class serves Stable Diffusion's VAE and the small one trained on a small data set. Pixels are uint8 (B, H, W, C);
latents are scaled so that their standard deviation is about 1.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dod_models import artifact
from dod_models.flow import Latent

SCHEMA = "codec/1"
Pixels = UInt8[np.ndarray, "B height width channels"]  # C, H and W are the latent's
RECONSTRUCTIONS = "reconstructions.safetensors"  # features of the held-out images after the codec

# The VAE of the paper's baselines; its config carries the scale 0.18215.
PINNED_VAE = "stabilityai/sd-vae-ft-ema"


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_pixels(decoded: Float[Tensor, "B C H W"]) -> UInt8[np.ndarray, "B H W C"]:
    """[-1, 1] -> uint8 as ADM has it: clamp(127.5 x + 128, 0, 255)."""
    pixels = (127.5 * decoded.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_signal(pixels: UInt8[np.ndarray, "B H W C"]) -> Float[Tensor, "B C H W"]:
    """uint8 -> [-1, 1] as x / 127.5 - 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


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
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        manifest = artifact.verify(folder, schema=SCHEMA)
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, use_safetensors=True)
        return cls(vae.to(device()), scale=manifest["about"]["scale"])

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> tuple[Latent, Latent]:
        """Mean and standard deviation of the scaled latents' posterior."""
        posterior = self.vae.encode(to_signal(pixels).to(self.vae.device)).latent_dist
        return posterior.mean * self.scale, posterior.std * self.scale

    @torch.inference_mode()
    def decode(self, z: Latent) -> Pixels:
        """Scaled latents -> uint8 pixels."""
        return to_pixels(self.vae.decode(z.to(self.vae.device) / self.scale).sample)

    def decode_all(self, z: Latent, *, batch: int = 100) -> Pixels:
        """`decode` in batches, so that memory stays bounded."""
        return np.concatenate([self.decode(part) for part in z.split(batch)])


def load_pinned(path: str | None) -> Codec:
    """Stable Diffusion's VAE from the folder `path`, or from the Hugging Face cache; never from the network."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(path or PINNED_VAE, local_files_only=True, use_safetensors=True)
    except OSError as error:
        raise FileNotFoundError(
            f"codec.path: {path or 'not set'}: no VAE there ({str(error).splitlines()[0]}); with network access run "
            f"`huggingface-cli download {PINNED_VAE}`, and set codec.path in params.yaml to the folder it prints"
        ) from None
    return Codec(vae, scale=float(vae.config.scaling_factor))
