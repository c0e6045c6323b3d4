"""Set-up of the tests: what they need beyond the program itself, where it is missing. After `make setup`."""

from __future__ import annotations

import os

from scripts import analyser, prepare

NEEDS = (
    # A file system with reflinks on a loop device, for the snapshots that they make short.
    prepare.Need("file systems with reflinks", prepare.program("mkfs.btrfs"), ("btrfs-progs",)),
    # Two network namespaces and a cable between them, for a hand-over between two hosts.
    prepare.Need("networks of one's own", prepare.program("ip"), ("iproute2",)),
    prepare.Need("a judge of our certificates", prepare.program("openssl"), ("openssl",)),
    prepare.Need("file systems that fill up", prepare.program("mkfs.ext4"), ("e2fsprogs",)),
)


def main() -> None:
    """Installs and fetches what is missing, and nothing else."""
    prepare.install_missing(NEEDS)
    if os.environ.get("ANALYZE_MIGRATION"):
        return
    try:
        analyser.provide()
    except analyser.NotFetched as error:
        prepare.say(
            f"WARNING: no QEMU source package: {error}. The tests that let QEMU's analyser read our streams will fail; "
            "ANALYZE_MIGRATION=/path/to/qemu/scripts/analyze-migration.py (QEMU 9 or newer) names one"
        )


if __name__ == "__main__":
    main()
