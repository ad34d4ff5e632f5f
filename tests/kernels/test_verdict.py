"""The check at the first use of a device, in forks of this process and with kernels of plain torch."""

import ctypes
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")  # its version is part of the key

from lightning_qlora import QLoRAPrecision
from lightning_qlora.kernels import backends, eager, reference, self_test, verdict
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from tests.kernels.forks import in_forks, start_in_fork

CPU = torch.device("cpu")
START = verdict.start


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache without a verdict, kernels of which the tests replace some, and checks in forks."""
    module = ModuleType("kernels_of_a_test")
    vars(module).update({op: getattr(reference, op) for op in self_test.OPS})
    vars(module).update(can_group=lambda *_: True, check_launch=lambda device: None)

    def plan(*operands):
        """That of plain torch, with the functions of the module as they are at each call."""
        made = eager.plan(*operands)
        made.in_one_call = False
        for op in backends.PLANNED:
            setattr(made, op, lambda *given, op=op: getattr(module, op)(*given))
        return made

    module.plan = plan
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in (verdict, backends):
        monkeypatch.setattr(name, "KERNELS", module.__name__)
    monkeypatch.setattr(verdict, "start", start_in_fork)
    monkeypatch.setattr(backends, "INTERPRETED", True)
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    backends._backends.clear()
    yield tmp_path / "cache"
    backends._backends.clear()


@pytest.fixture
def kernels():
    return sys.modules["kernels_of_a_test"]


def only(monkeypatch, *some):
    """Check these ops alone, in less time."""
    for module in (verdict, self_test):
        monkeypatch.setattr(module, "OPS", some)


def found(monkeypatch, reason=None):
    """The check finds this of each op; None: nothing."""
    monkeypatch.setattr(verdict, "examine", lambda device: dict.fromkeys(verdict.OPS, reason))


def said(recorded):
    return [str(warning.message) for warning in recorded if "plain torch" in str(warning.message)]


def test_a_wrong_value_an_error_a_hang_and_an_end_are_each_found_and_the_others_are_used(monkeypatch, kernels, recwarn):
    kernels.quantize = lambda *_: [].undefined
    kernels.dequantize = lambda *arguments: reference.dequantize(*arguments) * 2
    kernels.rows_to_half = lambda *given: print("noise") or reference.rows_to_half(*given)
    kernels.take_out = lambda *_: ctypes.PyDLL(None).sleep(3600)  # with the interpreter locked
    kernels.linear_into = lambda *_: os._exit(3)
    monkeypatch.setattr(verdict, "LIMIT", 4.0)
    quick = ("quantize", "dequantize", "rows_to_half", "take_out", "linear_into")
    only(monkeypatch, *quick)
    started = []
    ended = []

    def start_and_note(device, checked):
        started.append(tuple(checked))
        end, output = start_in_fork(device, checked)
        return lambda: ended.append(end()), output

    monkeypatch.setattr(verdict, "start", start_and_note)
    made = backends.backend(CPU)
    assert started == [quick, quick[1:], quick[2:], quick[4:]] and len(ended) == len(started)
    assert made.failures == {
        "quantize": "AttributeError: 'list' object has no attribute 'undefined'",
        "dequantize": "differs from the reference by 1 of the largest value, limit 0",
        "take_out": "no result after 4 s",
        "linear_into": "the process of the check ended",
    }
    failing = "; ".join(f"{op}: {why}" for op, why in made.failures.items())
    assert said(recwarn) == [
        "Triton's interpreter (cpu): plain torch computes quantize, dequantize, take_out, linear_into, because "
        f"the Triton kernels fail. The results are right, and slower. {failing}. `lightning-qlora doctor --check` "
        "checks them again."
    ]
    assert backends.describe(CPU) == ", ".join(["Triton kernels", *(f"{op} in plain torch" for op in made.failures)])
    assert made.can_group is kernels.can_group


def test_a_verdict_is_stored_and_read_by_the_next_process(monkeypatch, fresh):
    only(monkeypatch, "dequantize")
    examine = verdict.examine
    assert verdict.verdict(CPU) == {"dequantize": None}
    (file,) = fresh.iterdir()
    assert json.loads(file.read_text()) == {"setup": verdict.setup(CPU), "ops": {"dequantize": None}}
    monkeypatch.setattr(verdict, "examine", lambda device: pytest.fail("checked again"))
    assert verdict.verdict(CPU) == {"dequantize": None}
    found(monkeypatch, "is wrong")
    assert verdict.verdict(CPU, repeat=True) == verdict.verdict(CPU) == {"dequantize": "is wrong"}
    with monkeypatch.context() as patch:
        patch.setattr(verdict, "examine", examine)
        patch.setattr(verdict, "_ask", lambda *_: ["CUDA out of memory"])
        with pytest.raises(torch.OutOfMemoryError, match="no memory for the check"):
            verdict.verdict(CPU, repeat=True)
    assert verdict.verdict(CPU) == {"dequantize": "is wrong"}, "the next process may have memory"
    assert list(fresh.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("dequantize", "dequantise"),
        lambda text: text.replace("null", "0"),
        lambda text: "[]",
        lambda text: '{"ops": {}}',
        lambda text: '{"ops": ["dequantize"]}',
        lambda text: "{}",
    ],
)
def test_a_damaged_verdict_is_replaced(monkeypatch, fresh, damage):
    only(monkeypatch, "dequantize")
    found(monkeypatch)
    verdict.verdict(CPU)
    (file,) = fresh.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert verdict.verdict(CPU) == {"dequantize": None}
    assert file.read_text() == whole


def test_the_key_of_a_verdict(monkeypatch, tmp_path):
    """Card, driver, versions and sources; the name of the device is not in it."""
    card = {"name": "NVIDIA H100", "major": 9, "minor": 0, "gcnArchName": "gfx942"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**card))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    driver = 12040
    root = tmp_path / "lightning_qlora"
    for part in ("kernels", "quantization"):
        shutil.copytree(verdict.PACKAGE / part, root / part)
    monkeypatch.setattr(verdict, "PACKAGE", root)
    monkeypatch.setattr(verdict, "Path", lambda name: tmp_path / name.removeprefix("/"))  # what the drivers say
    seen = [verdict.setup(torch.device("cuda", 0))]
    assert verdict.setup(torch.device("cuda", 1)) == seen[0]
    (root / "kernels" / "ops.pyc").write_text("")
    versions = verdict.setup(CPU)
    assert versions.keys() == {"lightning_qlora", "torch", "triton", "sources"}
    assert seen[0] == versions | {
        "card": "NVIDIA H100, 9.0",
        "toolkit": "13.0",
        "supported by the driver": "12040",
        "driver": "",
    }

    def write(name):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text(f" {name}\n")

    for change in (
        lambda: card.update(name="NVIDIA H200"),
        lambda: card.update(minor=1),
        lambda: monkeypatch.setattr("triton.__version__", "99"),
        lambda: monkeypatch.setattr("torch.__version__", "99"),
        lambda: monkeypatch.setattr("lightning_qlora.__version__", "99"),
        lambda: (root / "kernels" / "triton" / "tiles.json").write_text("{}"),
        lambda: (root / "quantization" / "blockwise.py").write_text(""),
        lambda: write("proc/driver/nvidia/version"),
        lambda: write("sys/module/amdgpu/version"),
        lambda: monkeypatch.setattr(torch.version, "hip", "7.0"),
        lambda: monkeypatch.setattr(torch.version, "cuda", None),
    ):
        change()
        seen.append(verdict.setup(torch.device("cuda", 0)))
    driver = 12050
    seen.append(verdict.setup(torch.device("cuda", 0)))
    assert len({repr(facts) for facts in seen}) == len(seen)
    last = {name: seen[-1][name] for name in ("card", "toolkit", "driver")}
    assert last == {
        "card": "NVIDIA H200, gfx942",
        "toolkit": "7.0",
        "driver": "proc/driver/nvidia/version sys/module/amdgpu/version",
    }


def test_of_several_processes_at_the_first_use_one_checks(monkeypatch, tmp_path, fresh):
    right = dict.fromkeys(self_test.OPS)

    def examine(device):
        with (tmp_path / "checks").open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return right

    monkeypatch.setattr(verdict, "examine", examine)
    assert in_forks(3, lambda rank: verdict.verdict(CPU) == right) == [0] * 3
    assert (tmp_path / "checks").read_text() == "x"
    assert len(list(fresh.iterdir())) == 1


@pytest.mark.parametrize("stored", [True, False])
def test_a_read_only_cache_folder_is_read_and_else_each_process_checks(monkeypatch, caplog, stored):
    """Root can write everywhere, so it becomes another user, who may not be able to read this package."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0 and not all(path.stat().st_mode & stat.S_IXOTH for path in Path(folder).parents):
            pytest.skip("other users can't reach the folder of temporary files")
        facts = verdict.setup(CPU)
        monkeypatch.setenv("LIGHTNING_QLORA_CACHE", folder)
        monkeypatch.setattr(verdict, "setup", lambda device: facts)
        found(monkeypatch, "of before")
        if stored:
            verdict.verdict(CPU)
        os.chmod(folder, 0o555)
        for name in os.listdir(folder):
            os.chmod(Path(folder, name), 0o444)
        files = os.listdir(folder)
        expected = "of before" if stored else "of now"

        def reads(rank):
            if os.geteuid() == 0:
                os.seteuid(65534)
            found(monkeypatch, "of now")
            is_expected = verdict.verdict(CPU) == dict.fromkeys(self_test.OPS, expected)
            return is_expected and stored == ("checked again in each process" not in caplog.text)

        assert in_forks(1, reads) == [0]
        assert os.listdir(folder) == files
        os.chmod(folder, 0o755)  # so that it can be removed


