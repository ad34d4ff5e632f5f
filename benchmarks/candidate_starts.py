"""Initializations that were tried and are not part of the package, as starts of `benchmarks.fine_tuning`.

    gradient      A: the right singular vectors of the mean gradient of W, as long as the rows of the default A; B = 0
                  (the directions of LoRA-GA, Wang et al. 2024, on an unchanged 4-bit base)
    whitened      the same of G C^(-1/2), A = V^T C^(-1/2): of equal inputs of lora_B, those with the largest gradient
    shared        half of the rank as in "calibrated", half as in "gradient"
    preserved     half of the rank for the largest directions of W diag(d), the base quantized without them, the other
                  half for the error (SRR, arXiv 2602.02001)
    outputs       as "calibrated", with the rows weighted by the root mean square of their gradients
    full          as "calibrated", with C in place of its diagonal (the exact form of QERA)
    feedback      the codes of the base chosen with error feedback (GPTQ, Frantar et al. 2023), then "full"
    random_text   "calibrated" with inputs from random tokens
    own_text      "calibrated" with inputs from text that the 4-bit model writes

C is the mean of x x^T over the inputs x of a layer, d the square roots of its diagonal. All come from the first BATCHES
batches ("calibrated" in the package uses those of the first step).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_qlora.kernels import ops
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.quantization.codebooks import codebook
from lightning_qlora.quantization.packed_weight import PackedWeight, scales_of
from lightning_qlora.starts.calibrated import MIN_INPUT_RMS, Factors, calibrated_adapter, largest_singular

BATCHES, TOKENS = 16, 96
DAMPING = 0.1  # of the mean of C's diagonal, is added to C: 16 batches have fewer rows than down_proj has inputs


class Layer(NamedTuple):
    """What a start may use, in fp32: W [out, in], C [in, in], the gradient G [out, in], and the size of each output's
    gradient [out]."""

    layer: QLoRALinear
    weight: Tensor
    moments: Tensor
    gradient: Tensor
    output_size: Tensor

    @property
    def r(self) -> int:
        return int(self.layer.config.r)

    @property
    def input_rms(self) -> Tensor:
        """d."""
        return self.moments.diagonal().clamp_min(0).sqrt()

    @property
    def input_size(self) -> Tensor:
        """d, scaled to a mean square of 1 and bounded below, as `calibrated_adapter` does."""
        size = self.input_rms
        return (size / size.square().mean().sqrt()).clamp_min(MIN_INPUT_RMS)

    def error(self) -> Tensor:
        return self.weight - self.layer.packed_weight.dequantize(torch.float32)

    def power(self, exponent: float) -> Tensor:
        """C^exponent, damped; fp64."""
        values, vectors = torch.linalg.eigh(self.moments.double())
        values = values.clamp_min(0) + DAMPING * values.clamp_min(0).mean()
        return (vectors * values**exponent) @ vectors.T

    def split(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """A and B with s B A = u diag(sigma) v^T."""
        u, sigma, v = factors
        root = (sigma / self.layer.scaling).sqrt()
        return (v * root).T, u * root


class CandidateStart(Callback):
    """Initializes the adapters of a converted module with a start of this file, before the first step."""

    def __init__(self, start: str, dense: nn.Module, labels: Callable[[Tensor], Tensor]) -> None:
        self.start, self.dense, self.labels = start, dense, labels

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        batches: Iterable[dict[str, Tensor]] = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        if self.start == "random_text":
            batches = random_tokens(module.model.config.vocab_size, self.labels)  # type: ignore[union-attr]
        elif self.start == "own_text":
            batches = written_by(module.model)  # type: ignore[arg-type]
        with torch.random.fork_rng():
            found = measured(module.model, self.dense, list(islice(batches, BATCHES)))  # type: ignore[arg-type]
        for each in found:
            with torch.no_grad():
                each.layer.set_adapter(*(part.float() for part in STARTS[self.start](each)))


def measured(model: nn.Module, dense: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[Layer]:
    """Run the batches forward and backward, and collect what the starts use; the adapters of `model` must be 0."""
    layers, sums = adapted_layers(model), {}

    def hook(name: str) -> Callable[..., None]:
        def count(layer: QLoRALinear, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).float()
            moments, gradient, squares, rows = sums.get(name, (0.0, 0.0, 0.0, 0))

            def backward(grad: Tensor) -> None:
                flat = grad.flatten(0, -2).float()
                sums[name] = moments + x.T @ x, gradient + flat.T @ x, squares + flat.square().sum(0), rows + len(x)

            output.register_hook(backward)

        return count

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    for batch in batches:
        model(**batch).loss.backward()
    for each in hooks:
        each.remove()
    model.zero_grad()
    weights = dict(dense.named_parameters())
    return [
        Layer(layers[name], weights[f"{name}.weight"].detach().float(), moments / rows, gradient, squares.sqrt())
        for name, (moments, gradient, squares, rows) in sums.items()
    ]


def random_tokens(vocabulary: int, labels: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(vocabulary, (4, TOKENS), generator=generator)
        yield {"input_ids": tokens, "labels": labels(tokens)}


def written_by(model: Any) -> Iterator[dict[str, Tensor]]:
    """Samples from the model, begun with its first token, at temperature 1."""
    while True:
        begin = torch.full((4, 1), model.config.bos_token_id)
        model.eval()
        tokens = model.generate(
            input_ids=begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, max_new_tokens=TOKENS - 1,
            min_new_tokens=TOKENS - 1, pad_token_id=0,
        )  # fmt: skip
        model.train()
        yield {"input_ids": tokens, "labels": tokens}


def calibrated(of: Layer) -> tuple[Tensor, Tensor]:
    layer = of.layer
    return calibrated_adapter(of.weight, layer.packed_weight.to_bytes(), of.input_rms, layer.config, layer.seed_name)


def directions(of: Layer, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A: the given rows, scaled so that the mean square of A x is that of the default A; B = 0."""
    moments, default = of.moments.double(), of.layer.lora_A.detach().double()
    size, wanted = (((part @ moments) * part).sum(1).sqrt() for part in (rows, default))
    return rows * (wanted.mean() / size).unsqueeze(1), torch.zeros_like(of.layer.lora_B)


