import dataclasses
import inspect
import re
from functools import partial
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from typing_extensions import Unpack

from lightning_qlora import QLoRAPrecision, convert, estimate_memory
from lightning_qlora.arguments import QLoRAArguments
from lightning_qlora.config import ARGUMENTS, QUANT_TYPES, InitLoRAWeights, QLoRAConfig
from lightning_qlora.tools.cli import main

AUTO = "True, False or 'auto'"
NAMES = "a list of non-empty names"
BOOL = "True or False"
ACTIVATIONS = "True, False, 'auto', 'offload', or bytes such as '8GiB'"
STARTS = ", ".join(map(repr, get_args(InitLoRAWeights)))
WRONG_VALUES = {  # argument -> values that are refused, and what is allowed
    "quant_type": (["nf5", "NF4", "", None], "one of " + ", ".join(map(repr, QUANT_TYPES))),
    "block_size": ([0, 31, 48, 8192, -64], "one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    "compute_dtype": (["bfloat16", "float32", "half"], "one of 'auto', 'bf16', 'fp16', 'fp32'"),
    "r": ([0, -4], "an integer >= 1"),
    "lora_alpha": ([0, -1.0, 1e30, float("nan"), float("inf")], "a finite number > 0 and < 1e+30"),
    "lora_dropout": ([-0.1, 1.0, 1.5, float("nan")], "a finite number >= 0 and < 1"),
    "init_lora_weights": (["kaiming", "Gaussian", True, None], f"one of {STARTS}"),
    "checkpoint": (["both", "lora"], "one of 'adapter', 'full'"),
    "paged_optimizer": (["on", "never"], "one of True, False, 'auto'"),
    "deferred_logits": (["on", "False"], "one of True, False, 'auto'"),
    "gradient_checkpointing": (["yes", "8TB", 0, -1, "1kB"], ACTIVATIONS),
}
WRONG_TYPES = {
    "block_size": (["64", 64.0, True], "an integer"),
    "double_quant": ([1, "yes", None], BOOL),
    "r": ([4.0, "16", True, None], "an integer"),
    "lora_alpha": (["16", None, True], "a number"),
    "lora_dropout": (["0.1", None], "a number"),
    "target_modules": ([None, 3, ["q_proj", 3], ["q_proj", ""]], f"{NAMES}, or a regular expression"),
    "exclude_modules": ([3, [None]], f"{NAMES}, or a regular expression"),
    "modules_to_save": (["lm_head", [1], 5], NAMES),
    "use_rslora": ([1, "true"], BOOL),
    "use_dora": ([0], BOOL),
    "gradient_checkpointing": ([None, 1.5, []], ACTIVATIONS),
    "adapter": ([7], "a string"),
    "paged_optimizer": ([3, None], AUTO),
    "deferred_logits": ([1, None], AUTO),
}
REFUSED = [
    (kind, name, value, allowed)
    for kind, table in ((ValueError, WRONG_VALUES), (TypeError, WRONG_TYPES))
    for name, (values, allowed) in table.items()
    for value in values
]


def test_each_argument_refuses_something():
    dicts = {"trainable_token_indices", "rank_pattern", "alpha_pattern"}  # each has its own tests
    assert {*WRONG_TYPES, *WRONG_VALUES, *dicts} == {field.name for field in dataclasses.fields(QLoRAConfig)}


@pytest.mark.parametrize(("kind", "name", "value", "allowed"), REFUSED)
def test_an_error_names_the_argument_its_value_and_what_is_allowed(kind, name, value, allowed):
    with pytest.raises(kind) as caught:
        QLoRAPrecision(**{name: value})
    assert str(caught.value) == f"{name}={value!r}: must be {allowed}."


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("target_modules", "", "selects no layer: use 'all-linear', a regular expression, or a list of name endings"),
        ("target_modules", [], "selects no layer: use 'all-linear', a regular expression, or a list of name endings"),
        ("target_modules", "*proj(", "not a valid regular expression ("),
        ("exclude_modules", "((", "not a valid regular expression ("),
        ("adapter", "no/such/folder", "must be a folder on this machine with PEFT's adapter_config.json and adapter_"),
    ],
)
def test_an_error_of_a_name_says_more(name, value, text):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: {text}" if value else text)):
        QLoRAPrecision(**{name: value})


