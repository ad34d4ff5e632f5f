"""Compares every op of a backend with the reference, on small inputs that reach the variants of its kernels.

All tensors, also those that an op allocates, lie between bytes of 255 (NaN as floats), so that a kernel that reads or
writes past the end of a tensor is found.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_qlora.kernels import reference, scratch
from lightning_qlora.kernels.half import Wide, rows_to_half, to_half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.self_test import OPS as OPS
from lightning_qlora.kernels.self_test import function_of as function_of
from lightning_qlora.quantization.packed_weight import PackedBytes, stack_bytes

EXACT = ("quantize", "dequantize", "rows_to_half")  # the same bits everywhere
# Largest difference, as a share of the largest value; half of it for the norm. That of the coarsest type.
LIMITS = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
BORDER = 1 << 14  # bytes before and after each tensor; a multiple of 16, so that tensors stay aligned
ATEN = torch.ops.aten
EMPTY = (ATEN.empty, ATEN.new_empty, ATEN.empty_like)
ZEROS = (ATEN.zeros, ATEN.new_zeros, ATEN.zeros_like)
WIDE = "fp32 that is cast to bf16"
WEIGHTS: tuple[tuple[Any, ...], ...] = (  # outputs, inputs, type, block size, double quantization
    (72, 256, "nf4", 64, True),
    (37, 75, "fp4", 32, False),
    (37, 75, "nf4", 256, True),
)
LAYERS: tuple[tuple[Any, ...], ...] = (  # rows, outputs, inputs, rank, block size, double quantization, dropout, bias
    (70, 75, 515, 8, 64, True, 0.3, True),  # odd widths; several programs share each sum of lora_project
    (7, 66, 512, 24, 64, True, 0.0, True),  # few rows: W is decoded inside the product, whose sums are shared
    (20, 66, 128, 8, 256, False, 0.0, False),  # the same, not shared; blocks cross rows
    (650, 520, 70, 70, 64, True, 0.3, True),  # two tiles of ranks; two launches of linear_backward share sums
)
VECTORS: tuple[tuple[Any, ...], ...] = (  # the same in fp32, for cards that multiply so few rows without tensor cores
    (1, 35, 192, 8, 64, True, 0.0, True),
    (2, 35, 640, 8, 256, False, 0.0, False),  # blocks cross rows
)
EXPERTS: tuple[tuple[Any, ...], ...] = (  # rows of each expert, then as above
    ((5, 0, 66), 70, 128, 8, 64, True, 0.0),
    ((3, 0, 7), 66, 96, 70, 32, False, 0.3),  # two tiles of ranks
)
ROWS: tuple[tuple[Any, ...], ...] = (  # shape, whether it is transposed, whether columns are multiplied, dropout
    ((13, 700), False, False, 0.3),
    ((6, 515), True, True, 0.0),
    ((2, 17000), False, True, 0.3),  # rows longer than a program holds
)


def fault(kernels: ModuleType, device: torch.device, op: str) -> str | None:
    """What an op of a backend does wrong on a device: it raises, or differs from the reference. None if it is right."""
    launches = 1 if device.type == "cpu" else 2  # the second one takes the short path of `triton/launch.py`
    for arguments in cases(op):
        function = function_of(kernels, op)
        for _ in range(launches):
            text = fault_in(arguments, kernels, device, op, [], function)
            if text:
                return text
    return None


def fault_in(
    arguments: tuple[Any, ...],
    kernels: ModuleType,
    device: torch.device,
    op: str,
    memory: list[Tensor],
    function: Callable[..., Any] | None = None,
) -> str | None:
    """The same for one of `cases`; `memory` gets each tensor that the op can reach, with its borders."""
    theirs = _copy(arguments, torch.device("cpu"), [])
    expected = getattr(reference, op)(*theirs)
    scratch.release()  # so that the op allocates its buffers again
    try:
        ours = _copy(arguments, device, memory)
        if op.startswith("grouped"):
            weight, lora = ours[-2:]
            if not kernels.can_group(ours[0], weight, lora):
                return None  # a card without tiles for the product (Turing) runs experts one by one
        with _Framed(memory):
            result = (function or function_of(kernels, op))(*ours)
        text = _difference((result, ours), (expected, theirs), op in EXACT)
        if any((each[:BORDER] != 255).any() or (each[-BORDER:] != 255).any() for each in memory):
            text = "writes past the end of a tensor"
    except Exception as error:  # Triton, its compilers and the driver raise many types
        text = f"{type(error).__name__}: {error}"
    if text is None:
        return None
    first = _tensors(arguments)[0]
    return f"{text}, with {str(first.dtype).removeprefix('torch.')} {list(first.shape)}"


def cases(op: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of an op on the CPU, the same in every process."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    def factor(m: int, n: int, kind: Any, size: float, cast: Any = rows_to_half) -> Any:
        """A matrix in a type; None: a `Half` of values that fp16 does not have; WIDE: with a cast."""
        rows = normal(m, n)
        if kind is WIDE:
            return Wide(rows, torch.full_like(rows, torch.nan, dtype=torch.bfloat16))
        return cast(rows * size) if kind is None else rows.to(kind)

    def layer(n: int, k: int, r: int, block_size: int, double_quant: bool) -> tuple[PackedBytes, Tensor, Tensor]:
        weight = reference.quantize(normal(n, k) / k**0.5, "nf4", block_size, double_quant)
        return weight, normal(r, k) / k**0.5, normal(n, r) / r**0.5

    def adapter(a: Tensor, b: Tensor, p: float, kind: Any) -> LoRA:
        seed = torch.tensor([2**40 + 7], device="cpu") if p else None
        return LoRA(a, b, 0.7, p, seed, kind is None)

    if op == "rows_to_half":
        for (m, n), is_transposed, has_times, p in ROWS:
            x = normal(m, n) * 10 ** torch.linspace(-42, 30, m, dtype=torch.float32, device="cpu")[:, None]
            seed = torch.tensor([2**40 + 7], device="cpu") if p else None
            yield x.mT.contiguous().mT if is_transposed else x, normal(n) if has_times else None, p, seed
    elif op == "take_out":
        exponents = torch.arange(-75, 75, dtype=torch.float32, device="cpu").view(2, 75)
        powers = torch.exp2(exponents)
        for rows, columns in ((powers[0][:70, None], powers[1:]), (None, powers[1:]), (powers[0][:70, None], None)):
            yield normal(70, 75), rows, columns, 0.7
    elif op == "quantize":
        for (n, k, *form), dtype in _in_types(WEIGHTS):
            yield normal(n, k, dtype=dtype), *form
    elif op == "dequantize":
        for (n, k, _, *form), dtype in _in_types(WEIGHTS):
            yield layer(n, k, 1, *form)[0], dtype
    elif op.startswith("grouped"):
        for (counts, *shape, p), kind in _in_types(EXPERTS, 1):
            weights, a, b = zip(*(layer(*shape) for _ in counts), strict=True)
            lora = adapter(torch.stack(a), torch.stack(b), p, kind)
            x = factor(sum(counts) + 2, shape[1], kind, 1e6, to_half)
            grad = factor(sum(counts) + 2, shape[0], kind, 1e-9, to_half)
            rest = torch.tensor(counts, device="cpu").cumsum(0).int(), stack_bytes(weights), lora
            if op == "grouped_linear":
                yield x, *rest
            else:
                _, xa = reference.grouped_linear(x, *rest)
                yield grad, x, xa, *rest
    else:
        others: list[Any] = [(case, torch.float32) for case in VECTORS]
        others += [(case, WIDE) for case in LAYERS[:2]]
        for (m, n, k, *form, p, has_bias), kind in _in_types(LAYERS, 2) + others:
            weight, lora_a, lora_b = layer(n, k, *form)
            lora = adapter(lora_a, lora_b, p, kind)
            x = factor(m, k, kind, 1e6)
            grad = factor(m, n, kind, 1e-9)
            bias = normal(n) if has_bias else None
            xa = reference.lora_project(x, lora)
            of_out = kind if isinstance(kind, torch.dtype) else torch.float32
            out = torch.full((m, n), torch.nan, dtype=of_out, device="cpu")
            yield {
                "lora_project": (x, lora),
                "linear_into": (out, x, xa, weight, bias, lora),
                "linear_backward": (grad, x.values if kind is WIDE else x, xa, weight, lora, True),
            }[op]


def _in_types(cases: Sequence[Any], halves: int = 0) -> list[tuple[Any, Any]]:
    """All cases in bf16, one in each other type, since compiling takes time; None: the first `halves` with `Half`."""
    some = {torch.float32: cases[:1], torch.bfloat16: cases, torch.float16: cases[1:2], None: cases[:halves]}
    return [(case, dtype) for dtype, of_type in some.items() for case in of_type]


def _frame(like: Tensor, device: torch.device, memory: list[Tensor]) -> Tensor:
    """A contiguous tensor of 255 in each byte, with borders; `memory` gets all of it."""
    whole = torch.full((2 * BORDER + like.nbytes,), 255, dtype=torch.uint8, device=device)
    memory.append(whole)
    return whole[BORDER : BORDER + like.nbytes].view(like.dtype).view(like.shape)


class _Framed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this, the tensors that are allocated have borders."""

    def __init__(self, memory: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in EMPTY:
            return _frame(result, result.device, self._memory)
        if func.overloadpacket in ZEROS:
            return _frame(result, result.device, self._memory).zero_()
        return result


def _copy(arguments: Any, device: torch.device, memory: list[Tensor]) -> Any:
    """The arguments on the device, with borders. The seed, which is the only int64, stays on the CPU."""

    def copy(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int64:
            return tensor
        return _frame(tensor, device, memory).copy_(tensor)

    return tree_map_only(Tensor, copy, arguments)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _difference(ours: Any, theirs: Any, exact: bool) -> str | None:
    """How results and arguments after a call differ from those of the reference by more than the limit, or None."""
    coarsest = max(LIMITS[tensor.dtype] for tensor in _tensors(theirs) if tensor.is_floating_point())
    for mine, yours in zip(_tensors(ours), _tensors(theirs), strict=True):
        if mine.shape != yours.shape or mine.dtype != yours.dtype:
            return f"gives {mine.dtype} {list(mine.shape)} and not {yours.dtype} {list(yours.shape)}"
        limit = coarsest if yours.is_floating_point() and not exact else 0.0
        off = (mine.cpu().double() - yours.double()).abs()
        size = yours.double().abs()
        if yours.numel() and not (off.max() <= limit * size.max() and off.norm() <= limit / 2 * size.norm()):
            return f"differs from the reference by {off.max() / size.max():.2g} of the largest value, limit {limit:g}"
    return None
