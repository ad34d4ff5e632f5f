"""Lightning's callbacks that average weights, in a module that was converted before the Trainer's method."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qlora import QLoRAPrecision, convert
from tests.toys import assert_equal

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


class Words(pl.LightningModule):
    """A frozen fp32 embedding and norm before linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.BatchNorm1d(8)
        )
        self.net[1].weight.data.add_(0.1 * torch.randn(64))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def batches():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (48,), generator=generator)
    return DataLoader(TensorDataset(tokens, tokens % 8), batch_size=8)


@pytest.mark.parametrize(
    ("average", "part"),
    [(lambda: EMAWeightAveraging(decay=0.9), False), (WeightAveraging, False), (WeightAveraging, True)],
)
def test_a_run_with_averaged_weights_resumes_exactly(average, part, trainer, tmp_path):
    """Also if a part alone is converted before: the callback then copies a module that was not converted."""

    def fit(epochs, path=None, *callbacks):
        module = Words()
        convert(module.net if part else module, **ARGUMENTS)
        run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), callbacks=[average(), *callbacks], max_epochs=epochs)
        run.fit(module, batches(), ckpt_path=path)
        return module

    straight = fit(4)
    path = tmp_path / "half.ckpt"

    class SaveEarly(pl.Callback):  # the averages are in a checkpoint that is saved while they are computed
        def on_train_epoch_end(self, run, module):
            if run.current_epoch == 1:
                run.save_checkpoint(path)

    fit(2, None, SaveEarly())
    resumed = fit(4, path)
    assert_equal(dict(resumed.named_parameters()), dict(straight.named_parameters()))
