"""Fine-tune on several machines, with what starts a process for each GPU there: torchrun, or srun of SLURM.

On every machine, with the address of one of them (or `sbatch examples/machines.sbatch`, once):

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 3 \
        examples/machines.py --output /shared/outputs [--strategy ddp|hsdp|fsdp]

ddp: each GPU holds the model. hsdp: the GPUs of a machine share it. fsdp: all GPUs of all machines share it.

Every epoch ends with a checkpoint. A run that is started again resumes from the newest one, also with another strategy
and on another number of machines.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

from causal_lm import CausalLM
from docstring_qa import DocstringQA
from fsdp import ShardedLM
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_qlora import QLoRAPrecision


class HybridLM(ShardedLM):
    """ShardedLM that is whole on each machine: only gradients of the adapters are sent between machines."""

    def make_mesh(self) -> DeviceMesh:
        """Return machines x GPUs: `fully_shard` copies over the first dimension and splits over the second."""
        sizes = (self.trainer.num_nodes, self.trainer.num_devices)
        return init_device_mesh(self.device_mesh.device_type, sizes, mesh_dim_names=("machines", "gpus"))


MODULES = {"ddp": CausalLM, "hsdp": HybridLM, "fsdp": ShardedLM}


def from_environment(*names: str) -> int:
    """The number in the first of these variables that is set; 1 if none is, for a run without torchrun and srun."""
    return int(next((os.environ[name] for name in names if name in os.environ), 1))


def make_strategy(name: str, ranks: int, timeout: timedelta) -> Strategy:
    if name == "ddp":
        return DDPStrategy(timeout=timeout)
    return ModelParallelStrategy(
        data_parallel_size=ranks,  # "auto" would be the number of machines
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,  # one file: it resumes with every strategy
        timeout=timeout,
    )


def main(args: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=MODULES, default="ddp")
    parser.add_argument("--fast", action="store_true", help="3 epochs of 4 steps instead of 4 of 10")
    parser.add_argument("--base", help="hub name or folder of a causal language model")
    parser.add_argument("--output", default="outputs/machines", help="folder for checkpoints, on a shared file system")
    parser.add_argument("--timeout", type=float, default=10, help="minutes that ranks wait for a lost one")
    options = parser.parse_args(args)

    seed_everything(0)
    machines = from_environment("GROUP_WORLD_SIZE", "SLURM_NNODES")
    processes = from_environment("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
    trainer = Trainer(
        plugins=QLoRAPrecision(r=16, lora_alpha=16, lora_dropout=0.05),  # the only line for QLoRA
        strategy=make_strategy(options.strategy, machines * processes, timedelta(minutes=options.timeout)),
        num_nodes=machines,
        devices=processes,
        max_epochs=3 if options.fast else 4,
        limit_train_batches=4 if options.fast else 10,  # an epoch is what a worker that dies can cost
        limit_val_batches=2,
        logger=False,
        default_root_dir=options.output,
    )
    newest = max(Path(options.output).rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    trainer.fit(MODULES[options.strategy](options.base), DocstringQA(options.base, batch_size=4), ckpt_path=newest)
    if trainer.is_global_zero:
        metrics = ", ".join(f"{name} {value:.6g}" for name, value in trainer.callback_metrics.items())
        print(f"{trainer.world_size} ranks, step {trainer.global_step}: {metrics}")
    return trainer


if __name__ == "__main__":
    main()
