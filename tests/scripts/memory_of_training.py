"""Print the planned and the measured memory of training steps beside the weights, in MB, as a JSON list of pairs.

    python -m tests.scripts.memory_of_training small|larger|smollm2

Each entry: [setting, planned, measured]. Measured is the peak of anonymous memory above that of the converted model
after one step, so that what libraries keep for themselves (oneDNN: 20 to 25 MB for SmolLM2-135M) does not count.
Start it with MALLOC_MMAP_THRESHOLD_=65536: else glibc keeps memory that torch has freed.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from benchmarks.deferred_logits import WEIGHTS, anonymous_mb, peak_of
from lightning_qlora import convert, estimate_memory
from lightning_qlora.kernels import scratch

SETTINGS = {  # batch, length, gradient checkpointing, deferred logits, rank
    "small": [(2, 256, False, "auto", 16)],
    "larger": [(4, 256, False, "auto", 16), (2, 512, True, False, 16)],
    "smollm2": [
        (1, 512, True, "auto", 16),
        (1, 512, True, "auto", 64),
        (4, 512, False, "auto", 16),
        (2, 1024, True, False, 64),
    ],
}


def load(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    if name == "smollm2":
        sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
        from smollm2 import load_model

        return load_model(dtype=torch.bfloat16)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            vocab_size=16384,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def measure(name, batch, length, checkpointing, deferred, rank):
    arguments = {"r": rank, "gradient_checkpointing": checkpointing, "deferred_logits": deferred}
    model = load(name)
    planned = estimate_memory(model, batch, length, **arguments)
    convert(model, **arguments)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0)  # zeros take no memory until something is written to them
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.zero_grad(set_to_none=True)
    scratch.release()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = anonymous_mb()
    peak = []
    with peak_of(peak):
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return (planned.total - sum(planned.parts[part] for part in WEIGHTS)) / 1e6, peak[0] - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([[setting, *measure(sys.argv[1], *setting)] for setting in SETTINGS[sys.argv[1]]]))
