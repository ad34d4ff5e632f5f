import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from lightning_qlora import QLoRAPrecision
from lightning_qlora.config import QLoRAConfig

WRONG_VALUES = {
    "quant_type": ["nf5", "NF4", "", None],
    "block_size": [0, 31, 48, 8192, -64],
    "compute_dtype": ["bfloat16", "float32", "half"],
    "r": [0, -4],
    "lora_alpha": [0, -1.0, float("nan"), float("inf")],
    "lora_dropout": [-0.1, 1.0, 1.5, float("nan")],
    "target_modules": ["", [], "*proj("],
    "exclude_modules": ["(("],
    "init_lora_weights": ["kaiming", "LoftQ"],
    "checkpoint": ["both", "lora"],
    "adapter": ["no/such/folder"],
    "paged_optimizer": ["on", "never"],
}
WRONG_TYPES = {
    "block_size": ["64", 64.0, True],
    "double_quant": [1, "yes", None],
    "r": [4.0, "16", True, None],
    "lora_alpha": ["16", None, True],
    "lora_dropout": ["0.1", None],
    "target_modules": [None, 3, ["q_proj", 3], ["q_proj", ""]],
    "exclude_modules": [3, [None]],
    "modules_to_save": ["lm_head", [1], 5],
    "use_rslora": [1, "true"],
    "use_dora": [0],
    "gradient_checkpointing": ["yes"],
    "adapter": [7],
    "paged_optimizer": [3, None],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG_VALUES.items() for v in values])
def test_a_wrong_value_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=rf"{name}=") as caught:
        QLoRAPrecision(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG_TYPES.items() for v in values])
def test_a_wrong_type_is_named_with_what_is_allowed(name, value):
    if name in ("exclude_modules", "modules_to_save") and value is None:
        pytest.skip("None means the default there")
    with pytest.raises(TypeError, match=rf"{name}=") as caught:
        QLoRAPrecision(**{name: value})
    assert repr(value) in str(caught.value)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="rank"):
        QLoRAPrecision(rank=4)


def test_every_argument_alone_is_accepted_in_its_plain_form():
    good = {
        "quant_type": ["nf4", "fp4", "int4"],
        "block_size": [32, 4096],
        "compute_dtype": ["auto", "bf16", "fp16", "fp32"],
        "lora_alpha": [1, 0.5],
        "lora_dropout": [0, 0.0, 0.999],
        "target_modules": ["all-linear", r".*\.q_proj", ["q_proj"]],
        "exclude_modules": ["head", ["head"], []],
        "paged_optimizer": ["auto", True, False],
    }
    for name, values in good.items():
        for value in values:
            assert getattr(QLoRAPrecision(**{name: value}).config, name) == value


def test_the_plugin_takes_exactly_the_config_with_the_same_defaults():
    signature = inspect.signature(QLoRAPrecision.__init__).parameters
    fields = {field.name for field in dataclasses.fields(QLoRAConfig)}
    assert set(signature) - {"self"} == fields
    assert QLoRAPrecision().config == QLoRAConfig()


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert QLoRAConfig(r=16, lora_alpha=8).scaling == 0.5
    assert QLoRAConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


def test_the_page_of_arguments_says_what_the_plugin_takes():
    page = (Path(__file__).parents[1] / "docs" / "arguments.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", page, re.MULTILINE)
    parameters = inspect.signature(QLoRAPrecision).parameters
    assert rows == [(name, repr(parameter.default)) for name, parameter in parameters.items()]
