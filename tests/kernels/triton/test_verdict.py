"""Kernels that are broken on purpose are found at the first use or in mid-run, and the run is right."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import import_module, util
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_qlora import QLoRAPrecision
from lightning_qlora.kernels import backends, eager, ops, reference, verdict, verify
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.optim.adamw import PagedAdamW8bit
from tests.kernels.triton.interpreter import start
from tests.kernels.triton.test_training import losses

CPU = torch.device("cpu")
NAMES = ("adamw_kernel", "adapter_sums", "dropout", "grouped", "launch", "linear", "lora_products", "quantize")
MODULE = {name: import_module(f"{verdict.KERNELS}.{name}") for name in NAMES}
COLUMN_MASK = "mask=(row < end)[:, None] & (column < k)[None, :]"


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache without a verdict, and no prepared launches of kernels that another test replaced."""
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def forget():
    backends._backends.clear()
    for module in MODULE.values():
        for held in vars(module).values():
            if hasattr(held, "cache_clear"):
                held.cache_clear()


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Replaces a function of a module by that of a copy of the module's file with another text."""

    def replace(name, function, old, new, where=kernels):
        text = Path(MODULE[name].__file__).read_text()
        shutil.copy(Path(MODULE[name].__file__).with_name("tiles.json"), tmp_path)
        assert old in text
        file = tmp_path / f"broken_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(text.replace(old, new))
        spec = util.spec_from_file_location(file.stem, file)
        copy = util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        monkeypatch.setattr(where, function, getattr(copy, function))

    return replace


def found(monkeypatch, reason=None):
    """The check finds this of each op; None: nothing."""
    monkeypatch.setattr(verdict, "examine", lambda device: dict.fromkeys(verify.OPS, reason))


def only(monkeypatch, *some):
    """Check these ops alone, in less time."""
    monkeypatch.setattr(verdict, "OPS", some)


def said(recorded):
    return [str(warning.message) for warning in recorded if "plain torch" in str(warning.message)]


def test_a_wrong_scale_a_missing_mask_an_error_and_a_hang_are_each_found_and_the_run_is_right(
    monkeypatch, broken, recwarn
):
    broken("lora_products", "lora_up", "total *= s\n", "total *= 1.03 * s\n", MODULE["linear"])
    broken("adapter_sums", "sum_over_columns", COLUMN_MASK, "mask=(row < end)[:, None]", MODULE["lora_products"])
    broken("quantize", "quantize", "rank += (scaled", "rank += undefined + (scaled")
    broken("adamw_kernel", "adamw_step", "per_program = STATE", "while True:\n        pass\n    per_program = STATE")
    monkeypatch.setattr(verdict, "LIMIT", 12.0)
    failures = backends.backend(CPU).failures
    assert failures.keys() == {"quantize", "lora_project", "linear_into", "linear_backward", "adamw_step"}
    assert "undefined" in failures["quantize"] and "Error" in failures["quantize"]
    assert failures["adamw_step"] == "no result after 12 s"
    assert re.match(
        r"differs from the reference by 0\.0\d+ of the largest .*float16 \[70, 75\]", failures["linear_into"]
    )
    (warning,) = said(recwarn)
    assert "Triton's interpreter (cpu)" in warning and all(f"{op}: {why}" in warning for op, why in failures.items())
    assert backends.describe(CPU).startswith("Triton kernels, quantize in plain torch, lora_project in plain torch")
    ours = losses(0.2, dtype=torch.float16)
    monkeypatch.setattr(ops, "backend", lambda device: reference)
    assert ours == pytest.approx(losses(0.2, dtype=torch.float16), rel=2e-2)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize(
    ("name", "function", "old", "new", "where", "op"),
    [
        ("quantize", "dequantize", "mask=mask)\n\n", "mask=mask | True)\n\n", "", "dequantize"),
        ("quantize", "quantize", "mask=i < n)\n\n", "mask=i == i)\n\n", "", "quantize"),
        ("launch", "add_shares", "tl.store(counter, 0)", "pass", "lora_products", "linear_backward"),
        ("linear", "add_matmul_", "mask=row[:, None] < n, other=0", "mask=row[:, None] >= 0, other=0", "linear", ""),
        ("linear", "add_matmul_", "mask=write)\n\n", "mask=write | True)\n\n", "linear", "linear_into"),
        ("grouped", "grouped_linear", "+= added * s", "+= added * (1.05 * s)", "", "grouped_linear"),
        ("adamw_kernel", "adamw8bit_step", "levels + 768", "levels + 512", "", "adamw8bit_step"),
    ],
)
def test_other_faults(monkeypatch, broken, name, function, old, new, where, op):
    """Writes past the end, counters that are not reset, a scale, a table; a mask of what nothing reads is no fault."""
    broken(name, function, old, new, MODULE[where] if where else kernels)
    assert bool(verify.fault(kernels, CPU, op or "linear_into")) == bool(op)


