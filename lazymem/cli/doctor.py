"""`lazymem doctor`: what this host lacks for lazymem, and how to mend it."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap

from lazymem.cli.host import Finding, Host, State
from lazymem.cli.hostfindings import examine
from lazymem.errors import EnvironmentRefusedError

PROGRAM = "lazymem doctor"

_EPILOG = """examples:
  lazymem doctor                              what is there, what is not, and how to mend that
  lazymem doctor --json | jq '.findings[] | select(.state != "ok")'
  sudo lazymem doctor                         as the user who is to mount

exit code: 0 when a mount can work here (perhaps worse than it could), 3 when it cannot
"""

_WIDTH = 100
_INDENT = " " * 26


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="List what this host lacks for lazymem, and how to mend it. Changes nothing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    found = parser.parse_args(arguments)
    findings = examine(Host())
    print(json.dumps(as_record(findings), indent=2) if found.json else as_text(findings))
    return exit_code(findings)


def exit_code(findings: list[Finding]) -> int:
    """Of `EnvironmentRefusedError` where a mount would be refused."""
    missing = any(finding.state is State.MISSING for finding in findings)
    return EnvironmentRefusedError.exit_code if missing else 0


def as_record(findings: list[Finding]) -> dict[str, object]:
    """For programs: `ok`, and `findings` with `name`, `state` (ok, lacking, missing), `detail`, `mend`."""
    return {
        "ok": exit_code(findings) == 0,
        "findings": [
            {"name": found.name, "state": found.state.value, "detail": found.detail, "mend": found.mend}
            for found in findings
        ],
    }


def as_text(findings: list[Finding]) -> str:
    """For people: a line a finding, and how to mend it below."""
    lines: list[str] = []
    for found in findings:
        lines += _wrapped(f"{found.state.value:<9}{found.name:<17}", found.detail)
        if found.mend:
            lines += _wrapped(_INDENT, f"-> {found.mend}")
    missing = sum(found.state is State.MISSING for found in findings)
    lacking = sum(found.state is State.LACKING for found in findings)
    lines += ["", f"{missing} missing, {lacking} lacking" + ("" if missing else ": a mount can work here")]
    return "\n".join(lines)


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    sys.exit(main())
