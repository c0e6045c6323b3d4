"""Which tests may be skipped: those for what this machine really has not, which is looked up for each of them.

All else that a test needs `make test` installs, or something stands in for it (`stood_in`), so its absence is an error.
A skip's reason begins with a key of `MISSING`. The run ends with a list of what was shown by a stand-in, and why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import pytest

from lazymem.cli.landlock import landlock_version
from lazymem.fs import checks
from lazymem.fs.faultcounter import may_count
from tests.support import disks, privileges

ROOT = "no root and no sudo without a password"
OWN_ROOT = "no root, no sudo without a password, no user namespaces"
OTHERS = "root here is a user namespace's, which knows nobody else"
NAMESPACES = "no user namespaces"
MOUNTS = "root may not mount or make control groups"
DISK = "no file system lets go of what it caches"
LANDLOCK = "the kernel has no Landlock"
RESEND = "the kernel ends a mount with its daemon"
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage"
FAULTS = "the kernel tells nobody of page faults, or reads no huge pages"


def _counts_faults() -> bool:
    """Linux 5.18 reads a huge page around a touch."""
    return may_count() and checks.kernel_version(os.uname().release) >= (5, 18) and os.path.isdir(_HUGE_PAGES)


MISSING: dict[str, Callable[[], bool]] = {
    OWN_ROOT: lambda: privileges.maybe_as_own_root() is None,
    ROOT: lambda: privileges.maybe_as_root() is None,
    OTHERS: lambda: not privileges.root_may_become_nobody(),
    NAMESPACES: lambda: not privileges.user_namespaces(),
    MOUNTS: lambda: not privileges.root_may_mount(),
    DISK: lambda: disks.maybe_place() is None,
    LANDLOCK: lambda: not landlock_version(),
    RESEND: lambda: checks.maybe_no_resend() is not None,
    FAULTS: lambda: not _counts_faults(),
}
"""What may be missing, and whether it is."""

needs_resend = pytest.mark.skipif(checks.maybe_no_resend() is not None, reason=f"{RESEND}: {checks.maybe_no_resend()}")
"""For tests of what comes after a daemon's death: before Linux 6.9 that is the mount's end, as the command says."""

needs_fault_counts = pytest.mark.skipif(not _counts_faults(), reason=f"{FAULTS}: see perf_event_open(2)")

_STAND_IN = "stand-in"


def skip_without(what: str, why: str = "") -> NoReturn:
    """Skips the test that runs: `what` is a key of `MISSING`."""
    pytest.skip(f"{what}: {why}")


def _may_be(reason: str) -> bool:
    return any(reason.startswith(f"{what}: ") and is_missing() for what, is_missing in MISSING.items())


def judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a failure of a skip that may not be."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not _may_be(reason):
        report.outcome = "failed"
        report.longrepr = f"it may not be skipped (which may be: tests/support/skips.py): {reason}"


def stood_in(test: pytest.Item, what: str) -> None:
    """Something was shown by what stood in its place; `what` says which, and why."""
    test.user_properties.append((_STAND_IN, what))


def stood_in_elsewhere(test: pytest.Item, output: str) -> None:
    """As another run of pytest told at its end."""
    for what in re.findall(rf"^{_STAND_IN}: (.*)$", output, re.MULTILINE):
        stood_in(test, what)


def stand_ins(reports: Iterable[Any]) -> list[str]:
    """A line each."""
    found = (value for report in reports for name, value in getattr(report, "user_properties", ()) if name == _STAND_IN)
    return [f"{_STAND_IN}: {text}" for text in dict.fromkeys(found)]
