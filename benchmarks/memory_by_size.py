"""Memory of a training step by the size of the model, as `lightning-qlora plan` counts it: the table of docs/memory.md.

python -m benchmarks.memory_by_size
"""

from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from lightning_qlora import estimate_memory
from lightning_qlora.tools.memory_estimate import DRIVER, FRAGMENTATION

CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141)  # GiB, as a card of "24 GB" has 24 GiB
LENGTHS = (512, 2048, 8192)  # tokens of the one sequence of a batch
ARGUMENTS: dict[str, Any] = {"r": 16, "gradient_checkpointing": True}


def llama(hidden: int, feed_forward: int, layers: int, heads: int, tied: bool = False) -> PretrainedConfig:
    """The shape of a Llama 3."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def qwen(hidden: int, feed_forward: int, layers: int, heads: int) -> PretrainedConfig:
    """The shape of a Qwen 2.5."""
    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


MODELS = {
    "Llama 3.2 1B": llama(2048, 8192, 16, 32, tied=True),
    "Llama 3.2 3B": llama(3072, 8192, 28, 24, tied=True),
    "Llama 3.1 8B": llama(4096, 14_336, 32, 32),
    "Qwen 2.5 14B": qwen(5120, 13_824, 48, 40),
    "Qwen 2.5 32B": qwen(5120, 27_648, 64, 40),
    "Llama 3.1 70B": llama(8192, 28_672, 80, 64),
}


def card(needed: int) -> str:
    """The smallest card on which so many bytes fit, with room for the driver and fragmentation."""
    usable = {size: size * 2**30 * (1 - FRAGMENTATION) - DRIVER for size in CARDS}
    return next((f"{size} GB" for size, memory in usable.items() if needed <= memory), "several")


def main() -> None:
    """Print the table."""
    titles = [f"1 x {length:,} tokens" for length in LENGTHS]
    print(f"| model | weights in 16 bits | {' | '.join(titles)} | card for {titles[1]} |")
    print("|" + " --- |" * (len(LENGTHS) + 3))
    for name, config in MODELS.items():
        runs = [estimate_memory(config, 1, length, **ARGUMENTS) for length in LENGTHS]
        cells = " | ".join(f"{run.device / 1e9:.1f}" for run in runs)
        print(f"| {name} | {runs[0].dense_bytes / 1e9:.1f} | {cells} | {card(runs[1].device)} |", flush=True)


if __name__ == "__main__":
    main()
