"""`lazymem` finds its commands and says what is wrong in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.cli import main, status
from lazymem.errors import LazymemError


def test_no_command_and_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 2
    assert "usage: lazymem COMMAND" in capsys.readouterr().out
    assert main.main(["frobnicate"]) == 2
    assert "no command 'frobnicate'" in capsys.readouterr().err
    assert main.main(["--help"]) == 0
    assert main.main(["--version"]) == 0
    assert re.search(r"lazymem \d+\.\d+", capsys.readouterr().out)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_is_there(command: str) -> None:
    try:
        code: object = main.main([command, "--help"])
    except SystemExit as ended:  # argparse's own way
        code = ended.code
    assert code == 0


@pytest.mark.parametrize("command", ["status", "umount"])
def test_not_a_mount(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([command, str(tmp_path)]) == 13
    assert "is not a lazymem mount" in capsys.readouterr().err


def test_exit_codes_are_unique() -> None:
    def below(kind: type[LazymemError]) -> list[type[LazymemError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    own = [kind.exit_code for kind in below(LazymemError) if "exit_code" in vars(kind)]
    assert len(own) == len(set(own))
    assert all(0 < code < 126 for code in own)


def test_status_for_people() -> None:
    record = {
        "pid": 7, "mountpoint": "/mnt/ram", "snapshot": "web", "identity": "ab" * 32, "server": "h:1",
        "connection": "connected", "pages_total": 1024, "pages_held": 512, "pages_written": 3, "pages_in_flight": 0,
        "demand_faults": 0, "demand_wait_p50_seconds": None, "demand_wait_p99_seconds": None,
        "wire_received_bytes": 1 << 20, "wire_sent_bytes": 0,
    }  # fmt: skip
    rows = dict(status.describe(record))
    assert rows["held"] == "512 of 1024 pages, 2.0 MiB"
    assert rows["demand faults"] == "0, waited -"
    record |= {"demand_faults": 9, "demand_wait_p50_seconds": 0.0001, "demand_wait_p99_seconds": 0.02}
    assert dict(status.describe(record))["demand faults"] == "9, waited p50 0.10 ms, p99 20.00 ms"


def test_commands_are_installed() -> None:
    scripts = Path(sys.executable).parent
    for name in ("lazymem", "lazymem-serve", "lazymem-mount", "lazymem-vm"):
        found = subprocess.run([scripts / name, "--help"], capture_output=True, text=True, check=True)
        assert "usage:" in found.stdout
