"""What the kernels do on this card, side by side with the peers: `python -m benchmarks.gpu`.

    --only decode,linear,quantize,step,65b     some of the sections
    --write FILE                               Markdown, with card, versions and command (default: outputs/gpu.md)
    --small                                    tiny shapes, on a CPU too: does the script run?

Candidates of a line take turns and each figure is a median. A peer that is not installed is named and skipped.
"""

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import llama
from benchmarks.timing import seconds
from lightning_qlora.kernels import ops
from lightning_qlora.quantize.packed import PackedBytes

PEERS = ("bitsandbytes", "torchao", "peft")
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
SHAPES = {
    "7B attention": (4096, 4096), "7B up": (11008, 4096), "7B down": (4096, 11008),
    "70B attention": (8192, 8192), "70B up": (28672, 8192), "70B down": (8192, 28672),
}  # fmt: skip
Section = Callable[[torch.device, bool], Iterator[str]]


def decode(device: torch.device, small: bool) -> Iterator[str]:
    """Decoding to bf16: GB/s of the bytes read and written, against a copy of as many bytes."""
    yield "| shape | copy GB/s | decode GB/s | share | bitsandbytes GB/s |\n|---|---:|---:|---:|---:|"
    for name, (rows, columns) in _shapes(small).items():
        weight = _weight(rows, columns, device)
        moved = 2 * weight.numel + sum(part.numel() for part in weight[:3])
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        functions = {
            "copy": lambda target=target, source=source: target.copy_(source),
            "ours": lambda weight=weight: ops.dequantize(weight, torch.bfloat16),
        }
        if find_spec("bitsandbytes"):
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            packed, state = quantize_4bit(_normal(rows, columns, device), quant_type="nf4", compress_statistics=True)
            functions["bitsandbytes"] = lambda packed=packed, state=state: dequantize_4bit(packed, state)
        rate = {key: moved / took / 1e9 for key, took in seconds(functions, device).items()}
        share = rate["ours"] / rate["copy"]
        yield f"| {name} | {rate['copy']:.0f} | {rate['ours']:.0f} | {share:.0%} | {_figure(rate, 'bitsandbytes', 0)} |"


def linear(device: torch.device, small: bool) -> Iterator[str]:
    """One layer with an adapter of rank 64, microseconds: forward, and forward with backward (dX, dA, dB)."""
    names = ["bf16 cuBLAS", "ours", "bitsandbytes", "torchao"]
    yield f"| shape | rows | pass | {' | '.join(names)} |\n|---|---:|---|{'---:|' * len(names)}"
    for name, (rows, columns) in _shapes(small).items():
        forwards = _forwards(rows, columns, device)
        for m in ROWS[:3] if small else ROWS:
            for backward in (False, True):
                x = torch.randn(m, columns, device=device, dtype=torch.bfloat16, requires_grad=backward)
                functions = {key: _pass(forward, x, backward) for key, forward in forwards.items()}
                took = {key: 1e6 * value for key, value in seconds(functions, device).items()}
                kind = "forward + backward" if backward else "forward"
                yield f"| {name} | {m} | {kind} | {' | '.join(_figure(took, key, 1) for key in names)} |"


