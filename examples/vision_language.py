"""A vision-language model learns the colours of drawn pictures, with QLoRA on all its linear layers.

    python examples/vision_language.py --base HuggingFaceTB/SmolVLM-256M-Instruct [--fast]

The module is an ordinary one: the processor makes `pixel_values` and tokens of pictures and texts, and the model
returns the loss. `--exclude vision_model` (Llava: vision_tower, Qwen: visual) keeps the vision tower in 16 bits without
adapters.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from lightning_qlora import QLoRAPrecision

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
QUESTION = "What colour is the circle?"


def picture(colour: str) -> Image.Image:
    image = Image.new("RGB", (224, 224), "gray")
    x, y = random.randrange(40, 140), random.randrange(40, 140)
    ImageDraw.Draw(image).ellipse((x, y, x + 60, y + 60), fill=colour)
    return image


class VisionLanguageModel(LightningModule):
    def __init__(self, base: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.processor = AutoProcessor.from_pretrained(base)
        self.model: Any = None

    def configure_model(self) -> None:  # here each weight is quantized when it is read
        if self.model is None:
            self.model = AutoModelForImageTextToText.from_pretrained(self.hparams["base"])

    def collate(self, colours: list[str]) -> dict[str, torch.Tensor]:
        """Pictures with a question and its answer, padded; the loss is that of the text after the question."""
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        texts = []
        for colour in colours:
            answer = {"role": "assistant", "content": [{"type": "text", "text": colour}]}
            texts.append(self.processor.apply_chat_template([user, answer]))
        images = [[picture(colour)] for colour in colours]
        batch = self.processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        question = self.processor.apply_chat_template([user], add_generation_prompt=True).rstrip()
        start = self.processor(text=question, images=images[0], return_tensors="pt").input_ids.shape[1]
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        labels[:, :start] = -100
        return {**batch, "labels": labels}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(COLOURS * 100, batch_size=4, shuffle=True, collate_fn=self.collate)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-4)


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="HuggingFaceTB/SmolVLM-256M-Instruct", help="a hub name or a folder")
    parser.add_argument("--exclude", nargs="*", default=[], help="modules that get no 4 bits and no adapters")
    parser.add_argument("--output", default="outputs/vision_language")
    parser.add_argument("--fast", action="store_true", help="a few steps")
    given = parser.parse_args(arguments)
    seed_everything(0)
    plugin = QLoRAPrecision(r=16, exclude_modules=given.exclude)
    trainer = Trainer(
        max_steps=4 if given.fast else 100,
        devices=1,
        plugins=plugin,
        default_root_dir=given.output,
        logger=False,
    )
    trainer.fit(VisionLanguageModel(given.base))
    trainer.save_checkpoint(Path(given.output) / "adapter.ckpt")
    return trainer


if __name__ == "__main__":
    main()
