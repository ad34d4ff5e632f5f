"""The best rank-r approximation of a matrix: exact, or from a random sketch."""

import torch
from torch import Tensor

OVERSAMPLING = 16  # columns of the sketch beyond r (Halko, Martinsson and Tropp 2011, section 4.2)

Factors = tuple[Tensor, Tensor, Tensor]  # u [m, r], sigma [r], v [n, r]: the matrix is about u diag(sigma) v^T


def exact(matrix: Tensor, r: int) -> Factors:
    """The r largest singular values of a matrix [m, n] and their vectors.

    From the eigenvectors of its smaller Gram matrix in fp64, which is as exact as an SVD in fp32 and far faster on a
    GPU: G = M M^T = U diag(sigma^2) U^T, and V = M^T U / sigma.
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
    """The same, about, from a random sketch of r + 16 columns and power iterations (algorithm 4.4 of the same paper).

    torch.svd_lowrank does this too, but draws from the global generator of the matrix's device.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = min(r + OVERSAMPLING, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, sigma, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :r], sigma[:r], v[:r].T
