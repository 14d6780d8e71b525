"""Reconstructions, and what they are compared with."""

import numpy as np
import pytest
import torch

from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec
from dod_models.evaluator import Evaluator
from dod_models.images import ImageFolder
from dod_models.reconstruct import Originals, Reconstruction
from dod_models.sample import SampleConfig, sample_stage

from . import tiny


def originals(pipeline, **changes):
    return Originals(pipeline.dataset, pipeline.codec, **changes)


@pytest.mark.parametrize("count", [None, 7, 30, 90, 1000])
def test_every_class_has_its_share_of_the_originals_whatever_the_order_of_the_index(pipeline, monkeypatch, count):
    shuffled = np.random.default_rng(0).permutation(90)
    before = ImageFolder.__init__

    def mixed(self, *arguments):
        before(self, *arguments)
        self.entries = [self.entries[i] for i in shuffled]

    monkeypatch.setattr(ImageFolder, "__init__", mixed)
    found = originals(pipeline, count=count)
    per_class = np.bincount(found.labels, minlength=3)
    assert len(found) == per_class.sum() == min(count or 90, 90)
    assert per_class.max() - per_class.min() <= 1
    assert len(set(found.rows)) == len(found)


def test_the_prior_is_the_lem_s_embedding_of_the_originals_own_latents(pipeline):
    config = SampleConfig.model_validate(tiny.GUIDED)
    model, _ = load_checkpoint(pipeline.checkpoint, decay=0.9)
    found, spent = Reconstruction(originals(pipeline), Evaluator.load(pipeline.reference)).sample(
        model, config, title="row 1"
    )
    held_out = ImageFolder(pipeline.dataset, "val")
    (pixels,) = held_out.blocks(size=tiny.SIZE, channels=1)
    previous, labels = Codec.load(pipeline.codec).encode(pixels)[0], torch.from_numpy(held_out.labels)
    wanted, _ = sample_stage(model, config, stage=2, labels=labels, previous=previous)
    assert torch.equal(found, wanted)
    assert spent == (2, 2)


class Pictures:
    """Stands in for a codec's decoder, and gives these pictures back, in blocks."""

    def __init__(self, *blocks):
        self.given = blocks

    def decode_all(self, latents):
        return iter(self.given)


def compared(pipeline, change):
    """What is found when the originals are changed so."""
    subject = originals(pipeline)
    blocks = list(subject.blocks())
    subject.codec, subject.blocks = Pictures(*(change(block) for block in blocks)), lambda: iter(blocks)
    return Reconstruction(subject, Evaluator.load(pipeline.reference)).compare(torch.zeros(90, 4, 4, 4), title="row 1")


def test_images_that_are_their_originals_have_no_distance(pipeline):
    found = compared(pipeline, lambda block: block.copy())
    assert found["rfid"] == pytest.approx(0, abs=1e-6)
    assert found["ssim"] == pytest.approx(1)


def test_an_error_of_known_size_has_its_psnr(pipeline):
    """Every pixel off by 5 levels: 20 log10(255 / 5) for each image, and so for the mean."""
    found = compared(pipeline, lambda block: np.where(block < 128, block + 5, block - 5).astype(np.uint8))
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 5), abs=1e-9)
    assert found["rfid"] > 0 and found["ssim"] < 1


def test_the_order_of_the_images_matters_to_psnr_and_ssim_alone(pipeline):
    found = compared(pipeline, lambda block: block[::-1].copy())
    assert found["rfid"] == pytest.approx(0, abs=1e-6)
    assert found["psnr"] < 20 and found["ssim"] < 0.8


def test_too_few_originals_for_the_features_are_refused(pipeline):
    subject = Reconstruction(originals(pipeline, count=60), Evaluator.load(pipeline.reference))  # of 64 features
    with pytest.raises(ValueError, match="60"):
        _ = subject.real
