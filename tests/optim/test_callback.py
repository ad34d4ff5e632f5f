import gc
import pickle

import lightning as L
import pytest
import torch

from lightning_qlora.optim.adamw import PagedAdamW
from lightning_qlora.optim.pager import PagedOptimizer, PagingReport
from tests.conftest import launch
from tests.optim.runs import ManualRegression, Regression, data, fit, parameters
from tests.optim.stand_in import assert_all_paged

CLIPPED = {"precision": "bf16-mixed", "gradient_clip_val": 0.1}


@pytest.mark.parametrize(("kind", "options"), [(Regression, {}), (ManualRegression, {}), (Regression, CLIPPED)])
def test_paged_runs_equal_unpaged_ones_and_leave_nothing(stand_in, kind, options):
    """Two runs with one callback; autocast and clipping go through the same closure."""
    plain = kind()
    paged = kind(placed=stand_in)
    callback = PagedOptimizer()
    for _ in range(2):
        fit(plain, epochs=1, **options)
        fit(paged, callbacks=callback, epochs=1, **options)
        assert torch.equal(parameters(plain), parameters(paged))
        assert stand_in.pools and stand_in.nbytes == 0


@pytest.mark.parametrize("make_optimizer", [None, lambda params: PagedAdamW(params, lr=1e-2)])
def test_resume_is_bit_equal(stand_in, make_optimizer, tmp_path):
    """From a checkpoint of a paged run: paged, after a refusal, and without the callback."""
    straight, refused, paged, unpaged = (Regression(make_optimizer) for _ in range(4))
    half = tmp_path / "half.ckpt"
    fit(straight)
    fit(Regression(make_optimizer), callbacks=PagedOptimizer(), epochs=1, save=half)
    stand_in.budget = 1000
    with pytest.raises(MemoryError, match=r"MiB of .* memory were requested and refused"):
        fit(refused, callbacks=PagedOptimizer(), ckpt_path=half)
    stand_in.budget = 2**40
    paged.placed = stand_in
    fit(paged, callbacks=PagedOptimizer(), ckpt_path=half)
    fit(unpaged, ckpt_path=half)
    assert torch.equal(parameters(straight), parameters(paged))
    assert torch.equal(parameters(straight), parameters(unpaged))
    del straight, unpaged  # without the callback the state of PagedAdamW is paged as long as the optimizer exists
    gc.collect()
    assert stand_in.nbytes == 0


def test_an_exception_in_training_frees_the_pages(stand_in):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ValueError("a bad batch")
            return self.loss(batch)

    with pytest.raises(ValueError, match="a bad batch"):
        fit(Failing(), callbacks=PagedOptimizer())
    assert stand_in.pools and stand_in.nbytes == 0


def fabric_run(callbacks, setup_apart, use_closure, placed=None, load=None, save=None):
    """The parameters after twice the data; `save` is written after the first time, `load` is read in its place."""
    fabric = L.Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
    module = Regression()
    if setup_apart:
        module = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(module.parameters(), lr=1e-2))
    else:
        module, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    state = {"module": module, "optimizer": optimizer}

    def step(x, y):
        def closure():
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.mse_loss(module.net(x), y))

        if use_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if placed is not None:
            assert_all_paged(placed, optimizer.optimizer)

    if load is None:
        for batch in data():
            step(*batch)
    else:
        fabric.load(load, state)
    if save is not None:
        fabric.save(save, state)
    for batch in data():
        step(*batch)
    return parameters(module)


@pytest.mark.parametrize(("setup_apart", "use_closure"), [(False, False), (True, True)])
def test_fabric(stand_in, setup_apart, use_closure, tmp_path):
    half = tmp_path / "half.ckpt"
    plain = fabric_run(None, setup_apart, use_closure)
    paged = fabric_run(PagedOptimizer(), setup_apart, use_closure, placed=stand_in, save=half)
    resumed = fabric_run(PagedOptimizer(), setup_apart, use_closure, placed=stand_in, load=half)
    assert torch.equal(plain, paged)
    assert torch.equal(plain, resumed)
    gc.collect()
    assert stand_in.nbytes == 0, "the optimizers are gone, and their pages with them"


@pytest.mark.parametrize(
    ("callback", "expected"),
    [(PagedOptimizer, [0, 1, 2, 2, 2, 3, 4, 4]), (lambda: None, 8 * [0])],
    ids=["paged", "of another run"],
)
def test_fabric_pages_before_the_first_step(managed, callback, expected):
    """Fabric's own hook, `on_after_optimizer_step`, is called when all state is in device memory already.

    Each tensor is paged before the next is made; biases are too small. Without the callback nothing is paged.
    """
    fabric = L.Fabric(accelerator="cpu", devices=1, callbacks=callback())
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
    assert counts == expected


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


def test_two_processes(tmp_path):
    """DDP through the Trainer, FSDP2 through torch's own fully_shard: bit-equal, every page placed, nothing left."""
    launch("tests.scripts.two_processes", tmp_path, devices=0)


def test_a_copy_of_the_callback_has_its_own_pages():
    callback = pickle.loads(pickle.dumps(PagedOptimizer(min_numel=7)))
    assert callback._pager.min_numel == 7
    assert callback.report() == PagingReport("plain", "no state on a GPU", 0, 0, 0)
