"""Run in a process of its own: load FOLDER in `configure_model` with adapters of rank R, print how memory rises.

A third argument is the name of a GGUF file in the folder, which is loaded in bf16.
"""

import gc
import sys
import threading
import time
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import LightningModule
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_qlora import QLoRALinear, QLoRAPrecision
from tests.conftest import make_trainer


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
            gguf = {"gguf_file": sys.argv[3], "dtype": torch.bfloat16} if sys.argv[3:] else {}
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, **gguf)

    def predict_dataloader(self):
        return torch.utils.data.DataLoader(range(1))

    def predict_step(self, batch, batch_idx):
        watch.stop = True


class Watch(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.stop, self.peak = False, 0.0

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_what_loading_needs()
    watch = Watch()
    plugin = QLoRAPrecision(r=int(sys.argv[2]))
    lit = Lit(sys.argv[1])
    make_trainer(sys.argv[1], plugins=plugin, enable_checkpointing=False).predict(lit)
    layers = sum(isinstance(layer, QLoRALinear) for layer in lit.modules())
    print(f"{layers} layers, peak {watch.peak - watch.base:.1f} MB, end {anonymous_mb() - watch.base:.1f} MB")
