"""All CPU benchmarks, one after the other, each in a process of its own; refreshes docs/benchmarks.md."""

import subprocess
import sys

for name in ("cpu_quantize",):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--write"], check=True)
