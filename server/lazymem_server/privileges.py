"""Root given up: what root alone may open is open by then, and the rest of a server's life needs none of its rights.

Started as root, a server becomes the user of `--user`; without that, who owns the folder of `--learn`; else the account
`lazymem-serve` (that of the unit), or nobody. Where root can become no other user (a user namespace that knows root
alone, a container without CAP_SETUID) it gives up all capabilities instead, and says so.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from lazymem.capabilities import keep_only, no_new_privileges
from lazymem.errors import UsageError
from lazymem.settings import TlsSettings
from lazymem.tls.contexts import make_context
from lazymem.tls.failures import Side

log = logging.getLogger("lazymem.server")

ACCOUNTS = ("lazymem-serve", "nobody")
"""The first that this host knows: one of its own is better than one that others may have, too."""

NOBODY = 65534
"""Where no user of that name is known (an image without a passwd file): the kernel's own overflow user."""

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2


@dataclass(frozen=True, slots=True)
class Account:
    """Whom root becomes. `asked`: by name (`--user`), so nothing less will do."""

    name: str
    user: int
    group: int
    groups: tuple[int, ...]
    asked: bool = False


def maybe_account(maybe_user: str | None, maybe_learn: Path | None) -> Account | None:
    """Whom to become once all is open; None: we are who we should be.

    Raises:
        UsageError: there is no such user, he is root, or he is another than we are and we are not root.
    """
    root = os.geteuid() == 0
    if maybe_user is None:
        return _found(maybe_learn) if root else None
    try:
        found = replace(_named(maybe_user), asked=True)
    except KeyError as error:
        raise UsageError(f"--user {maybe_user}: there is no such user") from error
    if found.user == 0:
        raise UsageError(f"--user {maybe_user}: never as root, which a server needs for nothing")
    if found.user != os.geteuid() and not root:
        raise UsageError(f"--user {maybe_user}: only root can become another user")
    return found if root else None


def _named(name: str) -> Account:
    """Raises KeyError."""
    entry = pwd.getpwnam(name)
    return Account(name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)))


def _found(maybe_learn: Path | None) -> Account:
    if maybe_learn is not None and maybe_learn.is_dir():
        owner = maybe_learn.stat()
        if owner.st_uid != 0:
            try:
                return _named(pwd.getpwuid(owner.st_uid).pw_name)
            except KeyError:
                return Account(f"user {owner.st_uid}", owner.st_uid, owner.st_gid or NOBODY, ())
    for name in ACCOUNTS:
        try:
            return _named(name)
        except KeyError:
            continue
    return Account("nobody", NOBODY, NOBODY, ())


def make_folder(folder: Path, maybe_account: Account | None) -> None:
    """`folder` exists; made here, it is the account's.

    Raises:
        OSError: it cannot be made.
    """
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    if maybe_account is not None:
        try:
            os.chown(folder, maybe_account.user, maybe_account.group)
        except OSError:
            log.debug("%s stays root's", folder)  # a user namespace without him: we stay root there


def with_own_key(tls: TlsSettings, maybe_account: Account | None) -> TlsSettings:
    """`tls`, its key in memory if the account may not read the file: so a renewed certificate of that key is used
    without a restart, as always. What it will not be able to read again is said.

    Raises:
        UsageError: the key cannot be read.
    """
    if maybe_account is None:
        return tls
    make_context(tls, Side.SERVER)  # what is wrong with them is said of the files, and while they can be read
    try:
        with _eyes_of(maybe_account):
            unreadable = {path for path in (tls.cert, tls.key, tls.ca) if not _readable(path)}
    except OSError:
        return tls  # we can become nobody else: see `give_up_root`
    for path in sorted(unreadable):
        log.info(
            "%s: %s cannot read it: another %s takes a restart",
            path,
            maybe_account.name,
            "key" if path == tls.key else "one",
        )
    return structs.replace(tls, key=_in_memory(tls.key, maybe_account)) if tls.key in unreadable else tls


def _readable(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _in_memory(key: Path, account: Account) -> Path:
    """A copy that the account may read, for as long as this process lives."""
    memory = os.memfd_create("lazymem-tls-key")
    with open(memory, "wb", closefd=False) as copy:
        copy.write(key.read_bytes())
    os.fchmod(memory, 0o600)
    os.fchown(memory, account.user, account.group)
    return Path(f"/proc/self/fd/{memory}")


@contextmanager
def _eyes_of(account: Account) -> Iterator[None]:
    """The account's rights to files within the block. Raises OSError: we cannot become him."""
    groups, group = os.getgroups(), os.getegid()
    with _parents_end_kept():
        try:
            os.setgroups(account.groups)
            os.setresgid(-1, account.group, -1)
            os.setresuid(-1, account.user, -1)
            yield
        finally:
            os.setresuid(-1, 0, -1)
            os.setresgid(-1, group, -1)
            os.setgroups(groups)


@contextmanager
def _parents_end_kept() -> Iterator[None]:
    """Whoever started us may have asked that we end with him (prctl(2)), which the kernel forgets with each change of
    user: `lazymem-mount` of a local folder does."""
    libc = ctypes.CDLL(None)
    number, parent = ctypes.c_int(0), os.getppid()
    libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(number), 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_PDEATHSIG, number.value, 0, 0, 0)
        if number.value and os.getppid() != parent:
            os.kill(os.getpid(), number.value)


def give_up_root(maybe_account: Account | None) -> None:
    """Become the account, with its groups and no capability, for good; says so. None: nothing changes.

    Raises:
        UsageError: he was asked for, and we cannot become him; or root cannot be given up at all.
    """
    if maybe_account is not None:
        _become(maybe_account)
        no_new_privileges()


def _become(account: Account) -> None:
    """All three ids, so none is left to go back by."""
    try:
        with _parents_end_kept():
            os.setgroups(account.groups)
            os.setresgid(account.group, account.group, account.group)
            os.setresuid(account.user, account.user, account.user)
    except OSError as error:  # a user namespace without him
        if account.asked:
            raise UsageError(f"--user {account.name}: cannot become him: {error.strerror}") from error
        _give_up_capabilities()
        log.info("root here cannot become %s (%s): serves without any capability", account.name, error.strerror)
    else:
        log.info("serves as %s, no longer as root", account.name)


def _give_up_capabilities() -> None:
    """All of this thread, the only one so far; those that it starts have no more.

    Raises:
        UsageError: the kernel refuses; a server does not run as root.
    """
    try:
        keep_only(())
    except OSError as error:
        raise UsageError(
            f"runs as root, and cannot give that up ({error.strerror}): start it as another user"
        ) from error
