"""A mount's start is imports: what is loaded in the moment in which the command says that the mount answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.mounts import WAIT_SECONDS, Stage
from tests.support.snapshots import BuiltSnapshot

NEVER = {"cryptography", "rich", "pygments", "unicorn", "asyncio", "multiprocessing", "sdnotify", "http", "xml", "ssl"}
"""For a terminal, another program, a service manager, TLS that nobody asked for."""

METADATA = {"importlib.metadata", "email.message", "zipfile"}
"""pyfuse3 would read its own version with these."""

MOUNT = """
import sys
from lazymem.cli import mount
from lazymem.cli.background import Announcer

def ready(self, notices=()):
    import json
    with open({file!r}, "w") as file:
        json.dump(sorted(sys.modules), file)
    import os, signal
    os.kill(os.getpid(), signal.SIGTERM)

Announcer.ready = ready
sys.exit(mount.main(sys.argv[1:]))
"""


def test_a_mount_is_ready_without_what_it_needs_later_or_never(
    snapshot: BuiltSnapshot, mounts: Stage, tmp_path: Path
) -> None:
    """A real mount, in front; in that moment it writes down what is loaded, and wishes to end."""
    (tmp_path / "mnt").mkdir()
    file = tmp_path / "modules"
    words = (mounts.serve(snapshot.folder).address, tmp_path / "mnt", "--cache", tmp_path / "cache", "--foreground")
    done = subprocess.run(
        [sys.executable, "-c", MOUNT.format(file=str(file)), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    found = set(json.loads(file.read_text()))
    assert {"trio", "pyfuse3"} <= found, "they serve the mount"
    assert not found & (NEVER | METADATA)


def test_a_mounts_supervisor_has_loaded_neither_event_loop_nor_fuse_library(
    snapshot: BuiltSnapshot, mounts: Stage
) -> None:
    """It is forked before its daemon loads them."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address)
    daemons, supervisors = (
        Path(f"/proc/{pid}/maps").read_text() for pid in (mount.pid, mount.status()["survival"]["supervisor_pid"])
    )
    assert "pyfuse3" in daemons
    assert "_contextvars" in daemons, "trio brings it"
    assert "pyfuse3" not in supervisors
    assert "_contextvars" not in supervisors
