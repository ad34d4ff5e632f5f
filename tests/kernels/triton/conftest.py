"""Triton decides at import whether it interprets or compiles, so the tests need two processes.

Where TRITON_INTERPRET is not 1, only the compile gate, the launches, the GPU tests and `test_interpreted.py` are
collected; the last one runs this folder again, with the variable set, and then the tests of the numbers are.
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OUTSIDE = ["test_interpreted.py", "test_compiled.py", "test_gpu.py", "test_launch.py"]
INSIDE = [
    f"test_{name}.py"
    for name in (
        "dequantize",
        "quantize",
        "linear",
        "lora_products",
        "matmul",
        "grouped",
        "one_rounding",
        "adamw_kernel",
        "training",
        "experts",
        "tiles",
        "verdict",
    )
]

collect_ignore = OUTSIDE if INTERPRETED else INSIDE

if INTERPRETED:
    from lightning_qlora.kernels import verdict
    from tests.kernels.triton.interpreter import repair, start_in_fork

    repair()
    verdict.start = start_in_fork
    verdict.LIMIT = 900.0  # a busy machine; a fault is stored, and the next run would test torch in place of the kernel
