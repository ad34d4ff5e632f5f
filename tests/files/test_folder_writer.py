"""Folders that are written completely or not at all, and targets that are refused."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lightning_qlora.files.folder_writer import atomic_files, atomic_folder, check_free


@pytest.mark.parametrize("writing", [atomic_folder, atomic_files])
def test_after_an_error_nothing_is_left(writing, tmp_path):
    def fail(error, others_begin=lambda: None):
        with writing(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            assert partial.name.startswith(".") and [*tmp_path.rglob("half")] == [partial / "half"]
            others_begin()
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    # A full disk, as safetensors and as the operating system report it.
    for error in (
        SafetensorError('Error while serializing: IoError(Os { message: "No space left on device" })'),
        OSError(errno.ENOSPC, "No space left on device"),
    ):
        with pytest.raises(OSError, match=r"out: could not be written \(.*No space left on device"):
            fail(error)
    with pytest.raises(FileNotFoundError, match="an error of the caller"):
        fail(FileNotFoundError("an error of the caller"))
    assert not list(tmp_path.iterdir())

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt(), lambda: (tmp_path / "out/theirs").mkdir(parents=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_files_are_replaced_and_others_stay(tmp_path):
    (tmp_path / "notes").write_text("mine")

    def write(number, error=None):
        with atomic_files(tmp_path) as partial:
            (partial / "config.json").write_text(number)
            (partial / "weights").write_text(number)
            if error is not None:
                raise error

    for number in "12":
        write(number)
        with pytest.raises(KeyboardInterrupt):
            write("3", KeyboardInterrupt())
        expected = {"notes": "mine", "config.json": number, "weights": number}
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected


def test_an_empty_folder_is_replaced_where_a_rename_does_not_do_it(tmp_path, monkeypatch):
    def rename(path, target, rename=Path.rename):
        assert not target.exists()  # on Windows an error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "out/file").read_text() == "x"


def test_permissions_are_those_of_any_new_folder(tmp_path):
    (tmp_path / "usual").mkdir()
    with atomic_folder(tmp_path / "deep" / "out"):
        pass
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_targets_that_cannot_be_replaced_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "mount").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name, message in (
        ("file", "exists and is not an empty folder"),
        ("link", "is a symbolic link to .*empty"),
        ("dangling", "is a symbolic link"),
        ("empty", "is the current directory"),
    ):
        with pytest.raises(FileExistsError, match=f"{name}: {message}"):
            check_free(tmp_path / name)
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("mount") or ismount(path))
    with pytest.raises(FileExistsError, match="mount: is the current directory or a mount point"):
        check_free(tmp_path / "mount")
