"""Contexts from files: what is wrong with one is said in a line, and a renewed one is used without a restart."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from lazymem.errors import UsageError
from lazymem.settings import TlsSettings
from lazymem.tls.contexts import Contexts, make_context
from lazymem.tls.failures import Side
from tests.support.certificates import Pki


@pytest.fixture
def own(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def missing(path: str) -> Callable[[TlsSettings], TlsSettings]:
    return lambda found: structs.replace(found, **{path: Path("/nowhere/at/all")})


def read_by_all(found: TlsSettings) -> TlsSettings:
    found.key.chmod(0o644)
    return found


def not_its_key(found: TlsSettings) -> TlsSettings:
    other = Pki(found.ca.parent / "other").client("other")
    return structs.replace(found, key=other.key)


def nonsense(path: str) -> Callable[[TlsSettings], TlsSettings]:
    def write(found: TlsSettings) -> TlsSettings:
        (found.ca.parent / "nonsense").write_text("no PEM at all\n")
        (found.ca.parent / "nonsense").chmod(0o600)
        return structs.replace(found, **{path: found.ca.parent / "nonsense"})

    return write


def locked(found: TlsSettings) -> TlsSettings:
    target = found.key.with_name("locked.key")
    command: list[str | Path] = [
        "openssl",
        "pkey",
        "-in",
        found.key,
        "-aes256",
        "-passout",
        "pass:secret",
        "-out",
        target,
    ]
    subprocess.run(command, check=True, capture_output=True)
    target.chmod(0o600)
    return structs.replace(found, key=target)


BAD: dict[str, tuple[Callable[[TlsSettings], TlsSettings], str]] = {
    "no certificate": (missing("cert"), "--tls-cert .*No such file"),
    "no key": (missing("key"), "--tls-key .*No such file"),
    "no authority": (missing("ca"), "--tls-ca .*No such file"),
    "a key that all may read": (read_by_all, "--tls-key .*chmod 600"),
    "another certificate's key": (not_its_key, "not the certificate of the key"),
    "nonsense as a certificate": (nonsense("cert"), "--tls-cert .*no certificate in it"),
    "nonsense as a key": (nonsense("key"), "no certificate in it, or no key"),
    "nonsense as an authority": (nonsense("ca"), "--tls-ca .*no certificate in it"),
}


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_file_is_one_line(
    own: Pki, side: Side, spoil: Callable[[TlsSettings], TlsSettings], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        make_context(spoil(own.client()), side)
    assert "\n" not in str(caught.value)


def test_a_key_with_a_password_asks_nobody(own: Pki) -> None:
    with pytest.raises(UsageError, match="password"):
        make_context(locked(own.client()), Side.CLIENT)


def test_a_key_may_be_a_groups(own: Pki) -> None:
    found = own.client()
    found.key.chmod(0o640)
    make_context(found, Side.SERVER)


def test_a_renewed_certificate_is_used_from_then_on(own: Pki) -> None:
    contexts = Contexts(own.server(), Side.SERVER)
    first = contexts.current()
    assert contexts.current() is first
    own.server()
    os.utime(own.folder / "server.crt", (1, 1))  # two in one tick of the clock would be no change
    assert contexts.current() is not first


def test_files_that_went_bad_leave_the_last_good_ones_in_use(own: Pki, caplog: pytest.LogCaptureFixture) -> None:
    found = own.server()
    contexts = Contexts(found, Side.SERVER)
    first = contexts.current()
    whole = found.cert.read_bytes()
    found.cert.write_bytes(whole[:100])
    with caplog.at_level(logging.WARNING):
        assert contexts.current() is first
        assert contexts.current() is first
    assert len(caplog.records) == 1, "once, not at every connection"
    found.cert.unlink()
    assert contexts.current() is first
    found.cert.write_bytes(whole)
    os.utime(found.cert, (1, 1))
    assert contexts.current() is not first
