"""Whole mounts whose server is lost or moves: what the guest sees, what the status says, what an end needs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.fs import checks
from tests.support import skips
from tests.support.badlink import BadLink, Mode
from tests.support.mounts import Stage, command, drop_kernel_cache, wait_until
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

QUIET = ("--prefetch", "none")

TOUCH = """
import mmap, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
sys.stdout.buffer.write(mapped[:4096])
"""
"""A guest that maps the file: it touches the first page and says what is in it."""


def test_the_other_server_goes_on(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Also for a next daemon, which is told of both."""
    first, second = mounts.serve(snapshot.folder), mounts.serve(snapshot.folder)
    mount = mounts.mount(f"{first.address},{second.address}", *QUIET)
    status = mount.status()
    assert status["servers"] == [first.address, second.address]
    assert (status["served_by"], status["server"]) == (first.address, f"{first.address},{second.address}")
    first.kill()
    descriptor = os.open(mount.ram_path, os.O_RDONLY)
    assert os.pread(descriptor, 4096, 5 << 12) == snapshot.page(5)
    assert mount.status()["served_by"] == second.address
    if checks.maybe_no_resend() is None:
        os.kill(mount.pid, signal.SIGKILL)
        assert os.pread(descriptor, 4096, 500 << 12) == snapshot.page(500)
        assert mount.status()["served_by"] == second.address
        assert mount.status()["pid"] != mount.pid
    os.close(descriptor)
    shown = subprocess.run(
        command("lazymem.cli.main", "status", mount.path), capture_output=True, text=True, check=True, timeout=60
    )
    assert f"{second.address}: connected" in shown.stdout


def test_the_filling_process_goes_on_at_the_other_server(mounts: Stage) -> None:
    big = make_snapshot(mounts.folder / "big", pages=8192, seed=3)
    first, second = mounts.serve(big.folder), mounts.serve(big.folder)
    with BadLink(first.address) as link:
        link.delay_seconds = 0.002  # so that it is not done before
        mount = mounts.mount(f"{link.address},{second.address}")
        wait_until(lambda: mount.status()["pages_held"] > 0, "something came")
        link.mode = Mode.REFUSED
        link.reset()
        wait_until(lambda: mount.status()["pages_held"] == big.pages, "all is held")
        assert link.accepted >= 2
        drop_kernel_cache(mount.ram_path)
        assert mount.ram_path.read_bytes() == big.ram
        # All of it is here: what demands goes to the other server by itself, and nobody waits for that.
        wait_until(lambda: mount.status()["served_by"] == second.address, "the daemon's own way to the other one")
        assert "the filling process ended early" not in mount.log.read_text()


def test_another_snapshot_at_the_address_is_waited_out(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    other = make_snapshot(tmp_path / "o" / "snap", pages=1024, seed=8)
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    port = server.port
    server.kill()
    reader = subprocess.Popen([sys.executable, "-c", TOUCH, str(mount.ram_path)], stdout=subprocess.PIPE)
    try:
        wait_until(lambda: mount.status()["demand_faults"] > 0, "somebody waits")
        wrong = mounts.serve(other.folder, port=port)
        wait_until(lambda: "publishes another snapshot" in mount.status()["connection"], "it is refused")
        wrong.kill()
        mounts.serve(snapshot.folder, port=port)
        assert reader.communicate(timeout=60)[0] == snapshot.page(0)
    finally:
        reader.kill()
        reader.communicate()


def test_what_a_deadline_does_to_a_guest(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """SIGBUS, once; whoever comes after the server's return reads as if nothing had been."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET, "--deadline", "0.3")
    port = server.port
    server.kill()
    touch = [sys.executable, "-c", TOUCH, str(mount.ram_path)]
    done = subprocess.run(touch, capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS, done
    assert "did not come within 0.3 s" in mount.log.read_text()
    mounts.serve(snapshot.folder, port=port)
    wait_until(lambda: mount.status()["connected"], "the server is found again")

    def is_right() -> bool:
        """On a busy machine a page may be late once more, and then that is what its reader died of."""
        late = mount.log.read_text().count("did not come within")
        done = subprocess.run(touch, capture_output=True, check=False, timeout=60)
        if done.returncode == -signal.SIGBUS:
            assert mount.log.read_text().count("did not come within") > late, mount.log.read_text()
            return False
        assert (done.returncode, done.stdout) == (0, snapshot.page(0)), done
        return True

    wait_until(is_right, "a page that comes in time")


@skips.needs_resend
def test_an_unmount_needs_no_server(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Not even of a daemon that begins with nothing in its cache."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    for folder in mounts.cache.iterdir():
        if not folder.name.startswith("run-"):  # which has what the guest wrote
            shutil.rmtree(folder)
    os.kill(mount.pid, signal.SIGKILL)
    ended = subprocess.run(
        command("lazymem.cli.main", "umount", mount.path), capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