@pytest.mark.parametrize(
    ("name", "wrong"), [("rank_pattern", [0, 4.0, "4"]), ("alpha_pattern", [0, -1.0, float("inf"), "x", None])]
)
def test_a_wrong_entry_of_a_pattern_is_named(name, wrong):
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\['q_proj'\]={re.escape(repr(value))}: "):
            QLoRAConfig(**{name: {"k_proj": 1, "q_proj": value}})
    with pytest.raises(ValueError, match=rf"^{name}='\(': not a valid regular expression"):
        QLoRAConfig(**{name: {"(": 3}})
    with pytest.raises(TypeError, match=rf"^{name}=\[1\]: must be a dict"):
        QLoRAConfig(**{name: [1]})


@pytest.mark.parametrize("name", ["lora_alpha", "lora_dropout", "alpha_pattern"])
def test_a_number_that_no_checkpoint_could_hold_is_refused_before_training(name):
    """np.float32 is a number, and JSON has none of it: the first checkpoint of a run failed."""
    value = np.float32(0.5)
    arguments = {name: {"0": value} if name == "alpha_pattern" else value}
    with pytest.raises(TypeError, match=rf"^{name}.*=np.float32\(0\.5\): must be an int or a float\. Pass it as float"):
        QLoRAConfig(**arguments)
    QLoRAConfig(lora_alpha=np.float64(16))  # a float


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "loftq", "LoftQ"])
def test_a_start_that_was_taken_out_is_refused_with_its_reason_and_another(value):
    with pytest.raises(
        ValueError, match=rf"^init_lora_weights='{value}': was taken out, because .*Use 'calibrated' or"
    ):
        QLoRAPrecision(init_lora_weights=value)


def test_a_long_value_is_shortened():
    with pytest.raises(ValueError, match=r"quant_type='x{199}\.\.\. \(1002 characters\): must be one of"):
        QLoRAConfig(quant_type="x" * 1000)
    with pytest.raises(ValueError, match="r=int of thousands of digits: must be"):
        QLoRAConfig(r=-(10**5000))


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            {"load_in_4bit": True},
            "load_in_4bit: there is no such argument here; the arguments are .*quant_type, .*",
        ),
        ({"bnb_4bit_quant_type": "nf4"}, r"did you mean quant_type\?$"),
        ({"r": 4, "lora_alfa": 4}, r"lora_alfa: there is no such argument here; did you mean lora_alpha\?$"),
    ],
)
@pytest.mark.parametrize(
    "made_by",
    [QLoRAPrecision, QLoRAConfig, partial(convert, nn.Linear(64, 64)), partial(estimate_memory, nn.Linear(64, 64))],
)
def test_an_argument_that_is_none_is_answered_with_the_nearest(made_by, arguments, answer):
    with pytest.raises(TypeError, match=answer):
        made_by(**arguments)


