"""Stage `codec`: train a small autoencoder on the data set, or take a finished one; score its reconstructions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from tqdm import trange

from dod_models import artifact, draws, stable_diffusion
from dod_models.codec import BATCH, RECONSTRUCTIONS, SCHEMA, Codec, batch_size, load_vae
from dod_models.config import Frozen, local_copy
from dod_models.evaluate import psnr
from dod_models.evaluator import Evaluator, Gathered
from dod_models.images import ImageFolder
from dod_models.pixels import to_signal


class CodecConfig(Frozen):
    """Which autoencoder, and how the small one is trained. "finished" is one that was trained here and is kept, so that
    new images make no other latents: weights mean nothing in those of another codec."""

    source: Literal["train", "finished", "stable-diffusion"] = "train"
    path: str | None = None  # of one that isn't trained: folder or s3://BUCKET/PREFIX; None: the Hugging Face cache
    revision: str = Field(stable_diffusion.REVISION, pattern="^[0-9a-f]{40}$")  # of the cache's repository
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")  # of the weights; None: recorded, not required
    image_size: PositiveInt = 32  # pixels
    channels: PositiveInt = 1  # of an image
    latent_channels: PositiveInt = 4
    widths: tuple[PositiveInt, ...] = (16, 32, 32)  # one level each; all but the first halve the side
    groups: PositiveInt = 8  # of the group norms
    steps: PositiveInt = 300
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 2e-3  # peak of the one-cycle schedule
    kl_weight: float = Field(4e-6, ge=0)  # per latent number
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def check_pinned(self) -> "CodecConfig":
        """A finished codec is named by its digest."""
        if self.source == "finished" and (self.path is None or self.sha256 is None):
            raise ValueError("path and sha256: needed with source 'finished'; `dod pin DATASET` prints them")
        return self


def finished(config: CodecConfig) -> Codec:
    """The codec that `dod pin` put aside: diffusers' config with the scale in it, and weights of the stated digest."""
    folder = local_copy(config.path or "")
    weights = folder / stable_diffusion.WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: not there; bring it back, or correct codec.path in params.yaml")
    if (found := artifact.sha256_file(weights)) != config.sha256:
        raise ValueError(f"{weights}: sha256 is {found}, codec.sha256 says {config.sha256}; correct one of them")
    vae = load_vae(folder)
    return Codec(vae, scale=float(vae.config.scaling_factor))


def small_vae(config: CodecConfig) -> Any:
    """diffusers' AutoencoderKL at the config's size."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(config.widths)
    return AutoencoderKL(
        in_channels=config.channels,
        out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=1,
        norm_num_groups=config.groups,
        latent_channels=config.latent_channels,
        sample_size=config.image_size,
        mid_block_add_attention=False,
    )


def train_vae(config: CodecConfig, pixels: np.ndarray) -> Any:
    """L1 + 0.5 MSE + KL on uint8 images (N, H, W, C)."""
    signal = to_signal(pixels)
    with draws.seeded(config.seed, "codec"):
        vae = small_vae(config)
        optimizer = torch.optim.AdamW(vae.parameters(), config.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
        bar = trange(config.steps, desc="train codec", unit="step")
        for step in bar:
            rows = draws.generator(config.seed, "codec batch", step).integers(len(signal), size=config.batch_size)
            images = signal[torch.from_numpy(rows)]
            posterior = vae.encode(images).latent_dist
            error = vae.decode(posterior.sample()).sample - images
            loss = error.abs().mean() + 0.5 * error.square().mean() + config.kl_weight * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                if not loss.isfinite():
                    raise FloatingPointError(
                        f"codec: the loss is {loss.item()} at step {step}; lower codec.learning_rate"
                    )
    return vae


def measure_scale(vae: Any, pixels: np.ndarray) -> float:
    """1 / standard deviation of unscaled latents drawn from the posteriors of the training images."""
    unscaled = Codec(vae, scale=1.0)
    parts = [unscaled.encode(part) for part in np.array_split(pixels, -(-len(pixels) // BATCH))]
    mean, std = (torch.cat(side) for side in zip(*parts, strict=True))
    second_moment = (mean - mean.mean()).square().mean() + std.square().mean()
    return float(second_moment.rsqrt())


def blocks_of(config: CodecConfig, dataset: Path, split: str) -> Iterator[np.ndarray]:
    """A split's images, as many at a time as fit the codec."""
    count = batch_size(config.image_size)
    return ImageFolder(dataset, split).blocks(size=config.image_size, channels=config.channels, count=count)


def build_codec(config: CodecConfig, *, dataset: Path, reference: Path, out: Path) -> dict[str, Any]:
    """Make the codec; return PSNR and the scores of its reconstructions (posterior means) of the held-out images."""
    with artifact.writing(out, schema=SCHEMA, config=config.digest) as folder:
        origin: dict[str, Any] = {}
        if config.source == "train":
            pixels = np.concatenate(list(blocks_of(config, dataset, "train")))
            vae = train_vae(config, pixels)
            codec = Codec(vae, scale=measure_scale(vae, pixels))
        elif config.source == "finished":
            codec, origin = finished(config), {"weights": {"sha256": config.sha256}}
        else:
            taken = stable_diffusion.load(config.path, revision=config.revision, sha256=config.sha256)
            codec, origin = taken.codec, {"weights": taken.origin}
        codec.vae.save_pretrained(folder.path / "vae", safe_serialization=True)
        quality: list[float] = []

        def reconstructions() -> Iterator[np.ndarray]:
            for originals in blocks_of(config, dataset, "val"):
                rebuilt = codec.decode(codec.encode(originals)[0])
                quality.extend(psnr(rebuilt, originals))
                yield rebuilt

        evaluator = Evaluator.load(reference)
        evaluator.features(reconstructions()).save(folder.path / RECONSTRUCTIONS)
        found = Gathered.mixed(folder.path / RECONSTRUCTIONS)
        scores = evaluator.score_held_out(found, name="reconstructions of the held-out images (split val)")
        folder.about = {"scale": codec.scale, "factor": codec.factor, "image_size": config.image_size, **origin}
    return {"psnr": float(np.mean(quality)), "scale": codec.scale, **scores}
