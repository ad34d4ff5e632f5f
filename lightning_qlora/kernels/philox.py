"""The dropout mask of the Triton kernels, in torch: Philox 4x32-10, of the seed and an element's place alone.

Four neighbours share a counter, place // 4: ten rounds of multiplications turn it, under the 64-bit seed as key, into
four random 32-bit words. An element is kept where its word is at least p * 2^32
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; triton.language.random).
"""

import torch
from torch import Tensor

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The smallest word that keeps an element, with probability p of dropping it."""
    return min(round(p * 2**32), WORD)


def keep_mask(numel: int, p: float, seed: int) -> Tensor:
    """Which of `numel` elements stay: bool [numel]."""
    return words(-(-numel // 4), seed).view(-1)[:numel] >= threshold(p)


def words(counters: int, seed: int) -> Tensor:
    """Random 32-bit words of the first counters, int64 [counters, 4]."""
    count = torch.arange(counters)
    c0, c1, c2, c3 = count & WORD, count >> 32, torch.zeros_like(count), torch.zeros_like(count)
    key_a, key_b = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        # The products need 64 bits and wrap into the sign, which `& WORD` takes off again.
        product_a, product_b = c0 * ROUND_A, c2 * ROUND_B
        c0, c1 = ((product_b >> 32) & WORD) ^ c1 ^ key_a, product_b & WORD
        c2, c3 = ((product_a >> 32) & WORD) ^ c3 ^ key_b, product_a & WORD
        key_a, key_b = (key_a + KEY_A) & WORD, (key_b + KEY_B) & WORD
    return torch.stack([c0, c1, c2, c3], dim=1)
