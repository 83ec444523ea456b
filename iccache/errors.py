"""Everything that can go wrong, as one tree.

IccacheError
├── ConfigError              exit code 2: the configuration or the command line is wrong
├── StoreError               the store cannot be opened, read or written
│   └── StoreVersionError    the store was made by a newer version
├── SelectionError           embedding, recall or ranking failed: the request goes on without examples
├── BackendError             an upstream did not answer
│   └── BackendTimeout
└── RequestError             the client's request cannot be served: carries status, type, code, param
"""

from __future__ import annotations

import errno

from iccache.types import Reason


class IccacheError(Exception):
    """The root of the tree. Its text is one line that a user can act on."""


class ConfigError(IccacheError):
    """The configuration cannot be used as it is."""


class StoreError(IccacheError):
    """The store cannot be opened, read or written."""


class StoreVersionError(StoreError):
    """The store was made by a newer version of iccache."""


class SelectionError(IccacheError):
    """Embedding, recall or ranking failed."""


class BackendError(IccacheError):
    """A backend did not answer before its first byte, or broke off after it."""

    def __init__(self, message: str, reason: Reason, *, stale: bool = False, lasting: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.stale = stale  # a pooled connection had been closed by the upstream: worth one more try
        self.lasting = lasting  # it would do the same again
        self.should_retry = True  # False: the client is not to try again either

    @property
    def unbilled(self) -> bool:
        """Whether the backend surely took nothing for it: it was never asked, or sent the request elsewhere."""
        return self.reason in (Reason.CONNECT, Reason.REDIRECT)


class BackendTimeout(BackendError):
    """A backend was too slow at connecting, at its first byte, or between two bytes."""


class RequestError(IccacheError):
    """The client's request cannot be served. Rendered in the shape of the dialect that was spoken."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry


# of which the operator is to be told: a full disk, missing permissions, a path that leads nowhere
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
BARRED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def of_system(exc: OSError) -> IccacheError | None:
    """What a command line says of `exc`; None where it is no matter of the disk or of permissions.

    Where it names no file, what could not be written was standard output.
    """
    if exc.errno not in (*FULL, *BARRED):
        return None
    return IccacheError(f"{exc.filename or 'standard output'}: {exc.strerror}")
