"""A guest that runs from a mount of a snapshot is handed on while pages are missing, and its mount has a --deadline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.handover import pair
from tests.support.mounts import Stage
from tests.support.snapshotguest import missing_pages, running_on, saved, stalled
from tests.support.vmprocess import connected, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

RAM_BYTES = 8 << 20
TOO_LATE = "the server cannot read the snapshot: Connection timed out"


def test_a_page_that_misses_its_deadline_is_waited_for_at_the_destination(
    mounts: Stage, sockets: Path, tmp_path: Path
) -> None:
    """The source cannot read it in time, says so, and is asked again: an error there is none to the guest here."""
    server = mounts.serve(saved(tmp_path, sockets, RAM_BYTES, "first"))
    # Seconds: as long as a busy machine may take for a page that the guest needs before the server is stalled.
    mount = mounts.mount(server.address, "--prefetch", "none", "--deadline", "4", name="from")
    with running_on(mount, sockets) as vm, pair(tmp_path, vm.monitor, "-serial", f"unix:{sockets}/there") as two:
        assert vm.serial.ask("rewrite 5 1", "rewrote") == "5"
        with stalled(server):
            assert missing_pages(mount) > RAM_BYTES >> 13
            two.begin()
            assert two.wait_settled() == (False, True)
            wait_until(lambda: two.send.said().count(TOO_LATE) > 1, "the source to miss a page, and to be asked again")
            assert two.runs() == (False, True)
            assert two.send.code() is two.receive.code() is None
        with connected(sockets / "there") as line:
            assert " bad 0 " in line.ask("verify", "verified")
        assert two.send.wait() == 0, two.tell()
        assert missing_pages(mount) == 0
