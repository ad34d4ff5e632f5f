"""Folders of others: which files they may name and link to, copies of them, and models by their names on the hub."""

import os

import pytest

from lightning_qlora.files.hub import check_files, check_name, copy_files, file_in, resolve_model
from tests.conftest import raises_in_one_line


def test_what_is_asked_of_the_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **arguments: asked.append((name, arguments)) or "folder")
    assert resolve_model("someone/model") == resolve_model("someone/model", download=False) == "folder"
    files = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    offline = [{"allow_patterns": files, "local_files_only": offline} for offline in (False, True)]
    assert asked == [("someone/model", arguments) for arguments in offline]
    assert resolve_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "is_of_hub"), [("org/name", True), ("./base", False), ("runs/base/last", False), ("gpt2", True)]
)
def test_a_base_that_is_not_there_any_more(name, is_of_hub, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("not there")))
    monkeypatch.chdir(tmp_path)
    with raises_in_one_line(FileNotFoundError, rf"seen from {tmp_path}\).*base_model=FOLDER") as raised:
        resolve_model(name, download=False)
    assert ("download it" in str(raised.value)) is is_of_hub


@pytest.mark.parametrize(
    "name", [r"\\host\share", "//host/share", r"/\host\share", r"\/host", r"\\?\UNC\host\share", "//"]
)
def test_a_name_of_another_computer_in_a_file_is_refused(name, monkeypatch):
    """Windows would send the user's credentials to it."""
    monkeypatch.setattr(os.path, "exists", lambda path: 1 / 0)
    with raises_in_one_line(ValueError, "on another computer"):
        resolve_model(name, download=False)


NAMES = (
    "../x",
    "/x",
    "..",
    ".",
    "",
    "a/b",
    "a/",
    "a\\b",
    "\\x",
    "\\\\host\\x",
    "c:x",
    "c:\\x",
    "a\0b",
    None,
    3,
    ["x"],
    b"x",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leaves_its_folder_is_refused(name):
    with raises_in_one_line(ValueError, "^a name is .*which is not a file of this folder"):
        check_name("a name", name)
    for good in ("x", "x.safetensors", "...", ".x", "x y", "größe", "ab:c"):
        check_name("a name", good)


def links(folder, target, name="tokenizer.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    return folder


@pytest.fixture
def secret(tmp_path):
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id").write_text("PRIVATE KEY")
    return tmp_path / ".ssh/id"


@pytest.mark.parametrize(
    ("folder", "target"),
    [
        ("model", "../.ssh/id"), ("snapshots/model", "../../.ssh/id"), ("a/snapshots/model", "../../../.ssh/id"),
        ("models--a/snapshots/b", "../../../.ssh/id"), ("models--a/snapshots/b", "../../other"),
        ("models--a/snapshots/b", "../../blobs/c/d"), ("models--a/b", "../blobs/c"),
        ("xmodels--a/snapshots/b", "../../blobs/c"),
        ("models--a/snapshots/b", "../../../blobs/ab/cd"), ("models--a/snapshots/b", "../../../models--z/blobs/c"),
        ("models--a/snapshots/b", "../../blobs/../../.ssh/id"), ("models--a/x/b", "../../blobs/c"),
    ],
)  # fmt: skip
def test_links_to_other_places_are_refused(folder, target, tmp_path, secret):
    place = links(tmp_path / folder, target)
    for check in (check_files, lambda place: file_in(place, "tokenizer.json")):
        with raises_in_one_line(ValueError, "is a symbolic link to .*, outside of the folder"):
            check(place)
    links(tmp_path / folder, os.path.abspath(place / target))
    with raises_in_one_line(ValueError, "outside of the folder"):
        check_files(place)


def test_blobs_that_are_a_link_themselves_are_refused(tmp_path, secret):
    place = links(tmp_path / "models--a/snapshots/b", "../../blobs/id")
    (tmp_path / "models--a/blobs").symlink_to(secret.parent)
    with raises_in_one_line(ValueError, r"symbolic link to .*\.ssh/id"):
        check_files(place)


def test_links_of_a_cache_of_the_hub_are_followed(tmp_path):
    """Also in a folder of the snapshot, and to the store that all models of a cache share (huggingface_hub 2)."""
    xet = "ab" + "0" * 62
    model = tmp_path / "hub/models--org--name"
    (model / "blobs").mkdir(parents=True)
    (tmp_path / "hub/blobs/ab").mkdir(parents=True)
    (tmp_path / "hub/blobs/ab" / xet).write_text("weights")
    (model / "blobs/etag").write_text("config")
    (model / "blobs/large").symlink_to(f"../../blobs/ab/{xet}")
    for name in ("snapshots/commit", "snapshots/commit/checkpoint-1/adapter"):
        up = "../" * (name.count("/") + 1)
        folder = links(model / name, f"{up}blobs/etag", "config.json")
        links(folder, f"{up}blobs/large", "weights")
        check_files(folder)
        assert [file_in(folder, each).read_text() for each in ("config.json", "weights")] == ["config", "weights"]
    (tmp_path / "link").symlink_to(model / "snapshots/commit")
    check_files(tmp_path / "link")
    links(tmp_path / "own", "b", "a")
    (tmp_path / "own/b").write_text("inside")
    check_files(tmp_path / "own")
    links(tmp_path / "own", "a", "a")  # a loop is a link to itself
    assert not file_in(tmp_path / "own", "a").exists()


def test_copies_are_of_contents_alone(tmp_path, secret):
    source = tmp_path / "source"
    target = tmp_path / "target"
    for folder in (source / "inside", target):
        folder.mkdir(parents=True)
    for name in ("tokenizer.json", "helper", ".env", ".git", "kept", "a.bin"):
        (source / name).write_text(name)
    (target / "kept").write_text("before")
    os.mkfifo(source / "pipe")
    (source / "helper").chmod(0o4755)
    (source / "tokenizer.json").chmod(0o600)
    copy_files(source, target, without=(".bin",))
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "kept": "before", "helper": "helper", "tokenizer.json": "tokenizer.json"
    }  # fmt: skip
    (target / "plain").touch()
    assert {path.stat().st_mode for path in target.iterdir()} == {(target / "plain").stat().st_mode}
    links(source, secret, "merges.txt")
    with raises_in_one_line(ValueError, "symbolic link"):
        copy_files(source, target, without=())
    assert not (target / "merges.txt").exists()
