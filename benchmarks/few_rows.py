"""A 4-bit layer with few rows of input on the CPU, forward, beside the dense layer with the same decoded weight.

    python -m benchmarks.few_rows [--threads 1] [--rounds 15] [--rows 1 2 4 8 16 32 64] [--shapes 4096x11008 2048x2048]
                                  [--types bfloat16 float32] [--quant-type nf4] [--block-size 64]

The layers have no adapter. A call goes through several layers of one shape, whose dense weights together are larger
than most L3 caches: in a model, a weight is not in the cache when its layer runs. "Decoded first" is what the package
does for more rows: decode into the reused buffer, then torch's product. All take turns in one process.
"""

import argparse
import statistics

import torch
from torch.nn.functional import linear

from benchmarks import measure
from lightning_qlora.kernels import eager
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear

OURS, DENSE, DECODED = "ours", "dense", "decoded first"
BYTES = 48 << 20  # of the dense weights that a call reads
MOST_LAYERS = 30


def seconds(
    shape: tuple[int, int], dtype: torch.dtype, rows: list[int], rounds: int, quant_type: str, block_size: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds of each call, by the number of rows."""
    outputs, inputs = shape
    layers = max(1, min(MOST_LAYERS, BYTES // (outputs * inputs * dtype.itemsize)))
    packed = [
        eager.quantize(torch.randn(shape) * inputs**-0.5, quant_type, block_size, True)  # type: ignore[arg-type]
        for _ in range(layers)
    ]
    dense = [eager.dequantize(weight, dtype) for weight in packed]
    buffer = torch.empty(shape, dtype=dtype)
    lora = LoRA(torch.empty(0, inputs), torch.empty(outputs, 0))
    found = {}
    for m in rows:
        x = torch.randn(m, inputs).to(dtype)
        with torch.no_grad():
            found[m] = measure.take_turns(
                {
                    OURS: lambda x=x: [lora_linear(x, weight, None, lora) for weight in packed],
                    DENSE: lambda x=x: [linear(x, weight) for weight in dense],
                    DECODED: lambda x=x: [linear(x, eager.dequantize_into(buffer, weight)) for weight in packed],
                },
                rounds,
            )
        found[m] = {name: [each / layers for each in values] for name, values in found[m].items()}
    return found


def ratio(found: dict[str, list[float]], name: str) -> str:
    """The median over rounds of our time divided by the other's."""
    pairs = zip(found[OURS], found[name], strict=True)
    return f"{statistics.median(ours / other for ours, other in pairs):.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", default=["4096x11008", "2048x2048", "576x1536"], help="outputs x inputs")
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quant-type", default="nf4")
    parser.add_argument("--block-size", type=int, default=64)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = {}
    lines: list[list[str]] = []
    for type_name in options.types:
        of_type = {}
        for text in options.shapes:
            outputs, inputs = map(int, text.split("x"))
            of_type[text] = seconds(
                (outputs, inputs),
                getattr(torch, type_name),
                options.rows,
                options.rounds,
                options.quant_type,
                options.block_size,
            )
        results[type_name] = of_type
        for m in options.rows:
            line = [type_name, str(m)]
            for text, found in of_type.items():
                outputs, inputs = map(int, text.split("x"))
                speed = outputs * inputs / statistics.median(found[m][OURS]) / 1e9
                line += [f"{speed:.1f}", ratio(found[m], DENSE), ratio(found[m], DECODED)]
            lines.append(line)
    heads = ["type", "rows"]
    for text in options.shapes:
        heads += [f"{text}: billion weights/s", f"ours / {DENSE}", f"ours / {DECODED}"]
    markdown = (
        f"{eager.path()}; {options.quant_type}, blocks of {options.block_size}; medians of the ratios of a round:\n\n"
        + measure.table(heads, lines)
    )
    measure.publish("few_rows", {"seconds": results}, markdown, write=False)


if __name__ == "__main__":
    main()
