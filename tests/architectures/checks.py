"""What is checked of an architecture: it is compared with another computation of the same.

These are dense weights W + s B A, a restored or reloaded model, and PEFT.
"""

import copy
import re
import warnings

import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from safetensors import safe_open
from torch.utils._pytree import tree_leaves
from transformers.models.auto import modeling_auto

from lightning_qlora import QLoRAConfig, QLoRAPrecision, convert, load_adapter, merge, save_adapter
from lightning_qlora.huggingface.quantize_on_load import quantize_while_loading
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import last_part
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tools.merge_folder import merge_folder
from tests.adapters.folders import adapter_of
from tests.architectures.classes import build_class
from tests.architectures.models import ALL, build, inputs_of
from tests.toys import expert_stacks, ids, perturb

# Without two blocks of one class that hold linear layers: gradient checkpointing warns.
WITHOUT_BLOCKS = {"albert", "ibert", "squeezebert"}
ARGUMENTS = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}


class Lit(LightningModule):
    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.inputs = model, inputs

    def outputs(self):
        """All tensors of floating point that the model returns."""
        outputs = tree_leaves(dict(self.model(**self.inputs)))
        return [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]

    def training_step(self, batch=None, batch_idx=0):
        """A loss that every output has a part in."""
        return sum((y.flatten() * torch.arange(y.numel()).sin()).sum() / y.numel() ** 0.5 for y in self.outputs())

    def on_after_backward(self):
        self.grads = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(4))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def lit_of(kind, **how):
    model, inputs = build(kind, **how), inputs_of(ALL[kind][0])
    takes = model.forward.__code__.co_varnames
    return Lit(model, {name: value for name, value in inputs.items() if name != "token_type_ids" or name in takes})


def fitted(lit, folder, max_steps=2, **arguments):
    """The Trainer and the plugin after some steps."""
    plugin = QLoRAPrecision(**ARGUMENTS, **arguments)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    run = Trainer(accelerator="cpu", plugins=plugin, max_steps=max_steps, default_root_dir=folder, **quiet)
    run.fit(lit)
    return run, plugin


def with_adapters(kind, **how):
    lit = lit_of(kind, **how)
    convert(lit, **ARGUMENTS)
    return perturb(lit)


def check_training(kind, folder):
    """It trains, its checkpoint restores it bit for bit, its gradients are those of dense weights W + s B A."""
    lit = lit_of(kind)
    before = {part: type(part) for part in lit.modules()}
    run, plugin = fitted(lit, folder)
    changed = [part for part, kind_before in before.items() if type(part) is not kind_before]
    stacks = {owner for _, owner, _, _ in expert_stacks(lit.named_modules())}
    assert all(isinstance(part, LoRALayer) or part in stacks for part in changed)  # what stays dense keeps its class
    names = {parameter: name for name, parameter in lit.named_parameters()}
    for name, layer in adapted_layers(lit).items():
        grad = lit.grads.get(names[layer.lora_B])
        assert (grad is None) == (name in plugin.report.unused), name  # `check_gradients` says whether that is right
        assert layer.lora_B.any() or grad is None or not grad.any(), name
    run.save_checkpoint(folder / "c.ckpt")
    again = lit_of(kind)
    convert(again, **ARGUMENTS)
    again.load_state_dict(torch.load(folder / "c.ckpt", weights_only=True)["state_dict"])
    with torch.no_grad():
        assert all(map(torch.equal, lit.outputs(), again.outputs()))
    check_gradients(perturb(again))


def check_gradients(lit):
    """With D the gradient of a dense weight W + s B A, those of the adapter are dA = s B^T D and dB = s D A^T."""
    layers, dense_of = adapted_layers(lit), {}
    twin = merge(copy.deepcopy(lit))
    for name, _, _, stack in expert_stacks(lit.named_modules()):
        weight = twin.get_parameter(name).requires_grad_(True)
        shape = len(stack), *stack.matrix_shape
        dense_of[stack] = weight, (lambda grad, stack=stack, shape=shape: stack._as_stored(grad.view(shape)))
    for name, layer in layers.items():
        if layer not in dense_of:
            weight = twin.get_submodule(name).weight.requires_grad_(True)
            dense_of[layer] = weight, (lambda grad, layer=layer: layer._as_stored(grad))
    ours, expected = lit.training_step(), twin.training_step()
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    lit.zero_grad()
    ours.backward()
    expected.backward()
    for name, layer in layers.items():
        weight, part = dense_of[layer]
        a, b = layer.lora_A.grad, layer.lora_B.grad
        if weight.grad is None or (a is None and not part(weight.grad).any()):
            assert a is None and b is None, name
            continue
        dense = part(weight.grad)
        for grad, formula in ((a, layer.lora_B.mT @ dense), (b, dense @ layer.lora_A.mT)):
            formula = layer.scaling * formula.detach()
            torch.testing.assert_close(grad, formula, atol=1e-3 * formula.abs().max().item() + 1e-7, rtol=1e-3)


