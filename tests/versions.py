"""The flows of tests/scripts/user_flows.py in environments with other versions; the result is a table of record.md.

    make test-versions                                            all that can be made here
    make test-versions ENVIRONMENTS="lowest-3.10 newest-3.15"     those of these names; newest: with this Python

An environment is named by what is installed and by its Python, which stands on PATH or is pyenv's: `lowest` is each
lower bound of pyproject.toml, `newest` the newest of everything. A row of the table is replaced when its environment
runs again. Python 3.11 or newer, and none of the project's packages, are needed to run this.
"""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "tests" / "record.md"
BEGIN, END = "<!-- versions: begin -->\n", "<!-- versions: end -->"
FLOWS = ROOT / "tests" / "scripts" / "user_flows.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = ("lowest", "newest")
PACKAGES = ("torch", "lightning", "transformers", "peft", "jsonargparse", "numpy", "safetensors", "filelock")
PEFT = "peft>=0.19"  # in pyproject.toml a requirement of the tests
HEAD = (
    f"| environment | Python | {' | '.join(PACKAGES)} | flows that passed | run |\n|{' --- |' * (len(PACKAGES) + 4)}\n"
)


def pythons() -> dict[str, str]:
    """Versions such as "3.11", oldest first, and the path of each Python."""
    paths = {}
    for minor in range(10, 20):
        name = f"python3.{minor}"
        installed = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/{name}"))
        path = shutil.which(name) or (installed and installed[-1])
        # pyenv's command of that name fails for a version that is not chosen.
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode:
            path = installed and installed[-1]
        if path:
            paths[f"3.{minor}"] = str(path)
    return paths


def lower_bounds() -> list[str]:
    """`package==version` for each lower bound of the package and the extras `hf` and `cli`."""
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *extras["hf"], *extras["cli"], PEFT]
    return [re.sub(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+).*", r"\1==\2", each) for each in requirements]


def constraints(name: str) -> list[str]:
    """What pip installs in an environment of this name, beside the bounds of pyproject.toml."""
    return lower_bounds() if name == "lowest" else []


def run(name: str, version: str, python: str) -> str:
    """Make an environment, run the flows in it, and return its row."""
    folder = ROOT / ".venv-versions" / f"{name}-{version}"
    program = folder / "bin" / "python"
    if not program.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    print(f"{folder.name}: installing (some minutes; 4 GB where torch is a build for CUDA) ...", flush=True)
    chosen = folder / "constraints.txt"
    chosen.write_text("\n".join(constraints(name)))
    options = ["--quiet", "--disable-pip-version-check", "--upgrade", "--constraint", chosen]
    packages = ["--editable", f"{ROOT}[hf,cli]", "peft"]
    subprocess.run([program, "-m", "pip", "install", *options, *packages], check=True)
    print(f"{folder.name}: running the flows ({folder}/flows.log) ...", flush=True)
    with (folder / "flows.log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        output = subprocess.run([program, FLOWS], stdout=subprocess.PIPE, stderr=log, text=True, env=environment).stdout
    last_line = output[output.rfind("{") :]
    results = json.loads(last_line or '{"import": false}')
    failed = [flow for flow, passed in results.items() if not passed]
    passed = f"{len(results) - len(failed)} of {len(results)}"
    if failed:
        passed += f", not {', '.join(failed)}"
    installed = output_of(
        program, "-c", f"from importlib.metadata import version; print(*map(version, {PACKAGES}), sep=' | ')"
    )
    day = datetime.date.today()
    commit = output_of("git", "-C", ROOT, "rev-parse", "--short", "HEAD")
    return f"| {name}-{version} | {version} | {installed} | {passed} | {day}, {commit} |"


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def rows() -> dict[str, str]:
    """Name of each environment of the table, and its row."""
    found = re.findall(r"^\| \S+-3\.\d+ \|.*$", PAGE.read_text(), re.M)
    return {row.split("|")[1].strip(): row for row in found}


def _order(name: str) -> tuple[int, int]:
    kind, _, version = name.rpartition("-")
    return NAMES.index(kind), int(version.removeprefix("3."))


def main(names: list[str]) -> None:
    available = pythons()
    oldest = next(iter(available))
    own = f"3.{sys.version_info.minor}"
    all_names = [f"lowest-{oldest}", *(f"newest-{version}" for version in available)]
    names = [each if "-3." in each else f"{each}-{own}" for each in names]
    for each in names or all_names:
        name, _, version = each.rpartition("-")
        if name not in NAMES or version not in available:
            sys.exit(f"No environment {each}: the names are {', '.join(NAMES)}, the Pythons {', '.join(available)}.")
        row = run(name, version, available[version])
        table = rows() | {each: row}
        before, rest = PAGE.read_text().split(BEGIN)
        lines = "\n".join(table[key] for key in sorted(table, key=_order))
        PAGE.write_text(before + BEGIN + HEAD + lines + "\n" + END + rest.split(END)[1])
        print(row)
    sys.exit(any(", not " in row for row in rows().values()))


if __name__ == "__main__":
    main(sys.argv[1:])
