"""A config.json of someone else asks nobody: not the user, not the hub, and no other folder."""

import builtins
import json
import socket
from contextlib import suppress
from importlib import import_module

import pytest

from lightning_qlora import estimate_memory, save_adapter
from lightning_qlora.huggingface.model_config import read_model_config
from lightning_qlora.huggingface.model_folder import ModelFolder
from lightning_qlora.huggingface.patches import offline
from lightning_qlora.tools.cli import main
from tests.conftest import raises_in_one_line
from tests.toys import converted, toy

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of a model whose config.json has other values."""

    def save(changes=None, weights=False):
        place = tmp_path / "model"
        model = toy("llama")
        (model if weights else model.config).save_pretrained(place)
        path = place / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {})))
        return place

    return save


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What is asked of the user and of the hub."""
    calls = []
    monkeypatch.setattr(builtins, "input", lambda text="": calls.append(text) or "y")
    kernels = import_module("transformers.integrations.hub_kernels")
    for module in (kernels, import_module("transformers.modeling_utils")):
        monkeypatch.setattr(module, "is_kernels_available", lambda *_, **__: True, raising=False)
    monkeypatch.setattr(kernels, "get_kernel", lambda *names, **_: calls.append(names), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: calls.append(host) or 1 / 0)
    return calls


def with_code(place, name):
    mark = place / "ran"
    (place / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass {name}: pass\n")
    return mark


@pytest.mark.parametrize(
    ("auto", "name"), [("Config", "code.Thing"), ("Model", "code.Thing"), ("Config", "o/r--code.Thing")]
)
def test_code_of_a_folder_does_not_run_and_nobody_is_asked(auto, name, folder, asked, tmp_path, capsys):
    code = {f"Auto{auto}": name}
    place = folder({"model_type": "nobody_knows", "architectures": ["Thing"], "auto_map": code}, weights=True)
    mark = with_code(place, "Thing")
    with raises_in_one_line((ValueError, FileNotFoundError), str(place)):
        estimate_memory(str(place))
    assert ModelFolder.open(place).model is None
    save_adapter(converted("llama"), tmp_path / "adapter")
    merge = ["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), f"--base_model={place}"]
    for command in (["plan", str(place)], merge):
        with pytest.raises(SystemExit):
            main(command)
        assert "trust_remote_code" in capsys.readouterr().err or auto == "Model"
    assert not asked and not mark.exists()


@pytest.mark.parametrize("type_of_model", ["llama", "clip_vision_model"])
def test_an_auto_class_is_not_asked_for_code(type_of_model, folder, asked):
    """Of a model that transformers has: `from_config` asks too, if the config names code for its class."""
    place = folder({"model_type": type_of_model, "architectures": ["Unknown"]})
    config = json.loads((place / "config.json").read_text())
    classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    (place / "config.json").write_text(json.dumps(config | {"auto_map": dict.fromkeys(classes, "code.Thing")}))
    mark = with_code(place, "Thing")
    estimate_memory(str(place), sequence_length=8, r=4)
    assert not asked and not mark.exists()


REFUSED = {
    "attn_implementation": [
        "stranger/kernel",
        "stranger/kernel@main:x",
        "paged|a/b",
        {"": "sdpa", "text_config": "a/b"},
    ],
    "_attn_implementation": ["stranger/kernel"],
    "_attn_implementation_internal": ["stranger/kernel"],
    "experts_implementation": ["stranger/kernel"],
    "backbone": ["stranger/model", "hf-hub:stranger/model", "local-dir:/x"],
    "architecture": ["hf_hub:stranger/model"],
    "checkpoint_path": ["/x.pth", "x.pth"],
    "transformers_weights": ["../x.safetensors", "/x.safetensors", "a\\x.safetensors", 3],
    "configuration_files": [["../config.4.0.0.json"], ["a/config.4.0.0.json"]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_values_that_name_something_elsewhere_are_refused_by_name(name, value, folder, asked):
    inner = {} if name in ("transformers_weights", "configuration_files") else {"vision_config": [{"a": {name: value}}]}
    for changes in filter(None, ({name: value}, inner)):
        with raises_in_one_line(ValueError, name):
            read_model_config(folder(changes))
    with raises_in_one_line(ValueError, name):
        estimate_memory(str(folder({name: value})))
    assert not asked


def test_usual_values_stay(folder, asked):
    changes = {"attn_implementation": "eager", "backbone": "resnet50", "use_pretrained_backbone": True}
    config = read_model_config(folder(changes))
    assert config.hidden_size == toy("llama").config.hidden_size
    assert not getattr(config, "use_pretrained_backbone", False)  # the weights are those of the folder
    assert estimate_memory(
        str(folder({"architectures": None, "transformers_weights": "model.safetensors"})), sequence_length=8, r=4
    ).total
    assert not asked


def test_an_index_that_transformers_weights_names_is_checked(folder):
    place = folder({"transformers_weights": "other.safetensors.index.json"})
    index = place / "other.safetensors.index.json"
    for name in ("../x.safetensors", "/x.safetensors"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with raises_in_one_line(ValueError, "not a file of this folder"):
            read_model_config(place)
    (place / "x.safetensors").symlink_to("/etc/hostname")
    index.write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))
    with raises_in_one_line(ValueError, "symbolic link"):
        read_model_config(place)


def test_an_adapter_in_a_base_folder_is_refused(folder):
    place = folder()
    (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "stranger/model"}))
    with raises_in_one_line(ValueError, "has an adapter_config.json"):
        read_model_config(place)


def test_the_hub_is_not_asked_within(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)

    def ask():
        with suppress(Exception):  # of any type: there is no network
            hub.HfApi().model_info("stranger/model")
        with suppress(Exception):
            hub.hf_hub_download("stranger/model", "config.json", cache_dir=tmp_path)
        return len(asked)

    for _ in range(2):
        with offline():
            assert ask() == 0
    assert hub.constants.HF_HUB_OFFLINE is False
    with offline(trust_remote_code=True):  # whose code may need it
        assert ask() > 0


def test_a_config_given_by_the_user_is_used_as_it_is():
    config = toy("llama").config
    assert estimate_memory(config, sequence_length=8, r=4).total
