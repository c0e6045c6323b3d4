"""Real mounts: one stage a test, taken down whatever happens."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.cli.forkrequest import SOCKET_VARIABLE
from tests.support.forkservers import ForkServer, fork_server
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


@pytest.fixture
def forker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    """A fork server, which the installed command asks."""
    with fork_server(tmp_path) as server:
        monkeypatch.setenv(SOCKET_VARIABLE, str(server.path))
        yield server
