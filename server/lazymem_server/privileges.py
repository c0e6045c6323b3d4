"""Root given up: what root alone may open is open by then, and the rest of a server's life needs none of its rights."""

from __future__ import annotations

import logging
import os
import pwd
from pathlib import Path

from lazymem.errors import UsageError

log = logging.getLogger("lazymem.server")


def give_up_root(maybe_user: str | None, maybe_learn: Path | None) -> None:
    """Become `maybe_user`, with his groups and no capability. Without one, root is told how it could.

    `maybe_learn`: a folder that must be his to write to.

    Raises:
        UsageError: there is no such user, he is another than we are and we are not root, or that folder is not his.
    """
    if maybe_user is None:
        if os.geteuid() == 0:
            log.info("runs as root, which it needs for nothing: --user NAME gives that up when all is open")
        return
    try:
        entry = pwd.getpwnam(maybe_user)
    except KeyError as error:
        raise UsageError(f"--user {maybe_user}: there is no such user") from error
    if os.geteuid() != entry.pw_uid:
        if os.geteuid() != 0:
            raise UsageError(f"--user {maybe_user}: only root can become another user")
        try:
            os.initgroups(maybe_user, entry.pw_gid)
            os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
            os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
        except OSError as error:  # a user namespace without him
            raise UsageError(f"--user {maybe_user}: cannot become him: {error.strerror}") from error
    if maybe_learn is not None and not os.access(maybe_learn, os.W_OK | os.X_OK):
        raise UsageError(f"--learn {maybe_learn}: {maybe_user} cannot write there: make it his")
