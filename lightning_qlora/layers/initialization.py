"""Initial values of a LoRA adapter, and the 4-bit base that belongs to them (`init_lora_weights`).

    default, gaussian   A random, B = 0: the model is unchanged                        base Q = quantize(W)
    loftq               s B A = SVD_r(W - Q), repeated          base Q = quantize(W); repeated: quantize(W - s B A)
    pissa               s B A = SVD_r(W), repeated                                     base Q = quantize(W - s B A)
    calibrated          s B A = SVD_r((W - Q) diag(d)) diag(1 / d)                     base Q = quantize(W)

W is the weight [out, in], s the scaling of the adapter, SVD_r the best approximation of rank r, d the root mean square
of each input channel. Sources: "default" is PEFT's kaiming_uniform_(a=sqrt(5)). LoftQ: Li et al. 2023, algorithm 1.
PiSSA: Meng et al. 2024, section 3; with more than one iteration section 4. "calibrated": the
approximate form of QERA (Zhang et al., ICLR 2025), with d measured in the first step.
"""

import hashlib
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_qlora.checks import check_finite
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.quantization.packed_weight import PackedBytes
from lightning_qlora.tensors.fingerprint import has_values

MIN_INPUT_RMS = 1e-2  # times the mean: calibrated adapters are divided by d, and a dead channel would make them huge
Start = tuple[PackedBytes, Tensor, Tensor]  # of a layer: the base [out, in], A [r, in] and B [out, r] in fp32
Factors = tuple[Tensor, Tensor, Tensor]  # u [m, r], sigma [r], v [n, r]: the matrix is about u diag(sigma) v^T
WITHOUT_SOLVERS = ("mps",)  # types of devices


def initialize(weight: Tensor, config: QLoRAConfig, name: str) -> Start:
    """The 4-bit base and the initial adapter of a layer, computed on the weight's device.

    "calibrated" gives the values of "default": `calibrated_adapter` replaces them when the inputs are known.

    The float weight is [out, in]. The seed of the random numbers is made from the layer's name. ValueError if the rank
    is larger than the number of singular values.
    """
    if not has_values(weight):
        return _without_data(weight, config)
    with torch.autocast(weight.device.type, enabled=False):
        return STARTS[config.initialization](weight, config, name)


def _without_data(weight: Tensor, config: QLoRAConfig) -> Start:
    """Shapes alone. On the meta device `load_weights` reads the values once the module is sharded."""
    if config.init_kind.keeps_initial:
        _checked_rank(weight, config)
    base = ops.quantize_unchecked(weight, config.quant_type, config.block_size, config.double_quant)
    lora_a = weight.new_empty(config.r, weight.shape[1], dtype=torch.float32)
    lora_b = weight.new_empty(weight.shape[0], config.r, dtype=torch.float32)
    return base, lora_a, lora_b


def random_adapter(in_features: int, out_features: int, config: QLoRAConfig, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] random and B [out, r] = 0, fp32, on the CPU.

    "default": A is uniform in +-1 / sqrt(in). "gaussian": A is normal with standard deviation 1 / r.
    """
    generator = torch.Generator("cpu").manual_seed(seed_of_layer(name))
    lora_a = torch.empty(config.r, in_features, dtype=torch.float32, device="cpu")
    if config.initialization == "gaussian":
        lora_a.normal_(std=1 / config.r, generator=generator)
    else:
        bound = 1 / math.sqrt(in_features)
        lora_a.uniform_(-bound, bound, generator=generator)
    return lora_a, torch.zeros(out_features, config.r, dtype=torch.float32, device="cpu")


def calibrated_adapter(
    weight: Tensor, base: PackedBytes, input_rms: Tensor, config: QLoRAConfig, name: str
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, that best correct the quantization error for inputs of the given RMS d.

    Formula: the minimum over A and B of E ||(W - Q - s B A) x||^2, with E[x x^T] taken as diag(d^2).
    """
    size = input_rms.to(weight.device, torch.float32)
    size = (size / size.square().mean().sqrt()).clamp_min(MIN_INPUT_RMS)
    error = (weight.float() - ops.dequantize(base, torch.float32)) * size
    lora_a, lora_b = _split(exact(error, _checked_rank(weight, config)), config, name)
    return lora_a / size, lora_b


def calibrated_error(
    weight: Tensor, base: PackedBytes, input_rms: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """||(W - Q - s B A) diag(d)|| / ||W diag(d)||, fp32 []: how much of a layer's output its 4 bits still change."""
    dense = weight.float()
    size = input_rms.to(weight.device, torch.float32)
    error = dense - ops.dequantize(base, torch.float32) - scaling * (lora_b @ lora_a)
    share: Tensor = (error * size).norm() / (dense * size).norm().clamp_min(torch.finfo(torch.float32).tiny)
    return share


def seed_of_layer(name: str) -> int:
    """A seed from a layer's name and the seed of `seed_everything`: the same on every rank."""
    key = f"{os.environ.get('PL_GLOBAL_SEED', 0)}/{name}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")


def _random(weight: Tensor, config: QLoRAConfig, name: str) -> Start:
    return quantize(weight, config), *random_adapter(weight.shape[1], weight.shape[0], config, name)


