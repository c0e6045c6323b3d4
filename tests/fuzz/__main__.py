"""Coverage-guided fuzzing of every target: ``python -m tests.fuzz [--seconds N] [--keep] [TARGET ...]``.

Each target runs in a process of its own for so many seconds, with libFuzzer's limits: 512 MiB, 5 s an input, inputs of
at most 4 KiB. What breaks a target is written to ``.cache/fuzz/TARGET.crash-...`` and named; put it into the corpus
under a name that says what it is, together with the mend. What reaches new code stays in ``.cache/fuzz`` for the next
run; ``--keep`` adds the smallest set of it that reaches everything to the corpus.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.seeds import CORPUS, MOST_BYTES, file_name, seeds
from tests.fuzz.targets import TARGETS

WORK = Path(__file__).resolve().parents[2] / ".cache" / "fuzz"

LIMITS = (f"-max_len={MOST_BYTES}", "-rss_limit_mb=512", "-timeout=5", "-print_final_stats=0", "-verbosity=0")

MOST_KEPT_BYTES = 1024
MOST_KEPT_FILES = 24
"""Of a target: a corpus in a repository is for people, too. What is new and shortest."""


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    unknown = set(options.target) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is missing: pip install -e .[fuzz] (Linux on x86-64)", file=sys.stderr)
        return 3
    broken = [name for name in options.target or TARGETS if not _fuzz(name, options.seconds, keep=options.keep)]
    print(f"fuzz: {', '.join(broken) or 'nothing'} broken", flush=True)
    return 1 if broken else 0


def _fuzz(name: str, seconds: int, *, keep: bool) -> bool:
    """Whether the target held."""
    found, log = WORK / name, WORK / f"{name}.log"
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lazymem-fuzz-") as folder, log.open("wb") as output:
        made = _write_seeds(name, Path(folder))
        print(f"fuzz: {name}, {seconds} s", flush=True)
        child = [sys.executable, "-m", "tests.fuzz.child", name]
        limits = (f"-max_total_time={seconds}", f"-artifact_prefix={WORK}/{name}.", *LIMITS)
        done = subprocess.run([*child, *limits, str(found), str(made)], stdout=output, stderr=output, check=False)
        if keep and not done.returncode:
            _keep(name, child, found, made)
    if done.returncode:
        print(f"{log.read_text(errors='replace')[-3000:]}\nfuzz: {name} is broken, see {log}", flush=True)
    return done.returncode == 0


def _write_seeds(name: str, folder: Path) -> Path:
    made, disk = folder / "seeds", folder / "disk"
    made.mkdir()
    for data in seeds(name, disk):
        (made / file_name(data)).write_bytes(data)
    return made


def _keep(name: str, child: list[str], found: Path, made: Path) -> None:
    """libFuzzer's merge: of what was found, the least that reaches what the seeds do not."""
    with tempfile.TemporaryDirectory(prefix="lazymem-fuzz-") as folder:
        merged = Path(folder, "merged")
        merged.mkdir()
        for seed in made.iterdir():
            (merged / seed.name).write_bytes(seed.read_bytes())
        command = Path(folder, "child")  # libFuzzer starts itself again, by one word
        command.write_text(f'#!/bin/sh\nLAZYMEM_FUZZ_COMMAND="$0" exec {shlex.join(child)} "$@"\n')
        command.chmod(0o700)
        merge = [str(command), "-merge=1", *LIMITS, str(merged), str(found)]
        subprocess.run(merge, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        new = [path.read_bytes() for path in merged.iterdir() if not (made / path.name).exists()]
        for data in sorted((data for data in new if len(data) <= MOST_KEPT_BYTES), key=len)[:MOST_KEPT_FILES]:
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            (CORPUS / name / file_name(data)).write_bytes(data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"one of {', '.join(TARGETS)}; default: all, one after the other")
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="each target, default 60")
    parser.add_argument("--keep", action="store_true", help="add what reached new code to the corpus")
    return parser


if __name__ == "__main__":
    sys.exit(main())
