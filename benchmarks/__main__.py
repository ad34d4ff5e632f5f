"""All CPU benchmarks, one after the other, each in a process of its own; refreshes docs/benchmarks.md and its chart."""

import subprocess
import sys

for name in ("cpu_quantize", "cpu_layer", "cpu_step"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--write"], check=True)
subprocess.run([sys.executable, "-m", "benchmarks.chart"], check=True)
