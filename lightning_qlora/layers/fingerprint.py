"""A 63-bit fingerprint of tensors: files store it to recognize the base model, and to detect damaged values."""

import torch
from torch import Tensor

from lightning_qlora.layers.dtensor import gather
from lightning_qlora.quantization.packed_weight import PackedWeight

_PIECE = 1 << 17  # words at a time, so that a large tensor needs no large temporary
_ODD_1, _ODD_2 = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9


def fingerprint(*tensors: Tensor) -> int:
    """A number that changes with any bit and with the order of the tensors; the same on every device.

    Floats count by their fp32 value, so a copy cast from bf16 to fp32 has the fingerprint of the original.
    Formula: the sum over all words w of mix(w xor i * odd) mod 2^64, i the position of w. Sums that wrap need no order.
    """
    total = 0
    for tensor in tensors:
        flat = gather(tensor.detach()).reshape(-1)
        per_word = 2 if flat.is_floating_point() else 8 // flat.element_size()
        for start in range(0, flat.numel(), _PIECE * per_word):
            piece = flat[start : start + _PIECE * per_word]
            if piece.numel() % per_word:
                piece = torch.nn.functional.pad(piece, (0, -piece.numel() % per_word))
            words = piece.to(torch.float32 if piece.is_floating_point() else None, copy=True).view(torch.int64)
            first = 1 + start // per_word
            words ^= torch.arange(first, first + words.numel(), device=words.device).mul_(_ODD_1)
            words ^= words >> 29
            words *= _ODD_2
            words ^= words >> 32
            total = _mix(total + int(words.sum()))
        total = _mix(total + flat.numel())
    return total


def fingerprint_of_weight(weight: PackedWeight) -> int:
    """The fingerprint of a layer with this 4-bit weight."""
    stored = weight.to_bytes()
    return fingerprint(stored.packed, stored.absmax, stored.nested)


def checksum(tensor: Tensor) -> str:
    """The fingerprint of a tensor's bytes, in hexadecimal: for values that must come back bit for bit."""
    return f"{fingerprint(tensor.detach().contiguous().view(-1).view(torch.uint8)):016x}"


def _mix(number: int) -> int:
    number &= (1 << 64) - 1
    number ^= number >> 31
    return (number * _ODD_2 + _ODD_1) & ((1 << 63) - 1)
