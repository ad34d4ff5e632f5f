"""Compile a C source with the system's compiler when it is first needed, as Triton and Inductor do.

The library is cached under a name that hashes what it depends on: source, compiler, flags and processor (machines may
share a home folder). The name ends with a hash of the file itself, because loading a truncated library, left by a full
disk or a crash, kills the process. A library runs as this user, so no other user may be able to write to the cache. One
process compiles, and the others wait for it.
"""

import ctypes
import errno
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

from lightning_qlora.files.cache_folder import OWN_FOLDER, cache_folder, lock_file, objection

COMPILERS = ("gcc", "cc", "clang")  # gcc first: its OpenMP code can use the thread pool of torch's OpenMP library
FLAGS = ("-O3", "-fPIC", "-std=gnu11", "-ffp-contract=off", "-Wno-psabi")
# The first that works is used: all instructions of this processor with threads, without threads, or neither.
THREADS = "-fopenmp"
VARIANTS = (("-march=native", THREADS), ("-march=native",), ("-mcpu=native",), ())
TIMEOUT = 120  # seconds for one compiler call
LITTLE = 4_000_000  # bytes: with less free space a compilation may fail
_log = logging.getLogger("lightning_qlora")


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


class _VariantError(Exception):
    """The compiler rejects a list of flags; another list may work."""


def compiler() -> str:
    """Path of the C compiler: the one in the environment variable CC, else the first of `COMPILERS` that exists."""
    for name in filter(None, (os.environ.get("CC"), *COMPILERS)):
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(f"no C compiler on PATH (tried the environment variable CC and {', '.join(COMPILERS)})")


def load(source: Path, symbols: Collection[str] = (), variants: tuple[tuple[str, ...], ...] = VARIANTS) -> ctypes.CDLL:
    """The library compiled from `source` with the first of `variants` (lists of flags) that compiles and loads.

    A cached file without one of the functions `symbols` is compiled again. A warning says why, if threads are lost.

    Raises:
        BuildError: If there is no compiler, no private cache folder or no space, or if no variant works.
    """
    program = compiler()
    failures: list[str] = []
    for flags in variants:
        try:
            library = _load_variant(source, program, (*FLAGS, *flags), symbols)
        except (_VariantError, OSError) as error:
            failures.append(f"{' '.join(flags) or 'no flags'}: {str(error).strip()}")
            continue
        if failures and THREADS not in flags:
            _log.warning("C kernels compiled without threads, so 4-bit layers are slower: %s", failures[0])
        return library
    raise BuildError(f"{program} failed; " + "; ".join(failures))


def _load_variant(source: Path, program: str, flags: tuple[str, ...], symbols: Collection[str]) -> ctypes.CDLL:
    binary = Path(program).resolve()
    text = "".join(file.read_text() for file in sorted(source.parent.glob("*.[ch]")))  # what the source may include
    inputs = (text, binary, binary.stat().st_size, binary.stat().st_mtime_ns, flags, _processor())
    name = f"{source.stem}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:20]}"
    try:
        folder = cache_folder()
    except OSError as error:
        raise BuildError(str(error)) from error
    cached = _cached(folder, name, symbols)
    if cached is not None:
        return cached
    try:
        with lock_file(folder / f"{name}.lock", TIMEOUT):
            return _cached(folder, name, symbols) or ctypes.CDLL(str(_build(source, program, flags, folder, name)))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(f"{error}. Free some space, or choose another disk: {OWN_FOLDER}") from error
        raise


def _cached(folder: Path, name: str, symbols: Collection[str]) -> ctypes.CDLL | None:
    """The library of this name in the cache, unless it is damaged, has other functions, or others could change it."""
    for library in folder.glob(f"{name}-*.so"):
        if objection(library) is None and library.stem.endswith(_hash(library)):
            functions = ctypes.CDLL(str(library))
            if all(hasattr(functions, symbol) for symbol in symbols):
                return functions
    return None


def _build(source: Path, program: str, flags: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compile in a temporary folder and rename, so that no other process sees a half-written library."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        machine_code = Path(temporary) / "kernels.o"
        shared = Path(temporary) / "kernels.so"
        _run([program, *flags, "-c", str(source), "-o", str(machine_code)])
        # Linked without -fopenmp: the OpenMP functions are then those of the library that torch has loaded, so the
        # process has one thread pool and not two.
        lookup = []
        if platform.system() == "Darwin":
            lookup = ["-undefined", "dynamic_lookup"]
        _run([program, "-shared", str(machine_code), *lookup, "-o", str(shared)])
        shared.chmod(0o700)  # whatever the umask is
        library = folder / f"{name}-{_hash(shared)}.so"
        shared.replace(library)
    return library


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:20]


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            env=os.environ | {"LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"the compiler took more than {TIMEOUT} seconds: try again when the machine is less busy, or set CC to "
            "another compiler"
        ) from error
    if result.returncode:
        _check_space(Path(command[-1]).parent, result.stderr)
        raise _VariantError((result.stderr or result.stdout).strip()[-400:] or f"exit status {result.returncode}")


def _check_space(folder: Path, output: str) -> None:
    """Raise OSError if the compiler failed because a disk is full: other flags may need a little less, and are slow."""
    for place in (folder, Path(tempfile.gettempdir())):  # compilers have temporary files of their own
        free = shutil.disk_usage(place).free
        if free < LITTLE or "No space left" in output or "quota exceeded" in output:
            raise OSError(errno.ENOSPC, f"the compiler failed with {free:,} bytes free", str(place))


def _processor() -> str:
    """What -march=native depends on: the processor's model and instruction sets."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part", "isa")
    first = info.read_text().split("\n\n")[0].splitlines()
    return platform.machine() + "".join(line for line in first if line.startswith(names))
