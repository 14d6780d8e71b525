"""Pixels and signals: uint8 (B, H, W, C) on disk and for the eye, floats in [-1, 1] (B, C, H, W) for networks."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_pixels(signal: Float[Tensor, "B C H W"]) -> UInt8[np.ndarray, "B H W C"]:
    """[-1, 1] -> uint8 as ADM has it: clamp(127.5 x + 128, 0, 255)."""
    pixels = (127.5 * signal.float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_signal(pixels: UInt8[np.ndarray, "B H W C"]) -> Float[Tensor, "B C H W"]:
    """uint8 -> [-1, 1] as x / 127.5 - 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
