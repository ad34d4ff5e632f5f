"""What autograd keeps for the backward pass of one decoder layer, by the module that saved it.

    python -m benchmarks.saved_tensors [--tokens 4096] [--hidden 4096] [--intermediate 14336] [--r 64]

The layer is one of a Llama in bf16, by default with the shapes of Llama-3.1-8B, converted as `convert` does. Its
tensors have no data. A tensor that several modules save is counted for the first of them; the column "shared" has the
bytes of tensors that another module, or this one, has saved before.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import measure
from lightning_qlora import convert
from lightning_qlora.layers.qlora_linear import adapted_layers


def decoder_layer(options: argparse.Namespace) -> tuple[nn.Module, Callable[[], Any]]:
    """One converted layer, and a function that runs it."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config: Any = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    convert(layer, r=options.r, lora_dropout=0.05, compute_dtype="bf16")  # as on a GPU
    x = torch.zeros(1, options.tokens, options.hidden, dtype=torch.bfloat16, requires_grad=True)
    position = torch.arange(options.tokens).unsqueeze(0)
    cos_sin = LlamaRotaryEmbedding(config)(x, position)
    return layer.train(), lambda: layer(x, position_embeddings=cos_sin, position_ids=position)


def saved_by_module(layer: nn.Module, run: Callable[[], Any]) -> list[tuple[str, int, int, str]]:
    """(module, bytes, bytes that were saved before, dtypes) in the order of the forward pass."""
    held = [*layer.parameters(), *layer.buffers()]
    for part in adapted_layers(layer).values():
        held += [part.packed, part.absmax, part.nested]
    own = {tensor.untyped_storage()._cdata for tensor in held}
    stack = [""]
    kept = list[Tensor]()
    found = dict[str, list[tuple[int, bool, torch.dtype]]]()
    seen = set[int]()

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in own:
            found.setdefault(stack[-1] or "the layer itself", []).append(
                (tensor.untyped_storage().nbytes(), address in seen, tensor.dtype)
            )
            seen.add(address)
            kept.append(tensor)  # keeps the address from being used again
        return tensor

    hooks = []
    for name, module in layer.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: (stack.pop(), None)[1]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for hook in hooks:
        hook.remove()
    rows = []
    for name, entries in found.items():
        new = {(size, dtype) for size, shared, dtype in entries if not shared}
        dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in new}))
        own_bytes = sum(size for size, shared, _ in entries if not shared)
        rows.append((name, own_bytes, sum(size for size, shared, _ in entries if shared), dtypes))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 4096, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "r": 64}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    with FakeTensorMode():
        rows = saved_by_module(*decoder_layer(options))
    total = sum(own for _, own, _, _ in rows)
    table = [[name, f"{own / 1e6:.1f}", f"{shared / 1e6:.1f}", types] for name, own, shared, types in rows]
    table.append(["**all**", f"**{total / 1e6:.1f}**", "", ""])
    print(measure.table(["module", "MB", "shared, MB", "types"], table))


if __name__ == "__main__":
    main()
