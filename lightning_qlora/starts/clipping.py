"""Block scales chosen for the least squared error, instead of each block's largest magnitude.

A smaller scale clips a block's largest weights and rounds all others finer. On a whole weight that is a bad bargain:
its few outliers matter more to a language model than their squares say. On what is left of a weight when its largest
singular vectors are gone it is a good one, and there `starts` uses it.
"""

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.quantize import blockwise
from lightning_qlora.quantize.packed import PackedWeight

FACTORS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75)  # of the largest magnitude


def quantize_clipped(weight: Tensor, config: QLoRAConfig) -> PackedWeight:
    """Quantize a float weight [out, in] with the scale of each block that leaves the least squared error of `FACTORS`.

    The bytes are of the plain format: clipping a block makes the chosen scale its largest magnitude.
    """
    size, dense = config.block_size, weight.float()
    largest = blockwise.block_absmax(dense.reshape(-1), size)
    chosen, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for factor in FACTORS:
        error = _clip_and_quantize(dense, factor * largest, config).dequantize(torch.float32).sub_(dense).square_()
        error = _sum_of_blocks(error.reshape(-1), size)
        chosen = torch.where(error < least, factor, chosen)
        least = torch.minimum(error, least)
    return _clip_and_quantize(dense, chosen * largest, config)


def _clip_and_quantize(dense: Tensor, limits: Tensor, config: QLoRAConfig) -> PackedWeight:
    bound = limits.repeat_interleave(config.block_size)[: dense.numel()].view(dense.shape)
    return ops.quantize(torch.clamp(dense, -bound, bound), config.quant_type, config.block_size, config.double_quant)


def _sum_of_blocks(flat: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size).sum(1)
