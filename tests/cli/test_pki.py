"""`lazymem pki`: files that nobody else reads, nothing overwritten, certificates that OpenSSL itself believes."""

from __future__ import annotations

import json
import re
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazymem.cli import pki
from lazymem.tls import authority

PAGE = Path(__file__).parents[2] / "docs" / "man" / "lazymem-pki.1.md"


def run(*words: object) -> int:
    return pki.main([str(word) for word in words])


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert run(*words, "--json") == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def decoded(path: Path) -> dict[str, Any]:
    """As OpenSSL reads it."""
    found: dict[str, Any] = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
    return found


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run("init", tmp_path / "pki") == 0
    capsys.readouterr()
    return tmp_path / "pki"


def test_nobody_else_reads_keys(folder: Path) -> None:
    assert run("issue", folder, "host-b", "--client") == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("ca.key", "host-b.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def test_what_is_printed_says_where_and_until_when(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_json(capsys, "issue", folder, "ram.example", "--server", "--host", "10.0.0.5", "--days", "30")
    assert said["certificate"] == str(folder / "ram.example.crt")
    assert said["key"] == str(folder / "ram.example.key")
    assert said["authority"] == str(folder / "ca.crt")
    assert said["identity"] == "ram.example"
    found = decoded(folder / "ram.example.crt")
    assert found["subjectAltName"] == (("DNS", "ram.example"), ("IP Address", "10.0.0.5"))
    assert run("issue", folder, "host-b", "--client") == 0
    assert re.search(r"host-b\.crt and .*host-b\.key, until \d{4}-\d\d-\d\d\. For host-b", capsys.readouterr().out)


@pytest.mark.parametrize(("use", "purpose"), [("--server", "sslserver"), ("--client", "sslclient")])
def test_openssl_believes_them_strictly_and_for_their_use_alone(folder: Path, use: str, purpose: str) -> None:
    assert run("issue", folder, "host", use) == 0

    def verify(purpose: str) -> int:
        words: list[str | Path] = [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            folder / "ca.crt",
        ]
        return subprocess.run([*words, folder / "host.crt"], capture_output=True, check=False).returncode

    assert verify(purpose) == 0
    assert verify("sslclient" if purpose == "sslserver" else "sslserver") != 0


def test_nothing_is_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("issue", folder, "host-b", "--client") == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert run("init", folder) == 2
    assert run("issue", folder, "host-b", "--client") == 2
    said = capsys.readouterr().err
    assert said.count("exists, and is not replaced") == 2
    (folder / "host-b.key").unlink()
    assert run("issue", folder, "host-b", "--client") == 2, "a certificate alone stays, too"
    assert not (folder / "host-b.key").exists()
    del before[folder / "host-b.key"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_renewed_it_is_for_the_same_key_and_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("issue", folder, "host", "--server", "--client", "--host", "10.0.0.5", "--days", "5") == 0
    certificate, key = (folder / "host.crt").read_bytes(), (folder / "host.key").read_bytes()
    before = decoded(folder / "host.crt")
    assert run("issue", folder, "host", "--renew") == 0
    after = decoded(folder / "host.crt")
    assert (folder / "host.key").read_bytes() == key
    assert authority.read_wanted((folder / "host.crt").read_bytes()) == authority.read_wanted(certificate)
    assert before["subjectAltName"] == after["subjectAltName"]
    assert before["serialNumber"] != after["serialNumber"]
    assert ssl.cert_time_to_seconds(after["notAfter"]) > ssl.cert_time_to_seconds(before["notAfter"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(folder / "host.crt", folder / "host.key")
    assert sorted(path.name for path in folder.iterdir()) == ["ca.crt", "ca.key", "host.crt", "host.key", "issued"]


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    folder = tmp_path / "short"
    assert run("init", folder, "--days", "10") == 0
    assert run("issue", folder, "host", "--client", "--days", "300") == 0
    ends = [ssl.cert_time_to_seconds(decoded(folder / name)["notAfter"]) for name in ("ca.crt", "host.crt")]
    assert abs(ends[1] - ends[0]) <= 2


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("issue", "{pki}", "host"), "--server, --client, or both"),
    (("issue", "{pki}", "ca", "--client"), "cannot be a NAME"),
    (("issue", "{pki}", "../out", "--client"), "cannot be a NAME"),
    (("issue", "{pki}", "a b", "--client"), "cannot be a NAME"),
    (("issue", "{pki}", "*", "--client"), "cannot be a NAME"),
    (("issue", "{pki}", "x" * 65, "--client"), "cannot be a NAME"),
    (("issue", "{pki}", "host", "--server", "--host", "grüße"), "cannot be a host's name"),
    (("issue", "{pki}", "host", "--client", "--days", "0"), "--days"),
    (("issue", "{pki}", "host", "--renew"), "without --renew"),
    (("issue", "{pki}", "host", "--renew", "--client"), "keeps what"),
    (("issue", "{pki}/no", "host", "--client"), "lazymem pki init"),
    (("init", "{tmp}/open"), "others may look into it"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(words[2:]) or "init" for words, _ in WRONG])
def test_what_is_wrong_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    before = sorted(folder.iterdir())
    assert run(*(word.format(pki=folder, tmp=tmp_path) for word in words)) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1
    assert sorted(folder.iterdir()) == before
    assert not list((tmp_path / "open").iterdir())


def test_an_expired_authority_signs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.certificates import OVER

    over = authority.make_authority("old", OVER)
    (folder / "ca.crt").write_bytes(over.certificate)
    (folder / "ca.key").write_bytes(over.key)
    assert run("issue", folder, "host", "--client") == 2
    assert "expired" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["ca.crt", "ca.key", "host.crt", "host.key"])
def test_damaged_files_are_named(folder: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    assert run("issue", folder, "host", "--client") == 0
    (folder / file).write_bytes((folder / file).read_bytes()[:80])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert run("issue", folder, "host", "--renew") == 2
    whose, kind = file.split(".")
    assert f"in the {'authority' if whose == 'ca' else 'host'}'s .{kind} file is no" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_revoked_are_all_that_a_name_ever_had(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the ones that were renewed since: a thief has those, too. And the name can have another one."""
    assert run("issue", folder, "host-b", "--client") == 0
    serials = {int(decoded(folder / "host-b.crt")["serialNumber"], 16)}
    assert run("issue", folder, "host-b", "--renew") == 0
    serials.add(int(decoded(folder / "host-b.crt")["serialNumber"], 16))
    assert run("issue", folder, "host-c", "--client") == 0
    capsys.readouterr()
    said = run_json(capsys, "revoke", folder, "host-b")
    assert {int(word, 16) for word in said["revoked"]} == serials
    assert not (folder / "host-b.crt").exists()
    assert run("issue", folder, "host-b", "--client") == 0
    for name, good in (("host-b.crt", True), ("host-c.crt", True), ("host-b.crt.revoked", False)):
        assert is_believed(folder, name) is good, name
    capsys.readouterr()
    again = run_json(capsys, "revoke", folder, "host-c")
    assert len(again["revoked"]) == 1
    assert not is_believed(folder, "host-b.crt.revoked"), "who is on the list stays there"
    assert not is_believed(folder, "host-c.crt.revoked")
    assert run("issue", folder, "host-d", "--client") == 0, "the authority still signs"


def is_believed(folder: Path, name: str) -> bool:
    """By openssl itself."""
    words: list[str | Path] = [
        "openssl",
        "verify",
        "-crl_check",
        "-CAfile",
        folder / "ca.crt",
        "-CRLfile",
        folder / "ca.crt",
    ]
    done = subprocess.run([*words, folder / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "revoked" in done.stderr, done.stderr
    return done.returncode == 0


def test_who_has_no_certificate_cannot_lose_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "ca.crt").read_bytes()
    for name in ("host-b", "ca", "../pki/ca"):
        assert run("revoke", folder, name) == 2
        assert "no certificate was issued" in capsys.readouterr().err
    assert (folder / "ca.crt").read_bytes() == before


def test_the_man_page_names_all_options() -> None:
    text = PAGE.read_text()
    for command in ("init", "issue", "revoke"):
        words = [sys.executable, "-m", "lazymem.cli.pki", command, "--help"]
        usage = subprocess.run(words, capture_output=True, text=True, check=True).stdout.partition("examples:")[0]
        section = text.partition(f"## {command.upper()}")[2].partition("\n## ")[0]
        found = [set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", each)) - {"--help"} for each in (usage, section)]
        assert found[0] == found[1], command
