"""What to expect of a GPU before it is measured, by arithmetic: bytes, instructions, operations and launches.

    python -m benchmarks.predict          a training step
    python -m benchmarks.predict --token  one token of generation
    python -m benchmarks.predict --layer  a layer of 4096 x 4096

The model is Llama 2 7B with adapters of rank 64 on all linear layers, each block recomputed (`--layer`: without that).
The time of a launch is the longest of five: its bytes at 85% of the memory bandwidth, its bytes at the bandwidth of the
L2 cache, its instructions at one for each scheduler and cycle, its matrix product at 70% of the tensor cores' peak, and
the shortest time of a launch. A step takes the longer of the device's and the host's time.

Where the figures come from: instructions of our kernels from `compile_kernels` (tests/record.md); those of bitsandbytes
0.50.2 from the machine code in its library; launches and passes over a hidden state of a Llama block from transformers
5.24 on meta tensors; host times from `host_overhead` and 2.5 us for each launch; bandwidths of the L2 caches from
public measurements, +-20%. Of Unsloth the code was read, not compiled.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from benchmarks.measure import table

WIDTH, VOCABULARY, BLOCKS, RANK = 4096, 32000, 32, 64
LAYERS = 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]  # (outputs, inputs) of the layers of a block
LAUNCH = 2.5e-6  # seconds
ONE_ROW = 11e-6  # seconds on the host of a layer with one row and without gradients
DROPPED = 20  # instructions for the dropout mask of an element
ATTENTION_IN_FP32 = 1.4  # fused attention multiplies whole tiles of the causal triangle
# Passes over q, k, v and the output, and over their gradients, to and from fp16, in hidden states of fp32: one for each
# largest norm, one and a half for each cast.
CASTS_OF_ATTENTION = 9, 7


@dataclass(frozen=True)
class Card:
    """Bytes per second of memory and L2 cache, operations per second in 16 bits and fp32, multiprocessors, clock."""

    name: str
    bandwidth: float
    cache: float
    operations: float
    fp32: float
    multiprocessors: int
    clock: float
    instructions: float  # of the matmul of few rows, for each weight
    wavefronts: float  # of shared memory in the same loop, cycles for each 32 weights of a multiprocessor

    def seconds(
        self, moved: float = 0, cached: float = 0, instructions: float = 0, operations: float = 0, fp32: float = 0
    ) -> float:
        """Time of one launch."""
        slots = 4 * self.multiprocessors * self.clock
        tensor_cores = operations / (0.7 * self.operations)
        return max(
            LAUNCH,
            moved / (0.85 * self.bandwidth),
            cached / self.cache,
            instructions / 32 / slots,
            tensor_cores,
            fp32 / (0.7 * self.fp32),
        )

    def few_rows(self, numel: int) -> float:
        """A matmul of one row that decodes `numel` weights on the way."""
        in_shared_memory = numel / 32 * self.wavefronts / self.multiprocessors / self.clock
        return max(3e-6, self.seconds(0.516 * numel, 0, self.instructions * numel), in_shared_memory) + LAUNCH


T4 = Card("T4", 320e9, 1.2e12, 65e12, 8.1e12, 40, 1.59e9, 10.4, 3.2)
CARDS = (
    Card("RTX 4090", 1.008e12, 4.5e12, 165e12, 82e12, 128, 2.52e9, 8.9, 3.2),
    Card("A100", 2.039e12, 4.2e12, 312e12, 19.5e12, 108, 1.41e9, 8.5, 3.2),
    Card("H100", 3.35e12, 5.7e12, 989e12, 67e12, 132, 1.755e9, 9.06, 2.66),
    T4,
    # 70 W do not feed its tensor cores: half of the peak is what public measurements sustain.
    replace(T4, name="T4, sustained", operations=T4.operations * 0.5 / 0.7),
)


def is_turing(card: Card) -> bool:
    return card.name.startswith("T4")


def matmul(card: Card, m: int, n: int, k: int, adds: bool = False) -> float:
    """x W^T with W in 16 bits; one that adds to what is there also reads it, half of which is hidden."""
    read = 2 * m * n if adds else 0
    return card.seconds(2 * (m * k + n * k + m * n) + read, 0, 0, 2 * m * n * k) + read / 2 / (0.85 * card.bandwidth)


def project(card: Card, m: int, k: int, instructions: float, casts: bool = False) -> float:
    """x A^T, or dY B, for x [m, k]; `casts`: x is in fp32, and its cast is written."""
    shares = 64 * m * RANK  # sums in fp32 of the programs that share a product
    again = ceil(m / 64) * 4 * RANK * k  # tiles of 64 rows read A or B in fp32 again
    moved = (6 if casts else 2) * m * k
    return card.seconds(moved + 4 * RANK * k, moved + again + shares, (instructions + casts) * m * k)


def ours(card: Card, m: int, n: int, k: int) -> tuple[float, float]:
    """Seconds forward and backward of a layer [n, k] with m rows and dropout."""
    r = RANK
    again = ceil(m / 64) * 4 * r  # as in `project`
    decode = card.seconds(2.516 * n * k, 0, 5.9 * n * k)
    forward = project(card, m, k, 6 + DROPPED)
    forward += card.seconds(2 * m * n + 4 * r * n, 2 * m * n + again * n + ceil(n / 128) * 2 * m * r, 10 * m * n)
    forward += decode + matmul(card, m, n, k, adds=True)
    backward = project(card, m, n, 6)
    gradients = 2 * m * (n + k)
    backward += card.seconds(
        gradients + 4 * r * (n + k),
        gradients + (n + k) / 64 * 2 * m * r + 32 * r * (n + k),
        (6 + DROPPED) * m * k + 5 * m * n,
    )
    input_gradient = 2 * m * k + again * k + ceil(k / 128) * 2 * m * r
    backward += card.seconds(2 * m * k + 4 * r * k, input_gradient, (12 + DROPPED) * m * k)
    return forward, backward + decode + matmul(card, m, k, n, adds=True)


def ours_in_fp32(card: Card, m: int, n: int, k: int) -> tuple[float, float]:
    """The same of x in fp32: the first products cast x and dY, and y and dX are sums in fp32 of the last launches."""
    decode = card.seconds(2.516 * n * k, 0, 5.9 * n * k)
    forward = project(card, m, k, 6 + DROPPED, casts=True) + decode + in_half(card, m, n, k)
    forward += card.seconds(8 * m * n + 4 * RANK * n, 0, 13 * m * n)
    backward = project(card, m, n, 6, casts=True) + decode + in_half(card, m, k, n)
    gradients = 2 * m * (n + 2 * k)
    shares = (n + k) / 64 * 2 * m * RANK + 32 * RANK * (n + k)
    backward += card.seconds(gradients + 4 * RANK * (n + k), gradients + shares, (8 + DROPPED) * m * k + 7 * m * n)
    return forward, backward + card.seconds(8 * m * k + 4 * RANK * k, 0, (13 + DROPPED) * m * k)


def rows_to_half(card: Card, rows: int, columns: int, strided: bool = False, dropout: bool = False) -> float:
    """To fp16 with a power of two for each row, of which a program keeps 16,384 numbers, and reads the others twice.

    `strided`: of the rows of a transposed matrix each number is a sector of 32 bytes, read and written in the cache.
    """
    numel = rows * columns
    moved = (6 + 2 * dropout) * numel + 4 * rows * max(0, columns - 16384)
    return card.seconds(moved, 64 * numel if strided else 0, (10 + DROPPED * dropout) * numel)


def in_half(card: Card, rows: int, columns: int, inner: int) -> float:
    """A product of torch in 16 bits whose result is fp32."""
    moved = 2 * inner * (rows + columns) + 4 * rows * columns
    return card.seconds(moved, 0, 0, 2 * rows * columns * inner)


def finish(card: Card, m: int, n: int, instructions: float = 0) -> float:
    """Sums of fp16 to a result in fp32: their powers of two and the adapter's second product in fp32, in one launch."""
    moved = 8 * m * n + 4 * RANK * (m + n)
    return card.seconds(moved, 0, (22 + 1.1 * RANK + instructions) * m * n, 0, 2 * m * n * RANK)


