"""Run by test_load_weights.py on two ranks, and imported there for one: four models that are sharded, then loaded."""

import json
from pathlib import Path

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from lightning_qlora import QLoRAPrecision, convert
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tensors.dtensor import gather
from tests.conftest import fingerprints, make_trainer, run_rank, tensors
from tests.experts.test_experts import qwen3_moe
from tests.toys import ids, toy

ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
# Blocks cross the rows of a weight with 96 or 200 inputs, and the middle of a weight need not be the end of a block.
MODELS = {
    "llama": lambda: toy("llama", hidden_size=96, intermediate_size=200, tie_word_embeddings=True),
    "gpt2": lambda: toy("gpt2", n_layer=1),
    "bert": lambda: transformers.BertModel(toy("bert", num_hidden_layers=1).config),  # the head of a classifier is new
    "mixture": lambda: transformers.Qwen3MoeForCausalLM(
        qwen3_moe(num_experts=4, moe_intermediate_size=72, vocab_size=128, num_hidden_layers=1)[1]
    ),
}


def save_models(root):
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)


class Lit(pl.LightningModule):
    """Four models, loaded and sharded as users write it; with `split` each rank has a part of the batch."""

    def __init__(self, root, split=False):
        super().__init__()
        self.root = root
        self.split = split
        self.models = None
        self.losses = []
        self.start = {}

    def configure_model(self):
        if self.models is not None:
            return
        kinds = dict.fromkeys(MODELS, transformers.AutoModelForCausalLM)
        kinds["bert"] = transformers.AutoModelForSequenceClassification
        self.models = nn.ModuleDict({name: kind.from_pretrained(self.root / name) for name, kind in kinds.items()})
        for model in self.models.values() if self._device_mesh is not None else ():
            for blocks in [part for part in model.modules() if type(part) is nn.ModuleList]:
                for block in blocks:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(model, mesh=self.device_mesh["data_parallel"])

    def on_fit_start(self):
        self.start = values(self)
        self.fingerprints = fingerprints(self.state_dict())

    def training_step(self, batch, batch_idx):
        x = ids(rows=4, seed=batch_idx)
        x = x.chunk(self.trainer.world_size)[self.global_rank] if self.split else x
        labels = {"bert": torch.zeros(len(x), dtype=torch.long)}
        loss = sum(model(input_ids=x, labels=labels.get(name, x)).loss for name, model in self.models.items())
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(3))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def values(module):
    """Its tensors, whole, and those that the adapters began with."""
    held = tensors(module)
    for name, layer in adapted_layers(module).items():
        for number, value in enumerate(layer.initial or ()):
            held[f"{name}.initial.{number}"] = value
    return {name: gather(tensor.detach()).clone() for name, tensor in held.items()}


def fit(root, devices, sharded=False, split=False, **arguments):
    pl.seed_everything(1, verbose=False)
    module = Lit(Path(root), split)
    run = make_trainer(
        root,
        plugins=QLoRAPrecision(**ARGUMENTS | arguments),
        devices=devices,
        strategy=ModelParallelStrategy(devices, 1) if sharded else "auto",
        use_distributed_sampler=False,
        enable_checkpointing=False,
    )
    run.fit(module)
    trains = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {"start": module.start, "fingerprints": module.fingerprints, "trains": trains, "losses": module.losses}


def load(root, **arguments):
    """Without a Trainer, sharded by transformers if that is asked for."""
    with QLoRAPrecision(**ARGUMENTS).init():
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(root) / "mixture", **arguments)
    convert(model, **ARGUMENTS)
    return values(model)


def main(root, devices, *arguments):
    results = [fit(root, int(devices), sharded=True, **json.loads(given)) for given in arguments]
    by_transformers = load(root, distributed_config=DistributedConfig(fsdp_size=int(devices)))
    torch.save((results, by_transformers), Path(root) / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    run_rank(main, ranks=2)
