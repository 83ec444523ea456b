"""sqlite-utils, without pandas.

It loads pandas where that is installed, to take its types for columns: 38 MB and half a second in every process that
opens a store, for what nothing here uses. So it is told that there is none while it is loaded.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

_loaded = sys.modules.get("pandas")
if _loaded is None:
    sys.modules["pandas"] = cast(ModuleType, None)  # how an import is refused
try:
    from sqlite_utils import Database, Migrations
finally:
    if _loaded is None:
        del sys.modules["pandas"]

__all__ = ["Database", "Migrations"]
