"""Nearest neighbours among features, found at float32's speed and decided in float64. N rows, D features.

A float32 product gives every pair a lower bound of its squared distance, whose error is known. For each row the pairs
with the least bounds are computed again, from differences; where the next bound does not rule out all of the others,
the row is multiplied again in float64. So clustered features, whose bounds tell nothing, cost both products.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

ROWS_AT_ONCE = 2048
PAIRS_AT_ONCE = 1024  # computed again; 16 KiB each at width 2048, twice
SPARE = 4  # pairs computed again beyond the k sought: enough for all of 10,000 normal rows of width 2048
TIE = 1e-13  # of squared norms: the rounding of a difference of squares, and ten times what was seen at width 2048
UNIT = 2.0**-24  # float32's rounding
TINY, HUGE = 1e-30, 1e36  # of squares: what underflows is below the one, what overflows above the other

Rows = Float[np.ndarray, "_ _"]
Values = Float[Tensor, " _"]


class Cloud(NamedTuple):
    """Features (N, D), the point near them about which they are multiplied, and their squared norms about it."""

    rows: Rows
    centre: Float[np.ndarray, " D"]
    norms: Values

    @classmethod
    def of(cls, rows: Rows, centre: Float[np.ndarray, " D"]) -> "Cloud":
        """The norms are float64."""
        cloud = cls(rows, centre, torch.empty(len(rows), dtype=torch.float64))
        for place in _places(len(rows)):
            cloud.norms[place] = cloud.block(place, np.float64).square_().sum(dim=1)
        return cloud

    def block(self, place: slice | np.ndarray, dtype: type[np.floating]) -> Float[Tensor, "B D"]:
        """Rows about the centre, rounded to `dtype` after the subtraction, since far from zero float32 loses them."""
        rows = self.rows[place]
        exact = np.subtract(rows, self.centre, dtype=np.result_type(rows, self.centre, dtype))
        return torch.from_numpy(exact.astype(dtype, copy=False))

    def below(self) -> Values:
        """The norms, less by the most that float32 can err in |a|^2 + |b|^2 - 2 ab by either one's share.

        D + 16 roundings: D of the sum of products, in any order, as 2 |a| |b| <= |a|^2 + |b|^2; the rest for those of
        the factors and of what is added.
        """
        error = 1.1 * (self.rows.shape[1] + 16) * UNIT
        below: Values = self.norms * (1 - error) - TINY
        return below.float()


class _Least:
    """The least lower bounds of each row so far, and whose they are."""

    def __init__(self, count: int, keep: int) -> None:
        self.bounds = torch.full((count, keep), torch.inf)
        self.columns = torch.zeros((count, keep), dtype=torch.int64)

    def take(self, place: slice, first: int, bounds: Float[Tensor, "A B"]) -> None:
        """Add a block of bounds, whose columns begin at `first`."""
        keep = self.bounds.shape[1]
        found = bounds.topk(min(keep, bounds.shape[1]), dim=1, largest=False, sorted=False)
        every = torch.cat([self.bounds[place], found.values], dim=1)
        columns = torch.cat([self.columns[place], found.indices + first], dim=1)
        self.bounds[place], chosen = every.topk(keep, dim=1, largest=False, sorted=False)
        self.columns[place] = columns.gather(1, chosen)


def radii(cloud: Cloud, k: int) -> Values:
    """Each row's squared distance to the k-th nearest of the others."""
    nothing = torch.zeros_like(cloud.norms)
    least, _ = _screen(cloud, cloud, nothing, nothing, k + SPARE)
    found = _settle(cloud, cloud, nothing, least, k, 0.0)
    doubtful = ~(found <= least.bounds.amax(dim=1)) | (cloud.norms.max() > HUGE)
    return _again(cloud, cloud, nothing, found, doubtful, k, 0.0)


