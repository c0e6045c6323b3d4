"""The one error that ended a command, out of the groups that nurseries wrap it in."""

from __future__ import annotations

from lazymem.errors import LazymemError


def cause_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A bug before an error of ours before an interrupt: what hides behind the others is what must be seen."""
    leaves = list(_leaves(group))
    bugs = [error for error in leaves if not isinstance(error, LazymemError | KeyboardInterrupt)]
    ours = [error for error in leaves if isinstance(error, LazymemError)]
    return (bugs or ours or leaves)[0]


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
