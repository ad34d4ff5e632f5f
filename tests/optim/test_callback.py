import gc
import os
import pickle
import subprocess
import sys

import lightning as L
import pytest
import torch

from lightning_qlora.optim.adamw import PagedAdamW8bit
from lightning_qlora.optim.pager import PagedOptimizer
from tests.conftest import PORTS, RANKS, ROOT, TORCHRUN
from tests.optim.runs import ManualRegression, Regression, data, fit, parameters
from tests.optim.stand_in import assert_all_paged


@pytest.fixture
def half(tmp_path):
    """The checkpoint of a paged run after half of its steps."""

    def save(make_optimizer=None):
        path = tmp_path / "half.ckpt"
        fit(Regression(make_optimizer), callbacks=PagedOptimizer(), epochs=1, save=path)
        return path

    return save


@pytest.mark.parametrize("kind", [Regression, ManualRegression])
def test_a_paged_run_equals_an_unpaged_one_and_leaves_nothing(stand_in, kind):
    plain = kind()
    paged = kind(placed=stand_in)
    fit(plain)
    fit(paged, callbacks=PagedOptimizer())
    assert torch.equal(parameters(plain), parameters(paged))
    assert stand_in.pools
    assert stand_in.nbytes == 0


@pytest.mark.parametrize("make_optimizer", [None, lambda params: PagedAdamW8bit(params, lr=1e-2)])
def test_resume_is_bit_equal(stand_in, half, make_optimizer):
    straight = Regression(make_optimizer)
    fit(straight)
    resumed = Regression(make_optimizer, placed=stand_in)
    fit(resumed, callbacks=PagedOptimizer(), ckpt_path=half(make_optimizer))
    assert torch.equal(parameters(straight), parameters(resumed))
    del straight  # without the callback the state of PagedAdamW8bit is paged as long as the optimizer exists
    gc.collect()
    assert stand_in.nbytes == 0


def test_a_paged_checkpoint_resumes_without_paging(stand_in, half):
    straight = Regression()
    resumed = Regression()
    fit(straight)
    fit(resumed, ckpt_path=half())
    assert torch.equal(parameters(straight), parameters(resumed))


def test_several_fits_with_one_callback(stand_in):
    plain = Regression()
    paged = Regression(placed=stand_in)
    for _ in range(2):
        fit(plain, epochs=1)
    callback = PagedOptimizer()
    for _ in range(2):
        fit(paged, callbacks=callback, epochs=1)
        assert stand_in.nbytes == 0
    assert torch.equal(parameters(plain), parameters(paged))


def test_with_precision_plugin_and_clipping(stand_in):
    """bf16 autocast, gradient clipping and accumulation all go through the same closure."""
    plain = Regression()
    paged = Regression(placed=stand_in)
    options = {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 1}
    fit(plain, **options)
    fit(paged, callbacks=PagedOptimizer(), **options)
    assert torch.equal(parameters(plain), parameters(paged))


def test_after_a_refusal_the_run_goes_on_from_its_checkpoint(stand_in, half):
    straight = Regression()
    fit(straight)
    path = half()
    stand_in.budget = 1000
    with pytest.raises(MemoryError, match=r"MiB of .* memory were requested and refused"):
        fit(Regression(), callbacks=PagedOptimizer(), ckpt_path=path)
    assert stand_in.nbytes == 0
    stand_in.budget = 2**40
    resumed = Regression()
    fit(resumed, callbacks=PagedOptimizer(), ckpt_path=path)
    assert torch.equal(parameters(straight), parameters(resumed))


def test_an_exception_in_training_frees_the_pages(stand_in):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ValueError("a bad batch")
            return self.loss(batch)

    with pytest.raises(ValueError, match="a bad batch"):
        fit(Failing(), callbacks=PagedOptimizer())
    assert stand_in.pools
    assert stand_in.nbytes == 0


def fabric_run(callbacks, setup_apart=False, use_closure=False, stand_in=None, state=None, start=0):
    fabric = L.Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
    module = Regression()
    if setup_apart:
        module = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(module.parameters(), lr=1e-2))
    else:
        module, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    if state is not None:
        fabric.load(state, {"module": module, "optimizer": optimizer})
    for batch in (list(data()) * 2)[start:]:

        def closure(batch=batch):
            optimizer.zero_grad()
            x, y = batch
            loss = torch.nn.functional.mse_loss(module.net(x), y)
            fabric.backward(loss)
            return loss

        if use_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if stand_in is not None:
            assert_all_paged(stand_in, optimizer.optimizer)
    return parameters(module)


