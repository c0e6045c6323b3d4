"""`lazymem guest`: what it builds, and what it says when it cannot."""

import json
from pathlib import Path

import pytest

from lazymem.cli import guest
from lazymem.demo import linuxguest
from lazymem.errors import EnvironmentRefusedError
from lazymem.vm.guests import GUESTS


@pytest.mark.parametrize("name", GUESTS)
def test_builds_an_elf_kernel(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guest.main([name, str(tmp_path), "--json"]) == 0
    kernel = Path(json.loads(capsys.readouterr().out)["kernel"])
    assert kernel.read_bytes()[:5] == b"\x7fELF\x02"


def test_builds_linux(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guest.main(["linux", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["kernel", "initrd", "append"]
    assert (tmp_path / "vmlinuz").stat().st_size > 1 << 20
    assert (tmp_path / "initrd").read_bytes().startswith(b"070701")
    assert "console=ttyS0" in (tmp_path / "append").read_text()


def test_no_folder_and_no_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guest.main(["pages", str(tmp_path / "missing")]) == 2
    assert "make it first" in capsys.readouterr().err

    def none(boot: Path = tmp_path) -> Path:
        raise EnvironmentRefusedError("no kernel: install one")

    monkeypatch.setattr(linuxguest, "find_kernel", none)
    assert guest.main(["linux", str(tmp_path)]) == 3
    assert capsys.readouterr().err == "lazymem guest: no kernel: install one\n"
