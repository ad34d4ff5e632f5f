"""The C kernels in every variant this machine can run, against the specification; and what happens without them."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_qlora import convert
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.files import cache_folder
from lightning_qlora.kernels import eager, reference
from lightning_qlora.kernels.cpu import build
from lightning_qlora.kernels.cpu import library as module
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.scratch import _all_threads, release, scratch
from lightning_qlora.quantization import codebooks
from lightning_qlora.quantization.packed_weight import PackedBytes
from tests.conftest import raises_in_one_line
from tests.kernels.forks import in_forks
from tests.mounts import mounted

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}  # of the largest value
DTYPES = [*TOLERANCES]
SHAPES = [(1, 1), (3, 5), (37, 101), (16, 720), (8, 1376), (5, 4096), (70, 2112)]
FLAGS = {
    "this machine": ("-march=native", "-fopenmp"),
    "AVX-512 without bf16": ("-march=x86-64-v4", "-fopenmp"),
    "AVX2": ("-march=x86-64-v3", "-fopenmp"),
    "plain, one thread": (),
}


def _runs(name: str) -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    needs = {"AVX-512 without bf16": ("AVX512",), "AVX2": ("AVX512", "AVX2")}.get(name)
    return needs is None or capability in needs


@pytest.fixture(params=FLAGS, scope="module")
def library(request):
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C compiler")
    if not _runs(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return module.Library(build.load(module.SOURCE, variants=(FLAGS[request.param],)))


def assert_bits(library, weight, quant_type, block_size, double_quant):
    """Quantized and decoded, the bits of the reference."""
    expected = reference.quantize(weight, quant_type, block_size, double_quant)
    ours = library.quantize(weight, quant_type, block_size, double_quant)
    case = weight.shape, block_size, double_quant
    assert all(torch.equal(one, other) for one, other in zip(ours[:3], expected[:3], strict=True)), case
    for dtype in DTYPES:
        out = library.dequantize_into(torch.empty(weight.numel(), dtype=dtype), ours)
        assert torch.equal(out, reference.dequantize(ours, dtype).view(-1)), (*case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantizing_and_decoding_give_the_bits_of_the_reference(library, dtype, quant_type):
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        weight.view(-1)[: min(70, weight.numel() // 2)] = 0
        for block_size, double_quant in [(32, True), (64, True), (128, False), (4096, True)]:
            assert_bits(library, weight, quant_type, block_size, double_quant)


def test_each_op_of_a_cpu_runs_in_c(monkeypatch):
    library = module.compiled_library()
    if library is None:
        pytest.skip("no C compiler")
    called = []

    class Counted:
        def __getattr__(self, name):
            called.append(name)
            return getattr(library, name)

    monkeypatch.setattr(eager, "compiled_library", Counted)
    weight = eager.quantize(torch.randn(32, 64), "nf4", 64, True)
    eager.dequantize(weight, torch.float32)
    x, xa = torch.randn(1, 64), torch.randn(1, 4)
    lora = LoRA(torch.randn(4, 64), torch.randn(32, 4), p=0.5, seed=torch.tensor([3]))
    plan = eager.plan(x, lora)
    plan.lora_project(x, lora)
    for projected in (None, xa):
        plan.linear_into(torch.empty(1, 32), x, projected, weight, None, lora)
    of_plan = ["types", "types", "dropout_into", "dequantize_into", "is_fast_for"]
    assert called == ["types", "quantize", "types", "dequantize_into", *of_plan, "lora_linear", "lora_linear"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_numbers_keep_their_bits(library, dtype):
    """Denormal numbers, huge ones, ties between levels, blocks that are all alike."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    huge = torch.finfo(dtype).max / 8
    levels = module.codebook("nf4").levels
    ties = torch.cat([(levels[:-1] + levels[1:]) / 2, torch.ones(1)]).repeat(8)
    rows = [torch.randn(128) * tiny, torch.randn(128).clamp(-4, 4) * huge, ties, torch.full((128,), -0.3)]
    weight = torch.stack([row.to(dtype) for row in rows])
    for double_quant in (True, False):
        assert_bits(library, weight, "nf4", 64, double_quant)


