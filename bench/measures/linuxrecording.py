"""The working set that `lazymem-recorded` begins with: recorded in a first run of the same jobs, which nobody times."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.images import Image
from bench.lazymemways import RECORDED_FOLDER, mount_lazymem, serve_lazymem
from bench.links import LINKS, through
from bench.way import WayError
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import started, take_over
from lazymem.snapshot.manifest import MANIFEST_NAME, parse
from lazymem.snapshot.workingset import WORKING_SET_NAME

JOB_SECONDS = 300.0


def give_recording(image: Image, jobs: tuple[str, ...], folder: Path) -> None:
    """Put the set of these jobs where `serve_recorded` has it, below `folder`. Recorded once, over loopback."""
    learned = folder / RECORDED_FOLDER
    learned.mkdir()
    identity = parse((image.folder / MANIFEST_NAME).read_bytes()).identity
    (learned / f"{identity.hex()}.{WORKING_SET_NAME}").write_bytes(_recorded(image, jobs))


@cache
def _recorded(image: Image, jobs: tuple[str, ...]) -> bytes:
    with TemporaryDirectory(prefix="lazymem-bench-") as name:
        folder = Path(name)
        target = folder / "recorded"
        image.warm()
        mount_it = mount_lazymem("--prefetch", "all", "--record", str(target), "--record-seconds", str(JOB_SECONDS))
        with (
            serve_lazymem(image, folder) as server,
            through(LINKS["loopback"], server.address) as seen,
            mount_it(seen, image, folder) as mount,
        ):
            options = QemuOptions(mount.ram, image.ram_bytes, folder / "qmp", folder / "serial", incoming="defer")
            with started(options, folder / "qemu.log") as qemu:
                with qemu.open_monitor() as qmp:
                    take_over(qmp, mount.ram.parent / "vmstate", JOB_SECONDS)
                for job in jobs:
                    qemu.serial.ask(job, job.split()[0], JOB_SECONDS)
        if not target.exists():
            raise WayError("nothing was recorded")
        return target.read_bytes()
