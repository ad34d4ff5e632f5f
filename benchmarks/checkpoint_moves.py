"""Checkpoints of each strategy loaded under each other one: the table of docs/results.md.

    python -m benchmarks.checkpoint_moves                   all pairs, a few minutes
    python -m benchmarks.checkpoint_moves one fsdp2         only these

Each strategy trains a small Llama for STEPS steps on the same global batches and saves it, as adapters and with the
4-bit base, in shards and in one file. Each strategy loads every one of these and trains STEPS steps more. A cell has
the largest relative difference of the losses of these steps, over both contents and both kinds of file, from those of
one device that was not interrupted, or the error. Shards are loaded by the strategies that write them.
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_qlora import QLoRAPrecision

STEPS = 6
PROCESSES = {"one": 1, "ddp": 2, "fsdp2": 2, "fsdp4": 4, "hsdp": 4}
NAMES = {
    "one": "one device",
    "ddp": "DDP, 2 ranks",
    "fsdp2": "FSDP2, 2 ranks",
    "fsdp4": "FSDP2, 4 ranks",
    "hsdp": "HSDP, 2 x 2 ranks",
}
CONTENTS = ("adapter", "full")


class Model(pl.LightningModule):
    """As users write it: the optimizer gets what trains."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.losses = list[float]()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            config = LlamaConfig(
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=128,
                num_key_value_heads=2,
                tie_word_embeddings=False,
            )
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.model = LlamaForCausalLM(config)
            if self.name in ("fsdp2", "fsdp4", "hsdp"):
                mesh = self.device_mesh["data_parallel"]
                if self.name == "hsdp":
                    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
                self.trainer.precision_plugin.convert_module(self.model)
                for layer in self.model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(int(batch)))
        ids = ids.chunk(self.trainer.world_size)[self.global_rank]
        loss = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))
        return loss

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(STEPS * self.current_epoch, STEPS * (self.current_epoch + 1)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(name: str, checkpoint: str, epochs: int, single: bool = False, path: Path | None = None) -> Any:
    """Train, from a checkpoint if there is a path; the Trainer and the losses."""
    strategy: Any = {"one": "auto", "ddp": "ddp"}.get(name)
    if strategy is None:
        strategy = ModelParallelStrategy(PROCESSES[name], 1, save_distributed_checkpoint=not single)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=PROCESSES[name],
        strategy=strategy,
        max_epochs=epochs,
        logger=False,
        plugins=QLoRAPrecision(r=16, lora_dropout=0.0, checkpoint=checkpoint),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
    )
    module = Model(name)
    trainer.fit(module, ckpt_path=path)
    return trainer, module.losses


def files_of(name: str) -> list[str]:
    return ["file"] if name in ("one", "ddp") else ["shards", "file"]


def save_all(name: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Save each kind of checkpoint; on one device also the losses of a run without an interruption."""
    for checkpoint in CONTENTS:
        if name == "one":
            yield checkpoint, fit(name, checkpoint, 2)[1][STEPS:]
        for file in files_of(name):
            trainer, _ = fit(name, checkpoint, 1, file == "file")
            trainer.save_checkpoint(folder / "-".join((name, file, checkpoint)))


def load_all(name: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Load each checkpoint and train on: its name, and the losses or the error."""
    for path in sorted(path for path in folder.iterdir() if path.suffix != ".json"):
        _, file, checkpoint = path.name.split("-")
        if file not in files_of(name):
            continue
        try:
            yield path.name, fit(name, checkpoint, 2, path=path)[1]
        except Exception as error:
            yield path.name, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def work(command: str, name: str, folder: Path) -> None:
    """In every process of a strategy."""
    found = dict({"save": save_all, "load": load_all}[command](name, folder))
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / f"{command}-{name}.json").write_text(json.dumps(found))


def launch(command: str, name: str, folder: Path) -> Any:
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES[name]]
    if name == "one":
        arguments = [sys.executable]
    arguments += ["-m", "benchmarks.checkpoint_moves", "--worker", command, name, folder]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} {name}: {done.stderr[-3000:]}")
    return json.loads((folder / f"{command}-{name}.json").read_text())


def difference(losses: Any, expected: list[float]) -> float | str:
    """Of losses; an error as it is."""
    if isinstance(losses, str):
        return losses
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))


def measure(names: list[str]) -> dict[tuple[str, str], list[float | str]]:
    """Strategy that saved, strategy that loads -> a cell for each content and kind of file."""
    cells: dict[tuple[str, str], list[float | str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        expected = launch("save", "one", folder)
        for name in names:
            if name != "one":
                launch("save", name, folder)
        for name in names:
            for path, losses in launch("load", name, folder).items():
                saved, _, checkpoint = path.split("-")
                if saved in names:
                    cells[saved, name].append(difference(losses, expected[checkpoint]))
    return cells


def table(names: list[str], cells: dict[tuple[str, str], list[float | str]]) -> str:
    """Rows of strategies that saved, columns of those that load."""
    lines = ["| saved by | " + " | ".join(NAMES[name] for name in names) + " |"]
    lines.append("| --- " * (1 + len(names)) + "|")
    for saved in names:
        rows = [cells[saved, name] for name in names]
        errors = [[cell for cell in row if isinstance(cell, str)] for row in rows]
        texts = [error[0] if error else f"{max(map(float, row)):.0e}" for error, row in zip(errors, rows, strict=True)]
        lines.append(f"| {NAMES[saved]} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(*sys.argv[-3:-1], Path(sys.argv[-1]))  # type: ignore[call-arg]
    else:
        chosen = sys.argv[1:] or list(PROCESSES)
        print(table(chosen, measure(chosen)))