def test_a_folder_that_others_can_write_to_is_not_used(monkeypatch, fresh, caplog):
    fresh.mkdir()
    fresh.chmod(0o777)
    found(monkeypatch)
    assert verdict.verdict(CPU) == dict.fromkeys(self_test.OPS)
    assert not list(fresh.iterdir()) and "can be written by other users" in caplog.text


def train():
    """Losses of a run."""
    torch.manual_seed(3)
    draw = torch.Generator().manual_seed(0)
    weight = reference.quantize(torch.randn(64, 128, generator=draw) / 11, "nf4", 64, True)
    a = (torch.randn(8, 128, generator=draw) / 11).requires_grad_()
    b = torch.zeros(64, 8, requires_grad=True)
    bias = torch.zeros(64).half().requires_grad_()
    optimizer = torch.optim.SGD([a, b, bias], lr=1e-2)
    losses = []
    for _ in range(5):
        x = torch.randn(20, 128, generator=draw).half()
        seed = torch.randint(1 << 62, (1,))
        loss = lora_linear(x, weight, bias, LoRA(a, b, 0.5, 0.2, seed)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, torch.rand(()).item()]


def train_by_eager():
    """The same on a CPU."""
    backends._backends[CPU] = backends.Backend(CPU)
    losses = train()
    backends._backends.clear()
    return losses


