"""Folders that are written completely or not at all: several processes, killed processes, targets that are refused."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lightning_qlora.files import folder_writer
from lightning_qlora.files.folder_writer import INCOMPLETE, atomic_files, atomic_folder, check_free

posix = pytest.mark.skipif(os.name != "posix", reason="forks, and locks of POSIX")


def in_processes(work, count=2):
    """Run `work(number, barrier)` in forked processes; their exit codes, 3 where a writer was refused."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(count)

    def run(number):
        try:
            work(number, barrier)
        except FileExistsError:
            os._exit(3)
        os._exit(0)

    processes = [fork.Process(target=run, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return sorted(process.exitcode for process in processes)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def unfinished(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(INCOMPLETE) and path.is_dir()]


@posix
@pytest.mark.parametrize("exists", [False, True])
def test_two_processes_write_one_folder_and_the_second_is_refused(exists, tmp_path):
    target = tmp_path / "out"
    if exists:
        target.mkdir()

    def work(number, barrier):
        with atomic_folder(target) as partial:
            (partial / "a").write_text(str(number))
            barrier.wait()
            (partial / "b").write_text(str(number))
            barrier.wait()

    assert in_processes(work) == [0, 3]
    assert (target / "a").read_text() == (target / "b").read_text()
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"] and not hidden(tmp_path)


@posix
def test_several_processes_write_files_and_those_of_the_last_one_remain(tmp_path):
    target = tmp_path / "adapter"

    def work(number, barrier):
        with atomic_files(target) as partial:
            for name in ("model.safetensors", "config.json"):
                (partial / name).write_text(str(number))
            barrier.wait()

    for _ in range(20):
        assert in_processes(work, 3) == [0, 0, 0]
        assert len({path.read_text() for path in target.iterdir()}) == 1
        assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]


@posix
@pytest.mark.parametrize("writing", [atomic_folder, atomic_files])
def test_folders_of_killed_processes_are_deleted_and_those_of_running_ones_are_not(writing, tmp_path):
    target, fork = tmp_path / "out", multiprocessing.get_context("fork")
    begun = fork.Event()

    def killed():
        with writing(target) as partial:
            (partial / "half").write_text("x")
            begun.set()
            signal.pause()

    process = fork.Process(target=killed)
    process.start()
    begun.wait(60)
    place = tmp_path if writing is atomic_folder else target
    assert len(unfinished(place)) == 1
    with writing(target) as partial:
        assert len(unfinished(place)) == 2
        process.kill()
        process.join()
        (partial / "whole").write_text("x")
    assert len(unfinished(place)) == 1 and (target / "whole").exists()
    if writing is atomic_folder:
        target.rename(tmp_path / "moved")
    with writing(target):
        pass
    assert not hidden(place)


@posix
@pytest.mark.parametrize("writing", [atomic_folder, atomic_files])
def test_a_process_killed_before_its_folder_existed_leaves_nothing(writing, tmp_path):
    target = tmp_path / "out"
    place = tmp_path if writing is atomic_folder else target
    place.mkdir(exist_ok=True)
    (place / f"{INCOMPLETE}{'0' * 32}.lock").touch()
    with writing(target):
        pass
    assert not hidden(place)


@pytest.mark.parametrize("writing", [atomic_folder, atomic_files])
def test_folders_of_the_user_are_never_deleted(writing, tmp_path):
    target = tmp_path / "out"
    place = tmp_path if writing is atomic_folder else target
    names = [
        ".incomplete-notes",
        ".out.incomplete",
        f"{INCOMPLETE}notes",
        f"{INCOMPLETE}{'0' * 32}",
        ".lightning_qlora",
    ]
    for name in names:
        (place / name).mkdir(parents=True)
        (place / name / "file").write_text("x")
    (place / f"{INCOMPLETE}notes.lock").touch()  # not a name that we give
    with writing(target):
        pass
    assert all((place / name / "file").exists() for name in names)
    assert (place / f"{INCOMPLETE}notes.lock").exists()


@posix
@pytest.mark.parametrize("writing", [atomic_folder, atomic_files])
def test_files_are_on_the_disk_before_they_are_renamed(writing, tmp_path, monkeypatch):
    target, events, fsync = tmp_path / "out", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    for name in ("rename", "replace"):
        method = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda *paths, method=method: (events.append("rename"), method(*paths)))
    with writing(target) as partial:
        for name in ("weights.safetensors", "config.json"):
            (partial / name).write_text("x")
    flushed = set(events[: events.index("rename")])
    assert {path.stat().st_ino for path in target.iterdir()} <= flushed
    assert events[-1] == (target if writing is atomic_files else tmp_path).stat().st_ino  # the renames themselves


@pytest.mark.parametrize("writing", [atomic_folder, atomic_files])
def test_after_an_error_nothing_is_left(writing, tmp_path):
    def fail(error):
        with writing(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    # A full disk, as safetensors and as os.fsync report it.
    for error in (
        SafetensorError('Error while serializing: IoError(Os { message: "No space left on device" })'),
        OSError(errno.ENOSPC, "No space left on device"),
    ):
        with pytest.raises(OSError, match=r"out: could not be written \(.*No space left on device"):
            fail(error)
    with pytest.raises(FileNotFoundError, match="an error of the caller"):
        fail(FileNotFoundError("an error of the caller"))
    assert not list(tmp_path.iterdir())


@posix
@posix
def test_a_writer_that_waits_too_long_for_another_one_changes_nothing(tmp_path, monkeypatch):
    """It went on without the lock after 10 s: on a busy disk two writers could leave files of both."""
    import fcntl

    monkeypatch.setattr(folder_writer, "LOCK_TIMEOUT", 0.2)
    (tmp_path / "x.json").write_text("1")
    with (tmp_path / folder_writer.LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(TimeoutError, match=r"another process has been replacing its files for 0\.2 s"),
            atomic_files(tmp_path) as partial,
        ):
            (partial / "x.json").write_text("2")
    assert (tmp_path / "x.json").read_text() == "1"
    with atomic_files(tmp_path) as partial:
        (partial / "x.json").write_text("2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.json", "2")]


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
