"""Real mounts: one stage a test, taken down whatever happens."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import Stage, stage
from tests.support.snapshots import BuiltSnapshot, make_snapshot


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path) as made:
        yield made


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    """4 MiB of RAM, hashed, with a vmstate."""
    return make_snapshot(tmp_path / "snap", pages=1024, seed=7)