def _until_data(weight: Tensor, config: QLoRAConfig, name: str) -> Start:
    _checked_rank(weight, config)  # an error at conversion, not at the first batch
    return _random(weight, config, name)


def _loftq(weight: Tensor, config: QLoRAConfig, name: str) -> Start:
    return _alternate(weight, weight, config.loftq_iterations, config, name)


def _pissa(weight: Tensor, config: QLoRAConfig, name: str) -> Start:
    check_finite("weight:", weight, ops.SPREADS)  # a decomposition would fail without the reason
    dense = weight.float()
    r = _checked_rank(weight, config)
    if config.pissa_iterations is None:
        factors = exact(dense, r)
    else:
        factors = sketched(dense, r, config.pissa_iterations, seed_of_layer(name))
    lora_a, lora_b = _split(factors, config, name)
    residual = dense - config.scaling * (lora_b @ lora_a)
    if config.loftq_iterations > 1:
        return _alternate(weight, residual, config.loftq_iterations - 1, config, name)
    return quantize(residual, config), lora_a, lora_b


def _alternate(weight: Tensor, residual: Tensor, iterations: int, config: QLoRAConfig, name: str) -> Start:
    """Repeat: Q = quantize(residual), s B A = SVD_r(W - Q), residual = W - s B A."""
    dense = weight.float()
    r = _checked_rank(weight, config)
    for _ in range(iterations):
        base = quantize(residual, config)
        lora_a, lora_b = _split(exact(dense - ops.dequantize(base, torch.float32), r), config, name)
        residual = dense - config.scaling * (lora_b @ lora_a)
    return base, lora_a, lora_b


def _split(factors: Factors, config: QLoRAConfig, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with s B A = u diag(sigma) v^T; each gets the square roots of the singular values."""
    u, sigma, v = factors
    root = (sigma / config.scaling).sqrt()
    random_a, _ = random_adapter(v.shape[0], u.shape[0], config, name)
    # Where sigma is 0, A = B = 0 would never get a gradient: A is random there.
    zero = (sigma <= torch.finfo(torch.float32).eps * sigma.max()).unsqueeze(1)
    return torch.where(zero, random_a.to(v), (v * root).T), (u * root).contiguous()


def quantize(weight: Tensor, config: QLoRAConfig) -> PackedBytes:
    """The 4-bit weight that a config asks for."""
    return ops.quantize_bytes(weight, config.quant_type, config.block_size, config.double_quant)


def _checked_rank(weight: Tensor, config: QLoRAConfig) -> int:
    r = config.r
    if r > min(weight.shape):
        raise ValueError(
            f"r={r}: a {weight.shape[0]}x{weight.shape[1]} weight has only {min(weight.shape)} singular values, and "
            f"init_lora_weights={config.init_lora_weights!r} needs r of them. Use a smaller r (rank_pattern sets the "
            "rank of single layers) or init_lora_weights='default'."
        )
    return r


def exact(matrix: Tensor, r: int) -> Factors:
    """The r largest singular values of a matrix [m, n], fp32, and their vectors.

    Formula: the eigenvectors U of the smaller Gram matrix in fp64, G = M M^T = U diag(sigma^2) U^T, then
    V = M^T U / sigma. This is as exact as an SVD in fp32, and much faster on a GPU.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, sigma, v = exact(matrix.T, r)
        return v, sigma, u
    wide = matrix.to(solver_device(matrix.device)).double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
    u = vectors[:, -r:].flip(1)
    v = wide.T @ u
    sigma = torch.linalg.vector_norm(v, dim=0)
    v /= sigma.clamp_min(torch.finfo(torch.float32).tiny)
    return _like(matrix, u.to(matrix.dtype), sigma.to(matrix.dtype), v.to(matrix.dtype))


def sketched(matrix: Tensor, r: int, iterations: int, seed: int) -> Factors:
    """The same, approximately, from a sketch of r columns and power iterations (Halko et al. 2011, algorithm 4.4).

    As torch.svd_lowrank(matrix, r, iterations), which PEFT calls, but with its own random generator. It is computed
    from a copy: the last bits of a product depend on the alignment of its operands, and a file's tensors are not
    aligned as torch's are.
    """
    original = matrix
    matrix = matrix.to(solver_device(matrix.device), copy=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], r, generator=generator, dtype=torch.float32, device="cpu").to(matrix)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, sigma, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return _like(original, basis @ u, sigma, v.T)


def solver_device(device: torch.device) -> torch.device:
    """Where to compute in fp64, QR and eigenvalues: the CPU for a device that has none of them (Apple's MPS)."""
    if device.type in WITHOUT_SOLVERS:
        return torch.device("cpu")
    return device


def _like(matrix: Tensor, u: Tensor, sigma: Tensor, v: Tensor) -> Factors:
    return u.to(matrix.device), sigma.to(matrix.device), v.to(matrix.device)


# Name in `INITIALIZATIONS` -> what computes the base and the adapter.
STARTS: dict[str, Callable[[Tensor, QLoRAConfig, str], Start]] = {
    "default": _random,
    "gaussian": _random,
    "loftq": _loftq,
    "pissa": _pissa,
    "calibrated": _until_data,
}
