"""Fine-tune with the Trainer; one argument turns it into QLoRA.

python examples/trainer.py [--fast] [--base HUB_NAME_OR_FOLDER]
"""

import argparse

from causal_lm import CausalLM
from docstring_qa import DocstringQA
from lightning.pytorch import Trainer, seed_everything

from lightning_qlora import QLoRAPrecision


def main(args: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="4 steps instead of 40")
    parser.add_argument("--base", help="hub name or folder of a causal language model")
    parser.add_argument("--output", default="outputs/trainer", help="folder for the checkpoint")
    options = parser.parse_args(args)

    seed_everything(0)
    model = CausalLM(options.base)
    data = DocstringQA(options.base, batch_size=4 if options.fast else 8, held_out=16 if options.fast else 128)
    trainer = Trainer(
        plugins=QLoRAPrecision(r=16, lora_alpha=16),  # the only line for QLoRA; without it all weights train
        max_steps=4 if options.fast else 40,
        devices=1,
        logger=False,
        default_root_dir=options.output,
    )
    trainer.fit(model, data)
    trainer.validate(model, data, ckpt_path="best")  # the checkpoint holds the adapters only
    print(f"Checkpoint: {trainer.checkpoint_callback.best_model_path}")
    return trainer


if __name__ == "__main__":
    main()
