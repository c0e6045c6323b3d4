"""A next daemon's command line says the same as the first one's, from wherever that was called."""

from pathlib import Path

import pytest

from lazymem.cli import mount
from lazymem.cli.restart import restart


@pytest.mark.parametrize(
    "words",
    [
        ["host:1/web", "mnt"],
        ["unix:sock:/web", "mnt", "--cache", "c", "--state", "s", "--log", "l", "-v"],
        ["host:1", "mnt", "-o", "allow_other", "-o", "nosuid,nodev", "--deadline", "2.5", "--prefetch", "none"],
        ["--record=-set", "--record-seconds", "9", "--", "[::1]:1", "-mnt"],
    ],
)
def test_it_says_the_same(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = mount._parser().parse_args(words)
    settings = mount._settings(first)
    again = restart(mount._parser(), first, settings)
    monkeypatch.chdir("/")
    second = mount._parser().parse_args(again.arguments)
    assert mount._settings(second) == settings
    assert second.options == first.options
    assert second.verbose == first.verbose
    assert restart(mount._parser(), second, settings) == again or first.log is not None
