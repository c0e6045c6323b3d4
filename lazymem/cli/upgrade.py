"""`lazymem mount --upgrade MOUNTPOINT`: another daemon, of the version that is installed now, goes on with a mount.

The mount's daemon is asked through the mount itself (an extended attribute of its root), so it is the right one, and
only the mount's owner may. Its supervisor starts the next daemon, has it load all that it needs, and then lets the
present one end; a version that does not even start changes nothing. Under systemd the unit's own command is started.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from typing import Any

from lazymem.cli.status import read_status
from lazymem.errors import EnvironmentRefusedError, LazymemError, MountError
from lazymem.fs import mountinfo

PROGRAM = "lazymem mount --upgrade"

ATTRIBUTE = "user.lazymem.upgrade"

LOOK_SECONDS = 0.01

WAIT_SECONDS = 120.0
"""The supervisor gives a daemon a minute to load, and tries several times; the guest is served meanwhile."""

_EPILOG = """examples:
  lazymem mount --upgrade /mnt/ram          after the installation of another version, say
  lazymem status /mnt/ram                   which version serves, how often it was restarted
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="lazymem mount",
        description="Have a daemon of the installed version go on with a mount. The guest waits for a moment.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--upgrade", metavar="MOUNTPOINT", required=True, help="a lazymem mount")
    found = parser.parse_args(arguments)
    try:
        print(upgrade(found.upgrade))
    except LazymemError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; 'lazymem status' shows which daemon serves", file=sys.stderr)
        return 130
    return 0


def upgrade(mountpoint: str) -> str:
    """Swap the daemon; what happened, for people.

    Raises:
        MountError: no lazymem mount there, or no permission.
        EnvironmentRefusedError: nobody can start a next daemon, or it does not start.
    """
    before = read_status(mountpoint)
    path = mountinfo.real_path(mountpoint)
    try:
        os.setxattr(path, ATTRIBUTE, os.fsencode(sys.executable))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EPERM):  # EPERM: a daemon that does not know it yet
            raise EnvironmentRefusedError(
                f"the daemon of {path} has nobody who could start a next one ({_why(before)}): unmount and mount again"
            ) from error
        raise MountError(f"cannot ask the daemon of {path}: {error.strerror}") from error
    after, longest = _wait_for_another(mountpoint, before)
    return (
        f"{path}: daemon {before['pid']} (version {before.get('version', 'unknown')}) -> "
        f"{after['pid']} (version {after['version']}); the longest wait for an answer was {longest * 1000:.0f} ms"
    )


def _why(status: dict[str, Any]) -> str:
    survival = status.get("survival")
    if survival is None:
        return "it is of an older version"
    return str(survival["hindered_by"] or "it was started without a supervisor")


def _wait_for_another(mountpoint: str, before: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The next daemon's status, and the longest time that an answer took, in seconds."""
    give_up = time.monotonic() + WAIT_SECONDS
    longest = 0.0
    while time.monotonic() < give_up:
        begun = time.monotonic()
        status = read_status(mountpoint)
        longest = max(longest, time.monotonic() - begun)
        if status["pid"] != before["pid"]:
            return status, longest
        if status["survival"]["upgrade_refused"]:
            raise EnvironmentRefusedError(f"daemon {status['pid']} goes on: {status['survival']['upgrade_refused']}")
        time.sleep(LOOK_SECONDS)
    raise EnvironmentRefusedError(f"after {WAIT_SECONDS:g} s daemon {before['pid']} still serves; its log says more")


if __name__ == "__main__":
    sys.exit(main())
