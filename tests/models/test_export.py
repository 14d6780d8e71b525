import numpy as np
import pytest

from dod_models import cli
from dod_models.codec import Codec
from dod_models.export import ExportConfig, export
from dod_models.sample import Samples

from . import tiny


def test_the_file_holds_the_decoded_samples_in_three_channels_and_their_classes(pipeline, tmp_path):
    paths = ["--samples", str(pipeline.stage2), "--codec", str(pipeline.codec), "--out", str(tmp_path / "a.npz")]
    assert cli.main(["export", "--config", "{}", *paths]) == 0
    samples = Samples.load(pipeline.stage2)
    pixels = np.concatenate(list(Codec.load(pipeline.codec).decode_all(samples.latents)))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert found["arr_0"].shape == (70, tiny.SIZE, tiny.SIZE, 3)
        for channel in range(3):
            assert np.array_equal(found["arr_0"][..., channel], pixels[..., 0])
        assert np.array_equal(found["arr_1"], samples.labels.numpy())


def test_what_cannot_be_is_refused(pipeline, tmp_path):
    inputs = {"samples": pipeline.stage1, "codec": pipeline.codec}
    with pytest.raises(ValueError, match=r"stage1 holds 70 samples, 71 are asked for"):
        export(ExportConfig(num_samples=71), **inputs, out=tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"must be called FILE\.npz"):
        export(ExportConfig(), **inputs, out=tmp_path / "a.zip")
    assert list(tmp_path.iterdir()) == []
