import numpy as np
import pytest
import torch
from PIL import Image

from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec
from dod_models.generate import GenerateConfig, generate
from dod_models.picture import GAP, MARGIN
from dod_models.sample import SampleConfig, sample_stage

from . import tiny


def run(pipeline, out, **changes):
    values = {"classes": [2, 0], "num_stages": 3, "per_class": 2, "stage1": tiny.SAMPLING, "stage2": tiny.GUIDED}
    config = GenerateConfig.model_validate({**values, **changes})
    return generate(config, checkpoint=pipeline.checkpoint, codec=pipeline.codec, out=out)


def test_every_cell_is_its_class_s_sample_of_its_stage(pipeline, tmp_path):
    assert run(pipeline, tmp_path / "new" / "grid.png") == {"picture": str(tmp_path / "new" / "grid.png"), "samples": 4}
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png").convert("L"))
    model, _ = load_checkpoint(pipeline.checkpoint, decay=0.9)
    codec, labels, latents = Codec.load(pipeline.codec), torch.tensor([2, 0, 2, 0]), None
    for stage in (1, 2, 3):
        config = SampleConfig(**(tiny.SAMPLING if stage == 1 else tiny.GUIDED))
        latents, _ = sample_stage(model, config, stage=stage, labels=labels, previous=latents)
        images = codec.decode(latents)[..., 0]
        for sample, image in enumerate(images):
            place, column = divmod(sample, 2)
            top = 28 + (3 * place + stage - 1) * (64 + GAP) + place * 3 * GAP
            left = MARGIN + column * (64 + GAP)
            assert np.array_equal(grid[top : top + 64 : 4, left : left + 64 : 4], image)


@pytest.mark.parametrize("wrong", [3, -1])
def test_an_unknown_class_is_named(pipeline, tmp_path, wrong):
    with pytest.raises(ValueError, match=f"--class {wrong}: the model knows classes 0 to 2"):
        run(pipeline, tmp_path / "grid.png", classes=[0, wrong])
    assert not (tmp_path / "grid.png").exists()
