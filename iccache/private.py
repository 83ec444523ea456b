"""New files that hold what people wrote: for their owner and, as far as the umask lets it, the group; for no others."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MODE = 0o660  # less what the umask takes


def make(path: Path) -> Path:
    """Have `path` there, empty where it is new. SQLite gives its log the permissions of the file beside it."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, MODE))
    return path
