"""The Nth read of a page server from its disk fails, comes short, or finds the file's end, for every N until none does:
of pages, and of digests.

The mount and the server are real ones. Each time: whoever touches pages gets the right bytes and no error, however long
that takes, and where the server could not answer, the mount's log names what it could not read.
"""

from __future__ import annotations

import errno
import itertools

import pytest

from lazymem.digests import LEAF_PAGES
from tests.support.mountfaults import END, HALF, Control, Kind, Whose, control
from tests.support.mounts import Mounted, stage
from tests.support.patientreader import PatientReaders
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

KINDS = (Kind("disk error", errno.EIO), Kind("half of it", HALF), Kind("the file's end", END))

LEAVES = 48
"""One for each step: with its first page come its digests."""

STEP = (0, 1, 2, 3, 40, 41, 200, 255)
"""Pages of its leaf that a step touches, all at once."""


@pytest.fixture(scope="module", params=[True, False], ids=["hashed", "unhashed"])
def snapshot(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> BuiltSnapshot:
    folder = tmp_path_factory.mktemp("server") / "web"
    return make_snapshot(folder, pages=LEAVES * LEAF_PAGES, seed=7, hashed=request.param)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_a_read_of_the_server_fails(snapshot: BuiltSnapshot, kind: Kind, count: int) -> None:
    folder = snapshot.folder.parent
    with stage(folder) as mounts, control(folder) as faults:
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in faults.environment().items():
                patch.setenv(variable, value)
            server = mounts.serve(snapshot.folder)
        name = f"{kind.name}{count}".replace(" ", "-")
        mounts.cache = folder / f"cache-{name}"
        mount = mounts.mount(server.address, "--prefetch", "none", name=name)
        spared = 0
        for number in itertools.count():
            assert number < LEAVES
            step(mount, faults, snapshot, kind, number, count)
            spared = 0 if faults.failed else spared + 1
            if spared == 3:
                assert number > 3, "hardly any read failed"
                break
        assert server.is_running
        if count > 1 and kind.error != HALF:
            assert named(mount, kind), mount.log.read_text()
        mount.unmount()


def step(mount: Mounted, faults: Control, snapshot: BuiltSnapshot, kind: Kind, number: int, count: int) -> None:
    faults.arm(kind, number, count, Whose.SERVERS)
    first = number * LEAF_PAGES
    found = PatientReaders(mount, [first + page for page in STEP]).finish()
    faults.disarm()
    told = f"failed: {faults.failed or 'nothing'}\n{mount.log.read_text()}"
    for page, data in found.items():
        assert data == snapshot.page(page), f"page {page}; {told}"


def named(mount: Mounted, kind: Kind) -> bool:
    """What a person has to look at."""
    said = mount.log.read_text()
    return ("cannot read the snapshot" if kind.error == errno.EIO else "it was cut while it is served") in said
