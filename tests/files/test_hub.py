"""Models by their names on the Hugging Face Hub."""

import pytest

from lightning_qlora.files.hub import resolve_model


def test_what_is_asked_of_the_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **arguments: asked.append((name, arguments)) or "folder")
    assert resolve_model("someone/model") == resolve_model("someone/model", download=False) == "folder"
    files = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    offline = [{"allow_patterns": files, "local_files_only": offline} for offline in (False, True)]
    assert asked == [("someone/model", arguments) for arguments in offline]
    assert resolve_model(str(tmp_path)) == str(tmp_path)
