"""Run in a process of its own: load FOLDER in `configure_model` with adapters of rank R, print how memory rises."""

import gc
import sys
import threading
import time

import torch
from lightning.pytorch import LightningModule
from transformers import AutoModelForCausalLM

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
            self.model = AutoModelForCausalLM.from_pretrained(self.folder)

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    watch = Watch()
    plugin = QLoRAPrecision(r=int(sys.argv[2]))
    lit = Lit(sys.argv[1])
    make_trainer(sys.argv[1], plugins=plugin, enable_checkpointing=False).predict(lit)
    layers = sum(isinstance(layer, QLoRALinear) for layer in lit.modules())
    print(f"{layers} layers, peak {watch.peak - watch.base:.1f} MB, end {anonymous_mb() - watch.base:.1f} MB")
