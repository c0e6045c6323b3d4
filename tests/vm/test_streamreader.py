"""The tests' own stream reader, on a stream that a real QEMU wrote: the reader judges our writer, QEMU judges it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.demo.processes import child, open_monitor
from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import ram_left_out, save_device_state
from tests.support.streamreader import read_stream

RAM_BYTES = 32 << 20


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[QmpClient]:
    """Of a QEMU without a guest in it, stopped at its first instruction."""
    (tmp_path / "ram").touch()
    os.truncate(tmp_path / "ram", RAM_BYTES)
    backend = f"memory-backend-file,id=pc.ram,size={RAM_BYTES},mem-path={tmp_path}/ram,share=on"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-S", "-display", "none", "-m", "32M", "-object", backend]
    command += ["-machine", "pc,memory-backend=pc.ram", "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=on"]
    # QEMU listens a moment after its socket has its name.
    log = tmp_path / "log"
    with child(command, log) as process, open_monitor(tmp_path / "qmp", process, log) as qmp:
        yield qmp


@pytest.mark.system
def test_it_reads_a_real_qemus_stream(qmp: QmpClient, tmp_path: Path) -> None:
    with ram_left_out(qmp):
        save_device_state(qmp, tmp_path / "qmp", tmp_path / "vmstate")
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
