"""Snapshots for the store's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.snapshots import BuiltSnapshot, make_snapshot


@pytest.fixture(params=[True, False], ids=["hashed", "unhashed"])
def snapshot(request: pytest.FixtureRequest, tmp_path: Path) -> BuiltSnapshot:
    """600 pages (three leaves, the last one short), hashed and not."""
    return make_snapshot(tmp_path / "snapshot", pages=600, seed=3, hashed=request.param)


@pytest.fixture
def hashed(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "hashed", pages=600, seed=4)
