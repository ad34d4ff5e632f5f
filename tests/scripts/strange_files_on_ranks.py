"""Run by test_restore on two ranks: what each rank says to checkpoints that somebody changed, and that it resumes."""

import os
import pickle
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo

from lightning_qlora import QLoRAPrecision
from tests.conftest import Classifier, loader, make_trainer, run_rank
from tests.scripts.fsdp_training import Sharded, adapters, make_sharding_trainer

PLAIN = {"r": 4, "lora_dropout": 0.0}


class Code:
    """Makes a file where the checkpoint is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def fit(strategy, root, epochs, checkpoint=None):
    if strategy == "fsdp":
        module = Sharded()
        trainer = make_sharding_trainer(root, 2, False, {}, max_epochs=epochs)
    else:
        module = Classifier()
        arguments = {"strategy": "ddp", "devices": 2, "enable_checkpointing": False, "max_epochs": epochs}
        trainer = make_trainer(root, plugins=QLoRAPrecision(**PLAIN), **arguments)
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return trainer, module


def code_in_the_index(folder, mark):
    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(index[:2] + pickle.dumps(Code(mark), protocol=2)[2:-1] + b"0" + index[2:])


def an_attribute_of_a_class(folder, mark):
    index = pickle.loads((folder / ".metadata").read_bytes())
    gadget = b"cpathlib\nPurePath\nN}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xs\x86b0"
    content = pickle.dumps(index, protocol=2)
    (folder / ".metadata").write_bytes(content[:2] + gadget + content[2:])


def _replace(folder, kind, value):
    index = pickle.loads((folder / ".metadata").read_bytes())
    kinds = index.state_dict_metadata
    keys = [key for key in index.storage_data if type(kinds[key.fqn]).__name__ == kind]
    key = max(keys, key=lambda key: (index.storage_data[key].relative_path, key.fqn))  # of the last rank
    if kind == "TensorStorageMetadata":
        place = index.storage_data[key]
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            tensor = torch.load(file, weights_only=True)
        value = tensor.to(value)
    torch.save(value, folder / "other.distcp")
    index.storage_data[key] = _StorageInfo("other.distcp", 0, (folder / "other.distcp").stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def code_in_a_value(folder, mark):
    _replace(folder, "BytesStorageMetadata", Code(mark))


def another_type_in_the_shard_of_one_rank(folder, mark):
    _replace(folder, "TensorStorageMetadata", torch.float64)


def code_in_meta(folder, mark):
    content = torch.load(folder / "meta.pt", weights_only=False)
    torch.save(content | {"hyper_parameters": {"x": Code(mark)}}, folder / "meta.pt")


def code_in_a_file(path, mark):
    content = torch.load(path, weights_only=False)
    torch.save(content | {"hyper_parameters": {"x": Code(mark)}}, path)


CHANGES = {
    "fsdp": (
        code_in_the_index,
        an_attribute_of_a_class,
        code_in_a_value,
        another_type_in_the_shard_of_one_rank,
        code_in_meta,
    ),
    "ddp": (code_in_a_file,),
}


def main(root, strategy):
    root = Path(root)
    trainer, straight = fit(strategy, root, 2)
    rank = trainer.global_rank
    good = root / "good.ckpt"
    fit(strategy, root, 1)[0].save_checkpoint(good)
    errors = {}
    for change in CHANGES[strategy]:
        path = root / f"{change.__name__}.ckpt"
        mark = root / f"{change.__name__} ran"
        dist.barrier()
        if rank == 0:
            (shutil.copytree if good.is_dir() else shutil.copy)(good, path)
            change(path, mark)
        dist.barrier()
        try:
            fit(strategy, root, 2, str(path))
            errors[change.__name__] = "resumed"
        except (ValueError, pickle.UnpicklingError) as error:
            errors[change.__name__] = str(error)
        dist.barrier()
        assert not mark.exists(), change
    _, resumed = fit(strategy, root, 2, str(good))
    result = {"straight": adapters(straight), "resumed": adapters(resumed), "errors": errors}
    torch.save(result, root / f"rank{rank}.pt")


if __name__ == "__main__":
    run_rank(main, ranks=2)
