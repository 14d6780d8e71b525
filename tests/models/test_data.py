from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dod_models import artifact, data, draws
from dod_models.artifact import DamagedError
from dod_models.data import LatentShards, TrainingDraws, draws_ahead, evenly_kept

SHAPE = (2, 3, 3)
COUNT, CLASSES = 10, 4
USUAL: dict[str, Any] = {"seed": 0, "label_drop": 0.1, "prior_drop": 0.5, "exact_share": False}


def write(folder, *, std: float = 0.0, views: int = 1):
    """Ten images in shards of four; the mean of image i is i in its first view and i + 0.5 in the mirrored one."""
    moments = np.zeros((COUNT, views, 2, *SHAPE), dtype=np.float16)
    for view in range(views):
        moments[:, view, 0] = np.arange(COUNT).reshape(-1, 1, 1, 1) + view / 2
    moments[:, :, 1] = std
    with artifact.writing(folder, schema=data.SCHEMA, config="") as output:
        for shard in range(3):
            np.save(output.path / data.shard_name(shard), moments[4 * shard : 4 * shard + 4])
        np.save(output.path / "labels.npy", np.arange(COUNT) % CLASSES)
        facts = {"count": COUNT, "classes": CLASSES, "views": views, "latent_shape": SHAPE, "shard_size": 4}
        output.about = facts
    return LatentShards(folder)


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path / "latents")


def test_rows_are_found_across_shards(shards):
    order = [7, 0, 4, 3, 9, 9, 8]
    assert shards.gather(order, [0] * 7)[:, 0].mean(axis=(1, 2, 3)).tolist() == order


def test_a_damaged_shard_is_refused_and_named(tmp_path):
    write(tmp_path / "latents")
    path = tmp_path / "latents" / "shard-00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DamagedError, match=r"shard-00001\.npy: sha256"):
        LatentShards(tmp_path / "latents")


