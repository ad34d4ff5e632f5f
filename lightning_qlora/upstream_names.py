"""Private names of other libraries that this package uses, read from its own source, and the tested versions.

    python -m lightning_qlora.upstream_names

prints the list: each name, the files that use it, and whether the installed version has it. A release of such a library
may rename them without notice. `check_names` runs before any training and raises an ImportError that names versions.
"""

import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import resolve_name

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
LIBRARIES = "torch|lightning|transformers|peft|huggingface_hub"
CHAIN = re.compile(rf"(?<![\w.\"'`/])((?:{LIBRARIES})(?:\.\w+)*\._[a-zA-Z]\w*(?:\.\w+)*)")
IMPORT = re.compile(rf"^\s*from ((?:{LIBRARIES})[\w.]*) import (\([^)]*\)|[^\n(]*)", re.MULTILINE)
REPLACED = re.compile(rf'"((?:{LIBRARIES})[\w.]*):([\w.]+)"')  # the places of `replaces`
PRIVATE = re.compile(r"(?:^|\.)_[a-zA-Z]")
ATTRIBUTE = re.compile(r"(?:(?<!\bself)(?<!\bcls)\.|\")(_[a-z]\w+)")
OWN = re.compile(r"def (_\w+)|self\.(_\w+)(?:: [^=\n]+)? =|^ *(_\w+)(?:: [^=\n]+)? =|(_qlora_\w+)", re.MULTILINE)
NAMEDTUPLE = {"_replace", "_asdict", "_fields"}
OF_CUDA = "._cuda_"  # in the names that builds of torch for CPUs lack


@cache
def tested_versions() -> dict[str, str]:
    """Package -> the version that the test suite ran with, from constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.partition(";")[0].strip().split("==") for line in lines if "==" in line)


def differs(package: str) -> str:
    """The tested version of an installed package if it is another one, else ""."""
    tested = tested_versions().get(package, "")
    return "" if version(package).partition("+")[0] == tested else tested


@cache
def used_names() -> dict[tuple[str, str], list[str]]:
    """Module and name in it -> the files of this package that use it; the module may be only the first part of one."""
    names: dict[tuple[str, str], list[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for place in dict.fromkeys(_names_in(path.read_text(encoding="utf-8"))):
            names.setdefault(place, []).append(file)
    return names


def _names_in(source: str) -> Iterator[tuple[str, str]]:
    for module, imported in IMPORT.findall(source):
        for name in re.findall(r"(\w+)(?: as \w+)?", re.sub(r"#[^\n]*", "", imported)):
            if PRIVATE.search(module) or PRIVATE.search(name):
                yield module, name
    for module, name in REPLACED.findall(source):
        yield module, name
    for chain in CHAIN.findall(IMPORT.sub("", source)):
        package, _, name = chain.partition(".")
        yield package, name


def missing_names(packages: tuple[str, ...]) -> list[str]:
    """The names of these packages that the installed versions lack, each with the files that need it."""
    return [
        f"{module}.{name} (in {', '.join(files)})"
        for (module, name), files in sorted(used_names().items())
        if module.partition(".")[0] in packages and not _is_there(module, name)
    ]


def _is_there(module: str, name: str) -> bool:
    import torch

    if OF_CUDA in f".{name}" and not torch.cuda.is_available():
        return True
    try:
        resolve_name(f"{module}.{name}")
    except (ImportError, AttributeError):
        return False
    return True


@cache
def check_names(package: str) -> None:
    """ImportError if the installed version of a package lacks a name; a tested version is not looked at."""
    try:
        tested = differs(package)
    except PackageNotFoundError:
        return
    if not tested:
        return
    missing = missing_names((package,))
    if missing:
        raise ImportError(
            f"{package} {version(package)} lacks what lightning_qlora needs: {'; '.join(missing)}. Install the version "
            f"that was tested: pip install '{package}=={tested}', or a newer lightning_qlora."
        )


def used_attributes() -> dict[str, list[str]]:
    """Private attribute of objects of other libraries -> the files that use it, as `_buffers` of a torch.nn.Module."""
    import torch

    sources = {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
    every = "\n".join(sources.values())
    own = {name for names in OWN.findall(every) for name in names if name} | NAMEDTUPLE
    own -= {*dir(torch.nn.Module()), *dir(torch.Tensor), *dir(torch.optim.Optimizer)}
    attributes: dict[str, list[str]] = {}
    for path, source in sources.items():
        text = CHAIN.sub("", IMPORT.sub("", source))
        for name in sorted(set(ATTRIBUTE.findall(text)) - own):
            attributes.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    return dict(sorted(attributes.items()))


if __name__ == "__main__":
    for (module, name), files in sorted(used_names().items()):
        state = "" if _is_there(module, name) else "MISSING  "
        print(f"{state}{module}.{name}  {', '.join(files)}")
    print("\nAttributes of objects:")
    for name, files in used_attributes().items():
        print(f"{name}  {', '.join(files)}")
