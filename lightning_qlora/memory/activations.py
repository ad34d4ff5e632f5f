"""What autograd keeps for the backward pass, counted in a run on tensors without data."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_qlora.adapters.base_model import find_base, is_transformers_model
from lightning_qlora.checkpointing import enable_checkpointing
from lightning_qlora.memory.twin import in_a_line


def forward_of(twin: nn.Module, batch_size: int, length: int, example: Any) -> Callable[[], Any] | None:
    """What runs the module once, with errors of one line, or None if nothing is known of its input."""
    run = _run_of(twin, batch_size, length, example)
    return run and _told(run, twin, batch_size, length)


def _run_of(twin: nn.Module, batch_size: int, length: int, example: Any) -> Callable[[], Any] | None:
    if isinstance(example, Mapping):
        return lambda: twin(**example)
    if example is not None:
        return lambda: twin(*example) if isinstance(example, tuple) else twin(example)
    base: Any = find_base(twin)[1]
    if not is_transformers_model(base):
        return None
    ids = torch.zeros(batch_size, length, dtype=torch.long)
    inputs = {base.main_input_name: ids} if base.main_input_name == "input_ids" else None
    if inputs is None:
        return None
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if base.get_output_embeddings() is not None:
        inputs["labels"] = ids
    return lambda: base(**inputs)


def _told(run: Callable[[], Any], twin: nn.Module, batch_size: int, length: int) -> Callable[[], Any]:
    """`run` with errors that say in a line what was run and what can be changed."""

    def told() -> Any:
        torchs = logging.getLogger("torch._subclasses.fake_tensor")  # it prints the trace of an error that is raised
        before, torchs.disabled = torchs.disabled, True
        try:
            return run()
        except Exception as error:  # whatever a module's own code raises
            base = find_base(twin)[1]
            raise ValueError(
                f"{type(base).__name__}: can't be run with batch_size={batch_size}, sequence_length={length} on "
                f"tensors without data ({in_a_line(error)}). {_advice(getattr(base, 'config', None), length)}"
            ) from error
        finally:
            torchs.disabled = before

    return told


def _advice(config: Any, length: int) -> str:
    places, dtype = getattr(config, "max_position_embeddings", None), getattr(config, "dtype", None)
    advice = []
    if isinstance(places, int) and length > places:
        advice.append(f"It has {places} positions: choose a sequence_length of at most that.")
    if dtype not in (None, torch.bfloat16):
        advice.append(f"Its config says {str(dtype).removeprefix('torch.')}: it may run in bfloat16.")
    return " ".join([*advice, "Or call estimate_memory with an example= of its input."])


def faked(example: Any, mode: FakeTensorMode) -> Any:
    """An example input with shapes and no data."""
    if isinstance(example, tuple):
        return tuple(faked(value, mode) for value in example)
    if isinstance(example, Mapping):
        return {key: faked(value, mode) for key, value in example.items()}
    return mode.from_tensor(example) if isinstance(example, Tensor) else example


def activation_bytes(twin: nn.Module, run: Callable[[], Any], recomputed: bool) -> int:
    """Bytes that autograd keeps, the largest twice (its gradient), and with recomputation one block's in full."""
    kept, largest = _kept(twin, run)
    if recomputed:
        whole, blocks = kept, enable_checkpointing(twin)
        kept, _ = _kept(twin, run)
        kept += (whole - kept) // max(blocks, 1)
    return kept + largest


def _kept(twin: nn.Module, run: Callable[[], Any]) -> tuple[int, int]:
    held = {p.untyped_storage()._cdata for p in [*twin.parameters(), *twin.buffers()]}
    storages: dict[int, Tensor] = {}  # the tensors are held, so that no two storages get one address

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in held:
            storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    twin.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    sizes = [tensor.untyped_storage().nbytes() for tensor in storages.values()]
    return sum(sizes), max(sizes, default=0)
