"""Builds a C source with the system's compiler when it is first needed, as Triton and Inductor build theirs.

The library is kept under a name made of everything it depends on: source, compiler, flags and processor (a home folder
can be shared by unlike machines). The next start finds it there; a changed source makes another one. The name ends with
a hash of the file itself: to load half a library, left by a full disk or a crash, ends the process.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("gcc", "cc", "clang")  # gcc first: its loops run on the threads of the OpenMP that torch brings
FLAGS = ("-O3", "-fPIC", "-std=gnu11", "-ffp-contract=off", "-Wno-psabi")
# The best that compiles and loads: threads and this processor's instructions, the latter alone, neither.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
TIMEOUT = 120  # seconds for one compiler call


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


class _VariantError(Exception):
    """The compiler refuses a list of flags; another may do."""


def compiler() -> str:
    """Path of the C compiler: the one that the environment variable CC names, else the first of `COMPILERS`."""
    for name in filter(None, (os.environ.get("CC"), *COMPILERS)):
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C compiler on PATH (looked for {', '.join(COMPILERS)}, and for the variable CC)")


def cache_folder() -> Path:
    """Where libraries are kept: $LIGHTNING_QLORA_CACHE, else a folder of ours in the user's cache folder."""
    if chosen := os.environ.get("LIGHTNING_QLORA_CACHE"):
        return Path(chosen).absolute()  # a name without a slash would be looked for among the system's libraries
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "lightning_qlora"
    except RuntimeError as error:  # a user without an entry, as in some containers
        raise BuildError(f"{error} Set LIGHTNING_QLORA_CACHE to a folder that can be written to.") from error


def load(source: Path, variants: tuple[tuple[str, ...], ...] = VARIANTS) -> ctypes.CDLL:
    """The library made from `source` with the first of `variants` (lists of flags) that builds and loads.

    Raises:
        BuildError: If there is no compiler, no place to write to, or no variant works.
    """
    program, failures = compiler(), []
    for flags in variants:
        try:
            return ctypes.CDLL(str(_built(source, program, (*FLAGS, *flags))))
        except (_VariantError, OSError) as error:
            failures.append(f"{' '.join(flags) or 'no flags'}: {str(error).strip()}")
    raise BuildError(f"{program} failed; " + "; ".join(failures))


def _built(source: Path, program: str, flags: tuple[str, ...]) -> Path:
    binary = Path(program).resolve()
    facts = (_text(source), binary, binary.stat().st_size, binary.stat().st_mtime_ns, flags, _processor())
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:20]
    folder = cache_folder()
    for library in folder.glob(f"{source.stem}-{key}-*.so"):
        if library.stem.endswith(_hash(library)):
            return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made_in = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise BuildError(f"{error}. Set LIGHTNING_QLORA_CACHE to a folder that can be written to.") from error
    # Written beside and renamed: of several processes that start at once each sees no library or a whole one.
    with made_in as place:
        made, linked = Path(place) / "made.o", Path(place) / "made.so"
        _run([program, *flags, "-c", str(source), "-o", str(made)])
        # Linked without -fopenmp: its functions are then found in the OpenMP library that torch has loaded, so that
        # there is one pool of threads and not two.
        lookup = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        _run([program, "-shared", str(made), *lookup, "-o", str(linked)])
        library = folder / f"{source.stem}-{key}-{_hash(linked)}.so"
        os.replace(linked, library)
    return library


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:20]


def _text(source: Path) -> str:
    """The source and everything in its folder that it may include."""
    return "".join(file.read_text() for file in sorted(source.parent.glob("*.[ch]")))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler took more than {TIMEOUT} seconds") from error
    if done.returncode:
        raise _VariantError((done.stderr or done.stdout).strip()[-400:] or f"exit status {done.returncode}")


def _processor() -> str:
    """What -march=native depends on: the processor's model and instruction sets."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part", "isa")
    first = info.read_text().split("\n\n")[0].splitlines()
    return platform.machine() + "".join(line for line in first if line.startswith(names))
