"""`lazymem pki init DIR`, `issue DIR NAME`, `revoke DIR NAME`: an authority of one's own, and certificates from it.

`issued` in the folder names all that it signed, a line each: what a key that was stolen may be used with.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from lazymem.errors import LazymemError, StoreError, UsageError

PROGRAM = "lazymem pki"

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
ISSUED = "issued"

CA_DAYS = 3650
"""Whoever replaces it has to visit every host."""

HOST_DAYS = 365
"""Renewed by one command and one copied file; a lost key is of use to nobody after that."""

_MAX_DAYS = 36500

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A NAME is a file's name, a host's name and an identity in --allow, so it is nothing else than what all three take."""

_EPILOG = """examples:
  lazymem pki init pki                                        an authority in ./pki; its key stays there
  lazymem pki issue pki ram.example --server                  pki/ram.example.crt and .key, for the host of that name
  lazymem pki issue pki host-a --server --host 10.0.0.5       for a server that is dialled by its address
  lazymem pki issue pki host-b --client                       for the mounts of host-b, which it names
  lazymem pki issue pki host-b --renew                        another year, the same key: copy the .crt again
  lazymem pki revoke pki host-b                               its key was stolen: copy ca.crt to all hosts again

Each host gets ca.crt and its own .crt and .key, and nobody else's. Then:
  lazymem-serve --tls-cert ram.example.crt --tls-key ram.example.key --tls-ca ca.crt --allow web=host-b ... web
  lazymem-mount --tls-cert host-b.crt --tls-key host-b.key --tls-ca ca.crt ram.example:7411/web /mnt/ram
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    found = _parser().parse_args(arguments)
    try:
        said = {"init": _init, "issue": _issue, "revoke": _revoke}[found.command](found)
    except LazymemError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{PROGRAM}: {StoreError(f'{error.filename or found.folder}: {error.strerror}')}", file=sys.stderr)
        return StoreError.exit_code
    print(json.dumps(said) if found.json else _told(said))
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Make the certificates with which lazymem-serve and lazymem-mount know each other over TLS.",
        epilog=_EPILOG,
        formatter_class=form,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="init|issue|revoke")
    init = commands.add_parser("init", help="make an authority", formatter_class=form, epilog=_EPILOG)
    init.add_argument("folder", metavar="DIR", type=Path, help="made, mode 0700; its ca.key signs, and stays there")
    init.add_argument("--name", default="lazymem", help="how the authority is called (default: %(default)s)")
    _add_common(init, CA_DAYS)
    issue = commands.add_parser("issue", help="make a host's certificate", formatter_class=form, epilog=_EPILOG)
    issue.add_argument("folder", metavar="DIR", type=Path, help="where 'lazymem pki init' made the authority")
    issue.add_argument("name", metavar="NAME", help="the host; and what lazymem-serve knows its clients by")
    issue.add_argument("--server", action="store_true", help="for lazymem-serve, lazymem send, dialled as NAME")
    issue.add_argument("--client", action="store_true", help="for lazymem-mount, lazymem receive")
    issue.add_argument(
        "--host", action="append", default=[], metavar="HOST", help="a name or address that clients dial, too; repeated"
    )
    issue.add_argument("--renew", action="store_true", help="replace the certificate of NAME, for the same key and use")
    _add_common(issue, HOST_DAYS)
    revoke = commands.add_parser("revoke", help="take a host's certificates back", formatter_class=form, epilog=_EPILOG)
    revoke.add_argument("folder", metavar="DIR", type=Path, help="where 'lazymem pki init' made the authority")
    revoke.add_argument("name", metavar="NAME", help="all certificates that were issued for it")
    revoke.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _add_common(parser: argparse.ArgumentParser, days: int) -> None:
    parser.add_argument("--days", type=int, default=days, help="valid for so long (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _init(found: argparse.Namespace) -> dict[str, object]:
    lifetime = _lifetime(found.days)
    found.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if found.folder.stat().st_mode & 0o077:
        raise UsageError(f"{found.folder}: others may look into it; chmod 700 {found.folder}, or name a new folder")
    certificate, key = found.folder / CA_CERTIFICATE, found.folder / CA_KEY
    with _new_files(key, certificate) as write:
        from lazymem.tls.authority import make_authority  # heavy, and of no use to a mistake

        made = make_authority(found.name, lifetime)
        write(key, made.key)
        write(certificate, made.certificate)
    return {"certificate": str(certificate), "key": str(key), "not_after": made.not_after.isoformat()}


def _issue(found: argparse.Namespace) -> dict[str, object]:
    lifetime = _lifetime(found.days)
    if not _FILE_NAME.fullmatch(found.name) or found.name == "ca":
        raise UsageError(f"{found.name!r} cannot be a NAME: letters, digits, '.', '-', '_', at most 64, and not 'ca'")
    if found.renew and (found.server or found.client or found.host):
        raise UsageError("--renew keeps what the certificate is for: without --server, --client and --host")
    if not (found.renew or found.server or found.client):
        raise UsageError("say what it is for: --server, --client, or both")
    from lazymem.tls import authority

    ca = authority.Issued(_read(found.folder / CA_CERTIFICATE), _read(found.folder / CA_KEY), datetime.datetime.max)
    certificate, key = found.folder / f"{found.name}.crt", found.folder / f"{found.name}.key"
    if found.renew:
        made = authority.issue(ca, authority.read_wanted(_read(certificate)), lifetime, _read(key))
        _note(found.folder, found.name, authority.serial_of(made.certificate))
        _replace(certificate, made.certificate)
    else:
        with _new_files(key, certificate) as write:
            wanted = authority.Wanted(found.name, found.server, found.client, tuple(found.host))
            made = authority.issue(ca, wanted, lifetime)
            _note(found.folder, found.name, authority.serial_of(made.certificate))
            write(key, made.key)
            write(certificate, made.certificate)
    return {
        "certificate": str(certificate),
        "key": str(key),
        "authority": str(found.folder / CA_CERTIFICATE),
        "identity": found.name,
        "not_after": made.not_after.isoformat(),
    }


def _revoke(found: argparse.Namespace) -> dict[str, object]:
    from lazymem.tls import authority

    path, own = found.folder / CA_CERTIFICATE, found.folder / f"{found.name}.crt"
    ca = authority.Issued(_read(path), _read(found.folder / CA_KEY), datetime.datetime.max)
    serials = _noted(found.folder, found.name)
    if _FILE_NAME.fullmatch(found.name) and found.name != "ca" and own.exists():
        serials.add(authority.serial_of(_read(own)))
    if not serials:
        raise UsageError(f"no certificate was issued for {found.name!r} by the authority in {found.folder}")
    certificate = authority.LIST.sub(b"", ca.certificate)
    _replace(path, certificate + authority.revoked(ca, serials))
    moved = []
    for file in (own, own.with_suffix(".key")):  # so that the name can have another one
        if file.exists():
            moved.append(file.with_name(f"{file.name}.revoked"))
            file.replace(moved[-1])
    return {
        "authority": str(path),
        "identity": found.name,
        "revoked": sorted(f"{serial:x}" for serial in serials),
        "moved": [str(file) for file in moved],
    }


def _note(folder: Path, name: str, serial: int) -> None:
    """Before the certificate exists. Raises OSError."""
    fd = os.open(folder / ISSUED, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        file.write(f"{name} {serial:x}\n")
        file.flush()
        os.fsync(fd)


def _noted(folder: Path, name: str) -> set[int]:
    try:
        lines = (folder / ISSUED).read_text().splitlines()
    except FileNotFoundError:
        return set()
    return {int(words[1], 16) for words in map(str.split, lines) if len(words) == 2 and words[0] == name}


def _lifetime(days: int) -> datetime.timedelta:
    if not 0 < days <= _MAX_DAYS:
        raise UsageError(f"--days {days}: from 1 to {_MAX_DAYS}")
    return datetime.timedelta(days=days)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        hint = "lazymem pki init" if path.name in (CA_CERTIFICATE, CA_KEY) else "lazymem pki issue, without --renew,"
        raise UsageError(f"there is no {path}: {hint} makes it") from error


class _Writer:
    """Fills files that were created empty."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.made: list[Path] = []
        for path in paths:
            try:
                mode = 0o644 if path.suffix == ".crt" else 0o600
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
            except FileExistsError as error:
                self.remove()
                raise UsageError(f"{path} exists, and is not replaced: name another one, or move it away") from error
            self.made.append(path)

    def __call__(self, path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        for path in self.made:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_files(*paths: Path) -> Iterator[_Writer]:
    """All of them whole at the end, or none. Raises UsageError where one is there already."""
    writer = _Writer(paths)
    try:
        yield writer
    except BaseException:
        writer.remove()
        raise


def _replace(path: Path, data: bytes) -> None:
    """Whole, at once: whoever reads it meanwhile has the one or the other."""
    beside = path.with_name(f".new.{path.name}")
    beside.unlink(missing_ok=True)
    with _new_files(beside) as write:
        write(beside, data)
        os.replace(beside, path)


def _told(said: dict[str, object]) -> str:
    if "revoked" in said:
        count = len(cast("list[str]", said["revoked"]))
        what = "its certificate is" if count == 1 else f"its {count} certificates are"
        return (
            f"{said['identity']}: {what} revoked. Copy {said['authority']} to every host, over the one that is there: "
            "the next connections know it; start the servers again to end those that are open"
        )
    text = f"{said['certificate']} and {said['key']}, until {str(said['not_after'])[:10]}"
    if "authority" not in said:
        return f"an authority: {text}. Its key signs: keep it where it is"
    return f"{text}. For {said['identity']} alone, with {said['authority']}"


if __name__ == "__main__":
    sys.exit(main())
