"""Modules of other packages at small sizes: how each is built, and how its package trains, saves and loads it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_qlora import QLoRAPrecision, load_from_checkpoint, merge

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SERIES = np.random.default_rng(0).normal(size=(4, 60)).cumsum(1).astype(np.float32)


@dataclass
class Project:
    """A module of another package.

    Attributes:
        package: The package.
        build: Makes the module and the keyword arguments of `Trainer.fit` that hold its data.
        own: Trains, saves and loads with the package's own functions; its argument is an empty folder.
        lightning: The package of its LightningModule.
        load: Makes the arguments of `load_from_checkpoint` that the hyperparameters do not have, from the module.
        attributes: What the package sets in a module that it trains, and no checkpoint holds.
        resumes: Whether a resumed run of the plain module is bit-equal to a straight one.
    """

    package: str
    build: Callable[[], tuple[Any, dict[str, Any]]]
    own: Callable[[Path], None]
    lightning: str = "lightning.pytorch"
    load: Callable[[Any], dict[str, Any]] = lambda module: {}
    attributes: tuple[str, ...] = ()
    resumes: bool = True

    def trainer(self, root, **arguments):
        limits = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        package = importlib.import_module(self.lightning)
        return package.Trainer(**QUIET, **{**limits, "default_root_dir": root, **arguments})


def plugin(**arguments):
    return QLoRAPrecision(r=4, **arguments)


class Fitted(BaseException):
    """Raised in place of `Trainer.fit`, whose arguments it holds."""


def arguments_of_fit(train, lightning):
    """The module and the data that a package's own training passes to `Trainer.fit`."""
    trainer = importlib.import_module(lightning).Trainer

    def fit(self, model, train_dataloaders=None, val_dataloaders=None, datamodule=None, ckpt_path=None):
        if hasattr(train_dataloaders, "train_dataloader"):
            train_dataloaders, datamodule = None, train_dataloaders
        data = {"train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders, "datamodule": datamodule}
        raise Fitted(model, data)

    with mock.patch.object(trainer, "fit", fit), pytest.raises(Fitted) as raised:
        train()
    return raised.value.args


def refuses(message):
    return pytest.raises(Exception, match=message)


NOT_CONVERTED = r"(?s)Error\(s\) in loading state_dict for {}:.*Unexpected key\(s\) in state_dict: .*lora_A"


# pytorch-forecasting


def forecasting(name):
    import pandas as pd
    import pytorch_forecasting as pf

    rows, columns = SERIES.shape
    frame = pd.DataFrame(
        {"time": np.tile(np.arange(columns), rows), "series": np.repeat(list("abcd"), columns), "value": SERIES.ravel()}
    )
    more = {"time_varying_known_reals": ["time"], "static_categoricals": ["series"]} if name != "NBeats" else {}
    data = pf.TimeSeriesDataSet(
        frame,
        "time",
        "value",
        ["series"],
        max_encoder_length=16,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        **more,
    )
    sizes = {"widths": [64, 64]} if name == "NBeats" else {"hidden_size": 32, "hidden_continuous_size": 16}
    module = getattr(pf, name).from_dataset(data, learning_rate=1e-3, log_interval=0, **sizes)
    loaders = [data.to_dataloader(train=train, batch_size=32, shuffle=False, num_workers=0) for train in (True, False)]
    return module, {"train_dataloaders": loaders[0], "val_dataloaders": loaders[1]}


def own_forecasting(name, folder):
    """The tutorial: the best checkpoint by `load_from_checkpoint`, then `predict`."""
    module, data = forecasting(name)
    trainer = FORECASTING[name].trainer(folder, max_epochs=1, plugins=plugin(checkpoint="full"))
    trainer.fit(module, **data)
    path = trainer.checkpoint_callback.best_model_path
    with refuses(NOT_CONVERTED.format(name)):
        type(module).load_from_checkpoint(path, weights_only=False)
    expected = module.predict(data["val_dataloaders"], trainer_kwargs={**QUIET})
    merge(module)
    torch.testing.assert_close(module.predict(data["val_dataloaders"], trainer_kwargs={**QUIET}), expected)
    trainer = FORECASTING[name].trainer(folder)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "merged.ckpt")
    again = type(module).load_from_checkpoint(folder / "merged.ckpt", weights_only=False)
    torch.testing.assert_close(again.predict(data["val_dataloaders"], trainer_kwargs={**QUIET}), expected)


# gluonts