def test_a_verdict_is_stored_and_read_by_the_next_process(monkeypatch, fresh):
    only(monkeypatch, "dequantize")
    assert verdict.verdict(CPU) == {"dequantize": None}
    (file,) = fresh.iterdir()
    monkeypatch.setattr(verdict, "examine", lambda device: pytest.fail("checked again"))
    assert verdict.verdict(CPU) == {"dequantize": None}
    monkeypatch.setattr(verdict, "examine", lambda device: {"dequantize": "is wrong"})
    assert verdict.verdict(CPU, repeat=True) == verdict.verdict(CPU) == {"dequantize": "is wrong"}
    assert list(fresh.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("dequantize", "dequantise"),
        lambda text: text.replace("null", "0"),
        lambda text: "[]",
        lambda text: '{"ops": {}}',
    ],
)
def test_a_damaged_verdict_is_replaced(monkeypatch, fresh, damage):
    only(monkeypatch, "dequantize")
    monkeypatch.setattr(verdict, "examine", lambda device: {"dequantize": None})
    verdict.verdict(CPU)
    (file,) = fresh.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    verdict.verdict(CPU)
    assert file.read_text() == whole


def test_the_key_of_a_verdict(monkeypatch, tmp_path):
    """Card, driver, versions and sources; the name of the device is not in it."""
    card = {"name": "NVIDIA H100", "major": 9, "minor": 0}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**card))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    driver = 12040
    root = tmp_path / "lightning_qlora"
    for part in ("kernels", "quantization"):
        shutil.copytree(verdict.PACKAGE / part, root / part)
    monkeypatch.setattr(verdict, "PACKAGE", root)
    seen = [verdict.setup(torch.device("cuda", 0))]
    assert verdict.setup(torch.device("cuda", 1)) == seen[0]
    assert seen[0]["card"] == "NVIDIA H100, 9.0" and seen[0]["supported by the driver"] == "12040"
    for change in (
        lambda: card.update(name="NVIDIA H200"),
        lambda: card.update(minor=1),
        lambda: monkeypatch.setattr("triton.__version__", "99"),
        lambda: monkeypatch.setattr("torch.__version__", "99"),
        lambda: monkeypatch.setattr("lightning_qlora.__version__", "99"),
        lambda: (root / "kernels" / "triton" / "tiles.json").write_text("{}"),
        lambda: (root / "quantization" / "blockwise.py").write_text(""),
    ):
        change()
        seen.append(verdict.setup(torch.device("cuda", 0)))
    driver = 12050
    seen.append(verdict.setup(torch.device("cuda", 0)))
    assert len({repr(facts) for facts in seen}) == len(seen)


def in_forks(number, call):
    """Whether call(rank) is true in several processes at the same time."""
    context = get_context("fork")

    def run(rank):
        torch.set_num_threads(1)  # a fork does not have the threads of its parent: it would wait for them
        sys.exit(not call(rank))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes == [0] * number


