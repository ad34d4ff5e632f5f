import copy
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from torch import nn

import lightning_qlora
from lightning_qlora import (
    QLoRALinear,
    calibrate,
    convert,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
)
from lightning_qlora.conversion.convert import is_converted
from tests.toys import assert_equal, pretrain

PACKAGE = Path(lightning_qlora.__file__).parent


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 128), nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 128))


def test_layers_are_converted_in_place_and_only_adapters_train_and_once():
    model = mlp()
    model.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    layers = list(model)
    report = convert(model, r=8)
    assert list(model) == layers
    assert report.converted == ["1", "3"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"1.lora_A", "1.lora_B", "3.lora_A", "3.lora_B"}
    state = copy.deepcopy(model.state_dict())
    assert convert(model, r=4).converted == ["1", "3"]
    assert_equal(model.state_dict(), state)


def test_what_a_conversion_does_not_use_is_not_run(monkeypatch):
    """One look at the module decides, before the work: types, files, patterns, experts, heads, transformers, rows."""
    monkeypatch.delitem(sys.modules, "peft", raising=False)  # if it is loaded, its layers are searched for
    used = set()

    def note(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            used.add(file.relative_to(PACKAGE).as_posix())

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        convert(model, r=4)
    finally:
        sys.setprofile(previous)
    assert {"conversion/convert.py", "selection/selection.py", "layers/lora_layer.py"} <= used
    rooms = ["activations", "adapters", "calibration", "dtypes", "experts", "huggingface", "logits", "optim"]
    assert not [file for file in used if file.partition("/")[0] in [*rooms, "plugin", "runs", "tools"]]
    files = {"conversion/convert_checks.py"}
    files |= {f"selection/{name}.py" for name in ("expression", "patterns", "selection_checks", "token_selection")}
    assert used.isdisjoint({*files, "layers/dora.py", "layers/trainable_tokens.py", "starts/calibrated.py"})


def test_rank_0_alone_shows_the_progress(monkeypatch):
    bars = []
    monkeypatch.setattr("lightning_qlora.selection.apply.tqdm", lambda x, *name, **how: bars.append((name, how)) or x)
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        convert(mlp(), r=8)
    how = {"leave": False, "delay": 2, "unit": " layers"}
    assert bars == [(("Quantizing",), how | {"disable": off}) for off in (None, True)]  # None: if stderr is no terminal


def test_aliases_and_a_root_layer_are_converted_once():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(64, 64), shared), "head": shared})
    assert convert(model, r=4).converted == ["body.0", "body.1"]
    assert model["head"] is model["body"][1]
    root = nn.Linear(64, 64)
    assert convert(root, r=4).converted == [""]
    assert isinstance(root, QLoRALinear)


def test_a_module_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"No layer was converted.*no linear layer"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(ValueError, match=r"r=64\)\.(\n  \d: in exclude_modules){5}\n  and 2 more$"):
        convert(nn.Sequential(*(nn.Linear(64, 64) for _ in range(7))), exclude_modules=".*")


def test_a_rank_that_is_too_large_for_all_layers_is_refused_unless_they_are_named():
    with pytest.raises(
        ValueError, match=r"No layer was converted.*r=1024.*2 would train in full: 0, 1\. Set a smaller"
    ):
        convert(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10)), r=1024)


@pytest.mark.parametrize(("init", "bad"), [("default", float("nan")), ("calibrated", float("inf"))])
def test_a_weight_that_is_not_finite_is_refused_with_its_layer(init, bad):
    model = pretrain(mlp())
    expected = copy.deepcopy(model)
    convert(expected, r=8, init_lora_weights=init)
    weight = model[3].weight
    before = weight[0, 0].item()
    weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"^3: .*NaN or Inf"):
        convert(model, r=8, init_lora_weights=init)
    assert type(model[3]) is nn.Linear  # a dense layer still, with its weight
    assert model[3].weight is weight
    weight.data[0, 0] = before
    convert(model, r=8, init_lora_weights=init)
    x = torch.arange(8)
    assert torch.equal(model.eval()(x), expected.eval()(x))
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(parameter.requires_grad for parameter in merge(model).parameters())


def test_weights_on_the_meta_device_are_refused_with_their_layer():
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match=r"^0.weight: .*meta device.*Load it"):
        convert(model, r=8)


def test_peak_memory_is_the_module_plus_little():
    """Sampled from a thread: the resident size during conversion of 302 MB of fp32 weights."""
    psutil = pytest.importorskip("psutil")
    one_layer = 4 * 3072 * 3072  # above 32 MB the C library gives memory back to the system whatever went before
    model = nn.Sequential(*[nn.Linear(3072, 3072, bias=False) for _ in range(8)])
    convert(nn.Linear(256, 256), r=4)  # lazily made tables are not this model's
    process, done, peak = psutil.Process(), threading.Event(), [0]
    start = process.memory_info().rss

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(model, r=4)
    done.set()
    watcher.join()
    assert peak[0] - start < 2 * one_layer
    assert process.memory_info().rss - start < -6 * one_layer


