"""Lightning runs that tests and the two-process script share."""

import os
import shutil

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import make_trainer
from tests.optim.stand_in import assert_all_paged

# torchao compiles its step by torch.compile.
HAS_CXX = shutil.which(os.environ.get("CXX", "g++")) is not None


def data():
    """Three batches: checkpoints after three steps are at the end of an epoch, where Lightning can resume exactly."""
    x = torch.randn(24, 80, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :64].sin()), batch_size=8)


class Regression(L.LightningModule):
    """A little model; `placed` is called with its optimizers after every step."""

    def __init__(self, make_optimizer=None, placed=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(80, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
        self.make_optimizer = make_optimizer or (lambda params: torch.optim.AdamW(params, lr=1e-2))
        self.placed = placed

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def on_train_batch_end(self, *args):
        if self.placed is not None:
            assert_all_paged(self.placed, self.optimizers().optimizer)


class ManualRegression(Regression):
    """Two optimizers, stepped by hand, one of them with a closure."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [self.make_optimizer(self.net[0].parameters()), self.make_optimizer(self.net[2].parameters())]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()

        def closure():
            second.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        second.step(closure=closure)

    def on_train_batch_end(self, *args):
        if self.placed is not None:
            for optimizer in self.optimizers():
                assert_all_paged(self.placed, optimizer.optimizer)


def fit(module, callbacks=None, epochs=2, ckpt_path=None, save=None, **kwargs):
    """Train for epochs of three steps; with `save`, ModelCheckpoint leaves one of the last epoch there."""
    callbacks = [] if callbacks is None else [callbacks]
    if save is not None:
        callbacks.append(ModelCheckpoint(save.parent, save.stem))
    options = {"enable_checkpointing": save is not None, **kwargs}
    trainer = make_trainer(None, max_epochs=epochs, callbacks=callbacks, **options)
    trainer.fit(module, data(), ckpt_path=ckpt_path)


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])
