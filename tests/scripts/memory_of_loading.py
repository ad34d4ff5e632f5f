"""Run in a process of its own: load FOLDER in `configure_model` with adapters of rank R, print how memory rises.

With a third argument the model is sharded over so many ranks, or it is the name of a GGUF file in the folder, which is
loaded in bf16. A FOLDER that does not exist is written: a Llama with 572 MiB of bf16 weights.
"""

import gc
import os
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_qlora import QLoRAPrecision
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.conftest import make_trainer, run_rank


def anonymous_mb() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


class Lit(LightningModule):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.model = None

    def configure_model(self):
        if self.model is None:
            gc.collect()
            watch.start()
            gguf = {"gguf_file": GGUF, "dtype": torch.bfloat16} if GGUF else {}
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, **gguf)
            if self._device_mesh is not None:
                for part in (*self.model.model.layers, self.model):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def predict_dataloader(self):
        return torch.utils.data.DataLoader(range(1))

    def predict_step(self, batch, batch_idx):
        watch.stop = True


class Watch(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.stop = False
        self.peak = 0.0

    def run(self):
        self.base = anonymous_mb()
        while not self.stop:
            self.peak = max(self.peak, anonymous_mb())
            time.sleep(0.001)


def import_what_loading_needs():
    """Load a small model: the modules that transformers imports depend on what is installed, and take some MB."""
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    with TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)


def write_llama(folder):
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=8192,
        max_position_embeddings=128,
        dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main(folder: str, r: str, third: str = "1") -> None:
    global GGUF, watch
    torch.set_num_threads(1)
    ranks, GGUF = (int(third), None) if third.isdigit() else (1, third)
    if not Path(folder).exists():
        write_llama(folder)
    import_what_loading_needs()
    watch = Watch()
    plugin = QLoRAPrecision(r=int(r))
    lit = Lit(folder)
    strategy = ModelParallelStrategy(ranks, 1) if ranks > 1 else "auto"
    make_trainer(
        folder,
        plugins=plugin,
        enable_checkpointing=False,
        strategy=strategy,
        devices=ranks,
        use_distributed_sampler=False,
    ).predict(lit)
    layers = len(adapted_layers(lit))
    kept = sum(p.to_local().nbytes if ranks > 1 else p.nbytes for p in lit.parameters()) / 2**20
    peak = watch.peak - watch.base
    end = anonymous_mb() - watch.base
    line = f"{layers} layers, peak {peak:.1f} MB, end {end:.1f} MB, {kept:.1f} MB in parameters\n"
    os.write(1, line.encode())  # one write, so that the lines of two ranks do not mix


if __name__ == "__main__":
    run_rank(main)
