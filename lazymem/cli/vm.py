"""`lazymem-vm`: reads the command line, and imports the emulator only once that makes sense."""

from __future__ import annotations

from lazymem.cli.quickstart import leave, quick_imports

with quick_imports(trio=False):
    import signal
    import sys

    from lazymem.cli.exitcode import note
    from lazymem.cli.vm_options import VmOptions, parse_command_line
    from lazymem.errors import LazymemError


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    try:
        options = parse_command_line(sys.argv[1:] if argv is None else argv)
    except LazymemError as error:
        return _refused(error)
    except SystemExit as ended:
        # --help and --version.
        return int(ended.code or 0)
    code = _run(options)
    note(options.exit_code_file, code)
    return code


def _run(options: VmOptions) -> int:
    try:
        if options.engine == "qemu":
            with quick_imports(trio=False):
                from lazymem.cli import vm_qemu
            return vm_qemu.run(options)
        with quick_imports():
            import trio

            from lazymem.cli import vm_run
        return trio.run(vm_run.run, options)
    except LazymemError as error:
        return _refused(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _refused(error: LazymemError) -> int:
    print(f"lazymem-vm: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def run() -> None:
    """The installed `lazymem-vm`."""
    leave(main())


if __name__ == "__main__":
    run()
