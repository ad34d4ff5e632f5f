"""A 63-bit fingerprint of tensors: files store it to recognize the base model, and to detect damaged values."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_qlora.quantization.packed_weight import PackedWeight, stack_bytes
from lightning_qlora.tensors.dtensor import gather, own_rows
from lightning_qlora.tensors.values import has_values, is_strided

_PIECE = 1 << 14  # words with one sum: on a CPU torch computes so few on one thread, and they stay in its cache
_PIECES_ON_GPU = 1 << 6  # at a time
_TOGETHER = 1 << 20  # elements of small tensors
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ODD_1 = 0x1E3779B97F4A7C15
_ODD_2 = 0x3F58476D1CE4E5B9
# Pseudorandom odd numbers, one for each word of a piece; no tensor, which a mode of torch may change.
_ODD = np.arange(1, _PIECE + 1, dtype=np.int64) * _ODD_1
_ODD ^= _ODD >> 31
_ODD *= _ODD_2
_ODD ^= _ODD >> 29
_ODD |= 1


def fingerprint(*tensors: Tensor) -> int:
    """A number that changes with any bit and with the order of the tensors; the same on every device.

    Floats count by their value, so a copy cast from bf16 to fp32 has the fingerprint of the original.
    0 for tensors without values (see `has_values`), and for those that are not strided: files hold them as they are.
    Formula: of each piece the sum over its 64-bit words w of v xor (v >> 32) mod 2^64 with v = w * odd_i, odd_i a
    pseudorandom odd number for the position i in the piece; the sums, and the sizes, are mixed in their order.
    """
    total = 0
    for tensor in tensors:
        if not has_values(tensor) or not is_strided(tensor):
            return 0
        values = tensor.detach()
        if values.is_complex() or values.dtype is torch.float64:
            values = _with_words(values)
        for piece in _sums_of_pieces(values):
            total = _mix(total + piece)
        total = _mix(total + tensor.numel())
    return total


def fingerprints_of(tensors: Iterable[Tensor]) -> list[int]:
    """The fingerprint of each tensor; small ones of one size, as biases and norms are, are read together."""
    values = list(tensors)
    numbers: dict[int, int] = {}
    groups = defaultdict[tuple[int, torch.dtype, torch.device], list[int]](list)
    for place, tensor in enumerate(values):
        is_whole = has_values(tensor) and is_strided(tensor) and not isinstance(tensor, DTensor)
        if is_whole and tensor.dtype in _FLOATS and 0 < tensor.numel() <= 2 * _PIECE:  # one sum
            groups[tensor.numel(), tensor.dtype, tensor.device].append(place)
        else:
            numbers[place] = fingerprint(tensor)
    for (size, *_), places in groups.items():
        step = max(_TOGETHER // size, 1)
        for begin in range(0, len(places), step):
            some = places[begin : begin + step]
            rows = torch.stack([values[place].detach().reshape(-1) for place in some]).float()
            words = F.pad(rows, (0, size % 2)).contiguous().view(torch.int64)
            words = words * torch.from_numpy(_ODD[: words.shape[1]]).to(words.device)
            for place, total in zip(some, (words ^ (words >> 32)).sum(1).tolist(), strict=True):
                numbers[place] = _mix(_mix(total) + size)
    return [numbers[place] for place in range(len(values))]


def _with_words(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs; fp64 as fp32 where that is exact, else its bits."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype is not torch.float64:
        return tensor
    rounded = tensor.float()
    if torch.equal(rounded.double(), tensor):
        return rounded
    return tensor.view(torch.int64)


def _sums_of_pieces(tensor: Tensor) -> list[int]:
    """The sum of each piece. Of a sharded tensor every rank adds up its rows, and the sums are added."""
    if not tensor.numel():
        return []
    per_word = 2  # floats count as fp32
    if not tensor.is_floating_point():
        per_word = 8 // tensor.element_size()
    piece = _PIECE * per_word
    part, first, group = tensor, 0, None
    if isinstance(tensor, DTensor):
        rows = own_rows(tensor)
        if rows is not None and tensor.stride(0) % per_word == 0:
            part, first, group = rows
        else:
            part = gather(tensor)
    flat = part.reshape(-1).contiguous()  # of one dimension, reshape keeps its stride
    sums = torch.zeros(-(-tensor.numel() // piece), dtype=torch.int64, device=flat.device)
    step = piece
    if flat.device.type != "cpu":
        step *= _PIECES_ON_GPU
    step = min(step, piece * len(sums))
    width = min(_PIECE, -(-tensor.numel() // per_word))
    odd = torch.from_numpy(_ODD[:width]).to(flat.device)
    # Buffers: new memory would cost more time than the sums.
    floats = torch.empty(step, dtype=torch.float32, device=flat.device)
    buffers = torch.empty(2, step // per_word, dtype=torch.int64, device=flat.device)
    for begin in range(first - first % piece, first + flat.numel(), step):
        values = flat[max(begin - first, 0) : begin + step - first]
        if values.is_floating_point() and values.dtype is not torch.float32:
            values = floats[: len(values)].copy_(values)
        words = _words(values, max(first - begin, 0) // per_word, width)
        products, shifted = (buffer[: len(words)].view(-1, width) for buffer in buffers)
        torch.mul(words.view(-1, width), odd, out=products)
        torch.bitwise_right_shift(products, 32, out=shifted)
        products ^= shifted
        torch.sum(products, 1, out=sums[begin // piece :][: len(products)])
    if group is not None:
        dist.all_reduce(sums, group=group)
    return [*sums.tolist()]


def _words(values: Tensor, before: int, width: int) -> Tensor:
    """Values as 64-bit words, with so many zero words before them, and zeros up to a multiple of `width`."""
    missing = -values.nbytes % 8 // values.element_size()
    if missing:
        values = F.pad(values, (0, missing))
    elif values.storage_offset() * values.element_size() % 8:
        values = values.clone()
    words = values.view(torch.int64)
    after = -(before + len(words)) % width
    if before or after:
        words = F.pad(words, (before, after))
    return words


def fingerprint_of_weights(weights: Sequence[PackedWeight]) -> int:
    return fingerprint(*stack_bytes([weight.to_bytes() for weight in weights])[:3])


def checksum(tensor: Tensor) -> str:
    """The fingerprint of a tensor's bytes, in hexadecimal: for values that must come back bit for bit."""
    return f"{fingerprint(tensor.detach().contiguous().view(-1).view(torch.uint8)):016x}"


def _mix(number: int) -> int:
    number &= (1 << 64) - 1
    number ^= number >> 31
    return (number * _ODD_2 + _ODD_1) & ((1 << 63) - 1)
