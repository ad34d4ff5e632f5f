"""Shared by all tests: quiet Lightning, one small module written as users write theirs, and its data."""

import atexit
import gc
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from itertools import combinations, count, product
from pathlib import Path
from types import SimpleNamespace

# Set before torch is imported: pytest-xdist runs as many tests at a time as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

gc.disable()  # until all is imported: it would look through what was imported again and again, 2 s of 9

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._device import _device_constructors
from torch.utils.data import DataLoader, TensorDataset

import lightning_qlora
from lightning_qlora import QLoRAPrecision
from lightning_qlora.layers.packed_layer import PackedLayer
from tests import forks
from tests.machines import products

gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # else extensions in C++ print what is left at the end
products.state(products.FAST)  # also in the scripts of tests/scripts, which import this file

ROOT = Path(__file__).parent.parent
FILES_OF_TORCH, FILES_OF_PACKAGE = (f"{Path(each.__file__).parent}{os.sep}" for each in (torch, lightning_qlora))
# Of this process of pytest alone, and not among those that the kernel gives away (Linux: from 32768 on).
PORTS = count(10_000 + os.getpid() * 50 % 20_000)
# What torchrun gives to each of two processes, and the variables with the rank there and under SLURM.
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID")

# Without these devices each seed is kept for them beside the stack of its call, 1 ms.
for device in (torch.cuda, torch.xpu, torch.mtia):
    device.traceback = SimpleNamespace(format_stack=list)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


def fingerprints(state):
    """Name -> fingerprint of what a state dict of a converted module leaves out."""
    return json.loads(bytes(state["_qlora_conversion"].tolist()))["fingerprints"]


class Classifier(pl.LightningModule):
    """An MLP classifier that knows nothing of 4 bits."""

    def __init__(self, width: int = 64, dropout: float = 0.0, seed: int = 0):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, 8)
            )
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def dataset(samples: int = 32, width: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, width, generator=generator), torch.randint(0, 8, (samples,), generator=generator)
    )


def loader(samples: int = 32, batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    return DataLoader(dataset(samples), batch_size=batch_size, shuffle=shuffle)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers, and the bytes of 4-bit layers, wherever these are held."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, layer in module.named_modules():
        if isinstance(layer, PackedLayer):
            held |= {f"{name}.{key}": getattr(layer, key) for key in ("packed", "absmax", "nested")}
    return held


class ResumableLoader:
    """A loader that knows where it is, as torchdata's StatefulDataLoader: Lightning repeats data from any other."""

    def __init__(self, samples=64, batch_size=8):
        self.batches = list(loader(samples, batch_size))
        self.start = 0
        self.next = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_()  # as a DataLoader draws a seed for its workers
        self.next = self.start
        self.start = 0
        return self.rest()

    def rest(self):
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.start = state["next"]


def make_trainer(root, package=pl, **arguments) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return package.Trainer(**{**defaults, **arguments})


def every_pair(*axes) -> list[tuple]:
    """Cases of a test in which each value of an axis meets each value of any other axis; the whole product has more."""

    def pairs(case):
        return {*combinations(enumerate(case), 2)}

    cases = [*product(*(range(len(axis)) for axis in axes))]
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(axis[i] for axis, i in zip(axes, case, strict=True)) for case in chosen]


def elsewhere() -> torch.device:
    """A context in which the default device is not that of the module, as in `configure_model` on a GPU.

    Tensors that are made in it without a device have no data, so any use of them fails.
    """
    return torch.device("meta")


class PackageElsewhere:
    """`elsewhere()` for the code of this package alone, for use around a Trainer, a DataLoader or `from_pretrained`.

    These fail themselves under `torch.device("meta")`. Here a tensor without a device is made on the meta device if the
    first caller outside of torch is a file of the package: a torch module or optimizer that it runs counts as its own.

    Attributes:
        asked: The calls without a device, as "file:line"; all of them that should have one.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._constructors = {f.__name__: f for f in _device_constructors() if vars(torch).get(f.__name__) is f}

    def __enter__(self):
        vars(torch).update({name: self._asked_of(function) for name, function in self._constructors.items()})
        return self

    def __exit__(self, *_):
        vars(torch).update(self._constructors)

    def _asked_of(self, function):
        @wraps(function)
        def construct(*args, **kwargs):
            if kwargs.get("device") is None:
                frame = sys._getframe(1)
                while frame.f_back and frame.f_code.co_filename.startswith(FILES_OF_TORCH):
                    frame = frame.f_back
                if frame.f_code.co_filename.startswith(FILES_OF_PACKAGE):
                    self.asked.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                    kwargs = {**kwargs, "device": "meta"}
            return function(*args, **kwargs)

        return construct


def run_python(*arguments, folder=ROOT, **environment) -> subprocess.CompletedProcess:
    """Run Python with the package in a process of its own; its exit code must be 0."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-5000:]}"
    return done


