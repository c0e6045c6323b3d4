"""The tests' own stream reader, on a stream that a real QEMU wrote: the reader judges our writer, QEMU judges it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import ram_left_out, save_device_state
from tests.support.streamreader import read_stream

RAM_BYTES = 32 << 20


@pytest.fixture
def qemu_monitor(tmp_path: Path) -> Iterator[Path]:
    """A QEMU without a guest in it, stopped at its first instruction; its monitor's socket."""
    (tmp_path / "ram").touch()
    os.truncate(tmp_path / "ram", RAM_BYTES)
    backend = f"memory-backend-file,id=pc.ram,size={RAM_BYTES},mem-path={tmp_path}/ram,share=on"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-S", "-display", "none", "-m", "32M", "-object", backend]
    command += ["-machine", "pc,memory-backend=pc.ram", "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=on"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            while not (tmp_path / "qmp").exists():
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.01)
            yield tmp_path / "qmp"
        finally:
            process.kill()


@pytest.mark.system
def test_it_reads_a_real_qemus_stream(qemu_monitor: Path, tmp_path: Path) -> None:
    with QmpClient(qemu_monitor) as qmp, ram_left_out(qmp):
        save_device_state(qmp, qemu_monitor, tmp_path / "vmstate")
    stream = read_stream((tmp_path / "vmstate").read_bytes())
    assert stream.machine.startswith("pc-i440fx-")
    assert stream.capabilities == ["x-ignore-shared"]
    assert stream.blocks["pc.ram"] == RAM_BYTES
    assert stream.pages_of("pc.ram") == 0
    assert stream.pages_of("pc.bios") >= stream.blocks["pc.bios"] // 4096
    # The reset vector: a far jump at the top of the firmware.
    assert stream.memory("pc.bios")[-16] == 0xEA
    assert {"cpu", "i8259", "i8254", "globalstate"} <= {section.name for section in stream.devices}
    assert stream.device("globalstate").fields["size"] == len("prelaunch") + 1
