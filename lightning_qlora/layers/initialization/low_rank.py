"""The best approximation of rank r of a matrix: exact, or from a random sketch."""

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]  # u [m, r], sigma [r], v [n, r]: the matrix is about u diag(sigma) v^T


def exact(matrix: Tensor, r: int) -> Factors:
    """The r largest singular values of a matrix [m, n], fp32, and their vectors.

    Formula: the eigenvectors U of the smaller Gram matrix in fp64, G = M M^T = U diag(sigma^2) U^T, then
    V = M^T U / sigma. This is as exact as an SVD in fp32, and much faster on a GPU.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, sigma, v = exact(matrix.T, r)
        return v, sigma, u
    wide = matrix.double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
    u = vectors[:, -r:].flip(1)
    v = wide.T @ u
    sigma = torch.linalg.vector_norm(v, dim=0)
    v /= sigma.clamp_min(torch.finfo(torch.float32).tiny)
    return u.to(matrix.dtype), sigma.to(matrix.dtype), v.to(matrix.dtype)


def sketched(matrix: Tensor, r: int, iterations: int, seed: int) -> Factors:
    """The same, approximately, from a sketch of r columns and power iterations (Halko et al. 2011, algorithm 4.4).

    As torch.svd_lowrank(matrix, r, iterations), which PEFT calls, but with its own random generator.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], r, generator=generator, dtype=torch.float32, device="cpu").to(matrix)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, sigma, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, sigma, v.T
