"""`lazymem template SNAPSHOT MOUNTPOINT`: a mount for many guests, kept ready; a local folder gets its own server.

Guests map its `pc.ram` privately (share=off) and come and go. Nothing is ever written to it.
"""

from __future__ import annotations

from lazymem.cli.quickstart import quick_imports

with quick_imports(trio=False):
    import argparse
    import os
    import sys
    from pathlib import Path

    from lazymem.cli import localserver, mount
    from lazymem.errors import LazymemError, UsageError
    from lazymem.fs import mountinfo
    from lazymem.settings import escaped_server

PROGRAM = "lazymem template"

_EPILOG = """examples:
  lazymem template /srv/snapshots/web /mnt/web        of a folder here, by a server of its own that ends with the mount
  lazymem template ram.example:7411/web /mnt/web      of a server elsewhere
  lazymem-vm --pcram-file /mnt/web/pc.ram,share=off -incoming file:/mnt/web/vmstate ...
                                                      a guest; as many as there is memory for what they write
  lazymem umount /mnt/web                             ends it, once the last guest has gone
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    found = _parser().parse_args(arguments)
    found.state, found.reserve, found.candidates, found.template = None, None, None, True
    folder = Path(found.server)
    try:
        if not os.path.isdir(folder):
            _refuse_missing_folder(found.server)
            if found.parent:
                raise UsageError("--parent is for a delta in a folder here; a server elsewhere has its own --parent")
            return mount.mount(found)
        path = mountinfo.real_path(found.mountpoint)
        with localserver.started(folder, found.parent, path, _log(found)) as server:
            found.server = escaped_server(f"unix:{server.socket}")
            code = mount.mount(found, from_ours=True)
            if code == 0 and not found.foreground:
                server.keep()
            return code
    except LazymemError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing is mounted", file=sys.stderr)
        return 130


def _log(found: argparse.Namespace) -> Path | None:
    """Where a server of ours logs: with the daemon, in front on stderr (None)."""
    if found.log is not None:
        return Path(found.log)
    return None if found.foreground else Path(os.devnull)


def _refuse_missing_folder(text: str) -> None:
    """What is neither a folder nor looks like a server's address was meant as a folder."""
    if not text.startswith("unix:") and ":" not in text:
        raise UsageError(f"{text} is no folder, and no server's address (HOST:PORT[/NAME] or unix:PATH[:/NAME])")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Keep a mount ready that many guests run from, each with share=off: they share its clean pages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "server",
        metavar="SNAPSHOT",
        help="a snapshot's folder, or where one is served: HOST:PORT[/NAME], unix:PATH[:/NAME]",
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder")
    parser.add_argument(
        "--parent",
        action="append",
        default=[],
        metavar="DIR",
        type=Path,
        help="the snapshot that a delta was made over, where it is not beside the delta; may be repeated",
    )
    return mount.add_options(parser)


if __name__ == "__main__":
    sys.exit(main())
