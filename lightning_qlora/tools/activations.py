"""Bytes that autograd saves for the backward pass, counted by running a model on tensors without data."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lightning_qlora.adapters.base_model import find_base_model
from lightning_qlora.layers.deferred_head import DeferredHead
from lightning_qlora.layers.deferred_logits import DeferredLogits
from lightning_qlora.layers.names import is_transformers_model
from lightning_qlora.layers.piecewise_cross_entropy import piece_bytes
from lightning_qlora.tools.fake_model import one_line
from lightning_qlora.tools.patches import silence_fake_tensor_log
from lightning_qlora.training.gradient_checkpointing import enable_gradient_checkpointing


def forward_function(fake_model: nn.Module, batch_size: int, length: int, example: Any) -> Callable[[], Any] | None:
    """A function that runs the model once; None if its inputs are not known.

    The function raises ValueError, with a message of one line, if the model fails, and torch's error where the code of
    the model depends on values.
    """
    forward = _forward(fake_model, batch_size, length, example)
    if forward is None:
        return None

    def run() -> Any:
        try:
            with silence_fake_tensor_log():
                return forward()
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise
        except Exception as error:  # any error of the model's own code
            base = find_base_model(fake_model)[1]
            raise ValueError(
                f"{type(base).__name__}: can't be run with batch_size={batch_size}, sequence_length={length} on "
                f"tensors without data ({one_line(error)}). {_advice(getattr(base, 'config', None), length)}"
            ) from error

    return run


def _forward(fake_model: nn.Module, batch_size: int, length: int, example: Any) -> Callable[[], Any] | None:
    if isinstance(example, Mapping):
        return lambda: fake_model(**example)
    if example is not None:
        return lambda: fake_model(*example) if isinstance(example, tuple) else fake_model(example)
    base: Any = find_base_model(fake_model)[1]
    if not is_transformers_model(base) or base.main_input_name != "input_ids":
        return None
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="cpu")
    inputs = {"input_ids": ids}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if base.get_output_embeddings() is not None:
        inputs["labels"] = ids
    return lambda: base(**inputs)


def _advice(config: Any, length: int) -> str:
    positions, dtype = getattr(config, "max_position_embeddings", None), getattr(config, "dtype", None)
    advice = []
    if isinstance(positions, int) and length > positions:
        advice.append(f"It has {positions} positions: choose a sequence_length of at most that.")
    if dtype not in (None, torch.bfloat16):
        advice.append(f"The dtype of its config is {str(dtype).removeprefix('torch.')}: it may run in bfloat16.")
    return " ".join([*advice, "Or call estimate_memory with an example= of its input."])


def fake_example(example: Any, mode: FakeTensorMode) -> Any:
    """Copy an example input; the tensors of the copy have no data."""
    if isinstance(example, tuple):
        return tuple(fake_example(value, mode) for value in example)
    if isinstance(example, Mapping):
        return {key: fake_example(value, mode) for key, value in example.items()}
    return mode.from_tensor(example) if isinstance(example, Tensor) else example


def activation_bytes(fake_model: nn.Module, run: Callable[[], Any], gradient_checkpointing: bool) -> int | None:
    """Peak bytes of activations: all that autograd saves, and either two gradients or a piece of deferred logits.

    The gradients are those of the output and the input of the operation that saved the largest tensor: in a language
    model usually the log-softmax of the logits, in whose backward pass everything else is still held.

    With gradient checkpointing: the inputs of all blocks, and the activations of one block. None if the code of the
    model depends on values, as the loops over experts of some mixtures do.
    """
    try:
        saved, largest = _saved_bytes(fake_model, run)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    if gradient_checkpointing:
        without, blocks = saved, enable_gradient_checkpointing(fake_model)
        saved, _ = _saved_bytes(fake_model, run)
        saved += (without - saved) // max(blocks, 1)
    return saved + largest


def _saved_bytes(fake_model: nn.Module, run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of all storages that autograd saves in one forward pass, and those of the two gradients or the piece."""
    own = {p.untyped_storage()._cdata for p in [*fake_model.parameters(), *fake_model.buffers()]}
    pieces = [0]  # bytes of the buffers that cross entropy of deferred logits needs
    saved: dict[int, Tensor] = {}  # references keep the storages alive, so no two of them have the same address

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def count_piece(head: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(output, DeferredLogits):
            pieces.append(piece_bytes(output.numel(), output.dtype))

    heads = [part for part in fake_model.modules() if isinstance(part, DeferredHead) and isinstance(part, nn.Module)]
    hooks = [head.register_forward_hook(count_piece) for head in heads]
    fake_model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for hook in hooks:
        hook.remove()
    sizes = [tensor.untyped_storage().nbytes() for tensor in saved.values()]
    return sum(sizes), max(2 * max(sizes, default=0), *pieces)
