"""Compile a C source with the system's compiler when it is first needed, as Triton and Inductor do.

The library is cached under a name that hashes everything it depends on: source, compiler, flags and processor (several
machines may share a home folder). The name ends with a hash of the file itself, because loading a truncated library,
left by a full disk or a crash, kills the process.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("gcc", "cc", "clang")  # gcc first: its OpenMP code can use the thread pool of torch's OpenMP library
FLAGS = ("-O3", "-fPIC", "-std=gnu11", "-ffp-contract=off", "-Wno-psabi")
# The first that works is used: all instructions of this processor with threads, without threads, or neither.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
TIMEOUT = 120  # seconds for one compiler call


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


class _VariantError(Exception):
    """The compiler rejects a list of flags; another list may work."""


def compiler() -> str:
    """Path of the C compiler: the one in the environment variable CC, else the first of `COMPILERS` that exists."""
    for name in filter(None, (os.environ.get("CC"), *COMPILERS)):
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C compiler on PATH (tried the environment variable CC and {', '.join(COMPILERS)})")


def cache_folder() -> Path:
    """Where libraries are cached: $LIGHTNING_QLORA_CACHE, else `lightning_qlora` in the user's cache folder."""
    if chosen := os.environ.get("LIGHTNING_QLORA_CACHE"):
        return Path(chosen).absolute()  # dlopen searches the system's libraries for a name without a slash
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "lightning_qlora"
    except RuntimeError as error:  # the user has no entry in the password file, as in some containers
        raise BuildError(f"{error} Set LIGHTNING_QLORA_CACHE to a writable folder.") from error


def load(source: Path, variants: tuple[tuple[str, ...], ...] = VARIANTS) -> ctypes.CDLL:
    """The library compiled from `source` with the first of `variants` (lists of flags) that compiles and loads.

    Raises:
        BuildError: If there is no compiler or no writable cache folder, or if no variant works.
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
    inputs = (_text(source), binary, binary.stat().st_size, binary.stat().st_mtime_ns, flags, _processor())
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:20]
    folder = cache_folder()
    for library in folder.glob(f"{source.stem}-{key}-*.so"):
        if library.stem.endswith(_hash(library)):
            return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise BuildError(f"{error}. Set LIGHTNING_QLORA_CACHE to a writable folder.") from error
    # Built in a temporary folder and renamed, so that no other process sees a half-written library.
    with temporary as name:
        compiled, linked = Path(name) / "kernels.o", Path(name) / "kernels.so"
        _run([program, *flags, "-c", str(source), "-o", str(compiled)])
        # Linked without -fopenmp: the OpenMP functions are then those of the library that torch has loaded, so the
        # process has one thread pool and not two.
        lookup = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        _run([program, "-shared", str(compiled), *lookup, "-o", str(linked)])
        library = folder / f"{source.stem}-{key}-{_hash(linked)}.so"
        os.replace(linked, library)
    return library


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:20]


def _text(source: Path) -> str:
    """The source and all files in its folder that it may include."""
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