def check_recomputation(kind, folder):
    """Gradient checkpointing recomputes its blocks, or warns, and gradients do not change."""
    found = []
    for checkpointing in (False, True):
        lit = lit_of(kind)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fitted(lit, folder, max_steps=1, gradient_checkpointing=checkpointing)
        warned = any("gradient_checkpointing" in str(one.message) for one in seen)
        assert warned == (checkpointing and kind in WITHOUT_BLOCKS)
        found.append(lit.grads)
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5 * grad.abs().max().item() + 1e-8, rtol=1e-4)


def saved(kind, folder):
    """A folder as transformers saves it; biases and scales that are 0 get other values, so that a lost one is seen."""
    model = build(kind) if kind in ALL else build_class(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return type(model), folder


def not_loaded_again(kind, folder):
    """Why transformers does not load the weights that it saves: those that it does not find are random, each time."""
    try:
        model, base = saved(kind, folder)
        first, again = (load(model, base).state_dict() for _ in range(2))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    other = [name for name, x in again.items() if not torch.equal(first[name].nan_to_num(), x.nan_to_num())]
    return f"random: {other[0]}" if other else None


def load(kind, folder):
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def loaded_and_converted(kind, folder, **arguments):
    arguments = {**ARGUMENTS, **arguments}
    with quantize_while_loading(QLoRAConfig(**arguments)):
        model = load(kind, folder)
    convert(model, **arguments)
    return model


def check_loading(kind, folder):
    """Quantized while it loads, a model has the bytes that it has if it is converted afterwards."""
    model, base = saved(kind, folder / "base")
    after = load(model, base)
    convert(after, **ARGUMENTS)
    assert_equal(loaded_and_converted(model, base).state_dict(), after.state_dict())


def check_merge(kind, folder):
    """A merged folder has the tensors of the merged module, by the keys of the base."""
    model, base = saved(kind, folder / "base")
    module = load(model, base)
    convert(module, **ARGUMENTS)
    merge_folder(base, adapter_of(perturb(module)), folder / "out")
    assert_equal(load(model, folder / "out").state_dict(), merge(module).state_dict())
    assert keys(folder / "out") == keys(base)


def check_peft(kind, folder):
    """PEFT computes our outputs from our folder on the decoded base, or `save_adapter` says that it would not."""
    import peft

    lit = with_adapters(kind)
    with torch.no_grad():
        ours = lit.outputs()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            save_adapter(lit, folder / "adapter")
        except ValueError as error:
            return _first_sentence(error)
    if said := [one.message for one in seen if str(one.message).startswith("PEFT ")]:
        return _first_sentence(said[0])
    dense = copy.deepcopy(lit)
    for layer in adapted_layers(dense).values():
        layer.lora_B.data.zero_()
    try:
        theirs = Lit(peft.PeftModel.from_pretrained(merge(dense).model, folder / "adapter"), lit.inputs)
    except ValueError as error:
        return f"PEFT refuses the folder: {_first_sentence(error)}"
    with torch.no_grad():
        torch.testing.assert_close(theirs.outputs(), ours, atol=1e-4, rtol=1e-4)
    return None


def check_own_folder(kind, folder):
    """`load_adapter`, and `adapter=FOLDER` at conversion, give the outputs of the module that the folder is of."""

    def make(**arguments):
        module = lit_of(kind) if kind in ALL else build_class(kind)
        convert(module, **{**ARGUMENTS, **arguments})
        return module

    names = list(adapted_layers(make()))
    if not names:
        return "the model has no adapter"
    last = last_part(names[-1])
    module = perturb(make(rank_pattern={last: 1}, alpha_pattern={last: 5}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PEFT ")
        try:
            save_adapter(module, folder)
        except ValueError as error:
            return _first_sentence(error)
    loaded, layers = perturb(make(), seed=1), adapted_layers(module)
    load_adapter(loaded, folder)
    for other in (loaded, make(adapter=str(folder))):
        there = adapted_layers(other)
        assert {name: layer.scaling for name, layer in there.items()} == {k: x.scaling for k, x in layers.items()}
        assert all(torch.equal(layer.lora_B, there[name].lora_B) for name, layer in layers.items())
        if kind in ALL:
            with torch.no_grad():
                torch.testing.assert_close(other.outputs(), module.outputs(), atol=1e-5, rtol=1e-5)
    return None


def _first_sentence(message):
    """Without the names of layers."""
    return re.sub(r" \(.*?\)", "", str(message)).partition(". ")[0]


def check_generation(kind, folder):
    """With its cache it generates the tokens that the merged model generates; only for language models."""
    name = kind.partition(":")[0]
    causal = name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not causal and name not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "no language model"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSeq2SeqLM
    lit = with_adapters(kind, auto=auto)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    how |= {} if causal else {"decoder_start_token_id": 1}
    ours, expected = (model.generate(ids(), **how) for model in (lit.model, merge(copy.deepcopy(lit)).model))
    assert torch.equal(ours, expected)
    return None


CHECKS = {
    "trains": check_training,
    "recomputes": check_recomputation,
    "loads": check_loading,
    "merges": check_merge,
    "PEFT": check_peft,
    "own folder": check_own_folder,
    "generates": check_generation,
}


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name], value, atol=0, rtol=0, equal_nan=True, msg=name)


def keys(folder):
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found
