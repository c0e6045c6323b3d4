"""The Nth call to the disk or the network fails in the filling process of a real mount, for every N until none fails.

Each time: the daemon lives, and everything is here in the end, brought by one or the other; each byte is right, for
this mount and the next over the same folder.

A few N are taken, LAZYMEM_SWEEP=wide takes all, and also several calls in a row (`make sweep`).
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from lazymem.digests import LEAF_PAGES
from tests.support.mountfaults import KINDS, Control, Whose, control
from tests.support.mounts import Stage, stage, wait_until
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

WIDE = os.environ.get("LAZYMEM_SWEEP") == "wide"

IN_A_ROW = (1, 2, 6) if WIDE else (1,)

SOME = {
    "connection reset": (6,),
    "connection reset behind what was sent": (3,),
    "disk error": (33,),
    "disk full": (20,),
}
"""Where not all are taken."""

LEAVES = 1

ENOUGH = 3
"""So many N of which no call failed, and all have: how many calls a fill makes is not the same each time."""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("fill") / "web", pages=LEAVES * LEAF_PAGES, seed=5)


@pytest.mark.parametrize("count", IN_A_ROW)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_of_the_filling_process_fails(tmp_path: Path, snapshot: BuiltSnapshot, kind: str, count: int) -> None:
    with stage(tmp_path) as mounts, control(tmp_path) as faults:
        address = mounts.serve(snapshot.folder).address
        spared = 0
        for number in itertools.count() if WIDE else SOME[kind]:
            faults.arm(KINDS[kind], number, count, Whose.FILLERS)
            fill_once(mounts, faults, snapshot, address, number)
            assert WIDE or faults.failed
            spared = 0 if faults.failed else spared + 1
            if spared >= ENOUGH:
                assert number > 2 * ENOUGH, "hardly any call failed"
                return


def fill_once(mounts: Stage, faults: Control, snapshot: BuiltSnapshot, address: str, number: int) -> None:
    mounts.cache = mounts.folder / f"cache{number}"
    for name in (f"mnt{number}", f"again{number}"):
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in faults.environment().items():
                patch.setenv(variable, value)
            mount = mounts.mount(address, "--prefetch", "all", name=name)

        def told() -> str:
            return f"failed: {faults.failed or 'nothing'}\n{mount.log.read_text()}"  # noqa: B023  # called at once

        wait_until(lambda: mount.status()["pages_held"] == snapshot.pages, f"all is held; {told()}")  # noqa: B023
        faults.disarm()
        assert mount.status()["pid"] == mount.pid, f"the daemon died; {told()}"
        assert mount.ram_path.read_bytes() == snapshot.ram, told()
        assert "Traceback" not in mount.log.read_text(), told()
        mount.unmount()
