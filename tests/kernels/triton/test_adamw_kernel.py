import pytest
import torch
from torch.utils._pytree import tree_leaves

from lightning_qlora.kernels import adamw, ops
from lightning_qlora.kernels.adamw import AdamWStep
from lightning_qlora.kernels.triton.adamw_kernel import adamw8bit_step, adamw_step
from lightning_qlora.optim.adamw8bit import PagedAdamW8bit
from lightning_qlora.optim.state_8bit import MOMENTS
from tests.kernels.test_adamw import SCALARS, SHAPES, check_8bit_steps, draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32_bit_steps_equal_the_reference(dtype):
    ours = draw(0, dtype)
    theirs = draw(0, dtype)
    moments = [[torch.zeros(shape) for shape in SHAPES] for _ in range(4)]
    for step in range(1, 4):
        grads = draw(step, dtype)
        adamw_step(ours, grads, *moments[:2], AdamWStep(step, **SCALARS))
        adamw.adamw_step(theirs, grads, *moments[2:], AdamWStep(step, **SCALARS))
    for mine, yours in zip([*ours, *moments[0], *moments[1]], [*theirs, *moments[2], *moments[3]], strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_8_bit_steps_equal_a_float64_reference_in_every_code():
    check_8bit_steps(adamw8bit_step)


def test_tensors_of_several_types_and_many_rows(monkeypatch):
    """The optimizer launches once for each type."""
    kinds = [torch.float32, torch.bfloat16]
    params = [torch.randn(5 + i).to(kinds[i % 2]).requires_grad_() for i in range(37)]
    expected = [param.detach().clone().requires_grad_() for param in params]
    for mine, yours in zip(params, expected, strict=True):
        mine.grad = yours.grad = torch.randn(mine.shape).to(mine.dtype)
    PagedAdamW8bit(params, lr=1e-2).step()
    monkeypatch.setattr(ops, "backend", lambda device: adamw)
    PagedAdamW8bit(expected, lr=1e-2).step()
    for mine, yours in zip(params, expected, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-2 if mine.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_state_that_begins_off_a_16_byte_border():
    memory = torch.randn(4, 301)
    p, g, m, v = (row[1:] for row in memory)
    v.abs_()
    expected = [tensor.clone() for tensor in (p, g, m, v)]
    adamw_step([p], [g], [m], [v], AdamWStep(3, **SCALARS))
    adamw.adamw_step(*[[tensor] for tensor in expected], AdamWStep(3, **SCALARS))
    torch.testing.assert_close(p, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
def test_parameters_and_state_that_are_not_contiguous(bits):
    """As in a convolution in channels_last; state in the order of the elements, not of memory, as on a CPU."""
    params, expected = ([torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).T] for _ in range(2))
    params[0].requires_grad_()
    if bits == 32:
        states = [[[torch.zeros(30, 20).T] for _ in MOMENTS] for _ in range(2)]
        steps = adamw_step, adamw.adamw_step
    else:
        states = [[([torch.zeros(30, 20).byte().T], [torch.zeros(3)]) for _ in MOMENTS] for _ in range(2)]
        steps = adamw8bit_step, adamw.adamw8bit_step
    for step in range(1, 4):
        grads = [torch.randn(30, generator=torch.Generator().manual_seed(step)).expand(20, 30)]
        for update, tensors, state in zip(steps, (params, expected), states, strict=True):
            update(tensors, grads, *state, AdamWStep(step, **SCALARS))
    assert not params[0].is_contiguous() and not tree_leaves(states)[0].is_contiguous()
    torch.testing.assert_close(params[0].detach(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
def test_autograd_hears_that_a_parameter_was_written_to(bits):
    """Checkpoints too: they leave out what conversion froze unless its version says that it was trained since."""
    param = torch.ones(300, requires_grad=True)
    loss = param.square().sum()
    if bits == 32:
        adamw_step([param], [torch.ones(300)], [torch.zeros(300)], [torch.zeros(300)], AdamWStep(1, **SCALARS))
    else:
        m, v = (([torch.zeros(300, dtype=torch.uint8)], [torch.zeros(2)]) for _ in MOMENTS)
        adamw8bit_step([param], [torch.ones(300)], m, v, AdamWStep(1, **SCALARS))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
