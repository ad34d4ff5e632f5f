"""The memory of a training step beside the model, counted by running the step on tensors without data.

The forward and the backward pass run operation by operation, and each new tensor counts until autograd or Python frees
it. So the peak is found wherever it is: in the loss, in the backward pass of a block, or at the end.
"""

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qlora.checks import one_line
from lightning_qlora.config import DeviceName
from lightning_qlora.layers.names import is_transformers_model
from lightning_qlora.survey.parts import Parts
from lightning_qlora.tensors.device_types import IN_16_BITS
from lightning_qlora.tensors.readable import Readable
from lightning_qlora.tools.fake_model import RealIndices

ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SEED = 12  # position of the dropout seed in the arguments of the op `lora_linear`
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")  # in configs


def forward_function(fake_model: nn.Module, batch_size: int, length: int, example: Any) -> Callable[[], Any] | None:
    """A function that runs the model once; None if its inputs are not known. ValueError for more than its positions."""
    if isinstance(example, Mapping):
        return lambda: fake_model(**example)
    if isinstance(example, tuple):
        return lambda: fake_model(*example)
    if example is not None:
        return lambda: fake_model(example)
    base: Any = Parts.of(fake_model).base.root
    if not is_transformers_model(base) or base.main_input_name != "input_ids":
        return None
    positions = positions_of(fake_model)
    if positions is not None and length > positions:
        raise ValueError(
            f"sequence_length={length}: {type(base).__name__} has {positions} positions. Choose a sequence_length of "
            "at most that, or pass a config with more positions if the model is to be extended."
        )
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="cpu")
    inputs = {"input_ids": ids}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if base.get_output_embeddings() is not None:
        inputs["labels"] = ids
    return lambda: base(**inputs)


def positions_of(fake_model: nn.Module) -> int | None:
    """Positions of a transformers model; None if they are not limited or not known."""
    config: Any = getattr(Parts.of(fake_model).base.root, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for name in POSITIONS:
        number = getattr(config, name, None)
        if type(number) is int and number > 0:
            return number
    return None


def step_memory(
    fake_model: nn.Module, forward: Callable[[], Any], device: DeviceName = "gpu"
) -> tuple[int, int] | None:
    """Bytes of activations, and of gradients, at the peak of one forward and backward pass.

    Temporary tensors, also those of the loss, and the buffer for an adapter's input after dropout count as activations;
    parameters, buffers and inputs do not. None if the code of the model depends on values; ValueError if it fails.
    Without a loss of the model, deferred logits get a cross entropy, and all other outputs a gradient of their size.
    """
    fake_model.train()
    trained = [parameter for parameter in fake_model.parameters() if parameter.requires_grad]
    living = _LivingTensors([*fake_model.parameters(), *fake_model.buffers()], device)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: living.count_gradient(p.grad)) for p in trained]  # type: ignore[no-untyped-call]
    try:
        with torch.enable_grad(), RealIndices(), living:  # type: ignore[no-untyped-call]
            _backward(forward())
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    except Exception as error:  # any error of the model's own code
        base = type(Parts.of(fake_model).base.root).__name__
        raise ValueError(
            f"{base}: a training step fails on tensors without data ({one_line(error)}). "
            "Call estimate_memory with an example= of the input that the model trains with."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        fake_model.zero_grad(set_to_none=True)
    return living.peak - living.gradients_at_peak + living.dropped, living.gradients_at_peak


def _backward(output: Any) -> None:
    """Run the backward pass of a model's output. The caller keeps no reference to it, so that it can be freed."""
    if isinstance(output, Mapping) and output.get("loss") is not None:
        output = output["loss"]
    losses = [_loss(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    losses = [loss for loss in losses if loss.requires_grad]
    if losses:
        gradients = [torch.empty(loss.shape, dtype=loss.dtype, device="cpu") for loss in losses]
        torch.autograd.backward(losses, gradients)


def _loss(output: Tensor) -> Tensor:
    if not isinstance(output, Readable):
        return output
    rows = output.reshape(-1, output.shape[-1])
    return nn.functional.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long, device="cpu"))


def _device(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device  # faster: `.device` is dispatched


def _flash_workspace(query: Tensor, key: Tensor) -> int:
    """Bytes that FlashAttention's backward pass takes beside its inputs and outputs, of [batch, heads, rows, width].

    torch/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: dq_accum and softmax_d in fp32, and
    with grouped heads dk_expanded and dv_expanded for all heads.
    """
    if query.dtype not in IN_16_BITS:
        return 0
    batch, heads, rows, width = query.shape
    multiple = 32 if width <= 128 else 64
    count = 4 * batch * heads * (math.ceil(rows / 128) * 128) * (math.ceil(width / multiple) * multiple + 1)
    if key.shape[1] != heads:
        count += 2 * batch * heads * key.shape[2] * width * query.dtype.itemsize
    return count


class _LivingTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of new tensors until they are freed.

    `peak` is the largest sum, of which `gradients_at_peak` were gradients. The buffer that the kernels keep for drop(x)
    (`kernels/scratch.py`), `dropped`, is not part of it.
    """

    def __init__(self, existing: list[Tensor], device: DeviceName) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.peak = 0
        self.gradients_at_peak = 0
        self.dropped = 0
        self._bytes = 0
        self._gradients = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in existing}

    def count_gradient(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            self._gradients += gradient.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return _device(args[0])  # most calls, and slow in the modes below
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.lightning_qlora.lora_linear_dropout.default:
            x, in_fp16 = args[0], args[SEED + 1]
            if self.device == "cpu" or not (in_fp16 or x.dtype in IN_16_BITS):  # Triton's kernels need no buffer
                self.dropped = max(self.dropped, x.nbytes)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _device(tensor).type != "meta":  # a meta tensor has no memory
                self._add(tensor.untyped_storage())
        if func is ATTENTION_BACKWARD and self.device == "gpu":
            self._note_peak(self._bytes + _flash_workspace(*args[1:3]))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages:
            return
        self._storages.add(storage._cdata)
        self._bytes += storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        self._note_peak(self._bytes)

    def _note_peak(self, count: int) -> None:
        if count > self.peak:
            self.peak = count
            self.gradients_at_peak = self._gradients

    def _remove(self, key: int, count: int) -> None:
        self._bytes -= count
        self._storages.discard(key)
