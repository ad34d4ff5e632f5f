"""Fine-tune with Ray Train on the machines of a Ray cluster; without one, it starts on this machine.

    ray start --head                    # on one machine; ray start --address HOST:6379 on the others
    python examples/machines_ray.py --workers 16 --output /shared/outputs

Every epoch ends with a checkpoint. When a worker dies, all start again from the newest one.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from causal_lm import CausalLM
from docstring_qa import DocstringQA
from lightning.pytorch import Trainer, seed_everything
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig, get_checkpoint
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer

from lightning_qlora import QLoRAPrecision


def train(options: dict[str, str]) -> None:
    """Run on each worker."""
    seed_everything(0)
    qlora = QLoRAPrecision(r=16, lora_alpha=16, lora_dropout=0.05)  # the only line for QLoRA
    trainer = Trainer(
        plugins=[qlora, RayLightningEnvironment()],
        strategy=RayDDPStrategy(),
        callbacks=[RayTrainReportCallback()],
        max_epochs=3 if options["fast"] else 4,
        limit_train_batches=4 if options["fast"] else 10,  # an epoch is what a worker that dies can cost
        limit_val_batches=2,
        enable_checkpointing=False,  # Ray keeps the checkpoints
        logger=False,
    )
    checkpoint = get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        newest = folder and Path(folder) / RayTrainReportCallback.CHECKPOINT_NAME
        model, data = CausalLM(options["base"]), DocstringQA(options["base"], batch_size=4)
        prepare_trainer(trainer).fit(model, data, ckpt_path=newest)


def main(args: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="3 epochs of 4 steps instead of 4 of 10")
    parser.add_argument("--base", help="hub name or folder of a causal language model")
    parser.add_argument("--output", default="outputs", help="folder for checkpoints, on a shared file system")
    parser.add_argument("--workers", type=int, default=2, help="GPUs, or processes if there is none")
    options = parser.parse_args(args)
    storage = str(Path(options.output).resolve())
    scaling = ScalingConfig(num_workers=options.workers, use_gpu=torch.cuda.is_available())
    run = RunConfig(name="ray", storage_path=storage, failure_config=FailureConfig(max_failures=3))
    return TorchTrainer(train, train_loop_config=vars(options), scaling_config=scaling, run_config=run).fit()


if __name__ == "__main__":
    main()