def gluonts_estimator(**trainer):
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import PatchTSTEstimator

    data = ListDataset([{"start": pd.Period("2020-01-01", "D"), "target": row} for row in SERIES], freq="D")
    estimator = PatchTSTEstimator(
        prediction_length=4,
        patch_len=8,
        context_length=16,
        d_model=32,
        nhead=2,
        dim_feedforward=64,
        num_encoder_layers=1,
        num_batches_per_epoch=3,
        trainer_kwargs={**QUIET, "max_epochs": 1, **trainer},
    )
    return estimator, data


def gluonts():
    estimator, data = gluonts_estimator()
    return arguments_of_fit(partial(estimator.train, data, data), "lightning.pytorch")


def own_gluonts(folder):
    from gluonts.torch.model.predictor import PyTorchPredictor

    def means(predictor):
        torch.manual_seed(0)
        return np.stack([forecast.mean for forecast in predictor.predict(data)])

    estimator, data = gluonts_estimator(plugins=plugin(), default_root_dir=folder)
    predictor = estimator.train(data, data)  # reads its best checkpoint back into the converted module
    expected = means(predictor)
    predictor.serialize(make(folder / "adapters"))
    with refuses(NOT_CONVERTED.format("PatchTSTLightningModule")):
        PyTorchPredictor.deserialize(folder / "adapters")
    merge(predictor.prediction_net)
    predictor.serialize(make(folder / "merged"))
    np.testing.assert_allclose(means(PyTorchPredictor.deserialize(folder / "merged")), expected, rtol=1e-3)


def make(folder):
    folder.mkdir()
    return folder


# scvi-tools


def scvi_model():
    import anndata
    import scvi

    scvi.settings.seed = 0
    scvi.settings.verbosity = 30
    counts = anndata.AnnData(np.random.default_rng(0).poisson(2.0, (200, 64)).astype(np.float32))
    scvi.model.SCVI.setup_anndata(counts)
    torch.manual_seed(0)
    return scvi.model.SCVI(counts, n_hidden=64, n_latent=8)


SCVI_TRAIN = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "batch_size": 32, "enable_progress_bar": False}


def scvi():
    return arguments_of_fit(partial(scvi_model().train, **SCVI_TRAIN), "lightning.pytorch")


def own_scvi(folder):
    model = scvi_model()
    model.train(**SCVI_TRAIN, plugins=plugin())
    expected = model.get_latent_representation()
    model.save(folder / "part")  # the state dict of a part of what was converted
    with refuses(NOT_CONVERTED.format("VAE")):
        type(model).load(folder / "part", model.adata)
    merge(model.module)
    model.save(folder / "merged")
    again = type(model).load(folder / "merged", model.adata)
    np.testing.assert_allclose(again.get_latent_representation(), expected, atol=1e-5)


# darts


def darts_model(**arguments):
    from darts import TimeSeries
    from darts.models import TFTModel

    series = TimeSeries.from_values(SERIES[0])
    model = TFTModel(
        input_chunk_length=16,
        output_chunk_length=4,
        hidden_size=32,
        n_epochs=1,
        add_relative_index=True,
        random_state=0,
        batch_size=16,
        likelihood=None,
        loss_fn=nn.MSELoss(),
        **arguments,
    )
    return model, {"series": series, "val_series": series}


def darts():
    model, data = darts_model(pl_trainer_kwargs={**QUIET})
    return arguments_of_fit(partial(model.fit, **data, dataloader_kwargs={"shuffle": False}), "pytorch_lightning")


def own_darts(folder):
    from pytorch_lightning.strategies import SingleDeviceStrategy

    model, data = darts_model(pl_trainer_kwargs={**QUIET, "plugins": [plugin()]})
    with refuses("Received both `precision=32-true` and `plugins=QLoRAPrecision"):
        model.fit(**data)
    strategy = SingleDeviceStrategy("cpu", precision_plugin=plugin())
    model, _ = darts_model(pl_trainer_kwargs={**QUIET, "strategy": strategy})
    model.fit(**data)
    assert next(p for n, p in model.model.named_parameters() if n.endswith("lora_B")).any()
    with refuses("accelerator set through both strategy class and accelerator flag"):
        model.predict(4)  # by a second Trainer with the same strategy
    model, _ = darts_model(pl_trainer_kwargs={**QUIET})
    model.fit(**data, trainer=DARTS.trainer(folder, plugins=plugin()))
    expected = model.predict(4).values()
    model.save(str(folder / "adapters.pt"))
    with refuses(NOT_CONVERTED.format("_TFTModule")):
        type(model).load(str(folder / "adapters.pt"), trusted=True)
    merge(model.model)
    model.save(str(folder / "merged.pt"))
    again = type(model).load(str(folder / "merged.pt"), pl_trainer_kwargs={**QUIET})
    np.testing.assert_allclose(again.predict(4).values(), expected, rtol=1e-3)