def test_of_several_processes_at_the_first_use_one_checks(monkeypatch, tmp_path, fresh):
    right = dict.fromkeys(verify.OPS)

    def examine(device):
        with (tmp_path / "checks").open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return right

    monkeypatch.setattr(verdict, "examine", examine)
    assert in_forks(3, lambda rank: verdict.verdict(CPU) == right)
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
            is_expected = verdict.verdict(CPU) == dict.fromkeys(verify.OPS, expected)
            return is_expected and stored == ("checked again in each process" not in caplog.text)

        assert in_forks(1, reads)
        assert os.listdir(folder) == files
        os.chmod(folder, 0o755)  # so that it can be removed


def test_a_folder_that_others_can_write_to_is_not_used(monkeypatch, fresh, caplog):
    fresh.mkdir()
    fresh.chmod(0o777)
    found(monkeypatch)
    assert verdict.verdict(CPU) == dict.fromkeys(verify.OPS)
    assert not list(fresh.iterdir()) and "can be written by other users" in caplog.text


def train(dtype=torch.bfloat16, rows=20):
    """Losses of a run that meets new variants: more rows from its third step on, and parameters of two types."""
    torch.manual_seed(3)
    draw = torch.Generator().manual_seed(0)
    weight = reference.quantize(torch.randn(64, 128, generator=draw) / 11, "nf4", 64, True)
    a = (torch.randn(8, 128, generator=draw) / 11).requires_grad_()
    b = torch.zeros(64, 8, requires_grad=True)
    bias = torch.zeros(64).half().requires_grad_()
    optimizer = PagedAdamW8bit([a, b, bias], lr=1e-2)
    losses = []
    for step in range(5):
        x = torch.randn(rows if step < 2 else 3 * rows, 128, generator=draw)
        seed = torch.randint(1 << 62, (1,))
        loss = lora_linear(x.half(), weight, bias, LoRA(a, b, 0.5, 0.2, seed)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, torch.rand(()).item()]


@pytest.mark.parametrize(
    ("kernel", "failing"),
    [
        ("_down_kernel", ["linear_backward", "lora_project"]),
        ("_up_kernel", ["linear_into"]),
        ("_gradients_kernel", ["linear_backward"]),
        ("_adamw_kernel", ["adamw_step"]),
    ],
)
def test_a_variant_that_fails_in_mid_run_falls_back_without_a_change_of_the_run(monkeypatch, recwarn, kernel, failing):
    """The fourth launch of a kernel and all later ones; of AdamW that is the second of two types of parameters."""
    found(monkeypatch)
    monkeypatch.setattr(ops, "backend", lambda device: eager)
    expected = train()
    monkeypatch.setattr(ops, "backend", backends.backend)
    run = MODULE["launch"].Launch.__call__
    calls = []

    def fails_later(self, *arguments):
        calls.append(getattr(self._kernel, "__name__", ""))
        if calls[-1] == kernel and calls.count(kernel) > 3:
            raise RuntimeError("out of resource: shared memory")
        return run(self, *arguments)

    monkeypatch.setattr(MODULE["launch"].Launch, "__call__", fails_later)
    assert train() == pytest.approx(expected, rel=1e-3)
    assert backends.backend(CPU).failures == dict.fromkeys(failing, "RuntimeError: out of resource: shared memory")
    assert len(said(recwarn)) == len(failing)
    assert calls.count(kernel) == 3 + len(failing), "an op that failed launches no kernel again"


