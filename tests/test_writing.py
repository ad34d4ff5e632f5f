"""Folders written whole or not at all: by several processes, by killed ones, and where no folder can be put."""

import multiprocessing
import os
import signal

import pytest
import torch
from safetensors import SafetensorError

from lightning_qlora.files import WeightFolder
from lightning_qlora.writing import ShardWriter, check_free, replaced_files, whole_folder

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


@posix
@pytest.mark.parametrize("exists", [False, True])
def test_of_two_writers_one_is_refused_and_the_folder_is_whole(exists, tmp_path):
    target = tmp_path / "out"
    if exists:
        target.mkdir()

    def work(number, barrier):
        with whole_folder(target) as partial:
            (partial / "a").write_text(str(number))
            barrier.wait()
            (partial / "b").write_text(str(number))
            barrier.wait()

    assert in_processes(work) == [0, 3]
    assert (target / "a").read_text() == (target / "b").read_text()
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"] and not hidden(tmp_path)


@posix
def test_of_two_writers_of_files_one_leaves_all_of_its_own(tmp_path):
    target = tmp_path / "adapter"

    def work(number, barrier):
        with replaced_files(target) as partial:
            for name in ("model.safetensors", "config.json"):
                (partial / name).write_text(str(number))
            barrier.wait()

    for _ in range(20):
        assert in_processes(work, 3) == [0, 0, 0]
        assert len({path.read_text() for path in target.iterdir()}) == 1
        assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]


@posix
@pytest.mark.parametrize("writing", [whole_folder, replaced_files])
def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(writing, tmp_path):
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
    place = tmp_path if writing is whole_folder else target
    assert len(hidden(place)) == 1
    with writing(target) as partial:
        assert len(hidden(place)) == 2
        process.kill()
        process.join()
        (partial / "whole").write_text("x")
    assert len(hidden(place)) == 1 and (target / "whole").exists()
    if writing is whole_folder:
        target.rename(tmp_path / "moved")
    with writing(target):
        pass
    assert not hidden(place)


@pytest.mark.parametrize("writing", [whole_folder, replaced_files])
def test_after_an_error_nothing_is_left(writing, tmp_path):
    def fail(error):
        with writing(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    # A full disk, as safetensors says it.
    with pytest.raises(OSError, match=r"out: could not be written \(.*No space left on device"):
        fail(SafetensorError('Error while serializing: IoError(Os { message: "No space left on device" })'))
    assert not list(tmp_path.iterdir())


@posix
def test_permissions_are_those_of_any_new_folder(tmp_path):
    (tmp_path / "usual").mkdir()
    with whole_folder(tmp_path / "deep" / "out"):
        pass
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_where_no_folder_can_be_put_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "mount").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name, message in (
        ("file", "exists and is not an empty folder"),
        ("link", r"is a symbolic link.* Pass the folder it points to \(.*empty\)"),
        ("dangling", "is a symbolic link"),
        ("empty", "is the folder this runs in.* Name a folder inside it"),
    ):
        with pytest.raises(FileExistsError, match=f"{name}: {message}"):
            check_free(tmp_path / name)
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("mount") or ismount(path))
    with pytest.raises(FileExistsError, match="mount: is a mount point"):
        check_free(tmp_path / "mount")


def test_shards_have_an_index(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=100)
    for number in range(3):
        writer.add(f"w{number}", torch.full((20,), float(number)))
    writer.finish()
    found = WeightFolder(tmp_path)
    assert len(found.files()) == 3 and torch.equal(found.tensors(["w2"])["w2"], torch.full((20,), 2.0))
