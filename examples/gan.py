"""A GAN that is adapted to other data: the plugin on its generator alone, an average of weights, the best checkpoint.

    python examples/gan.py [--fast]

A generator learns to draw squares, in full. Then the same LightningModule is fine-tuned to draw crosses: the generator
in 4 bits with adapters, its critic in full. There are two optimizers, an average of the weights (EMA), early stopping,
and checkpoints, of which the best is loaded and merged.
"""

import argparse
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_qlora import QLoRAPrecision, convert, load_from_checkpoint, merge

SIZE = 16
NOISE = 32
ARGUMENTS = {"r": 8, "modules_to_save": ["critic"]}  # the generator in 4 bits, the critic in full


def draw(shape: str, count: int) -> Tensor:
    """Images [count, SIZE * SIZE] of squares or crosses at random places."""
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    y, x = torch.randint(4, SIZE - 4, (2, count, 1, 1))
    down, right = (row - y).abs(), (column - x).abs()
    inside = torch.maximum(down, right) <= 3
    if shape == "cross":
        inside = inside & (torch.minimum(down, right) <= 0)
    return inside.float().flatten(1) * 2 - 1


class Images(IterableDataset[Tensor]):
    def __init__(self, shape: str) -> None:
        self.shape = shape

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield draw(self.shape, 64)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The energy distance of two sets of images; 0 if they have one distribution."""
    return 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()


class GAN(LightningModule):
    """An ordinary module with two optimizers; nothing in it is about 4 bits or adapters."""

    def __init__(self, pretrained: str | None = None, width: int = 256) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(NOISE, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, SIZE * SIZE),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(nn.Linear(SIZE * SIZE, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))
        if pretrained is not None:
            self.load_state_dict(torch.load(pretrained, weights_only=True))

    def training_step(self, real: Tensor, _: int) -> None:
        of_generator, of_critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), NOISE, device=self.device))
        loss = nn.functional.softplus(-self.critic(real)) + nn.functional.softplus(self.critic(fake.detach()))
        of_critic.zero_grad()
        self.manual_backward(loss.mean())
        of_critic.step()
        of_generator.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.critic(fake)).mean())
        of_generator.step()

    def validation_step(self, real: Tensor, _: int) -> None:
        noise = torch.randn(len(real), NOISE, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.log("distance", distance(self.generator(noise), real), prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.generator, self.critic)
        return [torch.optim.Adam(part.parameters(), 2e-4, betas=(0.5, 0.99)) for part in parts]


def fit(module: GAN, shape: str, epochs: int, steps: int, plugin: QLoRAPrecision | None = None) -> ModelCheckpoint:
    best = ModelCheckpoint(monitor="distance", save_weights_only=True)
    stop = EarlyStopping("distance", patience=4)
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=steps,
        limit_val_batches=4,
        callbacks=[EMAWeightAveraging(decay=0.98), stop, best],  # validation and checkpoints have the average
        plugins=plugin,
        default_root_dir=f"outputs/gan/{shape}",
        logger=False,
    )
    trainer.fit(module, DataLoader(Images(shape), batch_size=None), DataLoader(Images(shape), batch_size=None))
    return best


def main(fast: bool = False) -> None:
    seed_everything(0)
    epochs, steps = (2, 20) if fast else (15, 150)
    first = GAN()
    fit(first, "square", epochs, steps)  # stands for pretraining: in full, without the plugin
    torch.save(first.state_dict(), "outputs/gan/pretrained.pt")

    plugin = QLoRAPrecision(**ARGUMENTS)
    module = GAN("outputs/gan/pretrained.pt")
    convert(module, **ARGUMENTS)  # before the callback that averages copies the module
    best = fit(module, "cross", epochs, steps, plugin)

    tuned = merge(load_from_checkpoint(GAN, best.best_model_path))
    crosses, noise = draw("cross", 512), torch.randn(512, NOISE)
    with torch.no_grad():
        for name, gan in {"pretrained": first, "tuned": tuned}.items():
            print(f"{name}: distance {distance(gan.generator(noise), crosses):.2f} from crosses")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a few steps")
    main(parser.parse_args().fast)