@pytest.mark.parametrize("exact", [False, True])
def test_draws_ignore_how_the_batch_is_split(tmp_path, exact):
    shards = write(tmp_path / "latents", std=1.0, views=2)
    usual = {**USUAL, "exact_share": exact}
    whole = TrainingDraws(shards, range(16), **usual)
    parts = [TrainingDraws(shards, range(a, a + 4), **usual) for a in range(0, 16, 4)]
    for name in ("latents", "noise", "normal", "labels"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
    assert torch.cat([p.keep + 4 * i for i, p in enumerate(parts)]).tolist() == whole.keep.tolist()


def test_the_seed_changes_every_draw(tmp_path):
    shards = write(tmp_path / "latents", std=1.0)
    a, b = (TrainingDraws(shards, range(40), **{**USUAL, "seed": seed}) for seed in (0, 1))
    for name in ("latents", "noise", "normal", "labels", "keep"):
        assert getattr(a, name).tolist() != getattr(b, name).tolist(), name


def test_every_epoch_visits_every_image_once_with_its_own_label(shards):
    seen = []
    for epoch in range(3):
        draw = TrainingDraws(shards, range(epoch * COUNT, (epoch + 1) * COUNT), **{**USUAL, "label_drop": 0.0})
        index = draw.latents.mean(dim=(1, 2, 3)).round().long()
        assert index.sort().values.tolist() == list(range(COUNT))
        assert torch.equal(draw.labels, index % CLASSES)
        seen.append(index.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_latents_are_drawn_from_the_posterior(tmp_path):
    shards = write(tmp_path / "latents", std=0.5)
    draw = TrainingDraws(shards, range(500), **USUAL)
    index = draw.latents.mean(dim=(1, 2, 3), keepdim=True)
    order = np.concatenate([draws.permutation(0, epoch, COUNT) for epoch in range(50)])
    excess = (draw.latents - torch.from_numpy(order).view(-1, 1, 1, 1)) / 0.5
    assert index.shape == (500, 1, 1, 1)
    assert abs(excess.mean()) < 5 / excess.numel() ** 0.5
    assert abs(excess.square().mean() - 1) < 5 * (2 / excess.numel()) ** 0.5
    for other in (draw.noise, draw.normal.view(-1, 1, 1, 1)):  # the posterior's draw is independent of noise and time
        assert abs((excess * other).mean()) < 5 / 500**0.5


def test_both_views_are_drawn_equally_often(tmp_path):
    draw = TrainingDraws(write(tmp_path / "latents", views=2), range(1000), **USUAL)
    mirrored = draw.latents.mean(dim=(1, 2, 3)) % 1 == 0.5
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / 1000**0.5


@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_their_rate(shards, drop):
    draw = TrainingDraws(shards, range(2000), **{**USUAL, "label_drop": drop})
    rate = (draw.labels == CLASSES).double().mean()
    assert abs(rate - drop) <= 5 * (drop * (1 - drop) / 2000) ** 0.5


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_priors_are_dropped_at_their_rate(shards, drop):
    draw = TrainingDraws(shards, range(2000), **{**USUAL, "prior_drop": drop})
    assert abs(1 - len(draw.keep) / 2000 - drop) <= 5 * (drop * (1 - drop) / 2000) ** 0.5


def test_label_and_prior_are_dropped_independently(shards):
    draw = TrainingDraws(shards, range(4000), **{**USUAL, "label_drop": 0.5})
    no_label = draw.labels == CLASSES
    kept = torch.zeros(4000, dtype=torch.bool).index_fill(0, draw.keep, True)
    assert abs((no_label & kept).double().mean() - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


@given(start=st.integers(0, 10**6), keep=st.sampled_from([0.25, 0.5, 0.75, 0.3, 0.9]))
def test_an_exact_share_of_every_batch_is_kept(start, keep):
    batch = 20
    kept = sum(evenly_kept(i, 1 - keep) for i in range(start * batch, (start + 1) * batch))
    assert kept == round(keep * batch)


@given(drop=st.floats(0, 1), start=st.integers(0, 10**6), size=st.integers(1, 50))
def test_kept_samples_are_spread_evenly(drop, start, size):
    """Any run of samples is within one of its share."""
    kept = sum(evenly_kept(i, drop) for i in range(start, start + size))
    assert abs(kept - size * (1 - drop)) < 1 + 1e-6


def test_the_exact_share_reaches_the_batches(shards):
    for start in range(0, 64, 8):
        draw = TrainingDraws(shards, range(start, start + 8), **{**USUAL, "exact_share": True})
        assert len(draw.keep) == 4


@pytest.mark.parametrize("size", [None, 1, 3, 4, 20])
def test_micro_batches_are_the_rows_of_the_batch_in_order(tmp_path, size):
    draw = TrainingDraws(write(tmp_path / "latents", std=1.0), range(10), **USUAL)
    parts = draw.parts(size)
    assert [len(part.labels) for part in parts] == {None: [10], 1: [1] * 10, 3: [3, 3, 3, 1], 4: [4, 4, 2], 20: [10]}[
        size
    ]
    for name in ("latents", "noise", "normal", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(draw, name)), name
    assert torch.cat([part.keep + i * (size or 0) for i, part in enumerate(parts)]).tolist() == draw.keep.tolist()


def test_draws_come_in_order_and_at_most_two_ahead(shards):
    begun: list[int] = []

    def draw(step: int) -> TrainingDraws:
        begun.append(step)
        return TrainingDraws(shards, range(4 * step, 4 * step + 4), **USUAL)

    with closing(draws_ahead(draw, range(3, 9))) as ahead:
        for step, found in enumerate(ahead, 3):
            assert torch.equal(found.noise, TrainingDraws(shards, range(4 * step, 4 * step + 4), **USUAL).noise)
            assert step in begun and max(begun) <= step + 1
    assert begun == list(range(3, 9))


def test_an_error_in_the_thread_is_raised_when_its_step_is_due(shards):
    def draw(step: int) -> TrainingDraws:
        if step == 2:
            raise OSError("the disk is gone")
        return TrainingDraws(shards, range(step, step + 1), **USUAL)

    ahead = draws_ahead(draw, range(5))
    assert [next(ahead).images.tolist() for _ in range(2)] == [[i] for i in draws.permutation(0, 0, COUNT)[:2]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
