"""A host as `lazymem doctor` looks at it, and what it says of it: records only."""

from __future__ import annotations

import enum
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct, field

from lazymem.fs import checks
from lazymem.fs.faultcounter import may_count


class State(enum.Enum):
    OK = "ok"
    LACKING = "lacking"
    """lazymem works, but worse."""
    MISSING = "missing"
    """Nothing can be mounted here."""


class Finding(Struct, frozen=True):
    """`detail`: what was found. `mend`: what to do about it, where something is to be done."""

    name: str
    state: State
    detail: str
    mend: str = ""


def _effective_capabilities() -> int:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 16) if found else 0


class Host(Struct, frozen=True):
    """The machine that is looked at, and as whom."""

    root: Path = Path("/")
    release: str = field(default_factory=lambda: os.uname().release)
    uid: int = field(default_factory=os.geteuid)
    capabilities: int = field(default_factory=_effective_capabilities)
    which: Callable[[str], str | None] = shutil.which
    may_count_faults: Callable[[], bool] = may_count
    descriptors: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    """As `file_bytes` and `locked_bytes` the soft limit, -1 for none: nothing of ours raises it."""
    file_bytes: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    locked_bytes: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])

    @property
    def version(self) -> tuple[int, int]:
        return checks.kernel_version(self.release)

    def can(self, capability: int) -> bool:
        return bool(self.capabilities >> capability & 1)

    def text(self, path: str) -> str:
        """A file's content without white space at its ends; empty where there is none."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""
