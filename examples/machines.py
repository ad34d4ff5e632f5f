"""Fine-tune on several machines, with what starts a process for each GPU there: torchrun, or srun of SLURM.

On every machine, with the address of one of them (or `sbatch examples/machines.sbatch`, once):

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 3 \
        examples/machines.py --output /shared/outputs

Every epoch ends with a checkpoint. A run that is started again resumes from the newest one.
"""

import argparse
import os
from pathlib import Path

from causal_lm import CausalLM
from docstring_qa import DocstringQA
from lightning.pytorch import Trainer, seed_everything

from lightning_qlora import QLoRAPrecision


def from_environment(*names: str) -> int:
    """The number in the first of these variables that is set; 1 if none is, for a run without torchrun and srun."""
    return int(next((os.environ[name] for name in names if name in os.environ), 1))


def main(args: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="3 epochs of 4 steps instead of 4 of 10")
    parser.add_argument("--base", help="hub name or folder of a causal language model")
    parser.add_argument("--output", default="outputs/machines", help="folder for checkpoints, on a shared file system")
    options = parser.parse_args(args)

    seed_everything(0)
    trainer = Trainer(
        plugins=QLoRAPrecision(r=16, lora_alpha=16, lora_dropout=0.05),  # the only line for QLoRA
        strategy="ddp",
        num_nodes=from_environment("GROUP_WORLD_SIZE", "SLURM_NNODES"),
        devices=from_environment("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"),
        max_epochs=3 if options.fast else 4,
        limit_train_batches=4 if options.fast else 10,  # an epoch is what a worker that dies can cost
        limit_val_batches=2,
        logger=False,
        default_root_dir=options.output,
    )
    newest = max(Path(options.output).rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    trainer.fit(CausalLM(options.base), DocstringQA(options.base, batch_size=4), ckpt_path=newest)
    return trainer


if __name__ == "__main__":
    main()
