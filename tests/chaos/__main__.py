"""`make chaos`: ill-treats mounts for minutes, and says what became of their guests.

    python -m tests.chaos [--seconds S] [--seed N] [--tls some|always|never] [--no-guest] [--json]

A seed repeats the choice of faults, and not their timing. Non-zero exit where a byte was wrong, a write was lost, a
guest ended or stood; its folder, with all logs, is then kept and named.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import TLS_SHARE, new_seed, run, say_on_stderr

DEFAULT_SECONDS = 180.0

TLS = {"some": TLS_SHARE, "always": 1.0, "never": 0.0}


def main(arguments: list[str] | None = None) -> int:
    """Runs it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="of faults (default: %(default)g)")
    parser.add_argument("--seed", type=int, help="which faults (default: a new one, printed)")
    parser.add_argument("--tls", choices=TLS, default="some", help="in how many of the rounds (default: %(default)s)")
    parser.add_argument("--no-guest", action="store_true", help="only the verifying writer, no QEMU")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    found = parser.parse_args(arguments)
    seed = new_seed() if found.seed is None else found.seed
    say_on_stderr(f"seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="lazymem-chaos-"))
    try:
        report = run(
            folder,
            seed,
            found.seconds,
            with_guest=not found.no_guest,
            say=say_on_stderr,
            tls_share=TLS[found.tls],
        )
    except KeyboardInterrupt:
        say_on_stderr("interrupted; everything was taken down")
        return 130
    print(report.to_json() if found.json else "\n".join(report.lines()))
    if not report.passed:
        say_on_stderr(f"what is left of it is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
