"""kept: how tensors are made that stay after the call that makes them.

The "reduce-overhead" of torch.compile runs a function once before it captures a CUDA graph. In this run all memory that
the thread allocates belongs to the graphs. If a tensor that is made then is kept, torch raises an error, or gives its
memory to other tensors.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")


def kept(make: Callable[[], Made], device: torch.device | str) -> Made:
    """`make()`, on a GPU in another thread, on the stream of this one."""
    device = torch.device(device)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return make()
    stream = torch.cuda.current_stream(device)

    def on_stream() -> Made:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_stream).result()