FEW_ROWS = [(1, 16), (2, 3), (3, 64), (4, 0), (5, 8), (16, 17), (33, 4), (module.MOST_ROWS, 16)]  # and ranks


def layer_of(library, x, weight, bias, lora, xa=None):
    """The layer in C, in memory that has other numbers before and after its rows."""
    rows, outputs = len(x), weight.shape[0]
    scratch((1 << 17,), torch.float32, x.device, "rows").fill_(torch.nan)
    memory = torch.full((rows + 8, outputs), 7.0, dtype=x.dtype)
    y = library.lora_linear(memory[4 : rows + 4], x, weight, bias, lora, xa)
    assert (memory[:4] == 7).all() and (memory[rows + 4 :] == 7).all()
    return y


def assert_layer(library, x, weight, bias, lora, xa=None):
    """It is the reference's, also from x A^T that is given."""
    expected = x.new_empty(len(x), weight.shape[0])
    given = reference.lora_project(x, lora) if xa is None else xa
    reference.linear_into(expected, x, given, weight, bias, lora)
    for projected in (xa, given):
        error = (layer_of(library, x, weight, bias, lora, projected) - expected).abs().max()
        assert error <= TOLERANCES[x.dtype] * expected.abs().max(), (weight.shape, weight.block_size, x.shape, lora)


@pytest.fixture
def multiplying(library, dtype):
    """The library, if it has products in this type."""
    if not library.is_fast_for(1, dtype):
        pytest.skip("this form leaves the products to torch")
    return library


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_few_rows_are_the_references(multiplying, dtype, quant_type):
    for n, k in [*SHAPES, (64, 128), (7, 96)]:
        for block_size, double_quant in [(32, True), (64, False), (256, True)]:
            weight = reference.quantize(torch.randn(n, k) * k**-0.5, quant_type, block_size, double_quant)
            for m, r in FEW_ROWS:
                x = torch.randn(m, k).to(dtype)
                lora = LoRA(torch.randn(r, k) * k**-0.5, torch.randn(n, r), 0.5)
                assert_layer(multiplying, x, weight, torch.randn(n), lora)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows_reads_these_rows_alone(multiplying, dtype):
    """Several rows are multiplied together: what is in memory beside the given ones must not matter."""
    for rows in filter(lambda rows: multiplying.is_fast_for(rows, dtype), [*range(1, 34), 63]):
        width = 101 if rows % 2 else 96
        weight = multiplying.quantize(torch.randn(37, width), "nf4", 64, True)
        given = torch.full((rows + 8, width), torch.inf, dtype=dtype)
        x = given[4 : rows + 4].copy_(torch.randn(rows, width))
        assert_layer(multiplying, x, weight, None, LoRA(torch.randn(5, width) / 8, torch.randn(37, 5), 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_inf_or_nan_leave_the_other_rows_as_they_are(multiplying, dtype):
    weight = multiplying.quantize(torch.randn(40, 96), "nf4", 64, True)
    lora = LoRA(torch.randn(4, 96), torch.randn(40, 4), 0.5)
    x = torch.randn(9, 96).to(dtype)
    plain = layer_of(multiplying, x, weight, None, lora)
    x[3, 5] = torch.inf
    x[8, 7] = torch.nan
    y = layer_of(multiplying, x, weight, None, lora)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(y[others], plain[others])
    assert not y[[3, 8]].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.99])
