"""Hugging Face models in an ordinary LightningModule."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_qlora import QLoRAPrecision, convert
from tests.toys import NAMES, Lit, perturb, toy

pytest.importorskip("transformers")


class HuggingFace(Lit):
    """It comes in evaluation mode, as `from_pretrained` gives it."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32):
        super().__init__(toy(kind).to(dtype))
        self.kind = kind
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3 if self.kind == "bert" else 5e-3)


def batches(kind: str) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (16, 12), generator=generator)
    labels = ids[:, 0] % 2 if kind == "bert" else ids
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize(("kind", "dtype"), [*zip(NAMES, [torch.bfloat16, torch.float32] * 2, strict=True)])
def test_a_model_trains_validates_and_resumes(trainer, kind, dtype):
    epochs = 12 if kind == "gpt2" else 8
    module = HuggingFace(kind, dtype)
    run = trainer(plugins=QLoRAPrecision(r=4, lora_dropout=0.0), max_epochs=epochs)
    run.fit(module, batches(kind), batches(kind))
    assert sum(module.losses[-4:]) < 0.9 * sum(module.losses[:4])
    again = HuggingFace(kind, dtype)
    second = trainer(plugins=QLoRAPrecision(r=4, lora_dropout=0.0), max_epochs=epochs + 1)
    second.fit(again, batches(kind), batches(kind), ckpt_path=run.checkpoint_callback.best_model_path)
    assert len(again.losses) == 4
    assert sum(again.losses) < sum(module.losses[:4])


def test_gradients_flow_through_transformers_own_gradient_checkpointing():
    def gradients(checkpointing):
        model = toy("llama").train()
        convert(model, r=4, lora_dropout=0.3)
        perturb(model, scale=0.1)
        if checkpointing:
            # transformers 4 defaults to the reentrant variant, which needs inputs that require gradients
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        ids = torch.arange(3, 15)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    torch.testing.assert_close(gradients(True), gradients(False))