@pytest.mark.parametrize("in_8bit", [False, True], ids=["32-bit", "8-bit"])
def test_a_step_that_raises_after_it_wrote_is_not_repeated(monkeypatch, recwarn, in_8bit):
    """A second step from the moments of the first one would be silently wrong."""
    found(monkeypatch)
    launch = MODULE["launch"].Launch
    run = launch.__call__

    def writes_and_raises(self, *arguments):
        run(self, *arguments)
        raise RuntimeError("an error after the launch")

    size = 4096 if in_8bit else 64
    param = torch.nn.Parameter(torch.ones(size))
    dense = torch.nn.Parameter(torch.ones(size))
    optimizer = PagedAdamW8bit([param], lr=0.1)
    param.grad = torch.linspace(-1, 1, size)
    dense.grad = torch.linspace(-1, 1, size)
    backends.backend(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "__call__", writes_and_raises)
        with pytest.raises(RuntimeError, match="an error after the launch"):
            optimizer.step()
    torch.optim.AdamW([dense], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(param, dense, rtol=0, atol=2e-3)
    assert not backends.backend(CPU).failures and not said(recwarn)


def test_an_error_of_the_arguments_or_of_memory_is_raised_and_not_a_fall_back(monkeypatch, recwarn):
    found(monkeypatch)
    made = backends.backend(CPU)
    with pytest.raises((RuntimeError, ValueError)):
        made.lora_project(torch.zeros(2, 64), LoRA(torch.zeros(4, 63), torch.zeros(8, 4)))
    monkeypatch.setattr(kernels, "dequantize", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        backends.Backend(CPU, kernels).dequantize(None, torch.float32)
    assert not made.failures and not said(recwarn)


def test_all_ranks_take_the_path_of_the_rank_whose_kernels_fail(monkeypatch, tmp_path):
    found(monkeypatch)

    def agrees(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        warnings.simplefilter("ignore")
        if rank:
            backends.backend(CPU).fall_back({"adamw_step": "differs"})
        module = torch.nn.Sequential(torch.nn.Linear(64, 64))
        plugin = QLoRAPrecision(r=2)
        plugin.convert_module(module)
        plugin.on_setup_optimizer(torch.optim.SGD(module.parameters(), 0.1))  # as Fabric does
        return backends.backend(CPU).failures == {"adamw_step": "differs" if rank else "fails on another rank"}

    assert in_forks(2, agrees)


def test_without_a_second_process_the_check_runs_in_this_one(monkeypatch):
    """As on a card in exclusive mode; torch's modes do not change it."""
    only(monkeypatch, "dequantize", "adamw_step")
    monkeypatch.setattr(verdict, "start", start)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"):
        assert verdict.examine(CPU) == {"dequantize": None, "adamw_step": None}


@pytest.mark.slow
def test_on_a_gpu_another_interpreter_of_python_checks(monkeypatch, tmp_path):
    """One op ends the process, one hangs, one is wrong."""
    root = tmp_path / "lightning_qlora"
    shutil.copytree(verdict.PACKAGE, root)
    for name, old, new in (
        ("quantize", "device, flat =", "import os; os._exit(3)\n    device, flat ="),
        ("adamw_kernel", "per_program = STATE", "while True:\n        pass\n    per_program = STATE"),
        ("dequantize", "+ tl.load(nested + n_nested)", ""),
    ):
        file = root / "kernels" / "triton" / f"{name}.py"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
    monkeypatch.setattr(verdict, "start", start)
    monkeypatch.setattr(verdict, "PACKAGE", root)
    monkeypatch.setattr(verdict, "LIMIT", 20.0)
    only(monkeypatch, "quantize", "dequantize", "adamw_step")
    failures = verdict.examine(CPU)
    assert failures["quantize"] == verdict.ENDED and failures["adamw_step"] == "no result after 20 s"
    assert failures["dequantize"].startswith("differs from the reference")


def test_what_the_interpreter_makes_of_bf16_without_the_repairs_is_a_fault():
    """It multiplies the bits: errors of 1e9 and more. A new process, which has no repairs."""
    code = (
        "import torch; from lightning_qlora.kernels import triton, verify; "
        "print(verify.fault(triton, torch.device('cpu'), 'linear_into'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.match(r"differs from the reference by \d.*e\+\d\d of the largest value.*bfloat16", run.stdout)
