"""Block scales of least squared error, in place of the largest magnitude of each block.

A smaller scale clips the largest weights of a block and rounds the others more finely. For a whole weight this makes a
language model worse: its few outliers matter more than their squared error says (SmolLM2-135M, WikiText-2 perplexity
32.3 -> 34.5 to 35.3). For the residual of PiSSA, without the largest singular vectors, it makes the model better, so
`methods` uses it only there.
"""

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.quantization import blockwise
from lightning_qlora.quantization.packed_weight import PackedWeight

FACTORS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75)  # of the largest magnitude


def quantize_clipped(weight: Tensor, config: QLoRAConfig) -> PackedWeight:
    """Quantize a float weight [out, in]; the scale of each block is the one of `FACTORS` with the least squared error.

    The format does not change: clipping a block makes the chosen scale its largest magnitude.
    """
    size, dense = config.block_size, weight.float()
    largest = blockwise.block_absmax(dense.reshape(-1), size)
    chosen, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for factor in FACTORS:
        error = _clip_and_quantize(dense, factor * largest, config).dequantize(torch.float32).sub_(dense).square_()
        error = torch.nn.functional.pad(error.flatten(), (0, -error.numel() % size)).view(-1, size).sum(1)
        chosen = torch.where(error < least, factor, chosen)
        least = torch.minimum(error, least)
    return _clip_and_quantize(dense, chosen * largest, config)


def _clip_and_quantize(dense: Tensor, limits: Tensor, config: QLoRAConfig) -> PackedWeight:
    bound = limits.repeat_interleave(config.block_size)[: dense.numel()].view(dense.shape)
    return ops.quantize(torch.clamp(dense, -bound, bound), config.quant_type, config.block_size, config.double_quant)
