"""The attack with a size and a seed: `python -m tests.attack --scale 10 --seed 1`; prints one line for each part."""

import argparse
import contextlib
import io
import random
import tempfile
import time
from pathlib import Path

from tests.attack import cases, files, strangers

# Attempts of each attack at scale 1; `make test` has scale 0.4.
ATTACKS = {
    "kills at random moments of a training": (files.kills_in_training, 5),
    "ends at random lines of save_adapter": (files.kills_in_saving, 40),
    "files that may not become large": (files.full_disks, 30),
    "arguments": (cases.arguments, 2000),
    "values in PEFT's files": (cases.foreign_values, 60),
    "programs in an index of shards": (strangers.programs, 500),
    "bytes of files": (strangers.bytes_of_files, 300),
    "layers": (cases.layers, 60),
    "modules": (cases.modules, 30),
    "threads": (cases.threads, 20),
    "soak": (cases.soak, 30),
}


def run(name, seed, scale, folder):
    attack, count = ATTACKS[name]
    return attack(seed, int(count * scale), folder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}, scale {chosen.scale:g}", flush=True)
    for name in ATTACKS:
        if chosen.only in name:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                found = run(name, chosen.seed, chosen.scale, Path(folder))
            counts = ", ".join(f"{what}: {number:,}" for what, number in sorted(found.items()))
            print(f"| {name} | {counts} | {time.perf_counter() - start:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
