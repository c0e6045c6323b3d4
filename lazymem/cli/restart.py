"""How a mount's next daemon is started: the command's own arguments, made independent of where the command was called.

The command line is what stays the same from version to version, so a next daemon may be of another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from msgspec import Struct

from lazymem.settings import MountSettings, servers_text


class Restart(Struct, frozen=True):
    """`maybe_log`: the file that the daemons log to."""

    arguments: list[str]
    maybe_log: Path | None


def restart(parser: argparse.ArgumentParser, found: argparse.Namespace, settings: MountSettings) -> Restart:
    """For what `parser` found and `settings` checked: every option that is not at its default, paths absolute."""
    options: list[str] = []
    for action in parser._actions:  # argparse has no other list of them
        value = getattr(found, action.dest, None)
        if not action.option_strings or value is None or value == action.default:
            continue
        name = action.option_strings[-1]
        for each in value if isinstance(value, list) else [value]:
            text = str(each.absolute() if isinstance(each, Path) else each)
            options += [name] if action.nargs == 0 else [f"{name}={text}" if name.startswith("--") else f"{name}{text}"]
    return Restart([*options, "--", servers_text(settings.servers), str(settings.mountpoint)], found.log)
