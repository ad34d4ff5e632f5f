"""A change to transformers, with the upstream file, the reason, and what would remove it."""

import inspect
from typing import Any

from lightning_qlora.upstream_changes import replaces


@replaces("transformers.modeling_utils:PreTrainedModel._load_pretrained_model")
def load_without_data(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Let `LaterWeights` say what the files of a model have, whose values are read after the model is sharded.

    Upstream: transformers/modeling_utils.py, PreTrainedModel._load_pretrained_model, reads all values at once.
    Supported ways tried: an HfQuantizer's operations, which get the values; device_map="meta", which leaves buffers
    and new heads without data.
    Removed by: from_pretrained returning a model whose values are read later.
    """
    arguments = inspect.signature(original).bind(*args, **kwargs).arguments
    later = getattr(arguments["load_config"].hf_quantizer, "later", None)
    if later is None:
        return original(*args, **kwargs)
    return later.load(original, arguments)  # without_data.py
