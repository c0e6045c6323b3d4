"""A machine for the monitor and the migration: RAM blocks, two devices, a run state, and no CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from lazymem.errors import SaveStreamError
from lazymem.vm.devicestate import Field, Layout, State, Stateful
from lazymem.vm.ram import MemFile, RamBlocks

RAM_BYTES = 256 * 1024
SIZES = (("pc.ram", RAM_BYTES), ("pc.bios", 128 * 1024), ("vga.vram", 64 * 1024))


class FakeDevice:
    """Refuses a state whose field "mode" is 0xff."""

    def __init__(self, name: str, instance: int = 0) -> None:
        fields = (Field("mode", 1), Field("count", 4), Field("stamp", 8), Field("fifo", 16, buffer=True))
        self.layout = Layout(name, 3, fields, instance)
        self.values: State = {"mode": 1, "count": 0, "stamp": 2**63 + 5, "fifo": bytes(range(16))}

    def state(self) -> State:
        return dict(self.values)

    def load_state(self, state: State) -> None:
        if state["mode"] == 0xFF:
            raise SaveStreamError("mode 255 is none")
        self.values = dict(state)


class FakeMachine:
    """`on_stop` runs in the stopping thread before the vCPU stands: what a guest still does, or waits for."""

    def __init__(self, mem_files: Sequence[MemFile] = ()) -> None:
        self.blocks = RamBlocks(SIZES, mem_files)
        self.run_state = "prelaunch"
        self.devices = [FakeDevice("cpu"), FakeDevice("serial"), FakeDevice("serial", 1)]
        self.on_stop: Callable[[], None] = lambda: None
        self.starts = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            self.run_state = "running"
            self.starts += 1

    def stop(self) -> None:
        self.on_stop()
        with self._lock:
            if self.run_state == "running":
                self.run_state = "paused"

    def stateful(self) -> Sequence[Stateful]:
        return self.devices
