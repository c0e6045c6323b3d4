"""`lazymem guest NAME DIR`: builds one of the small guests that show and test everything else."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from lazymem.demo import linuxguest
from lazymem.errors import LazymemError, UsageError
from lazymem.vm.guests import GUESTS, build_guest

PROGRAM = "lazymem guest"

_EPILOG = """examples:
  lazymem guest heartbeat .        ticks on its serial line; for lazymem-vm
  lazymem guest pages .            fills its RAM, and checks every page on command; for lazymem-vm
  lazymem guest linux .            the distribution's kernel with busybox and a file in its memory; for QEMU
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Build a small guest into the folder DIR, from source or from the distribution's packages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=[*GUESTS, "linux"])
    parser.add_argument("folder", metavar="DIR", type=Path, help="an existing folder")
    parser.add_argument("--json", action="store_true", help="print the files' paths as one JSON object")
    found = parser.parse_args(arguments)
    try:
        files = build(found.name, found.folder)
    except LazymemError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_code
    if found.json:
        print(json.dumps({what: str(path) for what, path in files.items()}))
    else:
        for what, path in files.items():
            print(f"{what:<8} {path}")
    return 0


def build(name: str, folder: Path) -> dict[str, Path]:
    """The guest's files by what they are: "kernel", and for Linux "initrd" and "append" (a text file).

    Raises:
        UsageError: no such folder, or it cannot be written.
        EnvironmentRefusedError: what it is built from is not installed.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: make it first")
    if name != "linux":
        return {"kernel": build_guest(name, folder)}
    try:
        guest = linuxguest.build(folder)
        kernel, append = folder / "vmlinuz", folder / "append"
        shutil.copyfile(guest.kernel, kernel)
        append.write_text(guest.append)
        initrd = guest.initrd.rename(folder / "initrd")
    except OSError as error:
        raise UsageError(f"cannot build the Linux guest in {folder}: {error.strerror}") from error
    return {"kernel": kernel, "initrd": initrd, "append": append}


if __name__ == "__main__":
    sys.exit(main())
