"""DPO (Rafailov et al. 2023) with the policy and the reference model on one 4-bit base.

    python examples/dpo.py [--fast] [--base HUB_NAME_OR_FOLDER] [--two_models]

The reference model is the policy without its adapters. A second process trains the same with a second 4-bit model as
the reference (`--two_models`), and both peaks of memory are printed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from docstring_qa import IGNORE, DocstringQA, encode, pad
from lightning.pytorch import LightningModule, Trainer, seed_everything
from quickstart import peak_memory
from smollm2 import load_model, load_tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qlora import QLoRAPrecision, convert, disable_adapter

Example = dict[str, list[int]]
COURTESY = "Certainly! I would be happy to help you with that. "


class Preferences(DocstringQA):
    """Two answers to every question: the docstring is preferred, and rejected if it begins with a courtesy."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        tokenizer = load_tokenizer(self.base)
        pairs = [pair._replace(answer=COURTESY + pair.answer) for pair in self.pairs if not pair.held_out]
        rejected = [encode(pair, tokenizer) for pair in pairs]
        self.preferences = list(zip(self.train, rejected, strict=True))

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.preferences, self.batch_size, shuffle=True, generator=order, collate_fn=pad_both)


def pad_both(pairs: list[tuple[Example, Example]]) -> dict[str, Tensor]:
    """Stack the preferred answers and then the rejected ones."""
    return pad([preferred for preferred, _ in pairs] + [rejected for _, rejected in pairs])


def log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The log-probability of each answer, [answers]."""
    labels = batch["labels"][:, 1:]  # the token at t predicts the one at t + 1
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    rows = ((logits[number], answer) for number, answer in enumerate(labels))
    # A sum for each answer: cross_entropy with a sum or a mean does not compute all logits, if they are deferred.
    sums = [F.cross_entropy(z.float(), y, reduction="sum", ignore_index=IGNORE) for z, y in rows]
    return -torch.stack(sums)


class DPO(LightningModule):
    """Direct preference optimization.

    Args:
        base: As in `CausalLM`.
        beta: Weight of the distance to the reference model.
        lr: Learning rate.
        reference: A second model as the reference; None: this one without its adapters.
    """

    def __init__(
        self, base: str | None = None, beta: float = 0.1, lr: float = 5e-5, reference: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model, self.beta, self.lr = load_model(base), beta, lr
        self.reference = [reference]  # in a list, so that it is no part of this module
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        reference = self.reference_log_probabilities(batch)
        preferred, rejected = (log_probabilities(self.model, batch) - reference).chunk(2)
        loss = -F.logsigmoid(self.beta * (preferred - rejected)).mean()
        self.log("accuracy", (preferred > rejected).float().mean(), prog_bar=True)
        self.losses.append(loss.item())
        return loss

    @torch.no_grad()
    def reference_log_probabilities(self, batch: dict[str, Tensor]) -> Tensor:
        if self.reference[0] is not None:
            return log_probabilities(self.reference[0], batch)
        with disable_adapter(self):
            return log_probabilities(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


def second_model(base: str | None) -> nn.Module:
    """Load a 4-bit model that never trains."""
    model = load_model(base)
    convert(model, r=1)
    return model.requires_grad_(False)


def main(args: list[str] | None = None) -> dict[str, list[float] | int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="4 steps instead of 24, and no second process")
    parser.add_argument("--base", help="hub name or folder of a causal language model with a chat template")
    parser.add_argument("--lr", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--two_models", action="store_true", help="use a second 4-bit model as the reference")
    parser.add_argument("--output", default="outputs/dpo", help="folder for the results")
    options = parser.parse_args(args)

    seed_everything(0)
    module = DPO(options.base, lr=options.lr, reference=second_model(options.base) if options.two_models else None)
    trainer = Trainer(
        plugins=QLoRAPrecision(r=16, lora_alpha=16),
        max_steps=4 if options.fast else 24,
        devices=1,
        logger=False,
        enable_checkpointing=False,
    )
    if options.two_models:
        module.reference[0].to(trainer.strategy.root_device)
    data = Preferences(options.base, batch_size=2 if options.fast else 4)
    data.setup("fit")
    trainer.fit(module, data.train_dataloader())

    result = {"losses": module.losses, "peak_memory_bytes": peak_memory(trainer.strategy.root_device)}
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{'two_models' if options.two_models else 'one_base'}.json").write_text(json.dumps(result))
    first, last = (sum(losses) / len(losses) for losses in (module.losses[:4], module.losses[-4:]))
    print(f"Loss of the first 4 steps {first:.3f}, of the last 4 steps {last:.3f}; ln 2 = 0.693 at the start")
    if not options.fast and not options.two_models:
        subprocess.run([sys.executable, __file__, *(args or sys.argv[1:]), "--two_models"], check=True)
        other = json.loads((output / "two_models.json").read_text())
        peaks = [run["peak_memory_bytes"] / 1e6 for run in (result, other)]
        print(f"Peak memory: {peaks[0]:.0f} MB on one base, {peaks[1]:.0f} MB with a second 4-bit model")
    return result


if __name__ == "__main__":
    main()
