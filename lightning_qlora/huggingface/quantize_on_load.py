"""Models larger than memory: transformers' `from_pretrained` quantizes each weight as it reads it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.huggingface.patches import QUANTIZER_FOR
from lightning_qlora.upstream_changes import make_changes


@contextmanager
def quantize_while_loading(
    config: QLoRAConfig, sharding: bool = False, adapter: Adapter | None = None
) -> Iterator[None]:
    """Within this, in this thread or task, every transformers `from_pretrained` quantizes each weight as it reads it.

    The model never exists in 16 bits: a weight stays memory-mapped until it is quantized, one after another. Calls with
    a `quantization_config`, and models in formats that transformers can't dequantize, load as usual. Without
    transformers 5 this does nothing: weights are quantized when the loaded model is converted.

    With `sharding` models stay on the meta device until the end of this context, when `fully_shard` has split them: so
    each rank reads its part alone. `adapter` is instead of the one in `config.adapter`.
    """
    if find_spec("transformers") is None or find_spec("transformers.core_model_loading") is None:
        yield
        return
    from lightning_qlora.huggingface.quantizer import Loading

    loading = Loading(config, sharding, adapter)
    import_module("transformers.modeling_utils")  # `make_changes` changes what is imported
    make_changes("transformers")
    token = QUANTIZER_FOR.set(loading.quantizer_for)
    try:
        with _one_after_another():
            yield
            for weights in loading.later:
                weights.read()
    except RuntimeError as error:
        # transformers names neither file nor shapes in this one
        if loading.mismatches and "ignore_mismatched_sizes" in str(error):
            raise loading.mismatches[0] from error
        for weights in loading.later:
            weights.explain(error)
        raise
    finally:
        QUANTIZER_FOR.reset(token)


@contextmanager
def _one_after_another() -> Iterator[None]:
    """Let transformers read a tensor when it converts it: its threads would copy the whole folder to the GPU before."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers 5, core_model_loading.py
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
