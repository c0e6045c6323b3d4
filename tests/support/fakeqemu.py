"""A program that passes for QEMU as far as lazymem-vm looks: version, machines, a monitor on an inherited socket.

Written as a script of its own, since it has to be found and started as QEMU is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_SCRIPT = """\
#!{python}
import json, pathlib, signal, socket, sys, time

VERSION, MODE, SAID = {version!r}, {mode!r}, pathlib.Path({said!r})
signal.signal(signal.SIGINT, signal.SIG_DFL)
words = sys.argv[1:]
if words == ["--version"]:
    print(VERSION)
    sys.exit()
if words == ["-machine", "help"]:
    print("Supported machines are:")
    print("pc                   Standard PC (alias of pc-i440fx-9.9)")
    print("pc-i440fx-9.9        Standard PC (default)")
    sys.exit()
SAID.write_text(json.dumps(words))
if MODE == "refuses":
    print("fake: no such option", file=sys.stderr)
    sys.exit(1)
chardev = next(word for word in words if word.startswith("socket,id=lazymem-control,fd="))
connection = socket.socket(fileno=int(chardev.rpartition("=")[2]))
connection.sendall(b'{{"QMP": {{"version": {{}}, "capabilities": []}}}}\\n')
for line in connection.makefile("r"):
    request = json.loads(line)
    answer = {{"return": {{}}}}
    if request["execute"] == "migrate-set-capabilities" and MODE == "incapable":
        answer = {{"error": {{"class": "GenericError", "desc": "Parameter 'capability' does not accept that value"}}}}
    connection.sendall(json.dumps({{**answer, "id": request.get("id")}}).encode() + b"\\n")
connection.close()
SAID.with_suffix(".ready").touch()
if MODE == "waits":
    time.sleep(600)
sys.exit(int(MODE) if MODE.isdigit() else 0)
"""


class FakeQemu:
    """`mode`: refuses (its options), incapable (no x-ignore-shared), waits (until it is ended), or its exit status."""

    def __init__(self, folder: Path, mode: str = "0", version: str = "QEMU emulator version 9.9.0 (fake)") -> None:
        self.program = folder / "fake-qemu"
        self._said = folder / "fake-qemu.words"
        self.ready = folder / "fake-qemu.ready"
        self.program.write_text(_SCRIPT.format(python=sys.executable, version=version, mode=mode, said=str(self._said)))
        self.program.chmod(0o755)

    @property
    def words(self) -> list[str] | None:
        """What it was started with; None when it was not."""
        if not self._said.exists():
            return None
        return [str(word) for word in json.loads(self._said.read_text())]
