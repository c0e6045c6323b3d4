"""Every command's man page names exactly the options that its --help names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "man"

COMMANDS = {
    "lazymem-serve": "lazymem_server.app",
    "lazymem-mount": "lazymem.cli.mount",
    "lazymem-forkserver": "lazymem.cli.forkserver",
    "lazymem-vm": "lazymem.cli.vm",
    "lazymem-snapshot": "lazymem.cli.snapshot",
    "lazymem-send": "lazymem.cli.send",
    "lazymem-receive": "lazymem.cli.receive",
    "lazymem-status": "lazymem.cli.status",
    "lazymem-template": "lazymem.cli.template",
    "lazymem-verify": "lazymem.cli.verify",
    "lazymem-umount": "lazymem.cli.umount",
    "lazymem-guest": "lazymem.cli.guest",
    "lazymem-demo": "lazymem.cli.demo",
    "lazymem-pki": "lazymem.cli.pki",
    "lazymem-doctor": "lazymem.cli.doctor",
}


def _help(module: str) -> str:
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    return result.stdout


def _long_options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - {"--help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_man_page_and_help_name_the_same_options(command: str) -> None:
    page = (DOCS / f"{command}.1.md").read_text()
    options = page.partition("## OPTIONS")[2].partition("\n## ")[0]
    usage = _help(COMMANDS[command]).partition("examples:")[0].partition("example:")[0]
    assert _long_options(options) == _long_options(usage)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    assert re.search(r"^examples?:", _help(COMMANDS[command]), re.MULTILINE)
