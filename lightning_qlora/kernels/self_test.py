"""Compares the ops of a backend with the reference on a few inputs, at the first use of a card and in `doctor`.

The tests compare them on many more (`tests/kernels/verify.py`).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_qlora.kernels import reference
from lightning_qlora.kernels.half import Wide, rows_to_half, to_half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.quantization.packed_weight import PackedBytes, stack_bytes

OPS = (
    "quantize",
    "dequantize",
    "rows_to_half",
    "take_out",
    "lora_project",
    "linear_into",
    "linear_backward",
    "grouped_linear",
    "grouped_linear_backward",
)
EXACT = ("quantize", "dequantize", "rows_to_half")  # the same bits everywhere
LIMIT = 2e-2  # largest difference in 16 bits, as a share of the largest value
OUT, IN, RANK = 72, 256, 8


def faults(kernels: ModuleType, device: torch.device) -> dict[str, str | None]:
    """`fault` of each op, in a new thread, which has none of torch's modes: a default device, autocast, inference."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: {op: fault(kernels, device, op) for op in OPS}).result()


def fault(kernels: ModuleType, device: torch.device, op: str) -> str | None:
    """What an op of a backend does wrong on a device: it raises, or differs from the reference. None if it is right."""
    try:
        for arguments in _examples(op):
            theirs = _copy(arguments, torch.device("cpu"))
            expected = getattr(reference, op)(*theirs), theirs  # some ops write into an argument
            function = function_of(kernels, op)
            for _ in range(2):  # the second launch takes the short path of `triton/launch.py`
                ours = _copy(arguments, device)
                if op.startswith("grouped") and not kernels.can_group(ours[0], *ours[-2:]):
                    break  # a card without tiles for the product (Turing) runs experts one by one
                text = _difference((function(*ours), ours), expected, 0.0 if op in EXACT else LIMIT)
                if text:
                    return text
    except Exception as error:  # Triton, its compilers and the driver raise many types
        return f"{type(error).__name__}: {error}"
    return None


def function_of(kernels: Any, op: str) -> Callable[..., Any]:
    """An op of a module by its name. Those of a layer are methods of a plan, made at the first call for its shapes."""
    if hasattr(kernels, op):
        return getattr(kernels, op)  # type: ignore[no-any-return]
    plans: list[Any] = []

    def call(*arguments: Any) -> Any:
        if not plans:
            weights = [each for each in arguments if isinstance(each, PackedBytes)]
            (lora,) = [each for each in arguments if isinstance(each, LoRA)]
            x = arguments[0 if op == "lora_project" else 1]
            if isinstance(x, Wide):
                x = x.values
            types = [(each.cast.dtype, each.values.dtype) for each in arguments if isinstance(each, Wide)]
            plans.append(kernels.plan(x, lora, weights[0] if weights else None, *types))
        return getattr(plans[0], op)(*arguments)

    return call


def _examples(op: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of an op on the CPU, the same in every process: in bf16, and for cards without it."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    weight = reference.quantize(normal(OUT, IN) / IN**0.5, "nf4", 64, True)
    seed = torch.tensor([2**40 + 7], device="cpu")
    if op == "quantize":
        yield normal(OUT, IN).bfloat16(), "nf4", 64, True
    elif op == "dequantize":
        yield weight, torch.bfloat16
    elif op == "rows_to_half":
        yield normal(13, 700), None, 0.3, seed
    elif op == "take_out":
        yield normal(70, 75), torch.exp2(normal(70, 1).round()), torch.exp2(normal(1, 75).round()), 0.7
    elif op.startswith("grouped"):
        counts = torch.tensor([5, 0, 30], device="cpu")
        lora = LoRA(normal(3, RANK, IN) / IN**0.5, normal(3, OUT, RANK), 0.7, 0.0, None, False)
        for cast in (Tensor.bfloat16, to_half):
            x, grad = cast(normal(40, IN)), cast(normal(40, OUT))
            rest = counts.cumsum(0).int(), stack_bytes([weight] * 3), lora._replace(in_fp16=cast is to_half)
            _, xa = reference.grouped_linear(x, *rest)
            yield (x, *rest) if op == "grouped_linear" else (grad, x, xa, *rest)
    else:
        lora = LoRA(normal(RANK, IN) / IN**0.5, normal(OUT, RANK), 0.7, 0.3, seed, False)
        for rows in (20, 200):  # few: the weight is decoded inside of the product
            for cast in (Tensor.bfloat16, rows_to_half):
                of_kind = lora._replace(in_fp16=cast is rows_to_half)
                x, grad = cast(normal(rows, IN)), cast(normal(rows, OUT))
                xa = reference.lora_project(x, of_kind)
                if op == "lora_project":
                    yield x, of_kind
                elif op == "linear_into":
                    out = torch.full((rows, OUT), torch.nan, device="cpu", dtype=torch.bfloat16)
                    yield out if cast is Tensor.bfloat16 else out.float(), x, xa, weight, None, of_kind
                else:
                    yield grad, x, xa, weight, of_kind, True


def _copy(arguments: Any, device: torch.device) -> Any:
    """The arguments on the device; the seed, which is the only int64, stays on the CPU."""
    return tree_map_only(Tensor, lambda t: t if t.dtype is torch.int64 else t.to(device, copy=True), arguments)


def _difference(ours: Any, theirs: Any, limit: float) -> str | None:
    """How results differ from those of the reference by more than the limit, or None."""
    for mine, yours in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if not isinstance(yours, Tensor):
            continue
        if mine.shape != yours.shape or mine.dtype != yours.dtype:
            return f"gives {mine.dtype} {list(mine.shape)} and not {yours.dtype} {list(yours.shape)}"
        off = (mine.cpu().double() - yours.double()).abs().max()
        size = yours.double().abs().max()
        if not off <= limit * size:
            return f"differs from the reference by {off / size:.2g} of the largest value, limit {limit:g}"
    return None
