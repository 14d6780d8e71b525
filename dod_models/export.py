"""Command `export`: a sampling stage's images as ADM's npz, so that its own evaluation suite can score them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt
from tqdm import tqdm

from dod_models import npz
from dod_models.codec import Codec
from dod_models.config import Frozen
from dod_models.stored import StoredSamples


class ExportConfig(Frozen):
    """How many of the samples."""

    num_samples: PositiveInt | None = None  # the first ones; None: all


def export(config: ExportConfig, *, samples: Path, codec: Path, out: Path) -> dict[str, Any]:
    """Write `out`: `arr_0`, images as uint8 (N, H, W, 3), and `arr_1`, their classes as int64; a batch is held."""
    stored, decoder = StoredSamples(samples), Codec.load(codec)
    count = config.num_samples or stored.count
    if out.suffix != ".npz" or count > stored.count:
        raise ValueError(
            f"{out}: must be called FILE.npz; {samples} holds {stored.count} samples, {count} are asked for"
        )
    side = stored.side * decoder.factor

    def images() -> Iterator[np.ndarray]:
        with tqdm(total=count, desc="export", unit="image") as bar:
            for pixels in stored.decoded(decoder, range(count)):
                yield np.broadcast_to(pixels, (*pixels.shape[:3], 3))  # grey is repeated
                bar.update(len(pixels))

    labels = stored.labels().numpy()[:count]
    arrays = {
        "arr_0": npz.Column((count, side, side, 3), np.uint8, images()),
        "arr_1": npz.Column((count,), np.int64, [labels]),
    }
    npz.write(out, arrays)
    return {"file": str(out), "num_samples": count}
