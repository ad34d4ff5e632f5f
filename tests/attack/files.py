"""Attacks on files: kills, and disks that are full.

Each function makes some number of attempts with a seed and returns what it counted. It raises AssertionError if
anything was lost, mixed, or wrong without an error.
"""

import os
import random
import resource
import shutil
import signal
import warnings
from collections import Counter

import torch

from lightning_qlora import QLoRAPrecision
from lightning_qlora.adapters.peft_config import CONFIG_FILE
from lightning_qlora.adapters.peft_folder import read_adapter, write_adapter
from lightning_qlora.files.folder_writer import INCOMPLETE
from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from tests.adapters.test_peft_folder import adapter, content
from tests.attack.processes import exit_at_line, kill_later, lines_of, run
from tests.conftest import Classifier, ResumableLoader, make_trainer

STEPS = 6


def train(folder, checkpoint=None):
    """Train with dropout; a checkpoint after every step."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.manual_seed(0)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(folder, plugins=QLoRAPrecision(r=4, lora_dropout=0.1), max_steps=STEPS, callbacks=[saving])
    module = Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, ResumableLoader(), ckpt_path=checkpoint)
    return module


def kills_in_training(seed, count, folder):
    """A run is killed at a random moment: its checkpoints are whole, and resuming the last one is bit-equal."""
    draw = random.Random(seed)
    found = Counter()
    expected = train(folder / "whole").state_dict()

    def resume(place):
        whole = sorted(place.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
        for path in whole:
            read_checkpoint(path)
        made = train(place, str(whole[-1])).state_dict()
        assert made.keys() == expected.keys()
        assert all(torch.equal(value, made[key]) for key, value in expected.items())

    while found["killed"] < count:
        number = found["started"]
        place = folder / str(number)
        place.mkdir()
        steps = draw.randrange(1, STEPS)  # that are saved before the kill
        found["started"] += 1
        found["killed"] += kill_later(
            lambda place=place: train(place),
            lambda place=place, steps=steps: len(list(place.glob("*.ckpt"))) >= steps,
            draw.uniform(0, 1 / steps),
        )
        if list(place.glob("*.ckpt")):
            assert run(lambda place=place: resume(place)) == 0, f"seed {seed}, attempt {number}"
            found["resumed, bit-equal"] += 1
        shutil.rmtree(place)
    return found


def number_of(place):
    """The number of the adapter in a folder, which must be whole."""
    return [content(adapter(number)) for number in (1, 2)].index(content(read_adapter(place))) + 1


def kills_in_saving(seed, count, folder):
    """A process ends at a random line of `save_adapter` over an older folder: one of the two is there, or no config."""
    draw = random.Random(seed)
    found = Counter()
    place = folder / "adapter"
    write_adapter(adapter(1), place)
    most = lines_of(lambda: write_adapter(adapter(2), place))
    for number in range(count):
        before = 1 + number % 2
        write_adapter(adapter(before), place)
        line = draw.choice([draw.randrange(most), most - 1 - draw.randrange(150)])  # the files are renamed at the end
        found["killed"] += exit_at_line(lambda new=3 - before: write_adapter(adapter(new), place), line)
        if not (place / CONFIG_FILE).exists():
            found["no config"] += 1
        else:
            now = number_of(place)
            found["old adapter" if now == before else "new adapter"] += 1
        for left in place.glob(f"{INCOMPLETE}*"):
            shutil.rmtree(left)
    return found


def full_disks(seed, count, folder):
    """No file may become larger than a random size: the old adapter stays, and nothing else is left."""
    draw = random.Random(seed)
    found = Counter()
    place = folder / "adapter"
    write_adapter(adapter(1), place)
    size = max(path.stat().st_size for path in place.iterdir())

    def limited(most):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        try:
            write_adapter(adapter(2), place)
        except OSError as error:
            os._exit(5 if str(place) in str(error) and "\n" not in str(error) else 6)

    for _ in range(count):
        write_adapter(adapter(1), place)
        most = draw.choice([draw.randrange(size), 2 * size])
        code = run(lambda most=most: limited(most))
        assert code in (0, 5), code
        found["refused" if code else "written"] += 1
        assert number_of(place) == (1 if code else 2)
        assert sorted(path.name for path in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return found
