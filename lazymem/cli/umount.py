"""`lazymem umount MOUNTPOINT`: ends a mount and waits for its daemon; says who holds it, or aborts when told to."""

from __future__ import annotations

import argparse
import sys
import time

from lazymem.errors import BusyError, LazymemError, MountError
from lazymem.fs import holders, mountinfo, session
from lazymem.fs.lock import MountLock

PROGRAM = "lazymem umount"

_EPILOG = """examples:
  lazymem umount /mnt/ram            returns once everything that the guest wrote is stored
  lazymem umount --force /mnt/ram    aborts the connection: a guest that maps the file dies
"""

STORE_WAIT_SECONDS = 60.0
"""For the daemon to store what the guest wrote, after the mount itself is gone."""

LOOK_SECONDS = 2.0
"""Longer than anybody takes who only looks at a mount that answers."""

POLL_SECONDS = 0.02


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="End a lazymem mount.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--force", action="store_true", help="end it although somebody uses it; a mapped guest dies")
    found = parser.parse_args(arguments)
    try:
        end_mount(mountinfo.real_path(found.mountpoint), force=found.force)
    except LazymemError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def end_mount(path: str, *, force: bool) -> None:
    """Unmount `path` and wait for its daemon's end.

    Raises:
        MountError: no lazymem mount there, or no permission.
        BusyError: somebody uses it (and not `force`), or the daemon takes too long.
    """
    mounted = mountinfo.maybe_mount_at(path)
    if mounted is None or not mounted.is_ours:
        raise MountError(f"{path} is not a lazymem mount; 'findmnt -t fuse.lazymem' lists them")
    if force:
        session.abort(mounted.minor)
        session.unmount(path, lazy=True)
    else:
        _unmount(path, mounted.device)
    lock = MountLock(path)
    lock.acquire(STORE_WAIT_SECONDS)
    lock.release()


def _unmount(path: str, device: str) -> None:
    """Who asks for a status, or only lists the folder, keeps a mount busy as long as that lasts, and is not found: so
    it is tried again for a moment where nobody is."""
    give_up = time.monotonic() + LOOK_SECONDS
    while not session.unmount(path):
        found = holders.find_holders(device, path)
        if found or time.monotonic() > give_up:
            who = ", ".join(str(holder) for holder in found) or "somebody"
            raise BusyError(f"{path} is in use: {who}; end that first (--force would kill it)")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
