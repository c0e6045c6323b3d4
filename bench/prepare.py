"""Set-up of the benchmark: the peers' packages and matplotlib, where they are missing. After `make setup`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from scripts import prepare

ROOT = Path(__file__).resolve().parent.parent

NEEDS = (
    prepare.Need("NBD's server", prepare.program("nbdkit"), ("nbdkit",)),
    prepare.Need("NBD's clients", prepare.program("nbdfuse", "nbdcopy"), ("libnbd-bin",)),
    prepare.Need("an NBD client with a FUSE export", prepare.program("qemu-storage-daemon"), ("qemu-utils",)),
    prepare.Need("a look into the page cache", prepare.program("fincore"), ("util-linux",)),
)


def main() -> None:
    """Installs what is missing, and nothing else."""
    packages = sorted({package for need in NEEDS if not need.there() for package in need.packages})
    if packages:
        prepare.require_apt(packages)
        prepare.apt_install(packages)
        still = [need.purpose for need in NEEDS if not need.there()]
        if still:
            prepare.fail(f"installed {' '.join(packages)}, but still missing: {', '.join(still)}")
    if find_spec("matplotlib") is None:
        prepare.say("installing matplotlib into .venv")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-e", f"{ROOT}[bench]"]
        subprocess.run(pip, check=True)


if __name__ == "__main__":
    main()