# neuralforecast


def neuralforecast_model(**trainer):
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    rows, columns = SERIES.shape
    frame = pd.DataFrame(
        {
            "unique_id": np.repeat(list("abcd"), columns),
            "y": SERIES.ravel(),
            "ds": np.tile(pd.date_range("2020-01-01", periods=columns), rows),
        }
    )
    model = NHITS(
        h=4,
        input_size=16,
        max_steps=3,
        mlp_units=3 * [[64, 64]],
        batch_size=4,
        windows_batch_size=16,
        random_seed=0,
        **{k: v for k, v in QUIET.items() if k != "devices"},
        **trainer,
    )
    return NeuralForecast(models=[model], freq="D"), frame


def neuralforecast():
    forecast, frame = neuralforecast_model()
    return arguments_of_fit(partial(forecast.fit, frame, val_size=8), "pytorch_lightning")


def own_neuralforecast(folder):
    forecast, frame = neuralforecast_model(plugins=plugin())
    forecast.fit(frame, val_size=8)
    assert forecast.models[0].blocks[0].layers[0].lora_B.any()
    expected = forecast.predict()
    forecast.save(str(folder / "adapters"))
    with refuses("Checkpoint does not match the model.*lora_A"):
        type(forecast).load(str(folder / "adapters"))
    merge(forecast.models[0])
    forecast.save(str(folder / "merged"))
    again = type(forecast).load(str(folder / "merged")).predict()
    np.testing.assert_allclose(again.NHITS, expected.NHITS, rtol=1e-4)


# lightly


class Backbone(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 32))


def images(classes=4):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(48, 3, 8, 8, generator=generator)
    labels = torch.arange(48) % classes
    return DataLoader(TensorDataset(pixels, labels), batch_size=16)


def lightly():
    """Fine-tuning as in its benchmarks."""
    from lightly.utils.benchmarking import FinetuneClassifier

    torch.manual_seed(0)
    module = FinetuneClassifier(Backbone(), 16, lr=0.1, feature_dim=32, num_classes=4, topk=(1, 2))
    return module, {"train_dataloaders": images(), "val_dataloaders": images()}


def own_lightly(folder):
    """Self-supervised training of its `embedding`, which takes a finished optimizer."""
    from lightly.embedding import SelfSupervisedEmbedding
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone()
            self.head = SimCLRProjectionHead(32, 32, 16)

        def forward(self, *views):
            return [self.head(self.backbone(view)) for view in views]

    pixels = [(image, image.flip(0)) for image in images().dataset.tensors[0]]
    loader = DataLoader([(views, 0, "name") for views in pixels], batch_size=16)
    model = SimCLR()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    embedding = SelfSupervisedEmbedding(model, NTXentLoss(), optimizer, loader)
    options = {"default_root_dir": folder, "plugins": plugin()}
    embedding.train_embedding(
        {**QUIET, "max_epochs": 1, **options}, {"save_top_k": 1, "dirpath": str(folder)}, {"max_depth": 0}
    )
    assert model.backbone[1].lora_B.any()
    state = torch.load(embedding.checkpoint, weights_only=True)["state_dict"]
    fresh = SelfSupervisedEmbedding(SimCLR(), NTXentLoss(), optimizer, loader)
    with refuses(NOT_CONVERTED.format("SelfSupervisedEmbedding")):
        fresh.load_state_dict(state)


# chemprop


def chemprop():
    from chemprop import data, nn
    from chemprop.models import MPNN

    smiles = ["C" * n + end for n in range(1, 13) for end in ("O", "N", "Cl", "C#N")]
    points = [data.MoleculeDatapoint.from_smi(text, np.array([float(len(text))])) for text in smiles]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=16, shuffle=False, num_workers=0)
    torch.manual_seed(0)
    module = MPNN(nn.BondMessagePassing(d_h=64), nn.MeanAggregation(), nn.RegressionFFN(input_dim=64, hidden_dim=64))
    return module, {"train_dataloaders": loader, "val_dataloaders": loader}