def _forwards(rows: int, columns: int, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """y = x W^T + s (x A^T) B^T by each peer, all with the same adapter in the same type."""
    dense, weight = _normal(rows, columns, device), _weight(rows, columns, device)
    adapter = torch.randn(64, columns, device=device), torch.randn(rows, 64, device=device)
    a, b = ((part / 64).to(torch.bfloat16).requires_grad_() for part in adapter)

    def with_adapter(base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: base(x) + 0.25 * ((x @ a.T) @ b.T)

    forwards = {
        "bf16 cuBLAS": with_adapter(lambda x: x @ dense.T),
        "ours": lambda x: ops.lora_linear(x, weight, None, a, b, 0.25),
    }
    if find_spec("bitsandbytes"):
        import bitsandbytes

        packed, state = bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        forwards["bitsandbytes"] = with_adapter(lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state))
    if find_spec("torchao"):
        from torchao.dtypes.nf4tensor import linear_nf4, to_nf4

        nf4 = to_nf4(dense, 64, 256)
        forwards["torchao"] = with_adapter(lambda x: linear_nf4(x, nf4))
    return forwards


def _pass(forward: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: forward(x))

    def run() -> None:
        y = forward(x)
        y.backward(y.detach())

    return run


def quantize(device: torch.device, small: bool) -> Iterator[str]:
    """All linear layers of a 7B model (32 x 4 attention, 3 MLP matrices) from bf16 to NF4 with double quantization."""
    shapes = [(64, 64)] if small else [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    weights = [_normal(*shape, device) for shape in shapes]
    functions = {"ours": lambda: [ops.quantize(weight) for weight in weights]}
    if find_spec("bitsandbytes"):
        from bitsandbytes.functional import quantize_4bit

        functions["bitsandbytes"] = lambda: [quantize_4bit(weight, compress_statistics=True) for weight in weights]
    yield "| | seconds for 32 layers |\n|---|---:|"
    took = {name: 32 * value for name, value in seconds(functions, device, rounds=5).items()}
    for name in ("ours", "bitsandbytes"):
        yield f"| {name} | {_figure(took, name, 2)} |"


def step(device: torch.device, small: bool) -> Iterator[str]:
    """A training step of a model of Llama-8B's shape, 1 x 2048 tokens, r 64 on all linear layers, checkpointing."""
    shape, length = (llama.SMALL, 16) if small else (llama.LLAMA_8B, 2048)
    makers, skipped = {"ours": llama.ours}, []
    for name, packages, make in (
        ("PEFT, bf16", ["peft"], llama.peft_bf16),
        ("PEFT + bitsandbytes", ["peft", "bitsandbytes"], llama.peft_bitsandbytes),
    ):
        if missing := [package for package in packages if not find_spec(package)]:
            skipped.append(f"| {name} | {', '.join(missing)} not installed | |")
        else:
            makers[name] = make
    tokens = torch.randint(shape["vocab_size"], (1, length), device=device)
    models = {name: llama.build(shape, make, 8 if small else 64, device) for name, make in makers.items()}
    functions = {name: llama.trainer(model, tokens) for name, model in models.items()}
    yield "| | seconds a step | tokens a second |\n|---|---:|---:|"
    for name, took in seconds(functions, device, rounds=5).items():
        yield f"| {name} | {took:.3f} | {length / took:.0f} |"
    yield from skipped


def largest(device: torch.device, small: bool) -> Iterator[str]:
    """LLaMA-65B's shape, NF4 with double quantization, r 64 on all linear layers, 1 x 512 tokens, checkpointing."""
    shape, length = (llama.SMALL, 16) if small else (llama.LLAMA_65B, 512)
    model = llama.build(shape, llama.ours, 8 if small else 64, device)
    take_step = llama.trainer(model, torch.randint(shape["vocab_size"], (1, length), device=device))
    take_step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds({"step": take_step}, device, rounds=3)["step"]
    yield "| seconds a step | peak memory of steps, GB (goal: under 48) |\n|---:|---:|"
    peak = f"{torch.cuda.max_memory_reserved() / 1e9:.1f}" if device.type == "cuda" else ""
    yield f"| {took:.2f} | {peak} |"


SECTIONS: dict[str, Section] = {
    "decode": decode, "linear": linear, "quantize": quantize, "step": step, "65b": largest
}  # fmt: skip


def _shapes(small: bool) -> dict[str, tuple[int, int]]:
    return {"small": (128, 128)} if small else SHAPES


def _normal(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02


def _weight(rows: int, columns: int, device: torch.device) -> PackedBytes:
    return ops.quantize(_normal(rows, columns, device)).to_bytes()


def _figure(figures: dict[str, float], name: str, digits: int) -> str:
    return f"{figures[name]:.{digits}f}" if name in figures else "not installed"


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    for package in ("torch", "triton", "lightning-qlora", *PEERS):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} not installed"


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--write", type=Path, default=Path("outputs/gpu.md"))
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.only.split(",")) - set(SECTIONS):
        parser.error(f"--only: there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}.")
    if not torch.cuda.is_available() and not chosen.small:
        print("There is no GPU here. `--small` tries the script with tiny shapes on the CPU.", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, tiny shapes: no figure means anything"
    lines = [f"{card}; {', '.join(_versions())}.", f"Command: `python -m benchmarks.gpu {' '.join(sys.argv[1:])}`"]
    for name in chosen.only.split(","):
        lines += ["", SECTIONS[name].__doc__ or "", "", *SECTIONS[name](device, chosen.small)]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    chosen.write.parent.mkdir(parents=True, exist_ok=True)
    chosen.write.write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
