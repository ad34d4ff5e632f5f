"""The CPU benchmarks of a layer and a step, each in a process of its own; refreshes docs/benchmarks.md and charts."""

import subprocess
import sys

for name in ("cpu_quantize", "cpu_layer", "cpu_step"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--write"], check=True)
subprocess.run([sys.executable, "docs/drawings/draw.py"], check=True)
