"""Repairs to Triton's interpreter, for tests alone: it keeps bf16 as its bits and then computes with the bits.

Triton declines to mend it (triton-lang/triton#11584). Repaired: fp32 -> bf16 rounds to nearest even, tl.dot takes bf16.
Our kernels compute in fp32 and touch bf16 in loads, stores, casts and dots alone, so these are all they need.
"""

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import IO, Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from lightning_qlora.kernels import verdict

start = verdict.start  # `conftest` replaces it


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)


def start_in_fork(device: torch.device, ops: list[str]) -> tuple[Callable[[], object], IO[str]]:
    """`verdict.start` by a fork, which has the repairs, and the functions that a test replaced."""
    read, write = os.pipe()

    def run() -> None:
        torch.set_num_threads(1)  # a fork does not have the threads of its parent
        with os.fdopen(write, "w") as output, ThreadPoolExecutor(1) as pool:  # torch's modes are those of a thread
            pool.submit(verdict.check, str(device), ops, output).result()

    child = get_context("fork").Process(target=run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of the parent's threads
        child.start()
    os.close(write)
    return child.kill, os.fdopen(read)


def repair() -> None:
    """Install the repairs in this process."""
    convert = interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def convert_float(data: np.ndarray, source: Any, goal: Any, rounding: Any) -> np.ndarray:
        if (source, goal) == (tl.float32, tl.bfloat16):
            return _to_bf16(data)
        return (
            _from_bf16(data) if (source, goal) == (tl.bfloat16, tl.float32) else convert(data, source, goal, rounding)
        )

    def create_dot(self: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, c, *options)
        factors = [
            _from_bf16(operand.data).view(np.float32).reshape(operand.data.shape)
            if operand.dtype.scalar == tl.bfloat16
            else operand.data
            for operand in (a, b)
        ]
        return interpreter.TensorHandle(np.matmul(*factors) + c.data, c.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
