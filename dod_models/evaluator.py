"""The evaluator of a data set, as stage `reference` left it: its feature net, and the real images' features."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dod_models import evaluate
from dod_models.codec import Codec
from dod_models.features import SCHEMA, Extractor, FeatureSet
from dod_models.flow import Latent


class Evaluator:
    """Scores sets of images against the reference."""

    def __init__(self, extractor: Extractor, real: FeatureSet) -> None:
        self.extractor, self.real = extractor, real

    @classmethod
    def load(cls, reference: Path) -> "Evaluator":
        """Read a finished stage `reference`, its digests checked."""
        return cls(Extractor.load(reference), FeatureSet.load(reference, "train.safetensors", schema=SCHEMA))

    def features(self, batches: Iterable[UInt8[np.ndarray, "_ H W C"]]) -> FeatureSet:
        """Features of all images of all batches, in order."""
        return self.extractor(batches)

    def decoded(self, codec: Codec, latents: Latent, count: int, *, name: str) -> FeatureSet:
        """Features of the first `count` samples, decoded in blocks; ValueError if there are fewer."""
        if len(latents) < count:
            raise ValueError(
                f"{name}: {len(latents)} samples, evaluation.num_samples is {count}; sample more, or ask for fewer"
            )
        return self.features(codec.decode_all(latents[:count]))

    def score(self, found: FeatureSet) -> dict[str, float]:
        """Every metric of a set of images against the reference, by name."""
        return evaluate.score(found, self.real)
