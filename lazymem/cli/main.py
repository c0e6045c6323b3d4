"""`lazymem COMMAND ...`: finds the command's module and lets it do the rest; imports only that one."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from lazymem import __version__
from lazymem.cli.quickstart import leave, quick_imports


class Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "serve": Command("lazymem_server.app", "publish snapshots (the same as lazymem-serve)"),
    "mount": Command("lazymem.cli.mountcommand", "mount a published snapshot's RAM (the same as lazymem-mount)"),
    "forkserver": Command("lazymem.cli.forkserver", "keep a process ready from which mounts are forked"),
    "template": Command("lazymem.cli.template", "keep a mount ready that many guests run from"),
    "vm": Command("lazymem.cli.vm", "run or resume a guest in the built-in emulator (the same as lazymem-vm)"),
    "snapshot": Command("lazymem.cli.snapshot", "save a running guest into a folder"),
    "send": Command("lazymem.cli.send", "hand a running guest over to another host"),
    "receive": Command("lazymem.cli.receive", "take a running guest over from another host"),
    "status": Command("lazymem.cli.status", "show what a mount holds, fetches, and waits for"),
    "verify": Command("lazymem.cli.verify", "hold a snapshot, a cache, or what a mount holds against its digests"),
    "umount": Command("lazymem.cli.umount", "end a mount, or say who holds it"),
    "pki": Command("lazymem.cli.pki", "make the certificates with which hosts know each other over TLS"),
    "doctor": Command("lazymem.cli.doctor", "say what this host lacks for a mount, and how to mend it"),
    "guest": Command("lazymem.cli.guest", "build a small guest to try things with"),
    "demo": Command("lazymem.cli.demo", "save, serve, mount and resume guests on this machine, with figures"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run `lazymem`; returns the command's exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lazymem {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        print(f"lazymem: there is no command {words[0]!r}; try 'lazymem --help'", file=sys.stderr)
        return 2
    with quick_imports(trio=words[0] in ("serve", "send", "receive")):
        module = importlib.import_module(command.module)
    return int(module.main(words[1:]))


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lazymem COMMAND [ARGUMENTS]",
            "",
            "Resume a virtual machine here while its memory is still there.",
            "",
            *lines,
            "",
            "'lazymem COMMAND --help' tells more, with examples.",
        ]
    )


def run() -> None:
    """The installed `lazymem`."""
    leave(main())


if __name__ == "__main__":
    run()
