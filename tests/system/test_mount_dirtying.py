"""A guest that dirties more than its memory control group may hold: it is not killed, it goes on, its bytes are right.

How long it stands still is the benchmark's to judge (docs/performance.md). Where nobody may make a group, the guest's
process stands in for its kernel: it stores and drops its memory itself whenever it has dirtied so much.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.memorygroup import memory_group
from lazymem.fs.session import MAX_READ_BYTES
from lazymem.pages import PAGE_SIZE
from tests.support import dirtier, skips
from tests.support.mounts import Stage, drop_kernel_cache

pytestmark = [
    pytest.mark.system,
    pytest.mark.needs_root("memory control groups are its own to make", else_in_place=True),
]

MIB = 1 << 20
RAM_BYTES = 96 * MIB
LIMIT_BYTES = 32 * MIB
SECONDS = 3


@pytest.fixture
def address(mounts: Stage) -> str:
    """A server with RAM that is all zeros."""
    folder = mounts.folder / "zeros"
    folder.mkdir()
    with open(folder / "pc.ram", "wb") as file:
        file.truncate(RAM_BYTES)
    return mounts.serve(folder).address


def _dirty(command: list[str]) -> int:
    """Passes that a guest made over all of its RAM."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"it ended with {done.returncode}: {done.stderr}"
    passes, pages, _, _ = done.stdout.split()
    assert int(pages) == RAM_BYTES // PAGE_SIZE
    return int(passes)


def test_a_guest_larger_than_its_memory_group(
    mounts: Stage, address: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    state = ("--prefetch", "none", "--state", tmp_path / "state")
    mount = mounts.mount(address, *state)
    command = [sys.executable, dirtier.__file__, str(mount.ram_path), str(SECONDS)]
    with memory_group("lazymem-test") as group:
        if isinstance(group, str):
            skips.stood_in(request.node, f"a guest that drops its own memory, for a memory control group: {group}")
            passes = _dirty([*command, str(LIMIT_BYTES)])
            reads = RAM_BYTES // MAX_READ_BYTES  # of a pass that finds nothing of the one before
            assert mount.requests() - reads >= (passes - 1) * reads / 2, "it was short of memory"
        else:
            group.limit(LIMIT_BYTES)
            passes = _dirty(group.command(*command))
            assert group.limit_hits > 0, "it was short of memory"
            assert group.kills == 0
    expected = dirtier.stamp(passes, RAM_BYTES // PAGE_SIZE)
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes()[::PAGE_SIZE] == expected
    mount.unmount()
    again = mounts.mount(address, *state)
    found = again.ram_path.read_bytes()
    assert found[::PAGE_SIZE] == expected
    assert found.count(0) == RAM_BYTES - len(expected), "nothing else was written"
