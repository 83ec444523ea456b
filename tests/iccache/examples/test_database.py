"""Opening a store loads no pandas, and takes it from nobody."""

import subprocess
import sys
from pathlib import Path


def said(folder: Path, code: str) -> str:
    (folder / "pandas.py").write_text("WHO = 'pandas'\n\ndef __getattr__(name):\n    return type(name, (), {})\n")
    path = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_pandas_is_not_loaded_where_it_is_installed_and_can_be_afterwards(tmp_path: Path) -> None:
    code = "import iccache.examples.store; print('pandas' in sys.modules)\nimport pandas; print(pandas.WHO)"
    assert said(tmp_path, code).split() == ["False", "pandas"]


def test_pandas_that_is_there_already_stays(tmp_path: Path) -> None:
    code = "import pandas, iccache.examples.store; print(sys.modules['pandas'] is pandas, pandas.WHO)"
    assert said(tmp_path, code).split() == ["True", "pandas"]