@pytest.mark.parametrize("setup_apart", [False, True])
@pytest.mark.parametrize("use_closure", [False, True])
def test_fabric(stand_in, setup_apart, use_closure):
    plain = fabric_run(None, setup_apart, use_closure)
    paged = fabric_run(PagedOptimizer(), setup_apart, use_closure, stand_in=stand_in)
    assert torch.equal(plain, paged)
    gc.collect()
    assert stand_in.nbytes == 0, "the optimizer is gone, and its pages with it"


def test_fabric_pages_before_the_first_step(managed):
    """Fabric's own hook, `on_after_optimizer_step`, is called when all state is in device memory already."""
    callback = PagedOptimizer()
    fabric = L.Fabric(accelerator="cpu", devices=1, callbacks=callback)
    module = fabric.setup_module(Regression())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(module.parameters()))
    fabric.backward(module.net(torch.randn(4, 80)).sum())
    counts = []
    zeros_like = torch.zeros_like

    def watched(*args, **kwargs):
        counts.append(sum(managed.owns(t) for s in optimizer.optimizer.state.values() for t in s.values()))
        return zeros_like(*args, **kwargs)

    torch.zeros_like = watched
    try:
        optimizer.step()
    finally:
        torch.zeros_like = zeros_like
    assert counts == [0, 1, 2, 2, 2, 3, 4, 4], "each tensor is paged before the next is made; biases are too small"


def test_fabric_load_before_the_first_step_puts_no_state_on_the_device(pinned, tmp_path):
    """A step hook, which torch has for all optimizers, would page only what fabric.load has put there already."""
    module = Regression()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module.net(torch.randn(4, 80)).sum().backward()
    optimizer.step()
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "trained.ckpt", {"optimizer": optimizer.state_dict()})
    resumed = L.Fabric(accelerator="cpu", devices=1, callbacks=PagedOptimizer())
    module, optimizer = resumed.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    resumed.load(tmp_path / "trained.ckpt", {"optimizer": optimizer})
    assert_all_paged(pinned, optimizer.optimizer, least=4)
    assert pinned.pools[0].most_on_device == 0


def test_optimizers_of_other_runs_are_not_paged(managed):
    mine, other = (L.Fabric(accelerator="cpu", devices=1, callbacks=c) for c in (PagedOptimizer(), None))
    optimizers = []
    for fabric in (mine, other):
        module = Regression()
        module, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters()))
        fabric.backward(module.net(torch.randn(4, 80)).sum())
        optimizer.step()
        optimizers.append(optimizer.optimizer)
    assert_all_paged(managed, optimizers[0])
    assert not any(managed.owns(t) for values in optimizers[1].state.values() for t in values.values())


def test_fabric_resume(stand_in, tmp_path):
    straight = fabric_run(None)
    fabric = L.Fabric(accelerator="cpu", devices=1, callbacks=PagedOptimizer())
    module = Regression()
    module, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    for x, y in data():
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.mse_loss(module.net(x), y))
        optimizer.step()
    fabric.save(tmp_path / "half.ckpt", {"module": module, "optimizer": optimizer})
    resumed = fabric_run(PagedOptimizer(), stand_in=stand_in, state=tmp_path / "half.ckpt", start=10)
    assert torch.equal(straight, resumed)


def test_two_processes(tmp_path):
    """DDP through the Trainer, FSDP2 through torch's own fully_shard: bit-equal, every page placed, nothing left."""
    command = [sys.executable, "-m", "tests.scripts.two_processes"]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(PORTS)), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **TORCHRUN, **own, **dict.fromkeys(RANKS, rank)},
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    for process in ranks:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        for mode in ("ddp", "fsdp2", "fsdp2_8bit"):
            assert f"{mode}: bit-equal, all paged, nothing left" in output


def test_a_copy_of_the_callback_has_its_own_pages():
    callback = pickle.loads(pickle.dumps(PagedOptimizer(min_numel=7)))
    assert callback._pager.min_numel == 7
    assert callback.report().tensors == 0
