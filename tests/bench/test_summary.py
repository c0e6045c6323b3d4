"""Medians, spreads, quantiles, ratios."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.summary import Summary, quantile, ratio, summarize


def test_a_summary_is_median_and_ends() -> None:
    assert summarize([3.0, 1.0, 2.0]) == Summary(2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError, match="nothing was measured"):
        summarize([])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 51), (0.99, 100), (1.0, 100)])
def test_quantiles_are_values_that_occurred(share: float, expected: int) -> None:
    assert quantile(list(range(1, 101)), share) == expected


def test_a_quantile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_rounds_that_ran_side_by_side_are_compared_in_pairs() -> None:
    # Twice as slow a machine in the second round changes both, and the ratio not at all.
    assert ratio([1.0, 2.0], [2.0, 4.0]) == Summary(0.5, 0.5, 0.5, 2)


def test_unequal_numbers_of_rounds_give_the_widest_spread() -> None:
    assert ratio([1.0, 3.0], [2.0]) == Summary(1.0, 0.5, 1.5, 1)


@pytest.mark.parametrize(("ours", "others"), [([], [1.0]), ([1.0], []), ([1.0], [0.0])])
def test_there_is_no_ratio_to_nothing(ours: list[float], others: list[float]) -> None:
    assert ratio(ours, others) is None


@given(st.lists(st.floats(0.001, 1000), min_size=1), st.floats(0, 1))
def test_a_quantile_lies_between_the_ends(values: list[float], share: float) -> None:
    ordered = sorted(values)
    assert ordered[0] <= quantile(ordered, share) <= ordered[-1]
