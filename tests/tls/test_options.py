"""The options of TLS: all three files or none, and what is made of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lazymem.errors import UsageError
from lazymem.settings import TlsSettings
from lazymem.tls.options import add_tls_options, maybe_tls, tls_words

FILES = ("--tls-cert", "a.crt", "--tls-key", "a.key", "--tls-ca", "ca.crt")


def parsed(*words: str, name: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_tls_options(parser, name=name)
    return parser.parse_args(words)


def test_none_of_them_is_no_tls() -> None:
    assert maybe_tls(parsed()) is None
    assert maybe_tls(parsed(name=False)) is None


def test_paths_are_as_the_next_daemon_needs_them() -> None:
    found = maybe_tls(parsed(*FILES))
    assert found == TlsSettings(Path("a.crt").absolute(), Path("a.key").absolute(), Path("ca.crt").absolute())
    assert maybe_tls(parsed(*tls_words(found))) == found
    named = maybe_tls(parsed(*FILES, "--tls-name", "ram.example"))
    assert named is not None
    assert named.name == "ram.example"
    assert maybe_tls(parsed(*tls_words(named))) == named


@pytest.mark.parametrize("words", [FILES[:2], FILES[:4], FILES[2:], ("--tls-name", "ram.example")])
def test_some_of_them_are_a_mistake(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="--tls-cert, --tls-key and --tls-ca"):
        maybe_tls(parsed(*words))


@pytest.mark.parametrize("name", ["", ".example", "grüße.example", "a b"])
def test_names_that_no_certificate_has(name: str) -> None:
    with pytest.raises(UsageError, match="--tls-name"):
        maybe_tls(parsed(*FILES, "--tls-name", name))
