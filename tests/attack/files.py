"""Attacks on files: kills, two writers, disks that are full, changed bits and truncations.

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
from pathlib import Path

import torch

from lightning_qlora import QLoRAPrecision, convert, load_adapter, load_from_checkpoint, save_adapter
from lightning_qlora.adapters import peft_reader
from lightning_qlora.adapters.peft_files import write_adapter
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from tests.adapters.test_peft_metadata import adapter, number_of
from tests.attack.processes import ended, exit_at_line, flipped, kill_later, lines_of, run, start
from tests.conftest import Classifier, ResumableLoader, make_trainer, save_shards
from tests.toys import perturb

STEPS = 6
INTERRUPTED = "ignore:.*is missing, as after a save that was interrupted"


def train(folder: Path, checkpoint: str | None = None) -> Classifier:
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


def kills_in_training(seed: int, count: int, folder: Path) -> Counter[str]:
    """A run is killed at a random moment: its checkpoints are whole, and resuming the last one is bit-equal."""
    draw, found = random.Random(seed), Counter[str]()
    expected = train(folder / "whole").state_dict()

    def resume(place: Path) -> None:
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


def kills_in_saving(seed: int, count: int, folder: Path) -> Counter[str]:
    """A process ends at a random line of `save_adapter` over an older folder: one of the two adapters is there."""
    draw, found, place = random.Random(seed), Counter[str](), folder / "adapter"
    write_adapter(adapter(1), place)
    most = lines_of(lambda: write_adapter(adapter(2), place))
    for number in range(count):
        before = 1 + number % 2
        write_adapter(adapter(before), place)
        line = draw.choice([draw.randrange(most), most - 1 - draw.randrange(150)])  # the files are renamed at the end
        found["killed"] += exit_at_line(lambda new=3 - before: write_adapter(adapter(new), place), line)
        with warnings.catch_warnings():
            warnings.filterwarnings(*INTERRUPTED.split(":"))
            now = number_of(read_adapter(place))
        found["old adapter" if now == before else "new adapter"] += 1
    write_adapter(adapter(1), place)
    assert sorted(path.name for path in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return found


def reads_beside_two_writers(seed: int, count: int, folder: Path) -> Counter[str]:
    """Two processes save different adapters into one folder without a pause; no read gets parts of both."""
    found = Counter[str](torn=0)
    write_adapter(adapter(1), folder / "adapter")

    def write(number: int) -> None:
        while True:
            write_adapter(adapter(number), folder / "adapter")

    writers = [start(lambda number=number: write(number)) for number in (1, 2)]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(*INTERRUPTED.split(":"))  # a writer that waits for a processor between two steps
            for _ in range(count):
                found[f"of writer {number_of(read_adapter(folder / 'adapter'))}"] += 1
    finally:
        for pid in writers:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
    return found


def full_disks(seed: int, count: int, folder: Path) -> Counter[str]:
    """No file may become larger than a random size: the old adapter stays, and nothing else is left."""
    draw, found, place = random.Random(seed), Counter[str](), folder / "adapter"
    write_adapter(adapter(1), place)
    size = max(path.stat().st_size for path in place.iterdir())

    def limited(most: int) -> None:
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
        assert number_of(read_adapter(place)) == (1 if code else 2)
        assert sorted(path.name for path in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return found


def damages(seed: int, flips: int, truncations: int, folder: Path) -> Counter[str]:
    """A bit of a file is changed, or its end is missing: loading is refused in one line, or gives the same outputs."""
    draw, found, x = random.Random(seed), Counter[str](unnoticed=0), torch.randn(3, 64)
    peft_reader.PATIENCE, patience = 0.0, peft_reader.PATIENCE
    try:
        return _damages(draw, found, x, flips, truncations, folder, seed)
    finally:
        peft_reader.PATIENCE = patience


def _damages(
    draw: random.Random, found: Counter[str], x: torch.Tensor, flips: int, truncations: int, folder: Path, seed: int
) -> Counter[str]:
    files: list[tuple[Path, object]] = []
    for kind in ("adapter", "full"):
        trainer = make_trainer(folder, plugins=QLoRAPrecision(r=4, lora_dropout=0.0, checkpoint=kind), max_steps=2)
        module = Classifier()
        trainer.fit(module, ResumableLoader())
        trainer.save_checkpoint(folder / f"{kind}.ckpt")
        files.append((folder / f"{kind}.ckpt", lambda path: load_from_checkpoint(Classifier, path)))
    rest = torch.load(folder / "adapter.ckpt", weights_only=True)
    values = {"state_dict": rest.pop("state_dict"), "optimizer_0": rest.pop("optimizer_states")[0]}
    shards = sorted(save_shards(folder / "shards.ckpt", values, rest).iterdir())
    files += [(path, lambda path: load_from_checkpoint(Classifier, path.parent)) for path in shards]
    save_adapter(perturb(module), folder / "folder")

    def from_folder(path: Path) -> Classifier:
        made = Classifier()
        convert(made, r=4, lora_dropout=0.0)
        load_adapter(made, path.parent)
        return made

    files += [(path, from_folder) for path in sorted((folder / "folder").iterdir())]
    for path, load in files:
        good = path.read_bytes()
        expected = load(path).eval()(x)
        for number in range(flips + truncations):
            bad = flipped(good, draw) if number < flips else good[: draw.randrange(len(good))]
            path.write_bytes(bad)
            try:
                same = torch.equal(load(path).eval()(x), expected)
            except (ValueError, FileNotFoundError, CheckpointMismatchError) as error:
                clear = "\n" not in str(error) and str(folder) in str(error)
                found["refused" if clear else f"unclear: {error}"] += 1
                continue
            assert same, f"{path.name}: seed {seed}, attempt {number}"
            found["same outputs"] += 1
        path.write_bytes(good)
    assert found.keys() <= {"refused", "same outputs", "unnoticed"}, f"seed {seed}: {found}"
    return found
