"""Which QEMU is installed, its version and its machine types, and what a version lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from msgspec import Struct

from lazymem.errors import EnvironmentRefusedError, UsageError

PROGRAMS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm")
"""Where it is looked for: on the PATH, then where Red Hat's distributions hide it."""

Version = tuple[int, int, int]

OLDEST: Version = (5, 0, 0)
"""`-machine memory-backend=`, which makes a file the machine's RAM."""

UNWRITABLE_PRIVATE: Version = (8, 2, 0)
"""`readonly=on,rom=off`: a private map of a file that is opened for reading only."""

_ANSWER_SECONDS = 60.0
"""For a program that only prints something; on an idle machine it takes 20 to 60 ms."""


class Qemu(Struct, frozen=True):
    """An installed QEMU."""

    program: Path
    version: Version

    def __str__(self) -> str:
        return f"QEMU {text(self.version)}"


class Search:
    """Looks for QEMU and asks its version, beside whatever else there is to do until `result`.

    Raises:
        EnvironmentRefusedError: none is there.
    """

    def __init__(self, wanted: str | None = None) -> None:
        """`wanted`: the user's own program, a path or a name on the PATH."""
        self._program = _find(wanted)
        self._asked = _ask(self._program, "--version")

    def result(self) -> Qemu:
        """
        Raises:
            EnvironmentRefusedError: it is no QEMU, or too old.
        """
        said = _answer(self._asked)
        match = re.search(r"\bversion (\d+)\.(\d+)(?:\.(\d+))?", said)
        if match is None:
            raise EnvironmentRefusedError(f"{self._program} --version does not tell a version of QEMU: {_first(said)}")
        found = Qemu(self._program, (int(match[1]), int(match[2]), int(match[3] or 0)))
        if found.version < OLDEST:
            raise EnvironmentRefusedError(
                f"{found} ({found.program}) cannot have a file as its machine's RAM; {text(OLDEST)} and newer can"
            )
        return found

    def close(self) -> None:
        """Ends the question where nobody waited for its answer."""
        self._asked.kill()
        self._asked.communicate()


def text(version: Version) -> str:
    return ".".join(map(str, version))


def versioned_machine(qemu: Qemu, name: str) -> str:
    """The machine type that `name`, perhaps an alias such as pc or q35, stands for in this QEMU.

    Raises:
        UsageError: it has no such machine.
    """
    types = machine_types(_answer(_ask(qemu.program, "-machine", "help")))
    if name not in types:
        raise UsageError(f"{qemu} has no machine type {name}{_too_new(qemu, name)} (-machine help lists them)")
    return types[name]


def refuse_newer_machine(qemu: Qemu, machine: str) -> None:
    """Raises EnvironmentRefusedError for a machine type that a later QEMU brought. (Of others QEMU itself knows.)"""
    if reason := _too_new(qemu, machine):
        raise EnvironmentRefusedError(f"{qemu} ({qemu.program}) has no machine type {machine}{reason}")


def machine_types(listing: str) -> dict[str, str]:
    """`-machine help`'s answer as name to versioned name; those that are no aliases stand for themselves."""
    found = {}
    for line in listing.splitlines()[1:]:
        name, _, rest = line.partition(" ")
        alias = re.search(r"\(alias of (\S+)\)", rest)
        if name:
            found[name] = alias[1] if alias else name
    return found


def _too_new(qemu: Qemu, machine: str) -> str:
    match = re.search(r"-(\d+)\.(\d+)(?:\.\d+)?$", machine)
    needed = (int(match[1]), int(match[2])) if match else (0, 0)
    return f": QEMU {needed[0]}.{needed[1]} brought that" if needed > qemu.version[:2] else ""


def _find(wanted: str | None) -> Path:
    for name in PROGRAMS if wanted is None else (wanted,):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    if wanted is not None:
        raise EnvironmentRefusedError(f"there is no program {wanted} that could be QEMU")
    raise EnvironmentRefusedError(
        f"no QEMU here: install {PROGRAMS[0]} (Debian's package qemu-system-x86), or name it with --qemu"
    )


def _ask(program: Path, *words: str) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [program, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise EnvironmentRefusedError(f"cannot run {program}: {error.strerror}") from error


def _answer(asked: subprocess.Popen[str]) -> str:
    try:
        said, _ = asked.communicate(timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        asked.kill()
        asked.communicate()
        raise EnvironmentRefusedError(f"{asked.args!r} did not answer in {_ANSWER_SECONDS:.0f} s") from error
    return said


def _first(said: str) -> str:
    return said.strip().partition("\n")[0][:200] or "it said nothing"
