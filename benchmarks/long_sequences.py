"""The longest sequence that trains on a card, as `lightning-qlora plan` counts it, beside what others published.

    python -m benchmarks.long_sequences

Llama 3.1 8B and Llama 3.3 70B with more positions than they have, r 32 on all linear layers without dropout, a batch of
one sequence. The limit is the memory of the card alone; the last column says what the host needs.
"""

from benchmarks.measure import table
from benchmarks.memory_by_size import llama
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.texts import size_text
from lightning_qlora.tools.longest_sequence import longest_sequences
from lightning_qlora.tools.memory_estimate import PlannedRun, usable_bytes

# Tokens by GiB: of Hugging Face with FlashAttention 2, and of Unsloth; None: does not fit. From Unsloth's blog of
# December 2024 (unsloth.ai/blog/llama3-3) and the page "Benchmarks" of its documentation, r 32, batch 1.
PUBLISHED: dict[str, dict[int, tuple[int | None, int]]] = {
    "8B": {
        8: (None, 2972),
        12: (932, 21_848),
        16: (2551, 40_724),
        24: (5789, 78_475),
        40: (12_264, 153_977),
        48: (15_502, 191_728),
        80: (28_454, 342_733),
    },
    "70B": {48: (None, 12_106), 80: (6916, 89_389)},
}
MODELS = {"8B": llama(4096, 14_336, 32, 32), "70B": llama(8192, 28_672, 80, 64)}
POSITIONS = 1 << 22


def main() -> None:
    """Print the table."""
    rows = []
    for name, published in PUBLISHED.items():
        config = MODELS[name]
        config.max_position_embeddings = POSITIONS
        run = PlannedRun(config, "adamw", QLoRAConfig(r=32, lora_dropout=0.0), in_short=True)
        for size, (hugging_face, unsloth) in published.items():
            recomputed, _, offloaded = longest_sequences(run, 1, usable_bytes(size << 30))
            others = ["does not fit" if tokens is None else f"{tokens:,}" for tokens in (hugging_face, unsloth)]
            own = [f"{found.tokens:,}" if found.tokens else "does not fit" for found in (recomputed, offloaded)]
            rows.append([f"{size} GiB, {name}", *others, *own, size_text(offloaded.host_bytes)])
    heads = ["card, model", "Hugging Face + FA2", "Unsloth", "`True`", '`"auto"`, `"offload"`', "on the host"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
