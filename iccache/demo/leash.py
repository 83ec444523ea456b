"""`python -m iccache.demo.leash PARENT COMMAND...`: become COMMAND, and end when PARENT ends, however it ends.

On Linux the kernel keeps the promise, a kill -9 of the parent included. Elsewhere the parent's own clean-up has to do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
