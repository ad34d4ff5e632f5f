"""Scripts of other projects, with the plugin in place of `precision`: each trains, or is refused with the reason.

`LIGHTNING_EXAMPLES` is the folder `examples` of Lightning's repository.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_qlora import convert, merge

pytestmark = pytest.mark.third_party

LIGHTNING = {
    "fabric/image_classifier/train_fabric.py": ["--dry-run", "--save-model"],
    "fabric/kfold_cv/train_fabric.py": ["--dry-run", "--folds", "2"],
    "fabric/language_model/train.py": [],
    "fabric/reinforcement_learning/train_fabric.py": ["--total-timesteps=256", "--num-envs=1", "--num-steps=64"],
    "pytorch/basics/autoencoder.py": [],
    "pytorch/basics/backbone_image_classifier.py": [],
    "pytorch/basics/transformer.py": [],
    "pytorch/domain_templates/generative_adversarial_net.py": [],
}
REFUSED = {
    "fabric/dcgan/train_fabric.py": "The module has no linear layer",
    "finetune_lora": "is litgpt's LoRAQKVLinear, a layer that contains another library's adapter",
    "finetune_adapter": "is litgpt's CausalSelfAttention, a layer that contains another library's adapter",
    "finetune_adapter_v2": "is litgpt's AdapterV2Linear, a layer that contains another library's adapter",
}


def run(folder, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", "tests.third_party.run_script", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def check(done, name):
    if name in REFUSED:
        assert done.returncode and REFUSED[name] in done.stderr, done.stderr[-3000:]
        return
    assert done.returncode == 0, done.stderr[-3000:]
    layers = json.loads(done.stdout.splitlines()[-1])
    assert layers["converted"] and layers["trained"] == layers["converted"]


@pytest.mark.parametrize("name", [*LIGHTNING, "fabric/dcgan/train_fabric.py"])
def test_examples_of_lightning(tmp_path, name):
    if not os.environ.get("LIGHTNING_EXAMPLES"):
        pytest.skip("set LIGHTNING_EXAMPLES to the folder `examples` of Lightning's repository")
    pytest.importorskip("gymnasium")
    check(run(tmp_path, Path(os.environ["LIGHTNING_EXAMPLES"], name).resolve(), *LIGHTNING.get(name, [])), name)


@pytest.mark.parametrize("name", ["finetune_full", "finetune_lora", "finetune_adapter", "finetune_adapter_v2"])
def test_fine_tuning_of_litgpt(tmp_path, name):
    pytest.importorskip("litgpt")
    from tests.third_party.litgpt_model import make

    model = tmp_path / "model"
    make(model)
    arguments = {
        "data": "JSON",
        "data.json_path": model / "data.json",
        "data.val_split_fraction": 0.25,
        "train.epochs": 1,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 1,
        "train.max_seq_length": 32,
        "eval.max_new_tokens": 2,
        "out_dir": tmp_path / "out",
    }
    check(run(tmp_path, "litgpt", name, model, *(f"--{key}={value}" for key, value in arguments.items())), name)
    if name == "finetune_full":
        from litgpt import GPT, Config

        trained = torch.load(tmp_path / "out/final/lit_model.pth")["model"]
        base = torch.load(model / "lit_model.pth")
        network = GPT(Config.from_file(model / "model_config.yaml"))
        network.load_state_dict(base)
        convert(network, r=4)
        network.load_state_dict(trained)
        merged = merge(network).state_dict()
        assert {key for key in base if not torch.equal(base[key], merged[key])} == {
            f"transformer.h.{block}.{layer}.weight"
            for block in range(3)
            for layer in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")
        }
        assert merged.keys() == base.keys()