@pytest.mark.parametrize("op", ["lora_project", "linear_into", "linear_backward"])
def test_a_variant_that_fails_in_mid_run_falls_back_without_a_change_of_the_run(monkeypatch, kernels, recwarn, op):
    """The fourth call and all later ones."""
    found(monkeypatch)
    expected = train_by_eager()
    right = getattr(reference, op)
    calls = []

    def fails_later(*arguments):
        calls.append(op)
        if len(calls) > 3:
            raise RuntimeError("out of resource: shared memory")
        return right(*arguments)

    setattr(kernels, op, fails_later)
    assert train() == pytest.approx(expected, rel=1e-3)
    assert backends.backend(CPU).failures == {op: "RuntimeError: out of resource: shared memory"}
    assert len(said(recwarn)) == 1
    assert len(calls) == 4, "an op that failed is not tried again"


@pytest.mark.parametrize("reason", ["the arguments", "memory", "a capture"])
def test_an_error_that_another_backend_would_raise_too_is_no_fall_back(monkeypatch, kernels, recwarn, reason):
    """A graph that is captured can't be captured a second time: what ran before the error is in it."""
    found(monkeypatch)
    made = backends.backend(CPU)
    error = RuntimeError
    if reason == "memory":
        error = torch.OutOfMemoryError
    elif reason == "a capture":
        monkeypatch.setattr(backends.scratch, "is_capturing", lambda device: device == CPU)
    kernels.dequantize = lambda *_: (_ for _ in ()).throw(error("full"))
    weight = reference.quantize(torch.ones(2, 64), "nf4", 64, True)
    if reason == "the arguments":
        operands = torch.zeros(2, 64), LoRA(torch.zeros(4, 63), torch.zeros(8, 4))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            made.new_plan(*operands, weight).lora_project(*operands)
    else:
        with pytest.raises(error, match="full"):
            backends.Backend(CPU, kernels).dequantize(weight, torch.float32)
    assert not made.failures and not said(recwarn)


