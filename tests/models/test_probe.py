"""The linear probe, on data whose best accuracy is known."""

import math

import numpy as np
import pytest
import torch

from dod_models import probe
from dod_models.data import LatentShards
from dod_models.probe import Features, ProbeConfig

from . import tiny

SOLVERS = pytest.mark.parametrize("solver", ["exact", "minibatch"])


def gaussians(count: int, *, distance: float, width: int = 12, seed: int = 0) -> Features:
    """Two classes of unit variance, `distance` apart along the diagonal, on features of very different scale."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count)
    rows = rng.standard_normal((count, width)) + (labels[:, None] - 0.5) * distance / math.sqrt(width)
    return Features((rows * np.logspace(-3, 3, width) + 50).astype(np.float32), labels)


def top1(train: Features, test: Features, *, classes: int = 2, **changes: object) -> float:
    config = ProbeConfig.model_validate({"batch_size": 256, **changes})
    return probe.top1(config, train, test, num_classes=classes, title="probe")


@SOLVERS
@pytest.mark.parametrize("distance", [0.5, 2.0, 4.0])
def test_gaussian_classes_are_told_apart_as_well_as_bayes_does(solver: str, distance: float):
    """The best any classifier can do is Phi(distance / 2)."""
    best = 0.5 * (1 + math.erf(distance / 2 / math.sqrt(2)))
    test = gaussians(20_000, distance=distance, seed=1)
    found = top1(gaussians(5000, distance=distance), test, solver=solver)
    error = math.sqrt(best * (1 - best) / 20_000)
    assert best - 0.006 - 3 * error < found < best + 3 * error  # 5,000 images don't quite show the best layer


@SOLVERS
def test_random_labels_give_chance(solver: str):
    rng = np.random.default_rng(2)
    train, test = (Features(rng.standard_normal((4000, 8), dtype=np.float32), rng.integers(5, size=4000)) for _ in "ab")
    assert top1(train, test, classes=5, solver=solver) == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / 4000))


@SOLVERS
def test_separable_classes_are_all_told_apart(solver: str):
    labels = np.arange(900) % 3
    rows = np.eye(3, dtype=np.float32)[labels] * 5 + 7  # a linear layer with a bias is enough
    constant = np.ones((900, 1), dtype=np.float32)  # has no scale
    both = Features(np.hstack([rows, constant]), labels)
    assert top1(both, both, classes=3, solver=solver) == 1


def test_both_solvers_agree_on_many_classes():
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((10, 16)) * 0.7
    labels = rng.integers(10, size=10_000)
    rows = (centres[labels] + rng.standard_normal((10_000, 16))).astype(np.float32)
    train, test = Features(rows[:4000], labels[:4000]), Features(rows[4000:], labels[4000:])
    exact = top1(train, test, classes=10, solver="exact")
    minibatch = top1(train, test, classes=10, solver="minibatch", epochs=60, learning_rate=0.03)  # 16 steps each
    assert 0.5 < exact < 0.9
    assert exact == pytest.approx(minibatch, abs=3 * math.sqrt(exact * (1 - exact) / 6000))


def test_the_solver_follows_the_size_unless_it_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "exact", lambda train, test: 1.0)
    monkeypatch.setattr(probe, "minibatch", lambda config, train, test, **rest: 2.0)
    small = Features(np.zeros((10, 4), np.float32), np.zeros(10, np.int64))
    large = Features(np.broadcast_to(np.float32(0), (1_281_167, 512)), np.zeros(10, np.int64))  # takes no memory
    assert top1(small, small) == 1 and top1(large, large, classes=1000) == 2
    assert top1(small, small, solver="minibatch") == 2 and top1(large, large, classes=1000, solver="exact") == 1


def test_a_fit_that_diverges_is_an_error():
    data = gaussians(600, distance=1)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf); lower probe\.learning_rate"):
        top1(data, data, solver="minibatch", learning_rate=1e36)


def test_features_are_the_lem_s_tokens_of_the_posterior_means(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "BLOCK", 7)  # of 90 images
    shards = LatentShards(pipeline.latents)
    lem = tiny.random_model(tiny.config()).lem
    labels = shards.labels.numpy()
    found = probe.extract(lem, probe.means(shards), labels=labels, path=tmp_path / "train.npy", title="features")
    stored = np.load(pipeline.latents / "shard-00001.npy")  # images 40 to 79; the first view, its mean
    with torch.no_grad():
        wanted = lem.encode(torch.from_numpy(stored[:, 0, 0].astype(np.float32)))
    np.testing.assert_allclose(found.rows[40:80], wanted.flatten(1), atol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "train.npy"), found.rows)