def test_the_dropout_mask_is_the_references_everywhere(library, dtype, p, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK", 999)
    x = torch.randn(37, 1000).to(dtype)
    seed = torch.tensor([2**61 + 12345])
    expected = reference.dropout(x, p, seed)
    for dropout_into in (library.dropout_into, eager.dropout_in_chunks):
        assert torch.equal(dropout_into(x.clone(), x, p, seed), expected)
    assert abs((expected == 0).float().mean().item() - p) < 0.01


def test_masks_of_neighbouring_seeds_and_rows_are_unlike():
    kept = torch.stack([reference.dropout(torch.ones(1, 4096), 0.5, torch.tensor([seed])) > 0 for seed in range(64)])
    correlation = torch.corrcoef(kept.view(64, -1).float()) - torch.eye(64)
    assert correlation.abs().max() < 0.09  # 5.7 deviations of the noise that 4096 coins make
    rows = reference.dropout(torch.ones(64, 4096), 0.5, torch.tensor([7])) > 0
    assert (torch.corrcoef(rows.float()) - torch.eye(64)).abs().max() < 0.09


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 992), (torch.float32, 1024)])
def test_any_number_of_threads_gives_the_same_bits(dtype, width, library, set_threads):
    weight = torch.randn(300, width).to(dtype)
    lora = LoRA(torch.randn(8, width), torch.randn(300, 8), 0.5)
    inputs = [torch.randn(m, width).to(dtype) for m in (4, 13) if library.is_fast_for(m, dtype)]
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        packed = library.quantize(weight, "nf4", 64, True)
        out = library.dequantize_into(torch.empty(weight.numel(), dtype=dtype), packed)
        results.append([*packed[:3], out, *(layer_of(library, x, packed, None, lora) for x in inputs)])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_views_are_read_right(library):
    made = library.quantize(torch.randn(64, 64), "nf4", 64, True)
    strided = PackedBytes(*(torch.stack([part, part], 1)[:, 0] for part in made[:3]), *made[3:])
    out = library.dequantize_into(torch.empty(64 * 64), strided)
    assert torch.equal(out, reference.dequantize(made, torch.float32).view(-1))
    transposed = torch.randn(96, 32).T
    assert torch.equal(
        library.quantize(transposed, "nf4", 64, True).packed, reference.quantize(transposed, "nf4", 64, True).packed
    )
    if library.is_fast_for(4, torch.float32):
        lora = LoRA(torch.randn(64, 8).T, torch.randn(8, 64).T.bfloat16(), 0.5)
        bias = torch.randn(128)[::2].double()
        for xa in (None, torch.randn(8, 4).T):
            assert_layer(library, torch.randn(64, 4).T, strided, bias, lora, xa)


def test_for_how_many_rows_the_loops_multiply(library, request):
    assert library.form.endswith(", one thread") == (request.node.callspec.params["library"] == "plain, one thread")
    limits = dict.fromkeys(DTYPES, 0 if "plain C" in library.form else 64)
    if "NEON" in library.form:
        limits = {torch.float32: 16, torch.bfloat16: 0, torch.float16: 0}
    for dtype, most in limits.items():
        for m in (0, 1, 16, 17, 64, 65):
            assert library.is_fast_for(m, dtype) == (0 < m <= most)


