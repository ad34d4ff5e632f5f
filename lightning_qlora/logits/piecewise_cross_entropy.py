"""Cross entropy of deferred logits in pieces of rows: neither the logits nor their gradient exist as a whole.

The gradient of a piece is computed together with its loss, so that each piece is multiplied once. It is scaled in the
backward pass, in fp32: a loss scale of your own loop acts before anything is rounded.
torch's `F.linear_cross_entropy(options=...)` does the same with less memory, but in bf16 its loss was 2% off (10.69 for
10.918, torch 2.13), and it takes a weight, so that a head in 4 bits could not use it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qlora.tensors.values import has_values

PIECE_ELEMENTS = 1 << 24  # logits in a piece: 64 MiB in fp32


def piecewise_cross_entropy(logits: Any, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """`F.cross_entropy` of `DeferredLogits` [rows, vocabulary] and the index of the right class, [rows].

    `reduction` is "mean" or "sum".
    """
    records = torch.is_grad_enabled()
    loss: Tensor = _PiecewiseCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, target, ignore_index, reduction, records, *logits.parameters()
    )
    return loss


class _PiecewiseCrossEntropy(torch.autograd.Function):
    """The same as a function of the parameters of the logits, which get the gradients.

    If code asked for the gradient of the logits since, they get it, as a whole, and their parameters through them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Any, target: Tensor, ignore_index: int, reduction: str, records: bool, *_: Tensor
    ) -> Tensor:
        needed = ctx.needs_input_grad[5:] if records else ()
        loss, grads = _loss_and_gradients(logits, target, ignore_index, needed)
        ctx.save_for_backward(target, *grads)
        ctx.logits = logits
        ctx.ignore_index = ignore_index
        ctx.count = None
        if reduction == "mean":
            ctx.count = (target != ignore_index).sum()
            loss = loss / ctx.count  # NaN without a row that counts, as in torch
        dtype = logits.dtype
        if torch.is_autocast_enabled(target.device.type):
            dtype = torch.float32
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.float()
        if ctx.count is not None:
            grad = torch.where(ctx.count == 0, 0.0, grad / ctx.count)
        target, *grads = ctx.saved_tensors
        if ctx.logits.is_asked_for:
            values = ctx.logits.values()
            _, of_logits = _losses_and_gradient(values, target, ctx.ignore_index)
            return (of_logits * grad).to(values.dtype), *[None] * (4 + len(grads))
        grads = [value if value is None else value * grad for value in grads]
        return None, None, None, None, None, *grads


def _loss_and_gradients(
    logits: Any, target: Tensor, ignore_index: int, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum of the losses of all rows, in fp32, and its gradients.

    `needed` says which of the logits' parameters need a gradient; empty: none.
    """
    losses = torch.zeros(len(target), dtype=torch.float32, device=target.device)
    hidden = logits.hidden.detach()
    parameters = logits.parameters()[1:]
    needs_hidden, *needs_others = needed or [False] * (1 + len(parameters))
    trained = [p for p, is_needed in zip(parameters, needs_others, strict=True) if is_needed]
    of_hidden = torch.zeros_like(hidden) if needs_hidden else None
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
    weight = logits.source.half_weight(len(hidden))
    for rows in _pieces(target, ignore_index, logits.shape[-1]):
        piece = hidden[rows].requires_grad_(needs_hidden)
        with torch.set_grad_enabled(bool(needed)):
            values = logits.compute(piece, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            losses[rows], grad = _losses_and_gradient(values.detach(), target[rows], ignore_index)
        if not needed:
            continue
        inputs = trained
        if needs_hidden:
            inputs = [piece, *trained]
        grads = list(torch.autograd.grad(values, inputs, grad.to(values.dtype)))
        del values, grad  # before the next piece is computed
        if of_hidden is not None:
            of_hidden[rows] = grads.pop(0)
        for total, value in zip(sums, grads, strict=True):
            total += value
    of_trained = iter(total.to(p.dtype) for total, p in zip(sums, trained, strict=True))
    return losses.sum(), [of_hidden, *(next(of_trained) if is_needed else None for is_needed in needs_others)]


def _losses_and_gradient(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Cross entropy of every row and its gradient [rows, vocabulary], fp32, in one buffer of the size of the logits.

    With p = softmax(z), for a row that counts:

        loss = logsumexp(z) - z[y]
        gradient = p - onehot(y)

    `F.cross_entropy` and its gradient take 1.7 (bf16) to 1.9 (fp32) times the memory of a piece, and more time.
    """
    z = logits.to(torch.float32, copy=True)
    z -= z.amax(dim=1, keepdim=True)
    counts = (target != ignore_index).unsqueeze(1)
    label = torch.where(counts, target.unsqueeze(1), 0)
    of_label = z.gather(1, label)
    z.exp_()
    total = z.sum(dim=1, keepdim=True)
    losses = counts * (total.log() - of_label)
    z *= counts / total
    z.scatter_add_(1, label, -counts.float())
    return losses.squeeze(1), z


def _pieces(target: Tensor, ignore_index: int, vocabulary: int) -> list[Any]:
    """The rows of each piece; those with an ignored label are left out where their number is known without waiting."""
    size = max(1, PIECE_ELEMENTS // vocabulary)
    if target.device.type == "cpu" and has_values(target):
        return [rows for rows in torch.split((target != ignore_index).nonzero().squeeze(1), size) if len(rows)]
    starts = range(0, len(target), size)
    if not has_values(target):  # the pieces of `plan` are alike
        starts = starts[:2]
    return [slice(start, start + size) for start in starts]
