"""A machine that systemd runs, for tests of the units: see `machineroot`, whose other end this is."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.support import machineroot, skips
from tests.support.mounts import WAIT_SECONDS
from tests.support.privileges import maybe_as_root

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAMS = Path("/opt/lazymem")
"""Where deploy/README.md installs them."""

LOG = "/run/units.log"

_PYTHON = "/opt/python"
_ROOT = ("env", "PYTHONDONTWRITEBYTECODE=1", "unshare", "--mount", "--propagation", "private")


class SystemdMachine:
    """One that runs. Commands fail the test unless they say otherwise."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _order(self, order: dict[str, list[str]]) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess("", answer["code"], answer["out"], answer["err"])

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command as root of the machine. Only one at a time."""
        done = self._order({"run": [str(word) for word in command]})
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.log()}"
        return done

    def log(self) -> str:
        """The last that the units said."""
        return self._order({"run": ["tail", "--lines=30", LOG]}).stdout

    def keep_log(self, unit: str) -> None:
        """Of a unit that is installed; there is no journal."""
        text = f"[Service]\nStandardOutput=append:{LOG}\nStandardError=append:{LOG}\n"
        self.shell(f"mkdir -p /etc/systemd/system/{unit}.d; echo '{text}' >/etc/systemd/system/{unit}.d/log.conf")

    def shell(self, script: str) -> str:
        """What the lines of `script` print; each must succeed."""
        return self.run("bash", "-euo", "pipefail", "-c", script).stdout

    def copy(self, source: Path | str, target: Path | str) -> None:
        """Into the machine, readable by all its users."""
        done = self._order({"copy": [str(source), str(target)]})
        assert done.returncode == 0, done.stderr

    def show(self, unit: str, name: str) -> str:
        """A property of a unit, as systemd has it."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def wait_shown(self, unit: str, name: str, wanted: str) -> None:
        give_up = time.monotonic() + WAIT_SECONDS
        while (found := self.show(unit, name)) != wanted:
            assert time.monotonic() < give_up, f"{name} of {unit} is {found}, not {wanted}"
            time.sleep(0.02)


@contextlib.contextmanager
def started() -> Iterator[SystemdMachine]:
    """Skips the test where nobody may start one: without root, or in a container that may not mount."""
    root = maybe_as_root()
    if root is None:
        skips.skip_without(skips.ROOT, "it starts a systemd")
    with tempfile.TemporaryDirectory(prefix="lazymem-machine-") as folder:
        process = subprocess.Popen(
            [*root, *_ROOT, sys.executable, machineroot.__file__, folder, *_binds()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "the machine did not start; why stands above"
            if "refused" in (answer := json.loads(line)):
                skips.skip_without(skips.MOUNTS, answer["refused"])
            yield SystemdMachine(process)
        finally:
            process.communicate()  # the end of its input is its end


def _binds() -> list[str]:
    """Python itself, unless it is the machine's own."""
    return [] if sys.base_prefix == "/usr" else [f"{sys.base_prefix}:{_PYTHON}"]


def install_programs(machine: SystemdMachine) -> None:
    """As `pip install .` into a new environment in `PROGRAMS` would, from what is installed here: without a network."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    home, start = "/usr", f"{PROGRAMS}/bin/python3"
    if _binds():
        home = _PYTHON
        # Its own libpython is looked for where it lay, which the units hide when that is below /home or /root.
        start = f"/usr/bin/env -S LD_LIBRARY_PATH={_PYTHON}/lib {start}"
    python = f"{home}/bin/{version}"
    machine.run(python, "-m", "venv", "--without-pip", PROGRAMS)
    site = PROGRAMS / "lib" / version / "site-packages"
    for path in _dependencies():
        machine.copy(path, site)
    for package in ("lazymem", "server/lazymem_server"):
        machine.copy(CHECKOUT / package, site)
    for name, entry in tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"].items():
        module, _, function = entry.partition(":")
        script = f"#!{start}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        machine.run(python, "-c", _WRITE, PROGRAMS / "bin" / name, script)


_WRITE = "import os, sys; open(sys.argv[1], 'w').write(sys.argv[2]); os.chmod(sys.argv[1], 0o755)"


def _dependencies() -> set[Path]:
    """What lazymem needs to run, in this environment's site-packages."""
    found: dict[str, Distribution] = {}
    wanted = ["lazymem"]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = distribution(name)
            needs = [Requirement(text) for text in found[name].requires or ()]
            wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    del found["lazymem"]  # here it is a link to the checkout
    return {
        Path(str(each.locate_file(file.parts[0])))
        for each in found.values()
        for file in each.files or ()
        if file.parts[0] not in ("..", "__pycache__")
    }
