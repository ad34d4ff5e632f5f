"""Models by their names on the Hugging Face Hub."""

import pytest

from lightning_qlora.files.hub import resolve_model


def test_a_hub_that_does_not_answer(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def no_connection(*_, **__):
        raise hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub, "snapshot_download", no_connection)
    with pytest.raises(FileNotFoundError, match=r"Check the name, the connection, and"):
        resolve_model("someone/typo")
