"""Broken adapter folders: each is refused in one line that names the file, in Python and on the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora import CheckpointMismatchError, convert, load_adapter, save_adapter
from lightning_qlora.adapters.adapter import MAGNITUDE, PREFIX
from lightning_qlora.adapters.peft_folder import BASE
from lightning_qlora.checks import DAMAGED, DIVERGED
from lightning_qlora.layers.trainable_tokens import DELTA
from lightning_qlora.tools.cli import main
from tests.conftest import Classifier

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MERGE = "Merge it in PEFT"
KEY = f"{PREFIX}0.lora_A.weight"
DORA = f"{PREFIX}0.{MAGNITUDE}"
NAN = float("nan")

CONFIGS = [  # entries, or bytes of the file; words of the error
    (b"\xff\xfe{}", ["not valid JSON", DAMAGED]),
    (b"[" * 100_000, ["not valid JSON", DAMAGED]),
    (b'{"a":' * 100_000, ["not valid JSON", DAMAGED]),
    (b"null", ["contains None, not an object", DAMAGED]),
    (b'{"r": 4}', ["peft_type='': must be one of 'LORA'"]),
    ({"peft_type": "IA3"}, ["peft_type='IA3': must be one of 'LORA'"]),
    ({"bias": "all"}, ["bias='all': ", MERGE]),
    ({"bias": ""}, ["bias='': ", MERGE]),
    ({"use_qalora": True}, ["use_qalora=True: ", MERGE]),
    ({"use_qalora": "none"}, ["use_qalora='none': ", MERGE]),
    ({"rank_pattern": "x"}, ["rank_pattern='x': must be a dict whose keys are non-empty strings"]),
    ({"alpha_pattern": [1]}, ["alpha_pattern=[1]: must be a dict whose keys are non-empty strings"]),
    ({"alpha_pattern": {"(": 3}}, ["alpha_pattern='(': not a valid regular expression"]),
    ({"alpha_pattern": {"0": -1}}, ["alpha_pattern['0']=-1: must be"]),
    ({"lora_alpha": None}, ["lora_alpha=None: must be a number"]),
    ({"lora_alpha": 1e308}, ["lora_alpha=1e+308: must be", "< 1e+30"]),
    ({"lora_dropout": "x"}, ["lora_dropout='x': must be a number"]),
    ({"modules_to_save": "lm_head"}, ["modules_to_save='lm_head': must be a list of non-empty names"]),
    ({"target_modules": 5}, ["target_modules=5: must be a list of non-empty names, or a regular expression"]),
    ({"target_modules": [3]}, ["target_modules=[3]: must be a list of non-empty names, or a regular expression"]),
    ({"use_rslora": "maybe"}, ["use_rslora='maybe': must be True or False"]),
    ({"base_model_name_or_path": 5}, ["base_model_name_or_path=5: must be a string"]),
    *(
        ({"init_lora_weights": method}, [f"init_lora_weights='{method}': PEFT changed the base weights"])
        for method in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")
    ),
]
FILES = [  # entries of the config, tensors (None: without it), words of the error
    ({"r": 8}, {}, [f"key '{KEY}': the file has rank=4 there, and {CONFIG} has 8. They are not of one adapter"]),
    ({"use_dora": True}, {}, [f"key '{KEY}': the file has use_dora=False there, and {CONFIG} has True"]),
    ({"trainable_token_indices": [1]}, {}, ["has no rows for trainable_token_indices, [1] in", DAMAGED]),
    *(
        (
            {"trainable_token_indices": indices},
            {f"{PREFIX}2.{DELTA}": torch.ones(2, 64)},
            [f"2.{DELTA}' has", "each index"],
        )
        for indices in (None, [3], {"other": [3, 7]})
    ),
    ({}, {KEY: None}, [f"key '{KEY}': the file has lora_B [64, 4] of torch.float32: a layer has lora_A", DAMAGED]),
    ({}, {KEY: torch.ones(9, 64)}, [f"key '{KEY}'", "lora_A [9, 64]", "lora_B [64, 4]", DAMAGED]),
    ({}, {KEY: torch.ones(0, 64)}, [f"key '{KEY}'", "lora_A [0, 64]", "of rank 1 or more"]),
    ({}, {KEY: torch.ones(1, 4, 64)}, [f"key '{KEY}'", "lora_A [1, 4, 64]"]),
    ({}, {KEY: torch.ones(4, 64, dtype=torch.int64)}, [KEY, "lora_A [4, 64] of torch.int64", "all are float16"]),
    ({}, {KEY: torch.full((4, 64), float("inf"))}, [f"key '{KEY}': lora_A holds NaN or Inf. {DIVERGED}"]),
    ({}, {KEY: torch.full((4, 64), 1e300, dtype=torch.float64)}, [f"key '{KEY}': lora_A holds NaN or Inf."]),
    ({}, {DORA: torch.ones(3)}, [f"key '{KEY}'", f"{MAGNITUDE} [3]", f"with DoRA {MAGNITUDE} [out]"]),
    ({}, {KEY.replace("weight", "default.weight"): torch.ones(4, 64)}, ["the file has a second lora_A of 0.", DAMAGED]),
    ({}, {"other": torch.ones(4)}, [f"key 'other' does not begin with '{PREFIX}', so PEFT would not read it either."]),
    ({}, {f"{PREFIX}x": torch.ones(4)}, [f"key '{PREFIX}x' is in no module, and modules_to_save names modules."]),
    ({}, {f"{PREFIX}2.weight": torch.full((64,), NAN)}, [f"key '{PREFIX}2.weight' holds NaN. {DIVERGED}"]),
    ({}, {f"{PREFIX}2.weight": torch.ones(64, dtype=torch.complex64)}, ["2.weight' is torch.complex64, and must be"]),
    ({}, None, ["holds no lora_A and lora_B", DAMAGED]),
]
METADATA = [  # the text of our entry
    ("[", ["not valid JSON", DAMAGED]),
    ("[]", ["contains [], not an object", DAMAGED]),
    ('{"experts": 3}', ["'experts': 3", DAMAGED]),
    ('{"quantization": {}}', ["quant_type", DAMAGED]),
]
OTHER_MODULES = [  # that fit no Classifier, but may be an adapter of another module
    (
        {"use_dora": True},
        {DORA: torch.ones(64), DORA.replace(".0.", ".4."): torch.ones(8)},
        [f"key '{KEY}'", "has use_dora=False there, and the adapter use_dora=True"],
    ),
    ({}, {f"{PREFIX}2.scale": torch.ones(64)}, ["2.scale", "has no such parameter"]),
    ({}, {f"{PREFIX}2.weight": torch.ones(3)}, ["2.weight", "has shape [64] there, the adapter [3]"]),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    module = Classifier()
    convert(module, r=4)
    save_adapter(module, folder := tmp_path_factory.mktemp("adapter"))
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


@pytest.fixture
def refused(whole, tmp_path, capsys):
    """Asserts that a folder without our metadata, as PEFT writes it, with these changes is refused with these words."""
    config, weights = whole
    module = Classifier()
    convert(module, r=4)

    def assert_refused(file, words, entries=(), tensors=(), metadata=(), shown=True):
        content = entries if isinstance(entries, bytes) else json.dumps({**config, **dict(entries)}).encode()
        (tmp_path / CONFIG).write_bytes(content)
        changed = {key: value for key, value in {**weights, **dict(tensors or {})}.items() if value is not None}
        if tensors is None:
            changed = {}
        save_file(changed, tmp_path / WEIGHTS, metadata={"format": "pt", **dict(metadata)})
        with pytest.raises((ValueError, CheckpointMismatchError)) as error:
            load_adapter(module, tmp_path)
        text = str(error.value)
        assert text.startswith(f"{tmp_path / file}: ") and "\n" not in text
        assert all(word in text for word in words), text
        if shown:
            with pytest.raises(SystemExit):
                main(["inspect", str(tmp_path)])
            assert capsys.readouterr().err == f"lightning-qlora: error: {text}\n"

    return assert_refused


def test_wrong_entries_of_the_config(refused):
    for entries, words in CONFIGS:
        refused(CONFIG, words, entries)


def test_wrong_tensors(refused):
    for entries, tensors, words in FILES:
        refused(WEIGHTS, words, entries, tensors)


def test_wrong_metadata(refused):
    for text, words in METADATA:
        refused(WEIGHTS, [f"its metadata {BASE!r}", *words], metadata={BASE: text})


def test_adapters_of_other_modules(refused):
    for entries, tensors, words in OTHER_MODULES:
        refused(WEIGHTS, words, entries, tensors, shown=False)


def test_missing_files(whole, tmp_path):
    module = Classifier()
    convert(module, r=4)
    for file, message in ((WEIGHTS, "not a safetensors file"), (WEIGHTS, "no such file"), (CONFIG, "no such file")):
        (tmp_path / CONFIG).write_text(json.dumps(whole[0]))
        (tmp_path / WEIGHTS).write_bytes(b"x" * 99)
        if message == "no such file":
            (tmp_path / file).unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{file}: {message}"):
            load_adapter(module, tmp_path)
