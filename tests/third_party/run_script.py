"""Run a script or module of another project with the plugin: `python -m tests.third_party.run_script SCRIPT ...`.

Trainers and Fabrics get the plugin in place of `precision`, and a CPU; Trainers get a limit of two batches. Data sets
that a script downloads are random numbers. The last line of the output has the number of converted layers, and of
those whose adapter trained.
"""

import functools
import inspect
import json
import runpy
import sys
from pathlib import Path

import lightning.fabric
import lightning.pytorch
import lightning.pytorch.demos.mnist_datamodule as mnist
import lightning.pytorch.demos.transformer as language
import torch
import torchvision
from torch.utils.data import Dataset

from lightning_qlora import QLoRAPrecision
from lightning_qlora.layers.qlora_linear import adapted_layers

modules = []


class Plugin(QLoRAPrecision):
    def convert_module(self, module):
        modules.append(module)
        return super().convert_module(module)


class Images(Dataset):
    """In place of MNIST (grey), CIFAR10 and CelebA."""

    def __init__(self, *_, transform=None, size=(28, 28), **__):
        self.transform = transform
        self.size = size

    def __len__(self):
        return 60_000

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(int(index))
        pixels = torch.randint(0, 255, self.size, dtype=torch.uint8, generator=generator)
        image = torchvision.transforms.functional.to_pil_image(pixels)
        return (self.transform or torchvision.transforms.functional.to_tensor)(image), index % 10


class Text(Dataset):
    """In place of WikiText2."""

    vocab_size = 100

    def __init__(self, **_):
        self.words = torch.randint(0, 100, (4020, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return self.words[index][:-1], self.words[index][1:]


def with_arguments(kind, **added):
    original = kind.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        names = list(inspect.signature(original).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        plugins = [*(given.get("plugins") or []), Plugin(r=4)]
        original(self, **{**given, **added, "plugins": plugins, "accelerator": "cpu", "devices": 1, "precision": None})

    kind.__init__ = init


if __name__ == "__main__":
    torchvision.datasets.MNIST = mnist.MNIST = mnist._MNIST = Images
    torchvision.datasets.CelebA = functools.partial(Images, size=(3, 64, 64))
    torchvision.datasets.CIFAR10 = functools.partial(Images, size=(3, 32, 32))
    language.WikiText2 = lightning.pytorch.demos.WikiText2 = Text
    with_arguments(lightning.fabric.Fabric)
    limits = {f"limit_{stage}_batches": 2 for stage in ("train", "val", "test", "predict")}
    with_arguments(lightning.pytorch.Trainer, max_epochs=1, **limits)
    sys.argv = sys.argv[1:]
    if Path(sys.argv[0]).is_file():
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__")
    layers = [layer for module in modules for layer in adapted_layers(module).values()]
    layers = list({id(layer): layer for layer in layers}.values())
    print(json.dumps({"converted": len(layers), "trained": sum(bool(layer.lora_B.any()) for layer in layers)}))