def test_calls_with_another_object_than_a_module_say_what_is_wanted(tmp_path):
    for call in (convert, merge, calibrate):
        with pytest.raises(TypeError, match=r"module='a-folder': must be a torch.nn.Module: build or load it first"):
            call("a-folder")
    with pytest.raises(TypeError, match=r"module_class='last.ckpt': must be the class of the module"):
        load_from_checkpoint("last.ckpt", LightningModule)
    plain, converted = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    convert(converted, r=4)
    save_adapter(converted, tmp_path)
    with pytest.raises(ValueError, match="Sequential has no adapter"):
        load_adapter(plain, tmp_path)


on_linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc is on Linux only")


@pytest.mark.parametrize("arguments", [{}, {"use_dora": True}, {"modules_to_save": ["2"]}])
def test_what_is_converted_inside_inference_mode_trains(arguments):
    modules = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    for module, mode in zip(modules, (True, False), strict=True):
        with torch.inference_mode(mode):
            convert(module, r=4, lora_dropout=0.0, **arguments)
        module(torch.ones(2, 64)).square().mean().backward()
        assert not any(parameter.is_inference() for parameter in module.parameters())
    for ours, expected in zip(*(module.parameters() for module in modules), strict=True):
        assert (ours.grad is None) == (expected.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_loaded_and_merged_inside_inference_mode_trains_unless_it_was_copied_there(copied, tmp_path):
    convert(source := mlp(), r=2)
    save_adapter(source, tmp_path)
    convert(model := mlp(), r=4, lora_dropout=0.0)
    x = torch.arange(8)
    with torch.inference_mode():
        used = copy.deepcopy(model) if copied else model
        load_adapter(used, tmp_path)
        assert used[1].r == 2
    if not copied:
        used(x).sum().backward()
    with torch.inference_mode():
        expected = used(x).clone()
        merge(used)
    assert not torch.equal(used[1].weight, mlp()[1].weight)
    with torch.no_grad():
        torch.testing.assert_close(used(x), expected)
    assert copied == used[1].weight.is_inference()
    model(x).sum().backward()


EYE = torch.eye(8)
LAYOUTS = {
    "coo": EYE.to_sparse,
    "csr": EYE.to_sparse_csr,
    "bsr": lambda: EYE.to_sparse_bsr((2, 2)),
    "mkldnn": torch.ones(4, 4).to_mkldnn,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("place", ["buffer", "persistent buffer", "parameter"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_is_not_strided_stays_as_it_is(layout, place):
    """As the `alignment_heads` of openai-whisper, a sparse buffer."""
    module, plain = nn.Sequential(nn.Linear(64, 64)), nn.Module()
    tensor = LAYOUTS[layout]()
    if place == "parameter":
        tensor = nn.Parameter(tensor, requires_grad=False)
    for each in (module, plain):
        if place == "parameter":
            each.odd = tensor
        else:
            each.register_buffer("odd", tensor, persistent=place != "buffer")
    report = convert(module, r=4)
    assert report.converted == ["0"] and report.bytes_before == 4 * 65 * 64 and module.odd is tensor
    assert "4-bit + adapter" in str(report)
    state = module.state_dict()
    assert ("odd" in state) == ("odd" in plain.state_dict())
    if layout not in ("nested", "jagged"):  # torch loads none of these
        module.load_state_dict(state)
    module(torch.ones(1, 64)).sum().backward()
    merge(module)
    assert type(module[0]) is nn.Linear and module.odd is tensor


def test_a_second_conversion_does_not_thaw_what_was_frozen_since():
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 2))
    convert(module, r=4)
    assert module[2].weight.requires_grad  # smaller than an adapter
    module[2].requires_grad_(False)
    module[0].lora_A.requires_grad_(False)
    assert is_converted(module)
    module.append(nn.Linear(2, 2)).append(nn.Linear(2, 512))
    assert not is_converted(module)
    convert(module, r=1)
    assert is_converted(module)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert not {"2.weight", "2.bias", "0.lora_A"} & trained and "0.lora_B" in trained


def test_after_an_error_the_layer_is_as_before_and_another_call_goes_on():
    module = pretrain(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    weight = module[1].weight.detach().clone()
    module[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^1: .*NaN"):
        convert(module, r=4)
    assert type(module[1]) is nn.Linear and [*module[1]._parameters] == ["weight", "bias"]
    module[1].weight.data.copy_(weight)
    assert convert(module, r=4).converted == ["0", "1"]
    assert all(layer.lora_A.requires_grad and layer.lora_B.requires_grad for layer in module)
    assert all(layer.weight.requires_grad for layer in merge(module))
