"""The Inception network that ADM's evaluation suite takes features from, in torch-fidelity's port of 2015-12-05.

Its resize is TensorFlow 1's, as that suite's. Nothing is downloaded: a run must not depend on the network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from dod_models import artifact
from dod_models.codec import device
from dod_models.config import local_copy
from dod_models.features import SPATIAL_CHANNELS, Extractor, FeatureSet

NAME = "inception-2015-12-05"
WIDTH, SPATIAL_WIDTH = 2048, 17 * 17 * SPATIAL_CHANNELS
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
# The file's name has its first eight digits. HyperGAN and snap-research/discoscene, among others, pin the whole.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 on a GPU: TF32 keeps ten bits of it, which shows in a FID."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def network(state: dict[str, Tensor]) -> nn.Module:
    """torch-fidelity's network with these weights, which gives pooled features (N, 2048) and unbiased logits."""
    from torch_fidelity import (
        feature_extractor_inceptionv3 as port,  # late: it imports torchvision, which takes seconds
    )

    # Its constructor downloads the weights, or unpickles them without a check; here it is handed ours instead.
    with mock.patch.object(port, "load_state_dict_from_url", lambda *_, **__: state):
        net: nn.Module = port.FeatureExtractorInceptionV3(NAME, ["2048", "logits_unbiased"])
    return net


class Inception(Extractor):
    """Pooled features (2048), unbiased logits (1008), and for sFID the first channels of `mixed_6/conv` (2023).

    That is what ADM's suite takes: the 1 x 1 branch of the block Mixed_6d after its ReLU, 17 x 17 places of 7 channels.
    """

    name = NAME

    def __init__(self, state: dict[str, Tensor], digest: str) -> None:
        self.digest, self.device, self.net = digest, device(), network(state)
        self.net.to(self.device)
        self.maps = torch.empty(0)
        self.net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        """Take the maps as the network computes them."""
        self.maps = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @classmethod
    def load(cls, weights: Path, digest: str) -> "Inception":
        """Read the weights as stage `reference` keeps them, in safetensors; `digest` is the published file's."""
        return cls(load_file(weights), digest)

    @torch.inference_mode()
    def part(self, pixels: UInt8[np.ndarray, "B H W C"]) -> FeatureSet:
        """Features of a batch of images; grey ones are repeated to three channels."""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
        with full_precision():
            features, logits = self.net(images.expand(-1, 3, -1, -1))
        return FeatureSet(features.cpu(), self.maps.cpu(), logits.cpu())


def find_weights(path: str | None) -> Path:
    """torch-fidelity's file of weights: the file `path`, in that folder or s3:// prefix, or in torch hub's cache.

    FileNotFoundError that says how to provide it.
    """
    place = Path(torch.hub.get_dir(), "checkpoints") if path is None else local_copy(path)
    found = place / WEIGHTS if place.is_dir() or path is None else place
    if not found.is_file():
        raise FileNotFoundError(
            f"reference.weights: {path or 'not set'}: no Inception weights at {found}. They are published at {URL} "
            f"(95,628,359 bytes). Provide them in one of three ways: save that file as "
            f"{Path(torch.hub.get_dir(), 'checkpoints', WEIGHTS)}; or set reference.weights in params.yaml to the file "
            "or its folder; or upload it, and set reference.weights to its s3://BUCKET/PREFIX"
        )
    return found


def read_weights(path: Path, *, sha256: str) -> dict[str, Tensor]:
    """The published file's tensors; ValueError unless it has this sha256."""
    digest = artifact.sha256_file(path)
    if digest != sha256:
        raise ValueError(
            f"{path}: sha256 is {digest}, expected {sha256}: these are other weights, or damaged ones; fetch them "
            f"again from {URL}, or correct reference.weights_sha256"
        )
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
