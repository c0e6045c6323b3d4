"""The wait histogram: quantiles within a bucket of the truth."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lazymem.fetch.stats import WaitHistogram


def test_nothing_counted_has_no_quantile() -> None:
    assert WaitHistogram().quantile(0.5) is None


@given(st.lists(st.floats(2e-6, 3600), min_size=1), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_quantile_is_the_upper_edge_of_the_right_bucket(waits: list[float], share: float) -> None:
    histogram = WaitHistogram()
    for wait in waits:
        histogram.add(wait)
    true = sorted(waits)[max(1, math.ceil(share * len(waits))) - 1]
    found = histogram.quantile(share)
    assert found is not None
    assert true * 0.999999 <= found <= true * 2 ** (1 / 4) * 1.000001


def test_absurd_waits_are_counted_too() -> None:
    histogram = WaitHistogram()
    for wait in (0.0, -1.0, 1e-9, 1e9):
        histogram.add(wait)
    assert histogram.total == 4
    assert histogram.quantile(0.5) is not None
