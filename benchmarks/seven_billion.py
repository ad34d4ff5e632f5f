"""Fine-tuning a model of LLaMA's size on a CPU: time and memory of loading and of a training step, beside PEFT.

    python -m benchmarks.seven_billion [--folder FOLDER] [--size 7b] [--steps 3] [--threads 2] [--write]

The model has the shape of LLaMA 7B (or 13B; or OpenLLaMA 3B, where LoRA in 16 bits is measured too) and random weights,
which this script writes to FOLDER as bf16 safetensors shards (13.5, 26, 6.9 GB) if they are not there. Each variant is
loaded as its guide says, with rank 16, gradient checkpointing, AdamW and one batch of 512 tokens. One process for each
variant; they take turns, one load or step each.

Memory is anonymous memory (RssAnon): without the pages of files, which the system can drop. "resident" counts them
(what `top` shows).
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.processes import steps_in_turns

SHAPES = {
    "3b": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
SHAPES["7b, 4 layers"] = {**SHAPES["7b"], "num_hidden_layers": 4}
VOCABULARY = 32000
LENGTH = 512
RANK = 16
RATE = 2e-4
LIMITED = f"{peers.OURS}, gradient_checkpointing=12GB"
VARIANTS = (peers.OURS, peers.BNB)  # LIMITED if it is named
THREE = (*VARIANTS, peers.DENSE)  # of 3b: all fit in 24 GB together

Step = Callable[[Tensor], float]


def write_shards(folder: Path, size: str) -> None:
    """Write a Llama with random weights, one shard for each layer, without a model in memory."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[size], vocab_size=VOCABULARY, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shard = f"layer-{parts[2]}.safetensors" if parts[1] == "layers" else "rest.safetensors"
        shards.setdefault(shard, []).append(name)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for shard, names in shards.items():
        tensors = {name: _random_weight(shapes[name], generator) for name in names}
        save_file(tensors, partial / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(partial)
    partial.rename(folder)


def _random_weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:  # a norm
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def load_ours(folder: str, gradient_checkpointing: bool | str = True) -> Step:
    """As in docs/trainer.md: the model is quantized while transformers reads it."""
    from lightning.fabric import Fabric
    from transformers import AutoModelForCausalLM

    from lightning_qlora import QLoRAPrecision

    plugin = QLoRAPrecision(r=RANK, lora_alpha=RANK, lora_dropout=0.0, gradient_checkpointing=gradient_checkpointing)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    with fabric.init_module():
        model: Any = AutoModelForCausalLM.from_pretrained(folder).train()
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=RATE))

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        fabric.backward(loss)
        optimizer.step()
        return loss.item()

    return step


def load_peft(folder: str) -> Step:
    """As in PEFT's guide (docs/source/developer_guides/quantization.md)."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
    model = prepare_model_for_kbit_training(model)
    return _peft_step(model)


def load_dense(folder: str) -> Step:
    """LoRA in 16 bits by PEFT, which casts the adapters to fp32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for weight in model.parameters():
        weight.data = weight.data.clone()  # the pages of a mapped file would not count as anonymous memory
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return _peft_step(model)


def _peft_step(model: Any) -> Step:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


LOADERS: dict[str, Callable[[str], Step]] = {
    peers.OURS: load_ours,
    LIMITED: partial(load_ours, gradient_checkpointing="12GB"),
    peers.BNB: load_peft,
    peers.DENSE: load_dense,
}


def memory(key: str) -> float:
    """A figure of this process in GB (10^9 bytes), by its name in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux.")


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds, those of processors, the peak of anonymous memory within this, and resident memory at its end."""
    result = {"anonymous": 0.0}
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.05):
            result["anonymous"] = max(result["anonymous"], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    start = time.perf_counter()
    start_of_processors = time.process_time()
    watcher.start()
    try:
        yield result
    finally:
        result["seconds"] = time.perf_counter() - start
        result["processor_seconds"] = time.process_time() - start_of_processors
        end.set()
        watcher.join()
        result["anonymous"] = max(result["anonymous"], memory("RssAnon"))
        result["resident"] = memory("VmRSS")


def work(variant: str, folder: str, threads: int) -> None:
    """For the first line read load the model, for each further one make a step; print figures each time."""
    torch.set_num_threads(threads)
    print(json.dumps({"variant": variant}), flush=True)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    step: Step | None = None
    for _ in sys.stdin:
        with measured() as result:
            if step is None:
                step = LOADERS[variant](folder)
            else:
                result["loss"] = step(tokens)
        print(json.dumps(result), flush=True)


def report(found: dict[str, dict[str, Any]]) -> str:
    """The table; a step is the fastest of those after the first."""
    rows = []
    for name, variant in found.items():
        load, first, *steps = variant["steps"]
        seconds = min(step["seconds"] for step in steps or [first])
        peak = max(step["anonymous"] for step in [first, *steps])
        losses = ", ".join(f"{step['loss']:.4f}" for step in [first, *steps])
        rows.append(
            [
                name,
                f"{load['seconds']:.0f} s",
                f"{load['anonymous']:.2f} GB",
                f"{load['resident']:.2f} GB",
                f"{seconds:.1f} s",
                f"{peak:.2f} GB",
                losses,
            ]
        )
    heads = ["", "load", "memory while loading", "resident after it", "step", "memory of a step", "losses"]
    return measure.table(heads, rows)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the shards are, or are written; a temporary folder without it")
    parser.add_argument("--size", choices=list(SHAPES), default="7b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=LOADERS, help="two, and LoRA in 16 bits for 3b")
    parser.add_argument("--write", action="store_true", help="keep the JSON and refresh docs/benchmarks.md")
    parser.add_argument("--variant", choices=LOADERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.variant:
        return work(options.variant, options.folder, options.threads)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="lightning-qlora-") as temporary:
        folder = Path(options.folder or temporary) / f"llama-{options.size}"
        if not folder.exists():
            write_shards(folder, options.size)
        results = steps_in_turns(
            "benchmarks.seven_billion",
            ["--folder", str(folder), "--threads", str(options.threads)],
            options.variants or (THREE if options.size == "3b" else VARIANTS),
            1 + options.steps,
            options.threads,
        )
    name = "seven_billion" if options.size == "7b" else f"seven_billion --size {options.size}"
    measure.publish(name, {"size": options.size, "variants": results}, report(results), options.write)


if __name__ == "__main__":
    main()
