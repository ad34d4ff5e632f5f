"""Tensors of a GGUF file, each read and dequantized when transformers converts it.

transformers reads those of Qwen3.5 and LFM2 this way itself. It dequantizes a file of another architecture as a whole,
before it loads the first tensor; here the same functions do so for one tensor at a time.
Source: transformers 5.24, modeling_gguf_pytorch_utils.py (load_gguf_checkpoint).
"""

from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# They make one tensor of several (experts), or several of one: transformers reads such files as a whole.
NOT_ONE_TO_ONE = ("Qwen2MoeTensorProcessor", "GptOssTensorProcessor", "GPT2TensorProcessor", "MiniMaxM2TensorProcessor")


class UnreadTensor(partial[Tensor]):
    """A call that reads a tensor of a file: `[...]` does so, as for a slice of safetensors."""

    def __getitem__(self, _: Any) -> Tensor:
        """The tensor."""
        return self()

    def is_floating_point(self) -> bool:
        """True: it is dequantized when it is read."""
        return True


def unread_tensors(path: str, model: nn.Module, dtype: torch.dtype) -> dict[str, UnreadTensor] | None:
    """Parameter of a model -> its tensor in a GGUF file; None if they are not one to one."""
    upstream, gguf = import_module("transformers.modeling_gguf_pytorch_utils"), import_module("gguf")
    reader = gguf.GGUFReader(path)
    (architecture, *_) = upstream.read_field(reader, "general.architecture")
    kind = upstream.TENSOR_PROCESSORS.get(architecture, upstream.TensorProcessor)
    if kind.__name__ in NOT_ONE_TO_ONE:
        return None
    processor = kind(config=upstream.load_gguf_checkpoint(path)["config"])
    names = upstream.get_gguf_hf_weights_map(model, processor)

    def read(tensor: Any) -> Tensor:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        made = processor.process(values, tensor.name, tensor_key_mapping=names, parsed_parameters={})
        return torch.from_numpy(np.copy(made.weights)).to(dtype)

    return {names[t.name]: UnreadTensor(read, t) for t in reader.tensors if t.name in names}
