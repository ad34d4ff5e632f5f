"""Compares adapter folders."""


def assert_same_folders(first, second):
    """To the byte, with our metadata: how the base was quantized, fingerprints and checksums."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