def launch(script: str, folder: Path, *arguments: object, devices: int = 2) -> tuple[str, list]:
    """Run a script whose Trainer starts its ranks itself: what it prints, and what each rank saved in the folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_", "MASTER_", "NODE_"))}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
        "MASTER_PORT": str(next(PORTS)),
    }
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        outputs = [stdout.fileno(), stderr.fileno()]
        code = forks.run(script, [str(folder), *map(str, arguments)], str(ROOT), environment, outputs)
        for file in (stdout, stderr):
            file.seek(0)
        texts = stdout.read(), stderr.read()
    saved = [folder / f"rank{rank}.pt" for rank in range(devices)]
    assert code == 0 and all(path.exists() for path in saved), f"{code}: {texts[1][-5000:]}"
    return texts[0], [torch.load(path, weights_only=False) for path in saved]


def run_rank(main: Callable[..., object], ranks: int = 1) -> None:
    """Call `main` with the arguments of the script, and end this rank without the end of the interpreter.

    With `ranks` this process is rank 0 and forks the others, with the variables that torchrun sets: an import of torch,
    Lightning and transformers takes 8 s, and they share it.

    A thread of gloo may still hold the tensors of the last collective, and the process crashes if the interpreter is
    gone when they are freed (pytorch pull request 179291). destroy_process_group does not wait for the threads of a
    group that a module or a cache of torch refers to.
    """
    others = []
    if ranks > 1:
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(TORCHRUN | sizes | {"RANK": "0", "LOCAL_RANK": "0"})
    for rank in range(1, ranks):
        child = os.fork()
        if child == 0:
            others.clear()
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            break
        others.append(child)
    code = 0
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    for child in others:
        code = code or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        forks.start()


def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    """What was imported stays until the end: no collection of garbage goes through it again."""
    gc.freeze()
    gc.enable()


@contextmanager
def raises_in_one_line(kinds, match):
    """As pytest.raises, of an error whose text is one line."""
    with pytest.raises(kinds, match=match) as raised:
        yield raised
    assert "\n" not in str(raised.value)


@contextmanager
def raises_before_teardown(kinds, match):
    """As pytest.raises. After it, Lightning's teardown may fail too: it can't move tensors on the meta device."""
    with pytest.raises((*(kinds if isinstance(kinds, tuple) else (kinds,)), NotImplementedError)) as raised:
        yield
    error = raised.value
    if isinstance(error, NotImplementedError):
        assert "Cannot copy out of meta tensor" in str(error)
        error = error.__context__
    assert isinstance(error, kinds)
    assert re.search(match, str(error))


@pytest.fixture
def trainer(tmp_path):
    """Makes a Trainer for one CPU device that writes under the test's own folder."""
    return lambda **arguments: make_trainer(tmp_path, **arguments)


@pytest.fixture
def fit(trainer):
    """Trains a module with adapters of rank 4; returns the Trainer, which has the other arguments."""

    def run(module, data=None, **arguments):
        used = trainer(**{"plugins": QLoRAPrecision(r=4), **arguments})
        used.fit(module, data)
        return used

    return run


@pytest.fixture
def slow():
    """As on a processor without fast 16-bit products."""
    with products.stated(products.SLOW):
        yield


@pytest.fixture(params=[False, True], ids=["slow", "fast"])
def fast(request):
    """On each kind of processor: whether 16-bit products are fast."""
    with products.stated(products.FAST if request.param else products.SLOW):
        yield request.param


@pytest.fixture
def one_rank(monkeypatch):
    """Restores the environment, and destroys the process group that the strategies make.

    Its port is not one that the system gives to other processes, which may take it between Lightning's search and use.
    """
    monkeypatch.setattr(os, "environ", os.environ | {"MASTER_PORT": str(next(PORTS))})
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def set_threads():
    """Sets the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