@pytest.mark.parametrize(("dtype", "word"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32")])
def test_a_torch_dtype_is_accepted_and_stored_as_our_word(dtype, word):
    assert QLoRAPrecision(compute_dtype=getattr(torch, dtype)).config == QLoRAConfig(compute_dtype=word)


def test_allowed_values_are_accepted():
    good = {
        "quant_type": QUANT_TYPES,
        "block_size": [32, 4096],
        "compute_dtype": ["auto", "bf16", "fp16", "fp32"],
        "lora_alpha": [1, 0.5],
        "lora_dropout": [0, 0.0, 0.999],
        "target_modules": ["all-linear", r".*\.q_proj", ["q_proj"]],
        "exclude_modules": ["head", ["head"], []],
        "paged_optimizer": ["auto", True, False],
        "deferred_logits": ["auto", True, False],
    }
    for name, values in good.items():
        for value in values:
            assert getattr(QLoRAPrecision(**{name: value}).config, name) == value


def test_the_signature_of_the_plugin_is_that_of_the_config():
    config = inspect.signature(QLoRAConfig)
    plugin = inspect.signature(QLoRAPrecision)
    assert list(plugin.parameters.values()) == list(config.parameters.values())
    assert list(plugin.parameters) == [field.name for field in dataclasses.fields(QLoRAConfig)]
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in plugin.parameters.values())
    assert QLoRAPrecision.__init__.__doc__ == QLoRAConfig.__doc__
    assert QLoRAPrecision().config == QLoRAConfig()
    assert QLoRAPrecision(quant_type="int4", r=8).config == QLoRAConfig(quant_type="int4", r=8)


@pytest.mark.parametrize("value", [16, "nf4"])
def test_arguments_without_a_name_are_refused(value):
    with pytest.raises(TypeError, match=f"{value!r}: arguments are passed by name, such as r=16"):
        QLoRAPrecision(value)


def test_all_linear_stands_alone_or_in_a_list():
    for targets, named in (
        ("all-linear", []),
        (["all-linear", "lm_head"], ["lm_head"]),
        (["q_proj"], ["q_proj"]),
        (".*q_proj", ".*q_proj"),
    ):
        assert QLoRAConfig(target_modules=targets).named_targets == named
    with pytest.raises(ValueError, match=r"can't contain 'all-linear'.*\['all-linear', 'lm_head'\]"):
        QLoRAConfig(target_modules="all-linear|lm_head")


def described():
    """Argument -> its description in the docstring of QLoRAConfig, on one line."""
    return pytest.importorskip("tests.arguments", reason="needs docstring_parser").described()


def help_of(command, capsys):
    """Option -> what its entry in the help of a command says: description, type and default."""
    with pytest.raises(SystemExit):
        command()
    text = capsys.readouterr().out.replace("--plugin.", "--")
    # From Python 3.13 on, the names of an option stand before its value: "target_modules, --target_modules+ ...".
    return {block.split()[0].rstrip(","): " ".join(block.split()) for block in re.split(r"\n  --(?=\w)", text)[1:]}


def test_the_help_of_the_plugin_and_of_plan_has_every_description_type_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside a description
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(Precision, "plugin")  # as LightningCLI does
    plugin = help_of(lambda: parser.parse_args(["--plugin.help", "lightning_qlora.QLoRAPrecision"]), capsys)
    plan = help_of(lambda: main(["plan", "--help"]), capsys)
    of_plan = {"config", "print_config", "batch_size", "sequence_length", "optimizer", "gpu_memory", "json"}
    of_plan |= {"devices", "strategy", "device", "gpu", "host_memory"}
    assert set(plan) == {*plugin, *of_plan}
    assert list(plugin) == list(described()) == [field.name for field in dataclasses.fields(QLoRAConfig)]
    for field in dataclasses.fields(QLoRAConfig):
        default = "null" if field.default is None else field.default
        assert plugin[field.name] == plan[field.name]
        assert re.search(rf"{re.escape(described()[field.name])} \(type: .*, default: {default}\)$", plan[field.name])


class Subclass(QLoRAPrecision):
    """A plugin of a user.

    Args:
        extra: An argument of its own.
    """

    def __init__(self, extra: int = 1, **kwargs):
        super().__init__(**kwargs)


def test_a_subclass_that_passes_arguments_on_has_them_in_its_help(capsys):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(Precision, "plugin")
    options = help_of(lambda: parser.parse_args(["--plugin.help", f"{__name__}.Subclass"]), capsys)
    assert list(options) == ["extra", *described()]
    assert "Rank of the adapters. (type: int, default: 64)" in options["r"]


@pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.empty is not None])
def test_none_stands_for_the_default(name):
    assert getattr(QLoRAPrecision(**{name: None}).config, name) == ARGUMENTS[name].empty()


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert QLoRAConfig(r=16, lora_alpha=8).scaling == 0.5
    assert QLoRAConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


def test_functions_take_the_arguments_of_the_config():
    """In their `**arguments`, and with the same types; in Python also a torch.dtype."""
    types = get_type_hints(QLoRAArguments)
    expected = get_type_hints(QLoRAConfig)
    expected["compute_dtype"] |= torch.dtype
    assert types == {field.name: expected[field.name] for field in dataclasses.fields(QLoRAConfig)}
    for function in (convert, estimate_memory, QLoRAPrecision.__init__):
        assert get_type_hints(function, include_extras=True)["arguments"] == Unpack[QLoRAArguments]


def test_the_page_of_arguments_is_what_the_config_says():
    arguments = pytest.importorskip("tests.arguments", reason="needs docstring_parser")
    page = arguments.PAGE.read_text(encoding="utf-8")
    assert page == arguments.page(), "python -m tests.arguments writes it"
    assert set(re.findall(r"^\| `(\w+)` \| `", page, re.MULTILINE)) == {*QLoRAConfig.__dataclass_fields__}
