"""The gate's arithmetic: known bounds of t, rates of error by simulation, and what the calibration promises."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dod_pipeline import paired
from dod_pipeline.paired import Look

FINITE = st.floats(-1e3, 1e3)
EACH, TOGETHER = 0.05, 0.05 / 6  # levels of a look


def last(found: Iterator[Look]) -> Look:
    *_, look = found
    return look


def judge(
    differences: Sequence[float],
    *,
    calibrated: float = 1.0,
    incumbent: float = 10.0,
    least: int = 3,
    most: int = 8,
    level: float = EACH,
) -> Look:
    """The verdict on a candidate that differs so from an incumbent that has the same FID in every block."""
    return last(
        paired.looks(
            lambda block: incumbent + differences[block],
            lambda block: incumbent,
            calibrated=calibrated,
            min_blocks=least,
            max_blocks=most,
            level=level,
        )
    )


@pytest.mark.parametrize(
    "level, freedom, value",  # printed tables of t
    [(0.05, 2, 2.919986), (0.05, 5, 2.015048), (0.05, 7, 1.894579), (0.01, 2, 6.964557), (0.01, 10, 2.763769)],
)
def test_quantiles_are_those_of_the_tables(level: float, freedom: int, value: float):
    assert paired.quantile(level, freedom) == pytest.approx(value, abs=1e-6)


def test_bounds_of_three_blocks_are_the_textbook_s():
    # mean 2, standard deviation 1, so the standard error is 1 / sqrt(3)
    lower, upper = paired.bounds([1.0, 2.0, 3.0], 0.05)
    assert (lower, upper) == pytest.approx((2 - 2.919986 / math.sqrt(3), 2 + 2.919986 / math.sqrt(3)), abs=1e-6)


@given(st.lists(FINITE, min_size=3, max_size=8), FINITE)
def test_bounds_move_with_the_differences_and_turn_with_their_sign(values: list[float], shift: float):
    lower, upper = paired.bounds(values, 0.05)
    assert paired.bounds([value + shift for value in values], 0.05) == pytest.approx(
        (lower + shift, upper + shift), abs=1e-8
    )
    assert paired.bounds([-value for value in values], 0.05) == pytest.approx((-upper, -lower), abs=1e-9)


def test_one_look_is_the_rule_as_it_is_written():
    look = judge([1.0, 2.0, 3.0], most=3)
    assert (look.lower, look.upper) == pytest.approx(paired.bounds([1.0, 2.0, 3.0], 0.05))


def test_a_candidate_that_is_clearly_worse_fails_at_the_first_look():
    look = judge([3.0, 3.1, 2.9])
    assert (look.ruling, len(look.candidate), look.lower > 1) == ("FAIL", 3, True)


def test_a_candidate_that_is_clearly_not_worse_passes_and_a_better_one_too():
    assert judge([0.0, 0.1, -0.1]).ruling == "PASS"
    assert judge([-5.0, -5.1, -4.9]).ruling == "PASS"


def test_the_incumbent_against_itself_passes():
    look = judge([0.0, 0.0, 0.0], calibrated=0.0)
    assert (look.ruling, look.lower, look.upper) == ("PASS", 0.0, 0.0)


def test_blocks_are_drawn_until_it_is_decided_and_no_more():
    drawn: list[int] = []

    def candidate(block: int) -> float:
        drawn.append(block)
        return 10.0 + [0.0, 3.0, 1.5, 0.2, 0.1, 0.0, 0.1, 0.0][block]

    found = list(
        paired.looks(candidate, lambda block: 10.0, calibrated=3.0, min_blocks=3, max_blocks=8, level=TOGETHER)
    )
    assert [look.ruling for look in found] == ["INCONCLUSIVE"] * (len(found) - 1) + ["PASS"]
    assert [len(look.candidate) for look in found] == list(range(3, len(drawn) + 1)) and 3 < len(drawn) < 8
    assert drawn == list(range(len(drawn)))


def test_what_stays_undecided_is_inconclusive():
    look = judge([0.0, 2.0] * 4)
    assert (look.ruling, len(look.candidate)) == ("INCONCLUSIVE", 8)
    assert look.lower < 1 < look.upper


@pytest.mark.parametrize("incumbent, tolerance", [(10.0, 0.5), (100.0, 2.0)])
def test_the_tolerance_is_the_larger_of_the_calibrated_one_and_two_percent(incumbent: float, tolerance: float):
    assert judge([0.0] * 3, calibrated=0.5, incumbent=incumbent).tolerance == pytest.approx(tolerance, rel=1e-12)


def rates(*, mean: float, level: float, trials: int = 20_000) -> dict[str, float]:
    """How often each verdict is given where d ~ N(mean, 1), the tolerance is 0, and looks are taken at 3 to 8 blocks.

    The same sequence as `looks`, on arrays.
    """
    drawn = np.random.default_rng(0).normal(mean, 1, (trials, 8))
    ruled = np.full(trials, "INCONCLUSIVE")
    for count in range(3, 9):
        values = drawn[:, :count]
        reach = paired.quantile(level, count - 1) * values.std(axis=1, ddof=1) / math.sqrt(count)
        open_ = ruled == "INCONCLUSIVE"
        ruled[open_ & (values.mean(axis=1) - reach > 0)] = "FAIL"
        ruled[open_ & (values.mean(axis=1) + reach < 0)] = "PASS"
    return {name: float((ruled == name).mean()) for name in ("PASS", "FAIL", "INCONCLUSIVE")}


def test_the_simulation_rules_as_the_gate_does():
    rng, level = np.random.default_rng(1), TOGETHER
    for values in rng.normal(1, 1, (40, 8)):
        look = judge(list(values), calibrated=1.0, incumbent=0.0, level=level)
        counts = [paired.rule(list(values[:n]), tolerance=1.0, level=level)[0] for n in range(3, 9)]
        decided = [ruling for ruling in counts if ruling != "INCONCLUSIVE"]
        assert look.ruling == (decided[0] if decided else "INCONCLUSIVE")


def test_repeated_looks_at_five_percent_would_err_in_thirteen():
    found = rates(mean=0.0, level=EACH)
    assert found["FAIL"] == pytest.approx(0.129, abs=0.01)
    assert found["PASS"] == pytest.approx(0.129, abs=0.01)


def test_divided_over_the_looks_either_error_stays_below_five_percent():
    found = rates(mean=0.0, level=TOGETHER)
    assert found["FAIL"] == pytest.approx(0.028, abs=0.005)
    assert found["PASS"] == pytest.approx(0.028, abs=0.005)


def test_the_gate_sees_a_difference_of_three_standard_deviations():
    assert rates(mean=3.0, level=TOGETHER)["FAIL"] > 0.99
    assert rates(mean=-3.0, level=TOGETHER)["PASS"] > 0.99


@pytest.mark.parametrize("retrains", [3, 6])
def test_a_fresh_retrain_is_worse_than_a_fresh_incumbent_by_the_tolerance_in_five_percent(retrains: int):
    drawn = np.random.default_rng(2).normal(30, 4, (8_000, retrains + 2))
    worse = 0
    for *calibrated, candidate, incumbent in drawn.tolist():
        worse += candidate - incumbent > paired.calibrated_tolerance(calibrated)[0]
    assert worse / len(drawn) == pytest.approx(0.05, abs=0.008)


def test_the_calibrated_tolerance_is_as_its_formula_says():
    tolerance, spread = paired.calibrated_tolerance([1.0, 2.0, 3.0])
    assert spread == 1.0
    assert tolerance == pytest.approx(2.919986 * math.sqrt(2), abs=1e-6)


def test_two_retrains_are_too_few():
    with pytest.raises(ValueError, match="2 retrains: give at least 3"):
        paired.calibrated_tolerance([1.0, 2.0])