def project_in_half(card: Card, m: int, k: int) -> float:
    """drop(x) A^T, with x and drop(x) cast in one launch."""
    casts = rows_to_half(card, m, k, dropout=True) + rows_to_half(card, RANK, k)
    return casts + in_half(card, m, RANK, k) + card.seconds(8 * m * RANK)


def ours_in_half(card: Card, m: int, n: int, k: int) -> tuple[float, float]:
    """The same on a card without bf16: products in fp16 with powers of two, 8 and 14 launches."""
    r = RANK
    decode = LAUNCH + card.seconds(2.516 * n * k, 0, 6.8 * n * k)
    forward = project_in_half(card, m, k) + decode + in_half(card, m, n, k) + finish(card, m, n)
    of_a = in_half(card, r, k, m) + card.seconds(8 * r * k)  # drop(x) is saved in fp16
    of_b = in_half(card, m, r, n) + card.seconds(8 * n * r)
    casts = rows_to_half(card, m, n) + rows_to_half(card, r, n, True) + 2 * rows_to_half(card, r, m, True)
    grad_xa = in_half(card, m, r, n) + card.seconds(8 * m * r)
    backward = casts + grad_xa + of_a + of_b + decode + in_half(card, m, k, n)
    return forward, backward + finish(card, m, k, DROPPED)


