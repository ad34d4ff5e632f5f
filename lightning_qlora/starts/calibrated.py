"""The start "calibrated": that of "default" until the inputs of the layer are known, then a correction of its 4 bits.

    s B A = SVD_r((W - Q) diag(d)) diag(1 / d)

W is the weight [out, in], Q its 4 bits, s the scaling of the adapter, SVD_r the best approximation of rank r, d the
root mean square of each input in the first step: the approximate form of QERA (Zhang et al., ICLR 2025).
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.quantization.packed_weight import PackedBytes
from lightning_qlora.starts.input_statistics import InputStatistics, solver_device
from lightning_qlora.starts.random_values import default, generator_of

MIN_INPUT_RMS = 1e-2  # times the mean: calibrated adapters are divided by d, and a dead channel would make them huge
Factors = tuple[Tensor, Tensor, Tensor]  # u [m, r], sigma [r], v [n, r]: the matrix is about u diag(sigma) v^T


def wait_for_inputs(layer: Any, dense_weight: Tensor) -> InputStatistics:
    rows, columns = dense_weight.shape[-2:]
    config = layer.config
    if config.r > min(rows, columns):
        raise ValueError(
            f"r={config.r}: a {rows}x{columns} weight has only {min(rows, columns)} singular values, and "
            f"init_lora_weights={config.init_lora_weights!r} needs r of them. Use a smaller r (rank_pattern sets the "
            "rank of single layers) or init_lora_weights='default'."
        )
    previous: InputStatistics | None = layer.input_observer
    statistics = InputStatistics(dense_weight, layer.matrix_count, dense_weight.shape[-1], layer.packed.device)
    statistics.join(layer)
    if previous is not None:  # the copies keep the weight that this layer had
        statistics.report = previous.report
        if statistics.report is not None:
            statistics.report.waiting.append(layer.full_name)
        layer.stop_observing()
    return statistics


def begin_again(layer: Any, initial: tuple[Tensor, Tensor] | None) -> None:
    """Let a layer wait for inputs, whose loaded adapter was saved before it was initialized from them.

    `initial`: what this layer was initialized with, if it was.
    """
    if initial is not None:
        layer.set_adapter(*initial)
        layer.set_initial(initial)
    elif layer.input_observer is None:
        warnings.warn(
            f"{layer.full_name}: the loaded state dict was saved before the calibration of the adapter "
            "(init_lora_weights='calibrated'), and its float weight is freed, so it has the default initialization "
            "now. Load it into a newly built module instead.",
            stacklevel=2,
        )


def calibrated_adapter(
    weight: Tensor, base: PackedBytes, input_rms: Tensor, config: QLoRAConfig, name: str
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, that best correct the quantization error for inputs of the given RMS d.

    Formula: the minimum over A and B of E ||(W - Q - s B A) x||^2, with E[x x^T] taken as diag(d^2).
    """
    size = input_rms.to(weight.device, torch.float32)
    size = (size / size.square().mean().sqrt()).clamp_min(MIN_INPUT_RMS)
    error = (weight.float() - ops.dequantize(base, torch.float32)) * size
    u, sigma, v = largest_singular(error, config.r)
    root = (sigma / config.scaling).sqrt()  # for A and for B
    random = v.new_empty(v.T.shape, device="cpu")
    default(random, generator_of(name))
    # Where sigma is 0, A = B = 0 would never get a gradient: A is random there.
    zero = (sigma <= torch.finfo(torch.float32).eps * sigma.max()).unsqueeze(1)
    lora_a = torch.where(zero, random.to(v), (v * root).T)
    return lora_a / size, (u * root).contiguous()


def calibrated_error(
    weight: Tensor, base: PackedBytes, input_rms: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """||(W - Q - s B A) diag(d)|| / ||W diag(d)||, fp32 []: how much of a layer's output its 4 bits still change."""
    dense = weight.float()
    size = input_rms.to(weight.device, torch.float32)
    error = dense - ops.dequantize(base, torch.float32) - scaling * (lora_b @ lora_a)
    share: Tensor = (error * size).norm() / (dense * size).norm().clamp_min(torch.finfo(torch.float32).tiny)
    return share


def largest_singular(matrix: Tensor, r: int) -> Factors:
    """The r largest singular values of a matrix [m, n], fp32, and their vectors.

    Formula: the eigenvectors U of the smaller Gram matrix in fp64, G = M M^T = U diag(sigma^2) U^T, then
    V = M^T U / sigma. This is as exact as an SVD in fp32, and much faster on a GPU.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, sigma, v = largest_singular(matrix.T, r)
        return v, sigma, u
    wide = matrix.to(solver_device(matrix.device)).double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
    u = vectors[:, -r:].flip(1)
    v = wide.T @ u
    sigma = torch.linalg.vector_norm(v, dim=0)
    v /= sigma.clamp_min(torch.finfo(torch.float32).tiny)
    return u.to(matrix), sigma.to(matrix), v.to(matrix)