def inside(x: Cloud, y: Cloud, k: int) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " M"]]:
    """Whether each row is no farther from one of the other cloud's than that one's k-th neighbour, for both clouds.

    A squared distance within `TIE` of both squared norms of the radius is a tie, which counts as inside.
    """
    x_radii, y_radii = radii(x, k), radii(y, k)
    x_least, y_least = _screen(x, y, x_radii, y_radii, 1 + SPARE)
    huge = max(x.norms.max(), y.norms.max()) > HUGE
    decided = []
    for a, b, b_radii, least in ((x, y, y_radii, x_least), (y, x, x_radii, y_least)):
        found = _settle(a, b, b_radii, least, 1, TIE)
        doubtful = (found > 0) & (~(least.bounds.amax(dim=1) > 0) | huge)
        decided.append(_again(a, b, b_radii, found, doubtful, 1, TIE) <= 0)
    return decided[0], decided[1]


def _places(count: int, begin: int = 0, step: int | None = None) -> Iterator[slice]:
    step = step or ROWS_AT_ONCE
    for first in range(begin, count, step):
        yield slice(first, min(first + step, count))


def _screen(x: Cloud, y: Cloud, x_less: Values, y_less: Values, keep: int) -> tuple[_Least, _Least]:
    """For each row of x, and of y, the least bounds of squared distance - what is to be taken off for the other row.

    Each pair of blocks is multiplied once, also where x is y, whose rows are not their own neighbours.
    """
    x_least = _Least(len(x.rows), keep)
    y_least = x_least if x is y else _Least(len(y.rows), keep)
    x_below, y_below = x.below(), y.below()
    x_off, y_off = ((less * (1 + 8 * UNIT)).float() for less in (x_less, y_less))
    for i in _places(len(x.rows)):
        a = x.block(i, np.float32)
        for j in _places(len(y.rows), begin=i.start if x is y else 0):
            b = a if x is y and i == j else y.block(j, np.float32)
            bounds = torch.addmm(y_below[j].expand(len(a), -1), a, b.T, alpha=-2).add_(x_below[i, None])
            if x is y and i == j:
                bounds.fill_diagonal_(torch.inf)
            else:
                y_least.take(j, i.start, bounds.T - x_off[i])
            x_least.take(i, j.start, bounds.sub_(y_off[j]))
    return x_least, y_least


def _settle(x: Cloud, y: Cloud, y_less: Values, least: _Least, k: int, tie: float) -> Values:
    """Each row's k-th least squared distance - `y_less` among the pairs of `least`, from differences in float64."""
    found = torch.empty(len(x.rows), dtype=torch.float64)
    for place in _places(len(found), step=max(1, PAIRS_AT_ONCE // least.columns.shape[1])):
        columns = least.columns[place]
        apart = np.subtract(y.rows[columns.numpy()], x.rows[place, None], dtype=np.float64)
        values = torch.from_numpy(apart).square_().sum(dim=2)
        values -= y_less[columns] + tie * (x.norms[place, None] + y.norms[columns])
        values[least.bounds[place].isposinf()] = torch.inf  # fewer rows than are kept
        found[place] = values.kthvalue(k, dim=1).values
    return found


def _again(x: Cloud, y: Cloud, y_less: Values, found: Values, doubtful: Tensor, k: int, tie: float) -> Values:
    """`found` where it is certain, and else the k-th least of all pairs by a float64 product."""
    places: Int64[Tensor, " B"]
    for places in doubtful.nonzero()[:, 0].split(ROWS_AT_ONCE // 2):
        a, a_norms = x.block(places.numpy(), np.float64), x.norms[places] * (1 - tie)
        nearest = torch.full((len(a), k), torch.inf, dtype=torch.float64)
        for j in _places(len(y.rows)):
            off = y.norms[j] * (1 - tie) - y_less[j]
            values = torch.addmm(off.expand(len(a), -1), a, y.block(j, np.float64).T, alpha=-2).add_(a_norms[:, None])
            if x is y:
                values[places[:, None] == torch.arange(j.start, j.stop)] = torch.inf
            nearest = torch.cat([nearest, values], dim=1).topk(k, dim=1, largest=False).values
        found[places] = nearest.amax(dim=1)
    return found
