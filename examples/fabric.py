"""Fine-tune with Fabric and your own training loop; the same argument turns it into QLoRA.

python examples/fabric.py [--fast] [--base HUB_NAME_OR_FOLDER]
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from causal_lm import CausalLM
from docstring_qa import DocstringQA
from lightning.fabric import Fabric

from lightning_qlora import QLoRAPrecision


def main(args: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="4 steps instead of 40")
    parser.add_argument("--base", help="hub name or folder of a causal language model")
    parser.add_argument("--output", default="outputs/fabric", help="folder for the checkpoint")
    options = parser.parse_args(args)

    fabric = Fabric(devices=1, plugins=QLoRAPrecision(r=16, lora_alpha=16))  # the only line for QLoRA
    fabric.launch()
    fabric.seed_everything(0)

    data = DocstringQA(options.base, batch_size=4 if options.fast else 8, held_out=8)
    data.setup("fit")
    batches = fabric.setup_dataloaders(data.train_dataloader())
    held_out = next(iter(fabric.setup_dataloaders(data.val_dataloader())))

    # The model comes first: setup_module creates the adapters, and the optimizer needs their parameters.
    model = fabric.setup_module(CausalLM(options.base))
    optimizer = fabric.setup_optimizers(model.configure_optimizers())

    model.train()
    for step, batch in enumerate(islice(batches, 4 if options.fast else 40)):
        loss = model.training_step(batch, step)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        fabric.print(f"step {step:3d}  loss {loss.item():.3f}")

    # The checkpoint holds the adapters and the optimizer state. A new model that loads it equals the trained one.
    path = Path(options.output) / "adapter.ckpt"
    fabric.save(path, {"model": model, "optimizer": optimizer})
    new_model = fabric.setup_module(CausalLM(options.base))
    fabric.load(path, {"model": new_model})
    trained, restored = (held_out_loss(module, held_out) for module in (model, new_model))
    fabric.print(f"held-out loss {trained:.4f}, after loading {path} into a new model {restored:.4f}")
    return trained, restored


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    model.eval()
    return model.training_step(batch, 0).item()


if __name__ == "__main__":
    main()
