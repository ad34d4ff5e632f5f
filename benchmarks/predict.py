"""What to expect of a GPU before it is measured, from bytes, operations and launches.

    python -m benchmarks.predict           the kernels as they are
    python -m benchmarks.predict --turing  a T4: products in fp16 with a power of two, and in fp32

The time of a launch is the longest of three: its bytes at 85% of the memory bandwidth, its instructions at one per
scheduler and cycle, its matrix product at 70% of the tensor cores' peak; at least 2 us. Instructions per element are
those of the compiled kernels (tests/record.md). A step waits for Python where that takes longer
(`host_overhead`).
"""

import argparse
from dataclasses import dataclass, replace

from benchmarks.measure import table

HOST = 60e-6, 65e-6  # seconds of host time of a layer, forward and backward
HASH = 21  # instructions per element for the dropout mask
LLAMA_8B = 32 * [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
VOCABULARY = 128256
WIDTH = 4096
BLOCKS = 32
PASSES = 60  # over a hidden state, 16 bits: norms, rotary embedding, activation, residuals, forward and backward


@dataclass(frozen=True)
class Card:
    """Bytes and bf16 operations per second, multiprocessors and clock (data sheets)."""

    name: str
    bandwidth: float
    operations: float
    multiprocessors: int
    clock: float

    def seconds(self, moved: float, instructions: float = 0, operations: float = 0) -> float:
        """Time of one launch."""
        slots = 4 * self.multiprocessors * self.clock
        by_bytes = moved / (0.85 * self.bandwidth)
        by_instructions = instructions / 32 / slots
        return max(2e-6, by_bytes, by_instructions, operations / (0.7 * self.operations))

    def decode(self, numel: int) -> float:
        """Decoding a weight into memory."""
        return self.seconds(2.516 * numel, 6 * numel)

    def product(self, m: int, n: int, k: int) -> float:
        """y += x W^T with its decoding, x [m, k] and W [n, k]; the product with dY is that with n and k exchanged."""
        return self.decode(n * k) + self.seconds(2 * (m * k + 2 * m * n + n * k), 0, 2 * m * n * k)

    def layer(self, m: int, n: int, k: int, fused_rows: int = 64) -> tuple[float, float]:
        """Seconds forward and backward of a layer [n, k] with m rows of input and dropout."""
        forward = self.seconds(2 * m * k, (5 + HASH) * m * k) + self.seconds(2 * m * n, 11 * m * n)
        if m <= fused_rows:
            forward += self.seconds(0.516 * n * k, 10 * n * k, 2 * max(m, 16) * n * k)
        else:
            forward += self.product(m, n, k)
        backward = self.seconds(2 * m * n, 5 * m * n) + self.seconds(2 * m * k, (11 + HASH) * m * k)
        backward += self.seconds(2 * m * (n + k), 5 * m * n + (5 + HASH) * m * k)
        return forward, backward + self.product(m, k, n)

    def step(self, tokens: int) -> tuple[float, float]:
        """Seconds on the GPU of a step of an 8B model, and of the bf16 products alone."""
        layers = sum(sum(self.layer(tokens, n, k)) for n, k in LLAMA_8B)
        head = 2 * self.seconds(2 * VOCABULARY * (WIDTH + tokens), 0, 2 * tokens * VOCABULARY * WIDTH)
        rest = head + 3.5 * BLOCKS * self.seconds(0, 0, 2 * tokens * tokens * WIDTH)
        rest += BLOCKS * PASSES * self.seconds(2 * tokens * WIDTH)
        products = sum(self.seconds(2 * n * k, 0, 2 * tokens * n * k) for n, k in LLAMA_8B)
        return layers + rest, 2 * products + rest


CARDS = (
    Card("RTX 4090", 1.008e12, 165e12, 128, 2.52e9),
    Card("A100 80GB", 2.039e12, 312e12, 108, 1.41e9),
    Card("H100 SXM", 3.35e12, 989e12, 132, 1.755e9),
)


def kernels() -> str:
    """The kernels as they are, on each card."""
    rows = [["decode 4096 x 4096 to bf16, us"]]
    rows += [[f"layer 4096 x 4096, rank 64, dropout, {m} rows: forward / backward, us"] for m in (1, 64, 512, 4096)]
    rows += [[f"step of an 8B model, {tokens} tokens, ms"] for tokens in (512, 4096)]
    rows += [[f"the same, compared with a 16-bit base without adapters, {tokens} tokens"] for tokens in (512, 4096)]
    host = sum(HOST) * len(LLAMA_8B)
    for card in CARDS:
        rows[0].append(f"{1e6 * card.decode(4096**2):.0f}")
        for row, m in zip(rows[1:5], (1, 64, 512, 4096), strict=True):
            row.append(" / ".join(f"{1e6 * seconds:.0f}" for seconds in card.layer(m, 4096, 4096)))
        for row, extra, tokens in zip(rows[5:7], rows[7:9], (512, 4096), strict=True):
            ours, dense = card.step(tokens)
            row.append(f"{1e3 * max(ours, host):.0f}{' (Python)' * (host > ours)}")
            extra.append(f"+{100 * (ours / dense - 1):.0f}%")
    return table(["predicted", *(card.name for card in CARDS)], rows)


T4 = Card("T4", 320e9, 65e12, 40, 1.59e9)
T4_FP32 = replace(T4, operations=8.1e12)


def _in_fp16(m: int, n: int, k: int, r: int = 64) -> float:
    """Seconds of x W^T + (drop(x) A^T) B^T for x [m, k] on a T4; the backward pass has the same work, from dY and x."""
    to_half = T4.seconds(4 * m * k) + T4.seconds(6 * m * k)
    adapter = T4.seconds(4 * m * k, HASH * m * k) + T4.seconds(2 * m * k, 0, 2 * m * k * r)
    adapter += T4.seconds(4 * m * n, 0, 2 * m * n * r)
    product = T4.decode(n * k) + T4.seconds(2 * m * k + 2 * n * k + 4 * m * n, 0, 2 * m * n * k)
    few = 7 * T4.seconds(0)  # A, B, xa and the scales to fp16
    return to_half + adapter + product + T4.seconds(12 * m * n) + few


def _in_fp32(m: int, n: int, k: int, r: int = 64) -> float:
    """The same with products in fp32."""
    adapter = T4.seconds(8 * m * k, HASH * m * k) + T4_FP32.seconds(4 * m * k, 0, 2 * m * k * r)
    adapter += T4_FP32.seconds(4 * m * n, 0, 2 * m * n * r)
    product = T4.seconds(4.516 * n * k) + T4_FP32.seconds(4 * (m * k + n * k + 2 * m * n), 0, 2 * m * n * k)
    return adapter + product


def turing() -> str:
    """A layer and a step on a T4."""
    rows = []
    for m in (1, 64, 512, 4096):
        times = [1e6 * layer(m, WIDTH, WIDTH) for layer in (_in_fp16, _in_fp32)]
        rows.append([f"layer 4096 x 4096, rank 64, dropout, {m} rows, forward, us", *(f"{time:.0f}" for time in times)])
    for tokens in (512, 2048):
        rest = 2 * T4_FP32.seconds(4 * VOCABULARY * WIDTH, 0, 2 * tokens * VOCABULARY * WIDTH)
        rest += 3.5 * BLOCKS * T4_FP32.seconds(0, 0, 2 * tokens * tokens * WIDTH)
        rest += BLOCKS * PASSES * T4.seconds(4 * tokens * WIDTH)
        times = [1e3 * (2 * sum(layer(tokens, n, k) for n, k in LLAMA_8B) + rest) for layer in (_in_fp16, _in_fp32)]
        rows.append([f"step of an 8B model, {tokens} tokens, ms", *(f"{time:.0f}" for time in times)])
        rows.append(["of it in both: output embedding, attention and norms in fp32, ms", *[f"{1e3 * rest:.0f}"] * 2])
    return table(["predicted for a T4", "fp16 with a power of two", "fp32"], rows)


def main(arguments: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turing", action="store_true", help="a T4: products in fp16 and in fp32")
    options = parser.parse_args(arguments)
    print(turing() if options.turing else kernels())


if __name__ == "__main__":
    main()
