"""Fine-tune with FSDP2: each GPU holds a part of the 4-bit model. Train, save, resume.

python examples/fsdp.py [--devices 2] [--accelerator auto] [--fast] [--base HUB_NAME_OR_FOLDER]

Use it for a model that does not fit on one GPU; for one that does, `strategy="ddp"` sends less. On several machines use
`machines.py --strategy fsdp`. Not run on GPUs yet.
"""

import argparse
from pathlib import Path

from causal_lm import CausalLM
from docstring_qa import DocstringQA
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from smollm2 import load_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torchmetrics.text import Perplexity

from lightning_qlora import QLoRAPrecision


class ShardedLM(CausalLM):
    """CausalLM that is loaded and split in `configure_model`, so that no rank holds the whole model."""

    def __init__(self, base: str | None = None, lr: float = 5e-4) -> None:
        super(CausalLM, self).__init__()  # not that of CausalLM, which loads the model
        self.save_hyperparameters()
        self.lr = lr
        self.model = None
        self.perplexity = Perplexity(ignore_index=-100)

    def make_mesh(self) -> DeviceMesh:
        """Return the mesh on which the model is split: all ranks."""
        return self.device_mesh["data_parallel"]

    def configure_model(self) -> None:
        if self.model is None:
            self.model = load_model(self.hparams.base).train()
            mesh = self.make_mesh()
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def make_trainer(options: argparse.Namespace, epochs: int) -> Trainer:
    return Trainer(
        plugins=QLoRAPrecision(r=16, lora_alpha=16),  # the only line for QLoRA
        strategy=ModelParallelStrategy(data_parallel_size=options.devices, tensor_parallel_size=1),
        accelerator=options.accelerator,
        devices=options.devices,
        max_epochs=epochs,
        limit_train_batches=2 if options.fast else 20,
        limit_val_batches=0,
        logger=False,
        default_root_dir=options.output,
    )


def main(args: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="GPUs, or processes on a CPU")
    parser.add_argument("--accelerator", default="auto", help="cpu for processes on a CPU")
    parser.add_argument("--fast", action="store_true", help="2 epochs of 2 steps instead of 20")
    parser.add_argument("--base", help="hub name or folder of a causal language model")
    parser.add_argument("--output", default="outputs/fsdp", help="folder for checkpoints")
    options = parser.parse_args(args)

    seed_everything(0)
    data = DocstringQA(options.base, batch_size=4)
    trainer = make_trainer(options, epochs=1)
    trainer.fit(ShardedLM(options.base), data)
    shards = trainer.checkpoint_callback.best_model_path  # a folder: each rank wrote its part

    trainer = make_trainer(options, epochs=2)
    trainer.fit(ShardedLM(options.base), data, ckpt_path=shards)  # goes on, bit for bit
    newest = Path(trainer.checkpoint_callback.best_model_path)
    if trainer.is_global_zero:
        print(f"lightning-qlora export {newest} adapter   # a PEFT folder; merge, inspect read shards too")
    return trainer


if __name__ == "__main__":
    main()