def peft(card: Card, m: int, n: int, k: int, decoded: bool = True) -> tuple[float, float]:
    """PEFT on bitsandbytes' layer, or on a dense one in 16 bits."""
    base, copy = 0.0, 0.0
    if decoded:
        nested_scales = card.seconds(5.1 * n * k / 64) + card.seconds(8 * n * k / 64)
        base = card.seconds(2.58 * n * k, 0, 26 * n * k) + nested_scales
        copy = card.seconds(4 * m * n)
    casts = 2 * card.seconds(3 * RANK * (n + k))
    dropout = card.seconds(5 * m * k)
    forward = base + copy + matmul(card, m, n, k) + dropout + casts
    forward += sum(card.seconds(moved) for moved in (2 * m * k, 2 * m * n, 4 * m * n, 6 * m * n))
    backward = base + matmul(card, m, k, n) + dropout + casts
    backward += sum(card.seconds(moved) for moved in (4 * m * n, 2 * m * n, 2 * m * n, 2 * m * k, 2 * m * k, 6 * m * k))
    return forward, backward


def dense(card: Card, m: int, n: int, k: int) -> tuple[float, float]:
    return peft(card, m, n, k, decoded=False)


def unsloth(card: Card, m: int, n: int, k: int) -> tuple[float, float]:
    """Unsloth's layer, which has no dropout."""
    decode = card.seconds(2.516 * n * k, 0, 8 * n * k)
    casts = 2 * card.seconds(3 * RANK * (n + k))
    forward = decode + matmul(card, m, n, k) + casts + card.seconds(2 * m * k) + card.seconds(4 * m * n)
    backward = decode + matmul(card, m, k, n) + casts + 2 * card.seconds(2 * m * n) + 2 * card.seconds(2 * m * k)
    return forward, backward + card.seconds(4 * m * k)


@dataclass(frozen=True)
class Method:
    """A way to train: a layer, and what a block has beside its linear layers."""

    name: str
    layer: Callable[[Card, int, int, int], tuple[float, float]]
    host: tuple[float, float]  # seconds of a layer, forward and backward
    passes: tuple[int, int] = (76, 155)  # over a hidden state in 16 bits, forward and backward
    passes_in_fp32: tuple[int, int] = (54, 109)  # in fp32, without casts
    launches: tuple[int, int] = (30, 52)
    of_logits: int = 32  # bytes moved for each logit
    in_fp32: bool = False  # what stays dense computes in fp32

    def device_step(self, card: Card, tokens: int) -> float:
        """Seconds on the card."""
        is_ours = self.layer in (ours, ours_in_fp32)
        turing = is_ours and is_turing(card)
        fp32 = self.in_fp32 or turing
        layer = ours_in_half if turing else self.layer
        times = [layer(card, tokens, n, k) for n, k in LAYERS]
        passes = self.passes_in_fp32 if fp32 else self.passes
        pass_over = (4 if fp32 else 2) * tokens * WIDTH / (0.85 * card.bandwidth)
        attention = self._dense(card, self.in_fp32, 2 * tokens * tokens * WIDTH, ATTENTION_IN_FP32)
        casts = CASTS_OF_ATTENTION if turing and not self.in_fp32 else (0, 0)
        forward = sum(forward for forward, _ in times) + (passes[0] + casts[0]) * pass_over + attention
        backward = sum(backward for _, backward in times) + (passes[1] + casts[1]) * pass_over + 2.5 * attention
        block = 2 * forward + backward
        if is_ours:
            # The recomputation of a block ends before the product of its last layer.
            width = LAYERS[-1][1]
            first = project(card, tokens, width, 6 + DROPPED, casts=self.layer is ours_in_fp32)
            if turing:
                first = project_in_half(card, tokens, width)
            block -= times[-1][0] - first
        moved = 2 * VOCABULARY * (WIDTH + tokens)
        head = max(card.seconds(moved), self._dense(card, self.in_fp32, 2 * tokens * VOCABULARY * WIDTH))
        if turing and not self.in_fp32:
            # The weight is cast once for both passes; then powers are taken out, or gradients are cast.
            head += rows_to_half(card, VOCABULARY, WIDTH) / 2 + card.seconds(8 * tokens * VOCABULARY)
        return BLOCKS * block + 2 * head + card.seconds(self.of_logits * tokens * VOCABULARY)

    @staticmethod
    def _dense(card: Card, fp32: bool, operations: float, factor: float = 1) -> float:
        return card.seconds(fp32=factor * operations) if fp32 else card.seconds(operations=operations)

    def host_step(self) -> float:
        """Seconds of Python and launches, of which the forward pass is done twice."""
        layers = len(LAYERS) * (2 * self.host[0] + self.host[1])
        small = 2 * 5e-6 * self.launches[0] + 7e-6 * self.launches[1]
        return BLOCKS * (layers + small)


