"""Cases whose metric is known in closed form: tests hold ours to them, and `make bench-evaluate` prints the errors."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dod_models.evaluate import Matrix, Vector


class Gaussians(NamedTuple):
    """Two Gaussians of width D and their Frechet distance."""

    name: str
    mu1: Vector
    sigma1: Matrix
    mu2: Vector
    sigma2: Matrix
    distance: float

    @property
    def size(self) -> float:
        """What an error of the distance is measured by: the sum of the terms that it is the difference of."""
        return float(np.square(self.mu1 - self.mu2).sum() + np.trace(self.sigma1) + np.trace(self.sigma2))


def turned(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    """Q matrix Q^T, Q being three random reflections."""
    for _ in range(3):
        axis = rng.standard_normal(len(matrix))
        axis /= np.linalg.norm(axis)
        matrix = matrix - np.outer(2 * axis, axis @ matrix)
        matrix = matrix - np.outer(matrix @ axis, 2 * axis)
    return (matrix + matrix.T) / 2


def commuting(name: str, first: Vector, second: Vector, seed: int) -> Gaussians:
    """Covariances with common axes and variances `first`, `second`; the means differ by 1 in each direction."""
    sigmas = [turned(np.diag(variances), np.random.default_rng(seed)) for variances in (first, second)]
    zero, one = np.zeros(len(first)), np.ones(len(first))
    distance = len(first) + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    return Gaussians(name, zero, sigmas[0], one, sigmas[1], float(distance))


def planes(width: int, seed: int) -> Gaussians:
    """Pairs of directions, each with a 2 x 2 covariance of its own, all turned in D dimensions.

    For 2 x 2 matrices the trace of the root is (tr S1 S2 + 2 (det S1 det S2)^(1/2))^(1/2), by Cayley and Hamilton.
    """
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((2, width // 2, 2, 2))
    blocks = factors @ factors.swapaxes(-1, -2)
    determinants = np.square(np.linalg.det(factors))
    products = np.einsum("nij,nji->n", blocks[0], blocks[1])
    roots = np.sqrt(products + 2 * np.sqrt(determinants[0] * determinants[1]))
    sigmas = []
    for which in blocks:
        whole = np.zeros((width, width))
        for index, block in enumerate(which):
            whole[2 * index : 2 * index + 2, 2 * index : 2 * index + 2] = block
        sigmas.append(turned(whole, np.random.default_rng(seed + 1)))
    zero = np.zeros(width)
    distance = np.trace(blocks.sum(axis=(0, 1))) - 2 * roots.sum()
    return Gaussians("2 x 2 planes, turned", zero, sigmas[0], zero, sigmas[1], float(distance))


def mapped(name: str, variances: Vector, seed: int) -> Gaussians:
    """S2 = A S1 A with A symmetric and positive: x -> A x is the optimal transport, and the root's trace is tr A S1."""
    rng = np.random.default_rng(seed)
    sigma = turned(np.diag(variances), rng)
    stretch = turned(np.diag(rng.uniform(0.5, 2, len(variances))), rng)
    image = stretch @ sigma @ stretch
    zero = np.zeros(len(variances))
    distance = np.trace(sigma) + np.trace(image) - 2 * np.sum(stretch * sigma)
    return Gaussians(name, zero, sigma, zero, (image + image.T) / 2, float(distance))


def line(width: int, seed: int) -> Gaussians:
    """S1 = u u^T of rank 1, whose root's trace is (u^T S2 u)^(1/2)."""
    rng = np.random.default_rng(seed)
    along = rng.standard_normal(width)
    sigma = turned(np.diag(rng.uniform(1, 2, width)), rng)
    zero = np.zeros(width)
    distance = along @ along + np.trace(sigma) - 2 * np.sqrt(along @ sigma @ along)
    return Gaussians("rank 1 against full rank", zero, np.outer(along, along), zero, sigma, float(distance))


def gaussians(width: int, seed: int = 0) -> Iterator[Gaussians]:
    """Every case at one width, which is a multiple of 8."""
    rng = np.random.default_rng(seed)
    first, second = rng.uniform(1, 2, (2, width))
    part = np.arange(width) / width
    sigma = turned(np.diag(first), rng)
    shift = rng.standard_normal(width)
    yield Gaussians("equal", shift, sigma, shift, sigma, 0.0)
    yield Gaussians("shifted", shift, sigma, np.zeros(width), sigma, float(shift @ shift))
    yield commuting("common axes", first, second, seed)
    yield planes(width, seed)
    yield mapped("S2 = A S1 A", first, seed)
    yield mapped("S2 = A S1 A, variances 1 to 1e-12", np.logspace(0, -12, width), seed)
    yield mapped("S2 = A S1 A of rank D / 4", first * (part < 0.25), seed)
    yield line(width, seed)
    yield commuting("rank D / 4 against full rank", first * (part < 0.25), second, seed)
    yield commuting("rank D / 2 both, half of it shared", first * (part < 0.5), second * (abs(part - 0.5) < 0.25), seed)
    yield commuting("rank D / 2 both, nothing shared", first * (part < 0.5), second * (part >= 0.5), seed)
    yield commuting("against a point", first, np.zeros(width), seed)
