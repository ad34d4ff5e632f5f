"""estimate_memory: what a QLoRA run will take, by part, without allocating any of it.

The module is copied with tensors that have shapes and no data (torch's FakeTensorMode), converted, and run once: what
autograd keeps for the backward pass is then counted, not guessed.
"""

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_qlora.adapters.base_model import find_base, is_transformers_model
from lightning_qlora.adapters.folder import read_adapter
from lightning_qlora.adapters.module import config_of_adapter
from lightning_qlora.checkpointing import enable_checkpointing
from lightning_qlora.choose import choose_layers
from lightning_qlora.config import QLoRAConfig, check_choice
from lightning_qlora.convert import check_initialized, freeze
from lightning_qlora.linear import QLoRALinear, adapted_layers
from lightning_qlora.loaded import config_while_loading
from lightning_qlora.packed_linear import BASE
from lightning_qlora.quantize.blockwise import NESTED_BLOCK_SIZE
from lightning_qlora.quantize.packed import PackedWeight
from lightning_qlora.report import count_parameters, size_text

OptimizerName = Literal["adamw", "adamw8bit", "sgd", "momentum"]
# State for each weight that trains, in units of its own bytes (8-bit: bytes, two codes and two fp32 scales of 256).
STATE = {"adamw": 2.0, "sgd": 0.0, "momentum": 1.0}
STATE_8BIT = 2 + 2 * 4 / 256
PARTS = ("4-bit weights", "other frozen weights", "trained weights", "gradients", "optimizer state",
         "decode buffer", "activations")  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run takes, by part.

    Attributes:
        parts: Part -> bytes; see `PARTS`.
        paged: Whether the optimizer state can move to host memory when the device is full.
        trainable_parameters: Number of weights that train.
        total_parameters: Number of all weights, the adapters included.
        dense_bytes: Bytes of the weights as the model comes, not in 4 bits.
        counted_activations: Whether a forward pass could be run to count activations; otherwise they are left out.
    """

    parts: dict[str, int]
    paged: bool
    trainable_parameters: int
    total_parameters: int
    dense_bytes: int
    counted_activations: bool

    @property
    def total(self) -> int:
        """Everything, in bytes."""
        return sum(self.parts.values())

    @property
    def device(self) -> int:
        """What must stay on the device: everything but optimizer state that is paged."""
        return self.total - (self.parts["optimizer state"] if self.paged else 0)

    def __str__(self) -> str:
        lines = [f"{part:22}{size_text(count):>10}" for part, count in self.parts.items()]
        if not self.counted_activations:
            lines[-1] = f"{'activations':22}{'unknown':>10}  (pass example= to count them)"
        moves = "  (may move to host memory)" if self.paged and self.parts["optimizer state"] else ""
        lines[PARTS.index("optimizer state")] += moves
        return "\n".join(
            [
                *lines,
                f"{'total':22}{size_text(self.total):>10}",
                f"{self.trainable_parameters:,} of {self.total_parameters:,} weights train; dense, the weights alone "
                f"take {size_text(self.dense_bytes)}. Not counted: the driver's own memory (0.3 to 0.8 GB on CUDA) and "
                "fragmentation (some percent).",
            ]
        )


def estimate_memory(
    model: nn.Module | str | os.PathLike[str] | Any,
    batch_size: int = 1,
    sequence_length: int = 512,
    optimizer: OptimizerName = "adamw",
    example: Any = None,
    **arguments: Any,
) -> MemoryEstimate:
    """Estimate the memory of training a model with QLoRA; allocates nothing of its size and needs no GPU.

    Args:
        model: A module, on any device or none; a transformers config; or a folder or hub name of a transformers model.
        batch_size: Sequences a step.
        sequence_length: Tokens a sequence.
        optimizer: "adamw", "adamw8bit" (PagedAdamW8bit), "sgd", or "momentum" (SGD with it).
        example: Input of the module's forward, for one that is no transformers model: a tensor, a tuple, or a dict of
            keyword arguments. batch_size and sequence_length have no effect then.
        **arguments: Those of `QLoRAPrecision`. Where an adapter starts changes nothing here; init_lora_weights=
            "calibrated" takes as much host memory as the dense weights, until the first batches have been seen.

    Raises:
        TypeError, ValueError: If an argument is wrong, no model can be made of a config, or a forward pass fails.
    """
    check_choice("optimizer", optimizer, get_args(OptimizerName))
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number of 1 or more.")
    config = QLoRAConfig(**arguments)
    made = model if isinstance(model, nn.Module) else _made(model)
    check_initialized(made)
    with FakeTensorMode() as mode:
        same_size = config_while_loading(config)  # a start computed from the weight makes an adapter of the same shape
        return _estimate(_copied(made), batch_size, sequence_length, optimizer, _faked(example, mode), same_size)


def _estimate(
    twin: nn.Module, batch_size: int, sequence_length: int, optimizer: str, example: Any, config: QLoRAConfig
) -> MemoryEstimate:
    dense_bytes = sum(parameter.nbytes for parameter in twin.parameters())
    converted = _convert(twin, config)
    trainable, total, _ = count_parameters(twin)
    packed = sum(
        p.nbytes for layer in converted for key, p in layer._parameters.items() if p is not None and key in BASE
    )
    trained = [p for p in twin.parameters() if p.requires_grad]
    trained_bytes = sum(p.nbytes for p in trained)
    run = _told(_forward_of(twin, batch_size, sequence_length, example), twin, batch_size, sequence_length)
    state = trainable * STATE_8BIT if optimizer == "adamw8bit" else trained_bytes * STATE[optimizer]
    counts = (
        packed,
        sum(p.nbytes for p in twin.parameters()) - packed - trained_bytes,
        trained_bytes,
        trained_bytes,
        int(state),
        _decode_buffers(converted),
        0 if run is None else _activations(twin, run, config.gradient_checkpointing),
    )
    parts = dict(zip(PARTS, counts, strict=True))
    return MemoryEstimate(parts, bool(config.paged_optimizer), trainable, total, dense_bytes, run is not None)


def _copied(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers have no data."""
    tensors: dict[int, Any] = {}
    for parameter in module.parameters():
        shape = torch.empty(parameter.shape, dtype=parameter.dtype)
        tensors[id(parameter)] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
    for part in module.modules():
        for value in (*part._buffers.values(), *vars(part).values()):
            if isinstance(value, Tensor):
                tensors[id(value)] = torch.empty(value.shape, dtype=value.dtype)
    return copy.deepcopy(module, tensors)


