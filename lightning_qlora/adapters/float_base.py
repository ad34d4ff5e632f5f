"""Adapters for the base in 16 or 32 bit, whatever they started from."""

import os
from dataclasses import replace

from lightning_qlora.adapters.folder import Adapter
from lightning_qlora.files import WeightFolder, resolve_model
from lightning_qlora.linear_state import CheckpointMismatchError
from lightning_qlora.starts.since_start import Origin, belongs_to, less_start, start_again


def for_float_base(adapter: Adapter, base: str | os.PathLike[str] | None = None) -> Adapter:
    """The same adapter for the base in 16 or 32 bit: its difference to the start, of rank 2 r, layer by layer.

    Args:
        adapter: From a module or a checkpoint; one that started at B = 0 comes back as it is.
        base: Folder of safetensors, or hub name, of the base it was trained on; None: what the adapter names.

    Raises:
        FileNotFoundError, ValueError: If there is no such base, or the adapter has no such difference.
        CheckpointMismatchError: If the base lacks one of its layers.
    """
    if belongs_to(adapter.quantization) is None:
        return adapter
    if adapter.origin is None:
        raise ValueError(
            f"{adapter.source}: an adapter folder does not hold what its start was made from. Export from the "
            "Lightning checkpoint, or from the module."
        )
    _check_input_sizes(adapter, adapter.origin)
    if adapter.use_dora:
        raise ValueError(
            f"{adapter.source}: DoRA's change since the start is no adapter of rank 2 r. Merge the adapter instead."
        )
    source = base or adapter.base_model
    if not source:
        raise ValueError(f"{adapter.source}: names no base model, whose weights the start was made from: pass base=.")
    folder = WeightFolder(resolve_model(os.fspath(source)))
    layers = {}
    for name, layer in adapter.layers.items():
        key = folder.find(f"{name}.weight")
        if key is None or folder.is_packed(key):
            what = "has no tensor" if key is None else "is in 4 bits, and has no float"
            raise CheckpointMismatchError(f"{folder.folder}: {what} {name + '.weight'!r}.")
        weight = folder.tensors([key])[key]
        rows = weight.T.contiguous() if adapter.is_transposed(name, weight.shape) else weight
        begin = start_again(_origin_of(adapter, name), name, rows, adapter.bases.get(name))
        lora_a, lora_b = less_start(layer.lora_A, layer.lora_B, *begin)
        # The factor alpha / r, or alpha / sqrt(r), stays.
        alpha = layer.alpha * (len(lora_a) / layer.r) ** (0.5 if adapter.use_rslora else 1)
        layers[name] = replace(layer, lora_A=lora_a, lora_B=lora_b, alpha=alpha)
    return replace(adapter, layers=layers, quantization=None, bases={}, origin=None)


def _check_input_sizes(adapter: Adapter, origin: Origin) -> None:
    """Refuse a "calibrated" start that came from a folder, and with it no input sizes: it can't be made again."""
    if origin.config.start != "calibrated":
        return
    for name, layer in adapter.layers.items():
        if name not in origin.input_rms and bool(layer.lora_B.any()):
            raise ValueError(
                f"{adapter.source}: {name}: its adapter started from input sizes that are not known here, since an "
                "adapter folder does not hold them, so the start can't be taken off. Export with onto='float' from the "
                "checkpoint, or the module, that it started in."
            )


def _origin_of(adapter: Adapter, name: str) -> Origin:
    """Where a layer's start comes from, with the layer's own rank and scaling, which a folder may have brought."""
    assert adapter.origin is not None
    layer, config = adapter.layers[name], adapter.origin.config
    own = replace(
        config, r=layer.r, lora_alpha=layer.alpha, use_rslora=adapter.use_rslora, rank_pattern={}, alpha_pattern={}
    )
    return replace(adapter.origin, config=own)
