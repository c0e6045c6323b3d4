"""Where QEMU's analyser is fetched from: a real APT on small repositories of our own; nothing leaves the machine."""

from __future__ import annotations

import hashlib
import io
import platform
import tarfile
from pathlib import Path

import pytest

from scripts import analyser

SCRIPT = b"#!/usr/bin/env python3\n# reads streams\n"


def archive(*members: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(SCRIPT)
            tar.addfile(entry, io.BytesIO(SCRIPT))
    return data.getvalue()


WHOLE = archive("qemu-10.0.2/README.rst", "qemu-10.0.2/scripts/analyze-migration.py", "qemu-10.0.2/z")


def repository(folder: Path, version: str, content: bytes = WHOLE) -> str:
    """A mirror with the source of one QEMU; its line of a sources.list, for an APT that asks for no signature."""
    name = f"qemu_{version}+ds.orig.tar.xz"
    (folder / "pool").mkdir(parents=True)
    (folder / "pool" / name).write_bytes(content)
    described = f"{len(content)} {name}"
    sources = (
        f"Package: qemu\nBinary: qemu\nVersion: 1:{version}+ds-1\nArchitecture: any\nFormat: 3.0 (quilt)\n"
        f"Directory: pool\nFiles:\n {hashlib.md5(content).hexdigest()} {described}\n"
        f"Checksums-Sha256:\n {hashlib.sha256(content).hexdigest()} {described}\n\n"
    ).encode()
    index = folder / "dists" / "test" / "main" / "source" / "Sources"
    index.parent.mkdir(parents=True)
    index.write_bytes(sources)
    release = f"Codename: test\nComponents: main\nSHA256:\n {hashlib.sha256(sources).hexdigest()} {len(sources)} "
    (folder / "dists" / "test" / "Release").write_text(f"{release}main/source/Sources\n")
    return f"deb-src [trusted=yes] file:{folder} test main\n"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where APT works."""
    (tmp_path / "apt").mkdir()
    return tmp_path / "apt"


def test_the_one_file_is_taken_out(tmp_path: Path, here: Path) -> None:
    fetched = analyser.fetch_source(here, repository(tmp_path / "mirror", "10.0.2"))
    target = tmp_path / "cache" / "qemu" / "analyze-migration.py"
    analyser.extract(fetched, target)
    assert target.read_bytes() == SCRIPT
    assert list(target.parent.iterdir()) == [target]


def test_altered_source_is_refused(tmp_path: Path, here: Path) -> None:
    line = repository(tmp_path / "mirror", "10.0.2")
    (stored,) = (tmp_path / "mirror" / "pool").iterdir()
    stored.write_bytes(WHOLE[:-1] + b"x")
    with pytest.raises(analyser.NotFetched, match=r"Hash Sum mismatch|unexpected size|Failed to fetch"):
        analyser.fetch_source(here, line)


def test_a_mirror_that_nobody_signed_is_refused(tmp_path: Path, here: Path) -> None:
    line = repository(tmp_path / "mirror", "10.0.2").replace("[trusted=yes] ", "")
    with pytest.raises(analyser.NotFetched, match="is not signed"):
        analyser.fetch_source(here, line)


def test_an_old_qemu_is_no_use(tmp_path: Path, here: Path) -> None:
    with pytest.raises(analyser.NotFetched, match="it has QEMU 7"):
        analyser.fetch_source(here, repository(tmp_path / "mirror", "7.2"))


def test_a_mirror_without_it_says_so(tmp_path: Path, here: Path) -> None:
    with pytest.raises(analyser.NotFetched, match=r"^E: "):
        analyser.fetch_source(here, f"deb-src [trusted=yes] file:{tmp_path}/none test main\n")
    bare = tmp_path / "qemu_10.orig.tar.xz"
    bare.write_bytes(archive("qemu-10/scripts/other.py", "qemu-10/more/scripts/analyze-migration.py"))
    with pytest.raises(analyser.NotFetched, match=r"has no scripts/analyze-migration\.py"):
        analyser.extract(bare, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def release_file(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, major: int | None) -> list[tuple[str, str]]:
    values = dict(line.split("=") for line in text.split())
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: values)
    monkeypatch.setattr(analyser, "packaged_qemu", lambda: major)
    monkeypatch.setattr(analyser, "configured_mirrors", lambda release: [f"http://near/{release}/"])
    return list(analyser.places())


@pytest.mark.parametrize(
    ("text", "major", "releases"),
    [
        ("ID=debian VERSION_CODENAME=bookworm", 7, ["bookworm-backports", "stable"]),
        ("ID=debian VERSION_CODENAME=trixie", 10, ["trixie", "trixie-backports", "stable"]),
        ("ID=debian VERSION_CODENAME=trixie", None, ["trixie", "trixie-backports", "stable"]),
        ("ID=ubuntu ID_LIKE=debian VERSION_CODENAME=noble", 8, ["resolute", "devel"]),
        ("ID=ubuntu VERSION_CODENAME=resolute", 10, ["resolute", "devel"]),
        ("ID=linuxmint ID_LIKE=ubuntu VERSION_CODENAME=zara UBUNTU_CODENAME=noble", 8, ["resolute", "devel"]),
        ("ID=fedora VERSION_CODENAME=", 9, []),
    ],
)
def test_which_releases_are_asked(
    text: str, major: int | None, releases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = release_file(tmp_path, text, monkeypatch, major)
    near = [release for mirror, release in places if mirror.startswith("http://near/")]
    assert near == releases
    assert [release for mirror, release in places[len(near) :]] == releases, "then the main mirror"
    assert [mirror for mirror, _ in places[: len(near)]] == [mirror for mirror, _ in places if "near" in mirror]


def test_what_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").touch()
    monkeypatch.setattr(analyser, "places", lambda: pytest.fail("it looked for a mirror"))
    analyser.provide(tmp_path / "there")


def test_all_refusals_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyser, "places", lambda: iter([("http://a/", "one"), ("http://b/", "two")]))

    def refuse(_: Path, line: str) -> Path:
        raise analyser.NotFetched(f"no: {line.split(' ', 1)[1].strip()}")

    monkeypatch.setattr(analyser, "fetch_source", refuse)
    monkeypatch.setattr(analyser, "source_line", lambda mirror, release: f"deb-src {mirror} {release}")
    with pytest.raises(analyser.NotFetched, match="http://a/ one: no: http://a/ one; http://b/ two: no"):
        analyser.provide(tmp_path / "target")
