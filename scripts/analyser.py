"""QEMU's own analyser of save streams, `scripts/analyze-migration.py`, out of the distribution's source package.

No binary package has it. It has to be QEMU 9's or newer: older ones do not know x-ignore-shared, which our streams say.
Where the machine's release has an older QEMU, a later release's source on the same mirror is taken. APT fetches, with
lists, cache and sources of its own and the distribution's keys, so nothing is believed that APT would not install, and
nothing of the machine's APT is changed; no root is needed. One file of 40 MB of source is kept, in .cache/qemu.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts import prepare

ANALYSER = prepare.ROOT / ".cache" / "qemu" / "analyze-migration.py"
OLDEST_QEMU = 9


@dataclass(frozen=True)
class Distribution:
    """Where a distribution keeps its releases, and which of them have a QEMU that is new enough."""

    mirror: str
    keys: str
    later_releases: tuple[str, ...]


KNOWN = {
    "debian": Distribution(
        "http://deb.debian.org/debian/", "/usr/share/keyrings/debian-archive-keyring.gpg", ("{}-backports", "stable")
    ),
    # 26.04, the first with long support and QEMU 10; then whatever is next.
    "ubuntu": Distribution(
        "http://archive.ubuntu.com/ubuntu/", "/usr/share/keyrings/ubuntu-archive-keyring.gpg", ("resolute", "devel")
    ),
}


class NotFetched(Exception):  # noqa: N818 - it says what happened
    """No source gave the analyser; the text says what each said."""


def provide(target: Path = ANALYSER) -> None:
    """The analyser at `target`; what is there stays. Raises NotFetched."""
    if target.exists():
        return
    prepare.say("fetching QEMU's source (40 MB) for scripts/analyze-migration.py, which judges our save streams")
    refusals = []
    for mirror, release in places():
        with tempfile.TemporaryDirectory(prefix="lazymem-") as folder:
            try:
                extract(fetch_source(Path(folder), source_line(mirror, release)), target)
            except NotFetched as error:
                refusals.append(f"{mirror} {release}: {error}")
                continue
        prepare.say(f"took it from {release}")
        return
    raise NotFetched("; ".join(refusals) or "this is no Debian and no Ubuntu")


# --- where it may be


def places() -> Iterator[tuple[str, str]]:
    """(mirror, release) to try in order: the machine's own mirrors first, the distribution's main one last."""
    name, own_release = distribution()
    if name not in KNOWN:
        return
    known = KNOWN[name]
    releases = [release.format(own_release) for release in known.later_releases]
    major = packaged_qemu()
    if own_release and (major is None or major >= OLDEST_QEMU):
        releases.insert(0, own_release)
    for mirror in dict.fromkeys([*configured_mirrors(own_release), known.mirror]):
        for release in dict.fromkeys(releases):
            yield mirror, release


def distribution() -> tuple[str, str]:
    """Debian's or Ubuntu's name and release; of a derivative the one that it is made of."""
    found = platform.freedesktop_os_release()
    for name in (found["ID"], *found.get("ID_LIKE", "").split()):
        if name in KNOWN:
            own = found.get("VERSION_CODENAME", "") if name == found["ID"] else ""
            return name, found.get(f"{name.upper()}_CODENAME", own)
    return found["ID"], ""


def configured_mirrors(release: str) -> list[str]:
    """From where APT takes the release on this machine."""
    output = tell("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)")
    entries = [line.split() for line in output.splitlines()]
    return [entry[0] for entry in entries if entry[1:] == [release, "main"]]


def packaged_qemu() -> int | None:
    """Major version of the QEMU that this machine's APT would install; None where it knows of none."""
    found = re.search(r"Candidate: (?:\d+:)?(\d+)\.", tell("apt-cache", "policy", "qemu-system-x86"))
    return int(found.group(1)) if found else None


def source_line(mirror: str, release: str) -> str:
    """The line of a sources.list. Where the keys are elsewhere, APT's own trusted ones count."""
    keys = KNOWN[distribution()[0]].keys
    return f"deb-src {f'[signed-by={keys}] ' if Path(keys).exists() else ''}{mirror} {release} main\n"


# --- fetching


def fetch_source(folder: Path, source: str) -> Path:
    """QEMU's source archive, fetched and verified by APT into `folder`."""
    options = private_apt(folder, source)
    run_apt([*options, "update"], folder)
    run_apt([*options, "source", "--download-only", "--tar-only", "qemu"], folder)
    (archive,) = folder.glob("qemu_*.orig.tar.*")
    major = int(re.sub(r"^qemu_(\d+)\..*", r"\1", archive.name))
    if major < OLDEST_QEMU:
        raise NotFetched(f"it has QEMU {major}")
    return archive


def private_apt(folder: Path, source: str) -> list[str]:
    """Options for an APT that knows only this source and writes only into `folder`."""
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    (folder / "sources.list").write_text(source)
    settings = {
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "APT::Default-Release": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": 3,
        # Else a list that could not be fetched is a warning.
        "APT::Update::Error-Mode": "any",
        # As root APT would fetch as its own user, who may not write here.
        "APT::Sandbox::User": "root",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def run_apt(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        ["apt-get", "-q", *words],
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise NotFetched(reasons[0] if reasons else f"apt-get ended with {done.returncode}")


def tell(*command: str) -> str:
    """What a command prints; nothing where it fails or is missing."""
    try:
        done = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout


def extract(archive: Path, target: Path) -> None:
    """The one file out of the archive, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r|*") as source:
        for member in source:
            if re.fullmatch(r"[^/]+/scripts/analyze-migration\.py", member.name) and member.isfile():
                content = source.extractfile(member)
                assert content is not None
                part = target.with_name(f"{target.name}.part")
                part.write_bytes(content.read())
                os.replace(part, target)
                return
    raise NotFetched(f"{archive.name} has no scripts/analyze-migration.py")