def _made(model: Any) -> nn.Module:
    """A transformers model on the meta device, from its config, folder or hub name."""
    try:
        import transformers
    except ImportError as error:
        raise TypeError(
            f"model={model!r}: is no module, and transformers is not installed to make one of it."
        ) from error
    named = isinstance(model, (str, os.PathLike))
    if not named and not isinstance(model, transformers.PretrainedConfig):
        raise TypeError(
            f"model={type(model).__name__}: must be a module, a transformers config, a folder or a hub name."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(model) if named else model
        with torch.device("meta"):
            return _of_config(config)
    except OSError as error:
        raise FileNotFoundError(
            f"{model}: neither a folder with a config.json nor a model on the hub ({_in_a_line(error)})."
        ) from error
    except Exception as error:  # whatever a model's own code raises
        where = f"{model}: its config.json" if named else f"model={type(model).__name__}: it"
        raise ValueError(
            f"{where} makes no model ({_in_a_line(error)}). Correct it, or pass estimate_memory a module instead."
        ) from error


def _of_config(config: Any) -> nn.Module:
    import transformers

    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    if kind is None:
        mapping: Any = transformers.AutoModelForCausalLM._model_mapping
        kind = mapping.get(type(config), None)
    if kind is None:
        return cast(nn.Module, transformers.AutoModel.from_config(config, dtype=dtype))  # type: ignore[no-untyped-call]
    return cast(nn.Module, kind._from_config(config, dtype=dtype))


def _convert(twin: nn.Module, config: QLoRAConfig) -> list[QLoRALinear]:
    """Convert as `convert_module` does, without data."""
    if config.adapter is not None:
        config = config_of_adapter(twin, read_adapter(config.adapter), config)
    choice = choose_layers(twin, config)
    for name, layer in choice.convert.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        turned = not isinstance(layer, nn.Linear)
        packed = _packed(weight.T if turned else weight, config)
        QLoRALinear.from_packed(layer, packed, type(layer), config, name)
    freeze(twin, choice)
    return list(adapted_layers(twin).values())


def _packed(weight: Tensor, config: QLoRAConfig) -> PackedWeight:
    blocks = -(-weight.numel() // config.block_size)

    def empty(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)

    return PackedWeight(
        empty((weight.numel() + 1) // 2, torch.uint8).view(-1, 1),
        empty(blocks, torch.uint8 if config.double_quant else torch.float32),
        empty(-(-blocks // NESTED_BLOCK_SIZE), torch.float32) if config.double_quant else None,
        0.0,
        tuple(weight.shape),
        config.quant_type,
        config.block_size,
        weight.dtype,
    )


def _decode_buffers(layers: list[QLoRALinear]) -> int:
    """Bytes of the buffers that weights are decoded into: one for each type, as large as its largest weight."""
    largest: dict[torch.dtype, int] = {}
    for layer in layers:
        types = {layer.compute_dtype(torch.empty(0, dtype=layer.weight_dtype))}
        if layer.config.use_dora:
            types.add(torch.float32)  # the norm of the rows
        for dtype in types:
            largest[dtype] = max(largest.get(dtype, 0), layer.weight_bytes.numel)
    return sum(dtype.itemsize * numel for dtype, numel in largest.items())


def _forward_of(twin: nn.Module, batch_size: int, length: int, example: Any) -> Callable[[], Any] | None:
    """What runs the module once, or None if nothing is known of its input."""
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


def _told(run: Callable[[], Any] | None, twin: nn.Module, batch_size: int, length: int) -> Callable[[], Any] | None:
    """`run` with errors that say in a line what was run and what can be changed."""

    def told() -> Any:
        assert run is not None
        torchs = logging.getLogger("torch._subclasses.fake_tensor")  # it prints the trace of an error that is raised
        before, torchs.disabled = torchs.disabled, True
        try:
            return run()
        except Exception as error:  # whatever a module's own code raises
            base = find_base(twin)[1]
            raise ValueError(
                f"{type(base).__name__}: can't be run with batch_size={batch_size}, sequence_length={length} on "
                f"tensors without data ({_in_a_line(error)}). {_advice(getattr(base, 'config', None), length)}"
            ) from error
        finally:
            torchs.disabled = before

    return None if run is None else told


def _advice(config: Any, length: int) -> str:
    places, dtype = getattr(config, "max_position_embeddings", None), getattr(config, "dtype", None)
    advice = []
    if isinstance(places, int) and length > places:
        advice.append(f"It has {places} positions: choose a sequence_length of at most that.")
    if dtype not in (None, torch.bfloat16):
        advice.append(f"Its config says {str(dtype).removeprefix('torch.')}: it may run in bfloat16.")
    return " ".join([*advice, "Or call estimate_memory with an example= of its input."])


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _faked(example: Any, mode: FakeTensorMode) -> Any:
    if isinstance(example, tuple):
        return tuple(_faked(value, mode) for value in example)
    if isinstance(example, Mapping):
        return {key: _faked(value, mode) for key, value in example.items()}
    return mode.from_tensor(example) if isinstance(example, Tensor) else example


def _activations(twin: nn.Module, run: Callable[[], Any], recomputed: bool) -> int:
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