FUSED = (22, 40), (22, 40), (12, 16), 8  # norms, RoPE and SwiGLU: passes, launches, and bytes of a logit
OURS = Method("this package", ours, (30e-6, 40e-6))
METHODS = (
    OURS,
    Method("PEFT + bitsandbytes", peft, (190e-6, 150e-6)),
    Method("Unsloth", unsloth, (40e-6, 70e-6), *FUSED),
    Method("LoRA in 16 bits (PEFT)", dense, (85e-6, 80e-6)),
    Method("this package, norms, RoPE and SwiGLU fused", OURS.layer, OURS.host, *FUSED),
    replace(OURS, name="this package, a module in fp32", layer=ours_in_fp32, in_fp32=True),
)


def steps(tokens: tuple[int, ...] = (512, 4096)) -> str:
    """A training step, in ms."""
    rows = []
    for count in tokens:
        for method in METHODS:
            device = (f"{1e3 * method.device_step(card, count):.0f}" for card in CARDS)
            rows.append([f"{method.name}, {count} tokens", *device, f"{1e3 * method.host_step():.0f}"])
    return table(["a step, ms", *(card.name for card in CARDS), "host"], rows)


def _token(card: Card) -> float:
    """Seconds on the card for one token; each launch of a layer waits for the one before."""
    total = 30 * LAUNCH + 2 * LAUNCH
    for n, k in LAYERS:
        adapter = max(5e-6, card.seconds(4 * RANK * k)) + max(3e-6, card.seconds(4 * RANK * n))
        total += adapter + card.few_rows(n * k)
    return BLOCKS * total + card.seconds((4 if is_turing(card) else 2) * VOCABULARY * WIDTH)


def tokens() -> str:
    """One token of generation, in ms, beside the time in which the weights are read once."""
    read = 0.516 * BLOCKS * sum(n * k for n, k in LAYERS) + 2 * VOCABULARY * WIDTH
    host = BLOCKS * (len(LAYERS) * ONE_ROW + 5e-6 * OURS.launches[0])
    rows = [
        ["on the device", *(f"{1e3 * _token(card):.1f}" for card in CARDS)],
        ["on the host", *(f"{1e3 * host:.1f}" for _ in CARDS)],
        ["the weights are read", *(f"{1e3 * read / 0.85 / card.bandwidth:.1f}" for card in CARDS)],
    ]
    return table(["a token, ms", *(card.name for card in CARDS)], rows)


def layers() -> str:
    """A layer of 4096 x 4096, in us."""
    rows = []
    for m in (512, 4096):
        for method in (*METHODS[:4], METHODS[-1]):
            times = []
            for card in CARDS:
                is_ours = method.layer in (ours, ours_in_fp32)
                layer = ours_in_half if is_ours and is_turing(card) else method.layer
                times.append(" / ".join(f"{1e6 * seconds:.0f}" for seconds in layer(card, m, WIDTH, WIDTH)))
            rows.append([f"{method.name}, {m} rows", *times])
    return table(["a layer, forward / backward, us", *(card.name for card in CARDS)], rows)


def main(arguments: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token", action="store_true", help="one token of generation")
    parser.add_argument("--layer", action="store_true", help="a layer of 4096 x 4096")
    options = parser.parse_args(arguments)
    print(tokens() if options.token else layers() if options.layer else steps())


if __name__ == "__main__":
    main()
