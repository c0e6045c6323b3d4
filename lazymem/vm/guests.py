"""The two guests that come as source: `heartbeat` and `pages`, assembled when they are wanted.

What they do and how they are talked to stands at the top of their sources in `guest_src/`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from lazymem.errors import EnvironmentRefusedError, UsageError

GUESTS = ("heartbeat", "pages")

SOURCES = Path(__file__).parent / "guest_src"

_TOOL_SECONDS = 60
"""Far more than an assembler takes for a page of source, on the slowest machine."""


def build_guest(name: str, folder: Path) -> Path:
    """Assemble guest `name` into the file `folder`/`name`, an ELF64 kernel for ``-kernel``; returns its path.

    The folder must be there. The file is whole or as it was before; building it again is cheap (0.1 s).

    Raises:
        UsageError: no guest of that name, or the folder cannot be written.
        EnvironmentRefusedError: no binutils, or none for x86-64.
    """
    if name not in GUESTS:
        raise UsageError(f"no guest named {name!r}; there are {', '.join(GUESTS)}")
    target = folder / name
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch_name:
            scratch = Path(scratch_name)
            _run("as", "--64", "-I", str(SOURCES), "-o", str(scratch / "o"), str(SOURCES / f"{name}.S"))
            link = ("-m", "elf_x86_64", "-nostdlib", "-static", "-z", "max-page-size=4096")
            _run("ld", *link, "-T", str(SOURCES / "guest.ld"), "-o", str(scratch / name), str(scratch / "o"))
            (scratch / name).replace(target)
    except OSError as error:
        raise UsageError(f"cannot build guest {name} in {folder}: {error.strerror}") from error
    return target


def _run(tool: str, *arguments: str) -> None:
    program = shutil.which(tool)
    if program is None:
        raise EnvironmentRefusedError(f"'{tool}' is missing, which assembles the guests: install binutils")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentRefusedError(f"'{tool}' cannot build the guests (is it binutils for x86-64?): {complaint}")