def test_small_weights_have_one_thread(library, monkeypatch):
    threads = []
    monkeypatch.setattr(
        library, "_loaded", SimpleNamespace(dequantize=lambda *arguments: threads.append(arguments[-1]))
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for rows in (1, 512, 513):
        library.dequantize_into(torch.empty(64 * rows), reference.quantize(torch.ones(rows, 64), "nf4", 64, True))
    assert threads == [1, 1, 5]


def test_levels_that_another_thread_replaced_are_not_read_after_they_are_freed(library):
    """Of threads that make a cached table at the same time the cache keeps one's: here, none's."""
    made = library.quantize(torch.randn(64, 64), "nf4", 64, True)
    module._levels.cache_clear()
    module._levels("nf4")
    codebooks.codebook.cache_clear()
    codebooks.dynamic_map.cache_clear()
    _others = [torch.full((size,), 7.0) for size in (16, 256) for _ in range(64)]  # in the memory that was freed
    out = library.dequantize_into(torch.empty(64 * 64), made)
    assert torch.equal(out, reference.dequantize(made, torch.float32).view(-1))


def test_decoding_allocates_nothing(monkeypatch):
    weight = reference.quantize(torch.randn(256, 256), "nf4", 64, True)
    x = torch.eye(256, dtype=torch.bfloat16)
    plan = eager.plan(x, LoRA(torch.empty(4, 256), torch.empty(256, 4)))
    decode = plan.dequantize_into
    places = []
    monkeypatch.setattr(plan, "dequantize_into", lambda out, w: places.append(out.data_ptr()) or decode(out, w))
    for transposed in (False, True):
        out = torch.zeros_like(x)
        plan.add_product(out, x, weight, transposed)
        assert torch.equal(out.T if transposed else out, eager.dequantize(weight, torch.bfloat16))
    assert places[0] == places[1]


def test_buffers_of_other_threads_are_released_and_those_of_ended_ones_are_gone():
    """As autograd's threads have them, which do not end."""
    made = threading.Event()
    released = threading.Event()
    buffers = []

    def work():
        buffers.append(weakref.ref(scratch((1000,), torch.float32, torch.device("cpu"), "rows")))
        made.set()
        released.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert made.wait(60)
        assert buffers[0]() is not None
        release()
        assert buffers[0]() is None
    finally:
        released.set()
        thread.join()
    ended = threading.Thread(target=lambda: scratch((1000,), torch.float32, torch.device("cpu"), "rows"))
    ended.start()
    ended.join()
    assert len(_all_threads) <= threading.active_count()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a library of one function, which compiles in less time than ours, from a cache of the test's own."""
    if module.compiled_library() is None or os.name != "posix":
        pytest.skip("no C compiler, or no owners of files")
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source" / "small.c"
    source.parent.mkdir()
    source.write_text("int one(void) { return 1; }")
    return partial(build.load, source)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a shell script the compiler of an empty cache; `{cc}` in it is the real one."""

    def use(script):
        path = tmp_path / "cc"
        path.write_text("#!/bin/sh\n" + script.replace("{cc}", build.compiler() if "{cc}" in script else ""))
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))
        monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))

    return use


@pytest.fixture
def train(monkeypatch):
    """Trains a little in this process, as if it was new: the library is looked for again, with another environment."""

    def steps(folder, **environment):
        monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(folder))
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        module.compiled_library.cache_clear()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.ReLU(), torch.nn.Linear(80, 72))
        convert(model, r=4, lora_dropout=0.1)
        for layer in (model[0], model[2]):
            torch.nn.init.normal_(layer.lora_B)
        model(torch.randn(50, 96)).square().sum().backward()
        return eager.path(), model[0].packed, model[0].lora_A.grad.abs().sum()

    yield steps
    module.compiled_library.cache_clear()


@pytest.mark.parametrize("fails", [False, True], ids=["none", "one that fails"])
def test_without_a_compiler_everything_works_and_one_line_says_so(train, compiler, tmp_path, caplog, fails):
    _, packed, grad = train(build.cache_folder())
    caplog.clear()
    without = {"PATH": tmp_path, "CC": ""}
    text = "no C compiler on PATH (tried the environment variable CC and gcc, cc, clang)"
    if fails:
        compiler("echo 'cc1: no such thing' >&2\nexit 1")
        without = {}
        text = "no flags: cc1: no such thing"
    path, packed_without, grad_without = train(tmp_path / "without", **without)
    assert path == "plain torch (the C kernels could not be compiled)"
    (message,) = caplog.messages
    assert message.startswith("C kernels not compiled, so 4-bit layers run in plain torch, which is slower: ")
    assert message.endswith(text)
    assert torch.equal(packed, packed_without)
    torch.testing.assert_close(grad, grad_without, rtol=1e-4, atol=0)


def test_it_is_built_once_however_many_start_together(load, tmp_path, monkeypatch):
    made = []
    failures = []

    def start():
        try:
            made.append(load())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(made) == 4
    (library,) = (tmp_path / "cache").iterdir()  # one library, nothing half made beside it
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache", library)] == [0o700, 0o700]
    before = library.stat().st_mtime_ns
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail("built again"))
    load()
    assert library.stat().st_mtime_ns == before


def test_it_uses_the_threads_that_torch_has():
    """A second OpenMP library in the process would bring a second pool of threads."""
    if module.compiled_library() is None or not os.path.exists("/proc/self/maps"):
        pytest.skip("no library, or no /proc")
    code = (
        "import torch; from lightning_qlora.kernels import eager\n"
        "def pools(): return {l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l}\n"
        "before = pools(); eager.quantize(torch.randn(512, 512), 'nf4', 64, True)\n"
        "assert pools() == before, pools()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def cache(load):
    """The library of `load` in its cache: a copy, which is not loaded yet."""
    library = Path(load()._name)
    copied = Path(shutil.copy2(library, library.with_name("copy")))
    return copied.rename(library)


def test_half_a_library_is_built_again_and_not_loaded(cache, load):
    """Loading it would end the process with a bus error, at every start."""
    size = cache.stat().st_size
    os.truncate(cache, size // 2)
    assert in_forks(1, lambda _: load().one()) == [0]
    assert [file.stat().st_size for file in cache.parent.iterdir()] == [size]


def builds(monkeypatch):
    """Counts the libraries that are compiled."""
    made = []
    built = build._build
    monkeypatch.setattr(build, "_build", lambda *arguments: made.append(built(*arguments)) or made[-1])
    return made


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_that_others_can_write_to_is_refused(mode, cache, load, monkeypatch):
    """Even if they could not write to it when the library was compiled."""
    cache.parent.chmod(mode)
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: pytest.fail("loaded"))
    monkeypatch.setattr(cache_folder, "_is_private_group", lambda _: False)
    with pytest.raises(build.BuildError, match=r"can be written by other users .*only you can write to \(chmod 700\)"):
        load()


def test_a_group_without_other_members_may_write(cache, load, monkeypatch):
    import grp
    import pwd

    user = pwd.getpwuid(os.geteuid())
    members = []
    group = grp.struct_group((user.pw_name, "x", user.pw_gid, members))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)
    monkeypatch.setattr(pwd, "getpwall", lambda: [user])
    cache.parent.chmod(0o770)
    os.chown(cache.parent, -1, user.pw_gid)
    load()
    members.append("somebody")
    with pytest.raises(build.BuildError, match="can be written by other users"):
        load()
    members.clear()
    other = pwd.struct_passwd(("bob", "x", user.pw_uid + 1, user.pw_gid, "", "/", "/bin/sh"))  # useradd -g alice bob
    monkeypatch.setattr(pwd, "getpwall", lambda: [user, other])
    with pytest.raises(build.BuildError, match="can be written by other users"):
        load()
    monkeypatch.setattr(pwd, "getpwall", lambda: [user])
    load()
    monkeypatch.delattr(grp, "getgrgid")
    monkeypatch.setattr(grp, "getgrgid", {}.__getitem__, raising=False)  # a group without a name
    with pytest.raises(build.BuildError, match="can be written by other users"):
        load()
    monkeypatch.setattr(cache_folder.os, "name", "nt")  # where the mode says nothing
    assert cache_folder.objection(cache.parent) is None


def test_a_folder_above_the_cache_counts_too(cache, load):
    cache.parents[1].chmod(0o777)
    with pytest.raises(build.BuildError, match=f"{cache.parents[1]} can be written by other users"):
        load()
    cache.parents[1].chmod(0o1777)  # as /tmp: others can't replace the cache
    load()


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root can give files away")
def test_a_cache_or_a_library_of_another_user_is_not_loaded(cache, load, monkeypatch):
    made = builds(monkeypatch)
    os.chown(cache, 12345, 0)
    load()
    assert len(made) == 1 and made[0].stat().st_uid == os.geteuid()
    os.chown(cache.parent, 12345, 0)
    with pytest.raises(build.BuildError, match=r"belongs to another user \(uid 12345\)"):
        load()


@pytest.mark.parametrize("how", ["as it was", "writable", "link"])
def test_a_planted_library_is_compiled_again(how, cache, load, monkeypatch, tmp_path):
    made = builds(monkeypatch)
    if how == "writable":
        cache.chmod(0o722)
    elif how == "link":
        cache.rename(tmp_path / "planted.so")
        cache.symlink_to(tmp_path / "planted.so")
    assert load().one() == 1
    assert len(made) == (how != "as it was")


def test_eight_processes_compile_once(load, tmp_path, compiler):
    compiler(f'echo x >> "{tmp_path}/calls"\nsleep 0.2\nexec "{{cc}}" "$@"')
    assert in_forks(8, lambda _: load()) == [0] * 8
    assert (tmp_path / "calls").read_text().split() == ["x", "x"]  # compile, link
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo out; echo 'cc1: no' >&2; exit 1", "cc1: no"),
        ("echo out; exit 1", "out"),
        ("exit 3", "exit status 3"),
        ("echo $LC_ALL; exit 1", "C"),
        ("printf 'caf\\351' >&2; exit 1", "caf\ufffd"),
        ("printf '%500s' x; exit 1", "x"),
        ("printf 'y%.0s' $(seq 500); exit 1", "y" * 400),
    ],
)
def test_what_a_failing_compiler_says_is_in_the_error(load, compiler, script, text):
    compiler(script)
    with pytest.raises(build.BuildError) as raised:
        load(variants=((), ("-x", "-y")))
    assert str(raised.value) == f"{os.environ['CC']} failed; no flags: {text}; -x -y: {text}"


def test_a_compiler_that_takes_too_long_is_an_error(load, compiler, monkeypatch):
    compiler("exec sleep 60")
    monkeypatch.setattr(build, "TIMEOUT", 0.3)
    with pytest.raises(build.BuildError) as raised:
        load()
    assert str(raised.value) == (
        "the compiler took more than 0.3 seconds: try again when the machine is less busy, or set CC to another "
        "compiler"
    )


def test_the_compiler_is_the_one_of_the_environment_else_the_first_on_the_path(monkeypatch, tmp_path):
    for name in ("clang", "cc"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for cc, expected in (("", "cc"), ("clang", "clang"), ("missing", "cc")):
        monkeypatch.setenv("CC", cc)
        assert build.compiler() == str(tmp_path / expected)


@pytest.mark.parametrize("path", ["", ".", "{bin}:", ":{bin}", ".:{bin}", "bin:{bin}", "{bin}"])
@pytest.mark.parametrize("cc", ["", "gcc", "./gcc", "bin/gcc"])
def test_a_compiler_in_the_current_folder_is_not_run(path, cc, monkeypatch, tmp_path):
    place = tmp_path / "unpacked"
    own = tmp_path / "bin"
    for folder in (place, place / "bin", own):
        folder.mkdir()
        (folder / "gcc").write_text("")
        (folder / "gcc").chmod(0o755)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", path.format(bin=own).replace(":", os.pathsep))
    monkeypatch.setenv("CC", cc)
    if "{bin}" in path:
        assert Path(build.compiler()).resolve() == own / "gcc" or cc == "bin/gcc"
        assert str(place) not in str(Path(build.compiler()).resolve())
    else:
        with pytest.raises(build.BuildError):
            build.compiler()


def test_a_compiler_in_the_current_folder_of_windows_is_not_run(monkeypatch, tmp_path):
    own = tmp_path / "bin"
    own.mkdir()
    for folder in (tmp_path, own):
        (folder / "gcc.EXE").write_text("")
        (folder / "gcc.EXE").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATHEXT", ".COM:.EXE".replace(":", os.pathsep))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "os", SimpleNamespace(**vars(os) | {"name": "nt"}))
    monkeypatch.setenv("PATH", str(own))
    assert build.compiler() == str(own / "gcc.EXE")
    monkeypatch.setenv("PATH", "nowhere")
    with pytest.raises(build.BuildError):
        build.compiler()


def test_the_compiler_runs_in_a_folder_of_its_own(load, compiler, tmp_path, monkeypatch):
    """It looks for an assembler and for headers in its working folder, if variables such as PATH or CPATH say so."""
    compiler(f'pwd >> "{tmp_path}/places"\necho "$PATH" >> "{tmp_path}/paths"\nexec "{{cc}}" "$@"')
    monkeypatch.chdir(tmp_path / "source")
    monkeypatch.setenv("PATH", "." + os.pathsep + os.environ["PATH"] + os.pathsep)
    load()
    assert all(Path(line).parent == tmp_path / "cache" for line in (tmp_path / "places").read_text().splitlines())
    paths = (tmp_path / "paths").read_text().splitlines()
    assert all("" not in path.split(os.pathsep) and "." not in path.split(os.pathsep) for path in paths)


def test_what_a_library_depends_on(load, tmp_path, monkeypatch):
    made = builds(monkeypatch)
    variants = ((),)
    for number, change in enumerate(
        (
            lambda: None,
            lambda: (tmp_path / "source" / "included.h").write_text("// another source"),
            lambda: monkeypatch.setattr(build, "_processor", lambda: "another one"),
            lambda: monkeypatch.setattr(build, "FLAGS", build.FLAGS[:-1]),
        ),
        start=1,
    ):
        change()
        for _ in range(2):
            load(variants=variants)
        assert len(made) == number


def test_what_is_known_of_a_processor(monkeypatch, tmp_path):
    """Of a Mac what sysctl says."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nmodel name: X\nflags: a b\n\nprocessor: 1\nmodel name: Y\n")
    monkeypatch.setattr(build, "Path", lambda name: info if name == "/proc/cpuinfo" else Path(name))
    calls = []
    monkeypatch.setattr(build.platform, "machine", lambda: "m")
    monkeypatch.setattr(build.platform, "processor", lambda: "Intel64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert build._processor() == "m AVX2 model name: Xflags: a b"
    info.unlink()
    monkeypatch.setattr(build.platform, "system", lambda: "Windows")
    assert build._processor() == "m AVX2 Intel64"
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    answer = SimpleNamespace(stdout="Apple M1")
    monkeypatch.setattr(build.subprocess, "run", lambda command, **options: calls.append((command, options)) or answer)
    assert build._processor() == "m AVX2 Apple M1"
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    assert calls == [(command, {"capture_output": True, "text": True, "check": False})]


@pytest.mark.parametrize("text", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_is_no_reason_for_a_slower_variant(load, compiler, monkeypatch, text):
    compiler(f"echo 'fatal error: error writing to x.o: {text}' >&2\nexit 1")
    with raises_in_one_line(build.BuildError, r"bytes free.*Free some space"):
        load()
    compiler("exit 1")  # killed, for example
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(build.BuildError, match="100,000 bytes free"):
        load()
    error = OSError(errno.EDQUOT, "Disk quota exceeded")
    monkeypatch.setattr(build, "_build", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(build.BuildError, match=r"Disk quota exceeded\. Free some space"):
        load()


def test_a_compiler_without_openmp_is_a_warning(load, compiler, caplog):
    compiler('case "$*" in *-fopenmp*) echo "no OpenMP" >&2; exit 1;; esac\nexec "{cc}" "$@"')
    load()
    (message,) = caplog.messages
    assert message.startswith(
        "C kernels compiled without threads, so 4-bit layers are slower: -march=native -fopenmp: no OpenMP"
    )
    assert message.endswith(". Install gcc, or set CC to another compiler with OpenMP")


def test_a_mac_without_openmp_gets_one_thread_quietly_and_the_remedy_is_named(load, compiler, monkeypatch, caplog):
    without_apples_option = '$(echo "$@" | sed "s/-undefined dynamic_lookup//")'
    compiler(f'case "$*" in *-fopenmp*) echo no >&2; exit 1;; esac\nexec "{{cc}}" {without_apples_option}')
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    with caplog.at_level("INFO", "lightning_qlora"):
        load(variants=build.flag_lists("Darwin"))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "CC=gcc-14" in build.remedy()


def test_flags_fit_the_system():
    native, v3, mcpu, threads = "-march=native", "-march=x86-64-v3", "-mcpu=native", "-fopenmp"
    assert build.flag_lists("Windows") == ((threads,), ())
    with_threads = (native, threads), (v3, threads), (mcpu, threads)
    assert build.flag_lists("Linux") == (*with_threads, (native,), (v3,), (mcpu,), ())
    with_threads = (mcpu, threads), (native, threads), (mcpu, "-Xclang", threads), (native, "-Xclang", threads)
    assert build.flag_lists("Darwin") == (*with_threads, (mcpu,), (native,), ())


@pytest.mark.parametrize(
    ("capability", "form"), [("AVX2", "AVX2"), pytest.param("DEFAULT", "plain C", marks=pytest.mark.slow)]
)
def test_the_library_has_no_instructions_that_torch_does_not_use(capability, form, monkeypatch):
    """Of an emulated processor or a copied home folder, torch's choice is the surer one: others end the process."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or module.compiled_library() is None:
        pytest.skip("needs AVX-512 and a C compiler")
    processor = build._processor()
    monkeypatch.setattr(build, "_processor", lambda: processor)  # what is compiled already is not compiled again
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    module.compiled_library.cache_clear()
    try:
        assert eager.path() == f"C kernels, {form}"
    finally:
        module.compiled_library.cache_clear()


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_openmp_that_torch_loaded_for_itself_is_opened_for_all(cache, monkeypatch, system, exists):
    """As torch's wheels for ARM and for Macs load it. Another package's is not taken."""
    opened = []

    def open_library(path, mode=0):
        opened.append((path, mode))
        if mode and not exists:
            raise OSError("not loaded")
        return object()  # without OpenMP's functions

    libraries = {"Linux": f"{build.TORCH}/lib/libgomp-1.so", "Darwin": f"{build.TORCH}/lib/libomp.dylib"}
    paths = ("/x/scikit_learn.libs/libgomp.so", libraries["Linux"], "")
    maps = "".join(f"00 r--p 0 00:00 0 {path}\n" for path in paths)
    monkeypatch.setattr(build.ctypes, "CDLL", open_library)
    monkeypatch.setattr(build.platform, "system", lambda: system)
    monkeypatch.setattr(build.Path, "read_bytes", lambda _: os.fsencode(maps))
    build._open(cache)
    of_torch = [(libraries[system], os.RTLD_GLOBAL | os.RTLD_NOLOAD)] if system in libraries else []
    assert opened == [(None, 0)] * (system == "Linux") + of_torch + [(str(cache), 0)]


def test_no_home_folder_is_a_failure_like_others(load, monkeypatch):
    monkeypatch.delenv("LIGHTNING_QLORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home.")))
    with pytest.raises(build.BuildError, match=r"^no home\. Set LIGHTNING_QLORA_CACHE"):
        load()


def test_a_cache_without_execution_is_named_in_one_line_and_nothing_is_compiled(tmp_path, compiler, train, caplog):
    compiler(f'echo x >> "{tmp_path}/calls"\nexit 1')
    with mounted(tmp_path / "noexec", "noexec,mode=700") as folder:
        assert train(folder)[0].startswith("plain torch")
        assert not list(folder.iterdir())
    (warning,) = [message for message in caplog.messages if "C kernels" in message]
    assert f"{folder} is mounted noexec" in warning and "Set LIGHTNING_QLORA_CACHE to a folder" in warning
    assert "\n" not in warning and len(warning) < 300 + len(str(folder))
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("path", [".", "cache", "~/cache", "../cache"])
def test_a_cache_folder_is_never_in_the_current_folder(tmp_path, monkeypatch, path):
    """An unpacked archive may hold a library: the specification of XDG_CACHE_HOME says to ignore relative paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", path)
    with raises_in_one_line(OSError, "is a relative path. Set LIGHTNING_QLORA_CACHE"):
        build.cache_folder()
    monkeypatch.delenv("LIGHTNING_QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_folder() == tmp_path / "home/.cache/lightning_qlora"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert build.cache_folder() == tmp_path / "mine" / "lightning_qlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", path)
    if path != "~/cache":  # which Python expands
        with raises_in_one_line(OSError, "is a relative path"):
            build.cache_folder()
    assert not list(tmp_path.glob("cache*"))


def test_the_path_says_when_the_environment_turned_the_loops_off(train, tmp_path, monkeypatch):
    assert train(tmp_path, LIGHTNING_QLORA_NO_BUILD="1")[0] == "plain torch (LIGHTNING_QLORA_NO_BUILD is set)"
    for value in ("", "0"):
        monkeypatch.setenv("LIGHTNING_QLORA_NO_BUILD", value)
        assert not module.is_off()