def own_chemprop(folder):
    from chemprop.models.utils import load_model, save_model

    module, loaders = chemprop()
    trainer = CHEMPROP.trainer(folder, max_epochs=1, plugins=plugin())
    trainer.fit(module, **loaders)
    expected = torch.cat(CHEMPROP.trainer(folder).predict(module, loaders["val_dataloaders"]))
    save_model(folder / "adapters.pt", module)
    with refuses(NOT_CONVERTED.format("MPNN")):
        load_model(folder / "adapters.pt")
    merge(module)
    save_model(folder / "merged.pt", module)
    again = CHEMPROP.trainer(folder).predict(load_model(folder / "merged.pt"), loaders["val_dataloaders"])
    torch.testing.assert_close(torch.cat(again), expected)


# lightning-hydra-template


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))


class HydraModule(pl.LightningModule):
    """As its `src/models/mnist_module.py`: hydra makes the network, and partial functions for the rest."""

    def __init__(self, net, optimizer, scheduler, compile):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.val_acc = MulticlassAccuracy(4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = self.criterion(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.val_acc(logits.argmax(1), batch[1])
        self.log("val/loss", self.criterion(logits, batch[1]))
        self.log("val/acc", self.val_acc, on_epoch=True)

    test_step = validation_step

    def setup(self, stage):
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = {"scheduler": self.hparams.scheduler(optimizer=optimizer), "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def hydra():
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=10)
    module = HydraModule(Net(), partial(torch.optim.Adam, lr=1e-3), scheduler, compile=False)
    return module, {"train_dataloaders": images(), "val_dataloaders": images()}


def own_hydra(folder):
    """`src/train.py` and `src/eval.py`: test the best checkpoint, in this process and in another one."""
    torch.manual_seed(0)
    module, data = hydra()
    project = PROJECTS["lightning-hydra-template"]
    trainer = project.trainer(folder, plugins=plugin())
    trainer.fit(module, **data)
    path = trainer.checkpoint_callback.best_model_path
    expected = trainer.test(module, data["val_dataloaders"], ckpt_path=path, weights_only=False, verbose=False)
    torch.manual_seed(0)
    fresh, _ = hydra()
    trainer = project.trainer(folder, plugins=plugin())
    assert trainer.test(fresh, data["val_dataloaders"], ckpt_path=path, weights_only=False, verbose=False) == expected
    with refuses(NOT_CONVERTED.format("HydraModule")):
        HydraModule.load_from_checkpoint(path, weights_only=False)
    torch.manual_seed(0)
    loaded = load_from_checkpoint(HydraModule, path, weights_only=False, net=Net())
    assert trainer.test(loaded, data["val_dataloaders"], verbose=False) == expected
    sizes = {name: tensor.nbytes for name, tensor in loaded.state_dict().items()}
    optimizer = 2 * sum(parameter.nbytes for parameter in loaded.parameters() if parameter.requires_grad)
    assert Path(path).stat().st_size < sum(sizes.values()) + optimizer + 20_000  # no second copy of the base


PROJECTS = {
    "pytorch-forecasting TFT": Project(
        "pytorch_forecasting",
        partial(forecasting, "TemporalFusionTransformer"),
        partial(own_forecasting, "TemporalFusionTransformer"),
    ),
    "pytorch-forecasting NBeats": Project(
        "pytorch_forecasting", partial(forecasting, "NBeats"), partial(own_forecasting, "NBeats")
    ),
    "gluonts PatchTST": Project("gluonts", gluonts, own_gluonts, load=lambda module: module.__init_args__),
    "scvi-tools SCVI": Project(
        "scvi", scvi, own_scvi, load=lambda module: {"module": scvi_model().module}, resumes=False
    ),
    "darts TFT": Project("darts", darts, own_darts, "pytorch_lightning"),
    "neuralforecast NHITS": Project(
        "neuralforecast",
        neuralforecast,
        own_neuralforecast,
        "pytorch_lightning",
        attributes=("val_size", "test_size"),
        resumes=False,
    ),
    "lightly": Project("lightly", lightly, own_lightly, "pytorch_lightning", lambda module: {"model": Backbone()}),
    "chemprop MPNN": Project("chemprop", chemprop, own_chemprop),
    "lightning-hydra-template": Project("torchmetrics", hydra, own_hydra, load=lambda module: {"net": Net()}),
}
FORECASTING = {
    "TemporalFusionTransformer": PROJECTS["pytorch-forecasting TFT"],
    "NBeats": PROJECTS["pytorch-forecasting NBeats"],
}
DARTS = PROJECTS["darts TFT"]
CHEMPROP = PROJECTS["chemprop MPNN"]