def gradient(of: Layer) -> tuple[Tensor, Tensor]:
    return directions(of, largest_singular(of.gradient, of.r)[2].T.double())


def whitened(of: Layer) -> tuple[Tensor, Tensor]:
    inverse = of.power(-0.5)
    return directions(of, largest_singular((of.gradient.double() @ inverse).float(), of.r)[2].T.double() @ inverse)


def shared(of: Layer) -> tuple[Tensor, Tensor]:
    half = of.r // 2
    error_a, error_b = calibrated(of)
    gradient_a, gradient_b = gradient(of)
    return torch.cat([error_a[:half], gradient_a[half:]]), torch.cat([error_b[:, :half], gradient_b[:, half:]], 1)


def preserved(of: Layer) -> tuple[Tensor, Tensor]:
    half, size = of.r // 2, of.input_size
    kept_a, kept_b = of.split(largest_singular(of.weight * size, half))
    rest, packed = of.weight - of.layer.scaling * kept_b @ (kept_a / size), of.layer.packed_weight
    of.layer.set_packed_weights(
        [ops.quantize(rest, packed.quant_type, packed.block_size, packed.nested_absmax is not None)]
    )
    error = (rest - of.layer.packed_weight.dequantize(torch.float32)) * size
    error_a, error_b = of.split(largest_singular(error, of.r - half))
    return torch.cat([kept_a, error_a]) / size, torch.cat([kept_b, error_b], 1)


def outputs(of: Layer) -> tuple[Tensor, Tensor]:
    rows = of.output_size / of.output_size.square().mean().sqrt()
    rows = rows.clamp_min(0.1).unsqueeze(1)
    lora_a, lora_b = of.split(largest_singular(rows * of.error() * of.input_size, of.r))
    return lora_a / of.input_size, lora_b / rows


def full(of: Layer) -> tuple[Tensor, Tensor]:
    lora_a, lora_b = of.split(largest_singular((of.error().double() @ of.power(0.5)).float(), of.r))
    return lora_a.double() @ of.power(-0.5), lora_b


def feedback(of: Layer) -> tuple[Tensor, Tensor]:
    packed = of.layer.packed_weight
    of.layer.set_packed_weights([round_with_feedback(of.weight, packed, of.power(1.0))])
    return full(of)


def round_with_feedback(weight: Tensor, packed: PackedWeight, moments: Tensor) -> PackedWeight:
    """The same scales with other codes: each column's rounding error is moved to the columns that follow (GPTQ)."""
    book = codebook(packed.quant_type)
    scales = scales_of(*packed.to_bytes()[1:3]).view(len(weight), -1).repeat_interleave(packed.block_size, 1)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).float()
    rest, codes, step = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8), packed.block_size
    for begin in range(0, weight.shape[1], step):  # columns after the block get the errors of the block in one product
        errors = []
        for column in range(begin, begin + step):
            scale = scales[:, column]
            codes[:, column] = book.order[torch.bucketize(rest[:, column] / scale.clamp_min(1e-30), book.bounds)]
            errors.append((rest[:, column] - book.levels[codes[:, column].int()] * scale) / factor[column, column])
            rest[:, column : begin + step] -= errors[-1].unsqueeze(1) * factor[column, column : begin + step]
        rest[:, begin + step :] -= torch.stack(errors, 1) @ factor[begin : begin + step, begin + step :]
    pairs = codes.view(-1, 2)
    return replace(packed, packed=(pairs[:, 0] << 4 | pairs[:, 1]).view_as(packed.packed))


STARTS: dict[str, Callable[[Layer], tuple[Tensor, Tensor]]] = {
    "gradient": gradient, "whitened": whitened, "shared": shared, "preserved": preserved, "outputs": outputs,
    "full": full, "feedback": feedback, "random_text": calibrated, "own_text": calibrated,
}  # fmt: skip
