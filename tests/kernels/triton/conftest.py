"""Triton decides at import whether it interprets or compiles, so the tests need two processes.

Where TRITON_INTERPRET is not 1, only the compile gate, the launches, the GPU tests and `test_interpreted.py` are
collected; the last one runs this folder again, with the variable set, and then the tests of the numbers are.
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OUTSIDE = ["test_interpreted.py", "test_compiled.py", "test_gpu.py", "test_launch.py"]
# Two processes that take as long as each other.
PARTS = (
    ("experts", "grouped", "one_rounding", "quantize", "tiles"),
    ("verify", "lora_products", "linear", "prepared"),
)
INSIDE = [f"test_{name}.py" for part in PARTS for name in part]

collect_ignore = OUTSIDE if INTERPRETED else INSIDE

if INTERPRETED:
    from lightning_qlora.kernels import backends, self_test
    from tests.kernels.triton.interpreter import repair

    repair()
    backends.verdict = lambda *_: dict.fromkeys(self_test.OPS)  # `test_verify.py` checks the kernels