@pytest.mark.parametrize("full", [1, 2])
def test_a_kernel_that_the_driver_can_not_load_is_launched_once_more(monkeypatch, kernels, recwarn, full):
    """A full card is no fault of a kernel: one rank alone would compute in plain torch from then on."""
    found(monkeypatch)
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    weight = reference.quantize(torch.ones(2, 64), "nf4", 64, True)

    def dequantize(*arguments):
        if len(given_back) < full:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return reference.dequantize(*arguments)

    kernels.dequantize = dequantize
    made = backends.Backend(CPU, kernels)
    if full == 2:
        with pytest.raises(RuntimeError, match="out of memory"):
            made.dequantize(weight, torch.float32)
    else:
        assert torch.equal(made.dequantize(weight, torch.float32), reference.dequantize(weight, torch.float32))
    assert given_back == [True] and not made.failures and not said(recwarn)


@pytest.mark.parametrize("has_triton", [True, False])
def test_all_ranks_take_the_path_of_the_rank_whose_kernels_fail(monkeypatch, tmp_path, kernels, has_triton):
    found(monkeypatch)
    failing = ["dequantize"] if has_triton else self_test.OPS

    def agrees(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        warnings.simplefilter("ignore")
        if rank and has_triton:
            backends.backend(CPU).fall_back({"dequantize": "differs"})
        elif rank:
            del kernels.check_launch
        module = torch.nn.Sequential(torch.nn.Linear(64, 64))
        plugin = QLoRAPrecision(r=2)
        plugin.convert_module(module)
        plugin._on_setup_optimizer(torch.optim.SGD(module.parameters(), 0.1))  # as Fabric does
        if rank:
            return backends.failures(CPU) == ({"dequantize": "differs"} if has_triton else {})
        return backends.failures(CPU) == dict.fromkeys(failing, "fails on another rank")

    assert in_forks(2, agrees) == [0, 0]


def test_without_a_second_process_the_check_runs_in_this_one(monkeypatch):
    """As on a card in exclusive mode; torch's modes do not change it."""
    only(monkeypatch, "dequantize", "take_out")
    monkeypatch.setattr(verdict, "start", START)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"):
        assert verdict.examine(CPU) == {"dequantize": None, "take_out": None}


def test_the_process_that_checks(monkeypatch, tmp_path, kernels, capfd):
    """Python, in the folder of the package, with the paths of this process; other lines are not for us."""
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\ncd {tmp_path}\nprintf \'%s\\n\' "$OLDPWD" "$PYTHONPATH" "$@" > call; cat > input; echo no >&2\n'
        "printf 'caf\\351\\n@verdict null\\nnoise @verdict 1\\n@verdict \"of the child\"\\n'"
    )
    program.chmod(0o755)
    only(monkeypatch, "dequantize")
    monkeypatch.setattr(verdict, "start", START)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(sys, "path", ["", "relative", "/absolute"])
    assert verdict.examine(CPU) == {"dequantize": "of the child"}
    folder, paths, option, *code, device, op = (tmp_path / "call").read_text().splitlines()
    here = os.getcwd()
    assert (folder, paths) == (str(verdict.PACKAGE.parent), f"{here}:{here}/relative:/absolute")
    assert (option, device, op) == ("-c", "cpu", "dequantize")
    assert not (tmp_path / "input").read_text()
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", [option, device, op])
    exec("\n".join(code), {})
    assert capfd.readouterr() == ("@verdict null\n@verdict null\n", "")
    kernels.take_out = lambda *_: 1 / 0
    verdict.check("cpu", ["dequantize", "take_out", "rows_to_half"], sys.stdout)
    text = "ZeroDivisionError: division by zero"
    expected = f'@verdict null\n@verdict null\n@verdict "{text}"\n'
    assert capfd.readouterr().out == expected, "after a fault another child goes on"


@pytest.mark.slow
def test_on_a_gpu_another_interpreter_of_python_checks(monkeypatch):
    """Here it finds no driver."""
    only(monkeypatch, "dequantize")
    monkeypatch.setattr(verdict, "start", START)
    (failure,) = verdict.examine(CPU).values()
    assert failure.startswith("RuntimeError: 0 active drivers") or torch.cuda.is_available()
