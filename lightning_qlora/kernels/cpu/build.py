"""Compile a C source with the system's compiler when it is first needed, as Triton and Inductor do.

The library is cached under a name that hashes what it depends on: source, compiler, flags, processor and which of its
instructions torch uses (machines may share a home folder, and an emulated one shows the processor of its host). The
name ends with a hash of the file itself, because loading a truncated library, left by a full disk or a crash, kills the
process. A library runs as this user, so no other user may be able to write to the cache. One process compiles, and the
others wait for it.
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
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch

from lightning_qlora.files.cache_folder import OWN_FOLDER, cache_folder, lock_file, objection

COMPILERS = ("gcc", "cc", "clang")  # gcc first: its OpenMP code can use the thread pool of torch's OpenMP library
FLAGS = ("-O3", "-fPIC", "-std=gnu11", "-ffp-contract=off", "-Wno-psabi")
THREADS = "-fopenmp"


def flag_lists(system: str = platform.system()) -> tuple[tuple[str, ...], ...]:
    """Lists of flags, of which the first that works is used: all instructions of this processor, and threads.

    -mcpu is for compilers for ARM. x86-64-v3 is for torch with AVX2 on a processor with more (ATEN_CPU_CAPABILITY).
    Apple's clang takes -fopenmp only for its inner compiler; the OpenMP library is torch's own. MinGW misaligns AVX
    registers on the stack (GCC bug 54412), so on Windows only what every processor has is used.
    """
    if system == "Windows":
        return (THREADS,), ()
    processors = ["-march=native", "-march=x86-64-v3", "-mcpu=native"]
    options: list[tuple[str, ...]] = [(THREADS,), ()]
    if system == "Darwin":
        processors = ["-mcpu=native", "-march=native"]
        options.insert(1, ("-Xclang", THREADS))
    return *((processor, *option) for option in options for processor in processors), ()


TORCH = Path(torch.__file__).resolve().parent  # as /proc/self/maps has it
TIMEOUT = 120  # seconds for one compiler call
LITTLE = 4_000_000  # bytes: with less free space a compilation may fail
_log = logging.getLogger("lightning_qlora")


class BuildError(RuntimeError):
    """The library could not be built; the message says why. Of one list of flags it is an OSError: others may work."""


def compiler() -> str:
    """Path of the C compiler: the one in the environment variable CC, else the first of `COMPILERS` that exists.

    Not one of the current folder, where `shutil.which` looks too: on Windows always, else if PATH has such an entry.
    """
    endings = [""]
    if os.name == "nt":
        endings = os.environ.get("PATHEXT", ".EXE").split(os.pathsep) + endings
    for name in filter(None, (os.environ.get("CC"), *COMPILERS)):
        for folder, ending in product(_absolute_path(), endings):
            path = os.path.join(folder, name + ending)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return path
    raise BuildError(f"no C compiler on PATH (tried the environment variable CC and {', '.join(COMPILERS)})")


def _absolute_path() -> list[str]:
    """The folders of PATH, without those that depend on the current folder."""
    return [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(folder)]


def load(
    source: Path,
    variants: tuple[tuple[str, ...], ...] = flag_lists(),
    refuse: Callable[[ctypes.CDLL], str | None] = lambda _: None,
) -> ctypes.CDLL:
    """The library compiled from `source` with the first of `variants` that compiles, loads and is not refused.

    `refuse` returns a reason or None. A warning says why, if threads are lost. On a Mac it has the level INFO: torch's
    products there have threads in any case.

    Raises:
        BuildError: If there is no compiler, no private cache folder whose code can be loaded or no space, or if no
            variant works.
    """
    program = compiler()
    folder = _folder_for_code()
    failures: list[str] = []
    for flags in variants:
        try:
            library = _load_variant(source, program, (*FLAGS, *flags), folder)
            reason = refuse(library)
            if reason is not None:
                raise OSError(reason)
        except OSError as error:
            failures.append(f"{' '.join(flags) or 'no flags'}: {str(error).strip()}")
            continue
        if failures and THREADS not in flags:
            _log.log(
                logging.INFO if platform.system() == "Darwin" else logging.WARNING,
                "C kernels compiled without threads, so 4-bit layers are slower: %s. %s",
                failures[0],
                remedy(),
            )
        return library
    raise BuildError(f"{program} failed; " + "; ".join(failures))


def remedy() -> str:
    if platform.system() == "Darwin":
        return (
            "A compiler with OpenMP gives threads: `brew install gcc`, and set CC=gcc-14 (or the version it installs)"
        )
    return "Install gcc, or set CC to another compiler with OpenMP"


def _folder_for_code() -> Path:
    """The cache folder; BuildError if it is not private, or is mounted so that no code in it can be loaded."""
    try:
        folder = cache_folder()
    except OSError as error:
        raise BuildError(str(error)) from error
    noexec = getattr(os, "ST_NOEXEC", 0)  # Linux has it
    if noexec and os.statvfs(folder).f_flag & noexec:
        raise BuildError(f"{folder} is mounted noexec, so compiled code can't be loaded from it. {OWN_FOLDER}")
    return folder


def _load_variant(source: Path, program: str, flags: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    binary = Path(program).resolve()
    text = "".join(file.read_text() for file in sorted(source.parent.glob("*.[ch]")))  # what the source may include
    inputs = (text, binary, binary.stat().st_size, binary.stat().st_mtime_ns, flags, _processor())
    name = f"{source.stem}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:20]}"
    file = _cached(folder, name)
    try:
        if file is None:
            with lock_file(folder / f"{name}.lock", TIMEOUT):
                file = _cached(folder, name) or _build(source, program, flags, folder, name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(f"{error}. Free some space, or use a folder on another disk. {OWN_FOLDER}") from error
        raise
    return _open(file)


def _cached(folder: Path, name: str) -> Path | None:
    """The library of this name in the cache, unless it is damaged or others could change it."""
    files = folder.glob(f"{name}-*.so")
    return next((file for file in files if objection(file) is None and file.stem.endswith(_hash(file))), None)


def _open(library: Path) -> ctypes.CDLL:
    """Load a library whose OpenMP functions are torch's.

    torch's wheels for ARM, and those for Macs, load theirs for themselves: it is opened again, for all.
    """
    openmp = None
    if platform.system() == "Linux" and not hasattr(ctypes.CDLL(None), "omp_get_thread_num"):
        mapped = [line.split(maxsplit=5)[-1] for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()]
        # Other packages bring one as well, in folders of their own (scikit-learn, in scikit_learn.libs).
        libraries = (path for path in mapped if "gomp" in Path(path).name)
        openmp = min(libraries, key=lambda path: not path.startswith(str(TORCH)), default=None)
    elif platform.system() == "Darwin":
        openmp = str(TORCH / "lib" / "libomp.dylib")
    if openmp is not None:
        with suppress(OSError):  # this torch has none, or has not loaded it
            ctypes.CDLL(openmp, mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)
    return ctypes.CDLL(str(library))


def _build(source: Path, program: str, flags: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compile in a temporary folder and rename, so that no other process sees a half-written library."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        machine_code = Path(temporary) / "kernels.o"
        shared = Path(temporary) / "kernels.so"
        _run([program, *flags, "-c", str(source.absolute()), "-o", str(machine_code)])
        # Linked without -fopenmp: the OpenMP functions are then those of the library that torch has loaded, so the
        # process has one thread pool and not two.
        lookup = ["-undefined", "dynamic_lookup"] * (platform.system() == "Darwin")
        _run([program, "-shared", str(machine_code), *lookup, "-o", str(shared)])
        shared.chmod(0o700)  # whatever the umask is
        library = folder / f"{name}-{_hash(shared)}.so"
        shared.replace(library)
    return library


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:20]


def _run(command: list[str]) -> None:
    """Run a compiler in the folder of its output, in which no other file is."""
    try:
        result = subprocess.run(
            command,
            cwd=Path(command[-1]).parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            env=os.environ | {"LC_ALL": "C", "PATH": os.pathsep.join(_absolute_path())},
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"the compiler took more than {TIMEOUT} seconds: try again when the machine is less busy, or set CC to "
            "another compiler"
        ) from error
    if result.returncode:
        _check_space(Path(command[-1]).parent, result.stderr)
        raise OSError((result.stderr or result.stdout).strip()[-400:] or f"exit status {result.returncode}")


def _check_space(folder: Path, output: str) -> None:
    """Raise OSError if the compiler failed because a disk is full: other flags may need a little less, and are slow."""
    for place in (folder, Path(tempfile.gettempdir())):  # compilers have temporary files of their own
        free = shutil.disk_usage(place).free
        if free < LITTLE or "No space left" in output or "quota exceeded" in output:
            raise OSError(errno.ENOSPC, f"the compiler failed with {free:,} bytes free", str(place))


def _processor() -> str:
    """What -march=native depends on: the processor's model and instruction sets, and what torch uses of them."""
    capability = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = ("model name", "flags", "Features", "CPU part", "isa")
        first = info.read_text().split("\n\n")[0].splitlines()
        model = "".join(line for line in first if line.startswith(names))
    elif platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    else:
        model = platform.processor()
    return f"{platform.machine()} {capability} {model}"
