"""What to expect of a GPU before it is measured, from bytes, operations and launches: `python -m benchmarks.predict`.

The time of a launch is the longest of three: its bytes at 85% of the memory bandwidth, its instructions at one per
scheduler and cycle, its matrix product at 70% of the tensor cores' peak; at least 2 us. Instructions per element are
those of the compiled kernels (docs/compile-report.md). A step waits for Python where that takes longer
(`host_overhead`).
"""

from dataclasses import dataclass

from benchmarks.measure import table

HOST = 60e-6, 65e-6  # seconds of host time of a layer, forward and backward
HASH = 21  # instructions per element for the dropout mask
LLAMA_8B = 32 * [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
VOCABULARY, WIDTH, BLOCKS = 128256, 4096, 32
PASSES = 60  # over a hidden state, 16 bits: norms, rotary embedding, activation, residuals, forward and backward


@dataclass(frozen=True)
class Card:
    """Bytes and bf16 operations per second, and schedulers times clock (data sheets)."""

    name: str
    bandwidth: float
    operations: float
    instructions: float

    def seconds(self, moved: float, instructions: float = 0, operations: float = 0) -> float:
        """Time of one launch."""
        by_bytes, by_instructions = moved / (0.85 * self.bandwidth), instructions / 32 / self.instructions
        return max(2e-6, by_bytes, by_instructions, operations / (0.7 * self.operations))

    def layer(self, m: int, n: int, k: int, fused_rows: int = 64) -> tuple[float, float]:
        """Seconds forward and backward of a layer [n, k] with m rows of input and dropout."""
        decode = self.seconds(2.516 * n * k, 6 * n * k)
        down, up = self.seconds(2 * m * k, (5 + HASH) * m * k), self.seconds(2 * m * n, 11 * m * n)
        product = self.seconds(2 * (m * k + n * k + 2 * m * n), 0, 2 * m * n * k)
        if m <= fused_rows:
            forward = down + up + self.seconds(0.516 * n * k, 10 * n * k, 2 * max(m, 16) * n * k)
        else:
            forward = down + up + decode + product
        adapter = self.seconds(2 * m * n, 5 * m * n) + self.seconds(2 * m * k, (11 + HASH) * m * k)
        adapter += self.seconds(2 * m * (n + k), 5 * m * n + (5 + HASH) * m * k)
        return forward, adapter + decode + self.seconds(2 * (m * n + n * k + 2 * m * k), 0, 2 * m * n * k)

    def step(self, tokens: int) -> tuple[float, float]:
        """Seconds on the GPU of a step of an 8B model without checkpointing, and of the bf16 products alone."""
        layers = sum(sum(self.layer(tokens, n, k)) for n, k in LLAMA_8B)
        head = 2 * self.seconds(2 * VOCABULARY * (WIDTH + tokens), 0, 2 * tokens * VOCABULARY * WIDTH)
        attention = 3.5 * BLOCKS * self.seconds(0, 0, 2 * tokens * tokens * WIDTH)
        passes = BLOCKS * PASSES * self.seconds(2 * tokens * WIDTH)
        dense = 2 * sum(self.seconds(2 * n * k, 0, 2 * tokens * n * k) for n, k in LLAMA_8B) + head + attention + passes
        return layers + head + attention + passes, dense


CARDS = (
    Card("RTX 4090", 1.008e12, 165e12, 128 * 4 * 2.52e9),
    Card("A100 80GB", 2.039e12, 312e12, 108 * 4 * 1.41e9),
    Card("H100 SXM", 3.35e12, 989e12, 132 * 4 * 1.755e9),
)


def main() -> None:
    """Print the table."""
    rows = [["decode 4096 x 4096 to bf16, us"]]
    rows += [[f"layer 4096 x 4096, rank 64, dropout, {m} rows: forward / backward, us"] for m in (1, 64, 512, 4096)]
    rows += [[f"step of an 8B model, {tokens} tokens, ms"] for tokens in (512, 4096)]
    rows += [[f"the same, compared with a 16-bit base without adapters, {tokens} tokens"] for tokens in (512, 4096)]
    host = sum(HOST) * len(LLAMA_8B)
    for card in CARDS:
        rows[0].append(f"{1e6 * card.seconds(2.516 * 4096**2, 6 * 4096**2):.0f}")
        for row, m in zip(rows[1:5], (1, 64, 512, 4096), strict=True):
            row.append(" / ".join(f"{1e6 * seconds:.0f}" for seconds in card.layer(m, 4096, 4096)))
        for row, extra, tokens in zip(rows[5:7], rows[7:9], (512, 4096), strict=True):
            ours, dense = card.step(tokens)
            row.append(f"{1e3 * max(ours, host):.0f}{' (Python)' * (host > ours)}")
            extra.append(f"+{100 * (ours / dense - 1):.0f}%")
    print(table(["predicted", *(card.name for card in CARDS)], rows))


if __name__ == "__main__":
    main()
