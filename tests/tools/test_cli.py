"""`lightning-qlora`: what each command prints, its exit codes, and errors in one line."""

import json
import platform
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import lightning_qlora
from lightning_qlora import QLoRAConfig, QLoRAPrecision, convert, estimate_memory, save_adapter
from lightning_qlora.checks import install
from lightning_qlora.files.safetensors_folder import WeightFolder
from lightning_qlora.kernels.cpu.matmul_16bit import products
from lightning_qlora.tools import doctor
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.memory_estimate import fits
from tests.conftest import ROOT, make_trainer, raises_in_one_line
from tests.toys import ARGUMENTS, Lit, converted, logits, toy

pytest.importorskip("transformers")
BITS = "quant_type=nf4, block_size=64, double_quant=True"
LAYERS = "down_proj x2, gate_proj x2, up_proj x2, k_proj x2, o_proj x2, q_proj x2, v_proj x2"


@pytest.fixture(autouse=True)
def _restore_handlers():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base, a checkpoint of its training and its PEFT folder, and the module; they are only read."""
    folder = tmp_path_factory.mktemp("trained")
    toy("llama").save_pretrained(folder / "base")
    lit = Lit(type(toy("llama")).from_pretrained(folder / "base"))
    torch.manual_seed(0)
    run = make_trainer(folder, plugins=QLoRAPrecision(**ARGUMENTS), max_steps=2, enable_checkpointing=False)
    run.fit(lit)
    run.save_checkpoint(folder / "last.ckpt")
    save_adapter(lit, folder / "adapter")
    return folder, lit


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that folder, to be changed; its adapters still name the base of the other one."""
    shutil.copytree(trained[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def fails(capsys):
    def run(*arguments, code=1):
        with pytest.raises(SystemExit) as raised:
            main([str(argument) for argument in arguments])
        assert raised.value.code == code
        error = capsys.readouterr().err.strip()
        if code == 1:
            assert error.startswith("lightning-qlora: error: ") and "\n" not in error
        return error

    return run


@pytest.fixture
def prints(capsys):
    def run(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def read(prints):
    return lambda *arguments: json.loads(prints(*arguments, "--json"))


def test_inspect(trained, tmp_path, read, prints):
    folder, lit = trained
    adapter = read("inspect", folder / "adapter")
    text = "".join(f"{name:30} {value}\n" for name, value in adapter.items())
    assert prints("inspect", folder / "adapter") == text
    assert prints("inspect", folder / "adapter", "--json", "false") == text
    path = folder / "adapter"
    for arguments in ((path, "--json", "true"), (path, "--json=true"), ("--json", path)):
        assert json.loads(prints("inspect", *arguments)) == adapter
    assert adapter.pop("trained on").startswith(f"the model in 4 bits ({BITS}). On the model in 16 bits its outputs")
    assert adapter == {
        "base": f"{folder}/base",
        "layers": LAYERS,
        "rank": "4",
        "modules_to_save": "nothing",
        "weights": f"{sum(p.numel() for p in lit.parameters() if p.requires_grad):,}",
    }
    of_checkpoint = read("inspect", folder / "last.ckpt")
    assert of_checkpoint.pop("trained on") and of_checkpoint == adapter


def test_inspect_shows_what_trained_in_full_and_each_rank(tmp_path, read, prints):
    lit = Lit(toy("llama"))
    convert(lit, **ARGUMENTS, use_dora=True, rank_pattern={"q_proj": 2}, modules_to_save=["norm"])
    save_adapter(lit, tmp_path)
    lines = read("inspect", tmp_path)
    trained = sum(p.numel() for p in lit.parameters() if p.requires_grad)
    expected = {"base": "unknown", "layers": LAYERS, "rank": "2, 4", "modules_to_save": "model.norm.weight"}
    assert lines.items() >= (expected | {"weights": f"{trained:,}"}).items()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "a byte that is not UTF-8: \udcff"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "a byte that is not UTF-8: \\udcff\n" in prints("inspect", tmp_path)


def test_export_and_merge(trained, tmp_path, capsys, prints):
    folder, lit = trained
    main(["export", str(folder / "last.ckpt"), str(tmp_path / "exported")])
    out = capsys.readouterr()
    first, second = out.out.splitlines()
    assert first == f"{tmp_path}/exported: 14 layers for {folder}/base"
    assert second.startswith(f"trained on: the model in 4 bits ({BITS}). ")
    assert not out.err
    sources = folder / "last.ckpt", tmp_path / "exported", folder / "adapter"
    for number, source in enumerate(sources):
        output = tmp_path / f"merged{number}"
        text = prints("merge", source, output, *["--trust-remote-code", "--json"][: 2 * (number == 0)])
        files = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
        if number == 0:
            names = {"output": f"{output}", "base_model": f"{folder}/base", "adapter": f"{source}"}
            assert json.loads(text) == names | {"files": files}
        else:
            size = sum(files.values()) / 1e6
            assert text == f"{output}: {folder}/base with {source} merged; {len(files)} files, {size:.1f} MB\n"
        merged = type(lit.model).from_pretrained(output)
        torch.testing.assert_close(logits(merged), logits(lit.model), atol=1e-5, rtol=0)


def test_a_merge_without_a_tokenizer_says_so(copied, tmp_path, capsys):
    for number, has_one in enumerate((False, True)):
        if has_one:
            (copied / "base/tokenizer.json").write_text("{}")
        main(["merge", str(copied / "adapter"), str(tmp_path / f"{number}"), "--base_model", str(copied / "base")])
        warning = f"warning: {copied}/base has no tokenizer, so {tmp_path}/{number} has none: copy one there"
        assert (warning in capsys.readouterr().err) is not has_one


def test_a_file_of_another_kind_is_not_damaged(tmp_path, fails):
    (tmp_path / "tune.py").write_text("import torch")
    text = fails("inspect", tmp_path / "tune.py")
    assert "tune.py: not a checkpoint" in text and "Pass what the training wrote" in text and "damaged" not in text


def test_lines_are_as_wide_as_a_terminal(trained, monkeypatch, prints):
    folder, _ = trained
    whole = prints("inspect", folder / "adapter")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for width in (80, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        text = prints("inspect", folder / "adapter")
        assert (text == whole) == (width == 60)
        if width == 80:
            assert " ".join(text.split()) == " ".join(whole.split())


def test_doctor(prints):
    out = prints("doctor")
    assert "torch" in out and "wrong" not in out
    assert str(products(torch.bfloat16)) in out
    lines = {line[:30].strip(): line[31:] for line in out.splitlines()}
    assert lines["self-test on cpu: ops"] == f"all {len(doctor.OPS)} compute what the reference does"
    losses = r"loss ([\d.]+) to ([\d.]+) in 20 steps; (\d+\.\d) s in total"
    first, last, seconds = map(float, re.fullmatch(losses, lines["self-test on cpu: training"]).groups())
    assert last < 0.9 * first and seconds < 30


def test_doctor_says_which_op_is_wrong_and_that_a_layer_does_not_learn(monkeypatch):
    monkeypatch.setattr(doctor, "faults", lambda *_: dict.fromkeys(doctor.OPS[:2], "differs"))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    (_, text, good), (_, _, learns) = doctor._self_test(torch.device("cpu"))
    assert text == "; ".join(f"{op}: differs" for op in doctor.OPS[:2]) and not good and not learns


def test_doctor_lists_the_ops_whose_kernels_fail_and_checks_them_again(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(doctor, "differs", {"torch": "2.13.0", "lightning": ""}.get)
    monkeypatch.setattr(doctor, "_self_test", lambda device: [])
    wrong = {"dequantize": "differs by 1"}
    monkeypatch.setattr(doctor.backends, "failures", lambda *given: asked.append(given) or wrong)
    monkeypatch.setattr(doctor.backends, "describe", lambda device: "C kernels, NEON, one thread")
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--check"])
    assert raised.value.code == 1 and asked == [(torch.device("cpu"), True)]
    expected = [
        f"{'cpu kernels':30} C kernels, NEON, one thread. {doctor.build.remedy()}",
        f"{'cpu dequantize':30} in plain torch, because its kernels fail: differs by 1  <-- wrong",
    ]
    assert "\n".join(expected) in capsys.readouterr().out


def test_doctor_looks_at_an_apple_gpu_and_says_what_to_use_in_its_place(monkeypatch):
    if torch.backends.mps.is_available():
        pytest.skip("has one")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.warns(UserWarning, match='accelerator="cpu"$'):
        checks = {name: (what, good) for name, what, good in doctor.examine()}
    text = 'Apple\'s GPU, on which this package was never run: use accelerator="cpu" if a check below fails'
    assert checks["mps"] == (text, True)
    for name in ("self-test on mps: ops", "self-test on mps"):
        what, good = checks[name]
        assert what.endswith('use accelerator="cpu"') and not good


def test_doctor_on_a_machine_with_a_card(monkeypatch):
    card = SimpleNamespace(name="A card", is_integrated=0)
    for name, value in {"is_available": True, "device_count": 1, "mem_get_info": (10**9, 2 * 10**9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(doctor, "why_not_managed", lambda device: "no driver")
    monkeypatch.setattr(doctor.backends, "failures", lambda device, check: {})
    monkeypatch.setattr(doctor.backends, "describe", lambda device: f"kernels of {device}")
    monkeypatch.setattr(doctor, "differs", {"torch": "2.13.0", "lightning": ""}.get)
    monkeypatch.setattr(doctor, "_self_test", lambda device: [(f"self-test on {device}", "ran", True)])
    monkeypatch.setattr(doctor.build, "compiler", Mock(side_effect=doctor.build.BuildError("none found")))
    checks = {name: text for name, text, good in doctor.examine() if good}
    assert checks["C compiler"] == "none found; the CPU path is slower without one"
    assert checks["cuda:0"] == "A card, 1 GB of 2 GB free" and checks["cuda:0 paging"] == "no driver"
    for device in ("cpu", "cuda:0"):
        assert checks[f"{device} kernels"] == f"kernels of {device}" and checks[f"self-test on {device}"] == "ran"
    assert "GPU" not in checks
    names = ("TRITON_INTERPRET", "LIGHTNING_QLORA_CACHE", "CC", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, f"x{name}")
    monkeypatch.delenv("CC")
    assert doctor.environment() == {name: f"x{name}" for name in names if name != "CC"}


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has a GPU")
def test_doctor_says_which_extra_is_missing_and_where_paging_brings_nothing(monkeypatch):
    missing = {
        "torch": ("not installed", False),
        "triton": ("not installed under this name; torch for CUDA and ROCm brings its own", True),
        "jsonargparse": (f"not installed (extra cli: {install('cli')})", True),
        "bitsandbytes": ("not installed", True),
    }

    def version(name):
        if name in missing:
            raise doctor.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "differs", {"torch": "2.13.0", "lightning": ""}.get)
    monkeypatch.setattr(doctor, "_self_test", lambda device: [])
    checks = {name: (what, good) for name, what, good in doctor.examine()}
    compiler = checks.pop("C compiler"), checks.pop("cpu kernels")
    assert compiler[0][1] and compiler[1] == (doctor.backends.describe(torch.device("cpu")), True)
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    machine = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    assert checks == {
        "python": (machine, True),
        **{name: (f"1.0 ({doctor.tested_text(name)})", True) for name in doctor.PACKAGES},
        "private names": ("all that this package uses are there", True),
        **missing,
        "CPU": (threads, True),
        "CPU, bfloat16": (str(products(torch.bfloat16)), True),
        "CPU, float16": (str(products(torch.float16)), True),
        "GPU": ("none that torch supports", True),
    }
    monkeypatch.setattr(doctor, "differs", {"torch": "2.13.0", "lightning": ""}.get)
    monkeypatch.setattr(doctor, "_self_test", lambda device: iter([1 / 0]))
    with pytest.raises(ZeroDivisionError):
        list(doctor.examine())
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, extra in doctor.PACKAGES.items():
        if extra is None:
            continue
        listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
        assert any(re.match(rf"{package}\b", entry) for entry in listed), package
    card = torch.device("cuda", 0)
    nothing = "brings nothing: this GPU uses the host's memory, so there is no other one to page to"
    assert doctor.paging(card, SimpleNamespace(is_integrated=1)) == nothing
    monkeypatch.setattr(doctor, "why_not_managed", lambda device: None)
    assert doctor.paging(card, SimpleNamespace(is_integrated=0)) == "unified memory"


@pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])
def test_doctor_fails_if_something_is_wrong(json_flag, capsys, monkeypatch):
    found = [("python", "3", True), ("CPU", "on fire", False)]
    monkeypatch.setattr(doctor, "examine", lambda check: found)
    monkeypatch.setattr(doctor, "environment", lambda: {"CC": "gcc"})
    with pytest.raises(SystemExit) as raised:
        main(["doctor", *json_flag])
    assert raised.value.code == 1
    if json_flag:
        checks = {"python": {"found": "3", "good": True}, "CPU": {"found": "on fire", "good": False}}
        assert json.loads(capsys.readouterr().out) == {"checks": checks, "environment": {"CC": "gcc"}}
    else:
        assert capsys.readouterr().out == f"{'python':30} 3\n{'CPU':30} on fire  <-- wrong\n{'CC':30} gcc\n"
    found.pop()
    monkeypatch.setattr("sys.argv", ["lightning-qlora", "doctor", *json_flag])
    main()


def test_errors_are_one_line(trained, copied, tmp_path, capsys, monkeypatch, fails):
    folder, _ = trained
    output = tmp_path / "out"
    assert fails("inspect", tmp_path / "nothing").endswith("nothing: no such file.")
    assert "not an empty folder" in fails("merge", folder / "adapter", folder / "base")
    toy("gpt2").save_pretrained(tmp_path / "other")
    capsys.readouterr()
    error = fails("merge", folder / "adapter", output, "--base_model", tmp_path / "other")
    assert "adapter_model.safetensors: key 'base_model.model.model.layers.0" in error
    weights = copied / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert "adapter_model.safetensors: not a safetensors file, or truncated" in fails("inspect", copied / "adapter")
    assert "dtype" in fails("merge", "a", "b", "--dtype", "int8", code=2)
    assert "--base_mod" in fails("merge", "a", "b", "--base_mod", "c", code=2)
    assert "{plan,inspect,merge,export,doctor}, but it was not provided" in fails(code=2)
    assert fails("inspect", "a", "b", code=2).endswith("\nlightning-qlora inspect --help lists the arguments.")
    for command, argument in ((["plan"], "model"), (["merge", "a"], "output")):
        expected = f"are required: {argument}\nlightning-qlora {command[0]} --help lists the arguments."
        assert fails(*command, code=2).endswith(expected)
    assert "devices=0: must be an integer >= 1" in fails("plan", folder / "base", "--devices", "0")
    (tmp_path / "gguf").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "gguf" / name).touch()
    merge_into = ["merge", folder / "last.ckpt", output, "--base_model"]
    assert "gguf: has 2 GGUF files, ['a.gguf', 'b.gguf']. Pass one" in fails(*merge_into, tmp_path / "gguf")
    (copied / "adapter/adapter_config.json").unlink()
    assert "adapter_config.json: no such file. PEFT writes" in fails("inspect", copied / "adapter")
    path = copied / "base/model.safetensors"
    assert "Pass a checkpoint of a run with QLoRAPrecision, or the" in fails("export", path, output)
    config = copied / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    for command in (["plan", copied / "base", "--r", "4"], [*merge_into, copied / "base"]):
        assert "base: is in 'gptq'. transformers can dequantize" in fails(*command)
    config.unlink()
    assert "base: has no config.json, which names the model" in fails(*merge_into, copied / "base")
    save_adapter(converted("llama"), tmp_path / "adapter")
    assert "names no base model. Pass it: --base_model FOLDER" in fails("merge", tmp_path / "adapter", output)
    assert not output.exists()
    with pytest.raises(SystemExit) as end:
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
    assert end.value.code == 143
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=re.escape(f"lightning-qlora: jsonargparse is missing: {install('cli')}")):
        main([])


def test_an_error_that_is_none_of_the_user_keeps_its_traceback(tmp_path, monkeypatch, fails):
    monkeypatch.setattr("lightning_qlora.tools.cli._adapter", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        main(["inspect", str(tmp_path)])

    monkeypatch.setattr("lightning_qlora.tools.cli._adapter", Mock(side_effect=KeyboardInterrupt))
    assert fails("inspect", tmp_path, code=130) == ""


def test_merge_refuses_an_output_before_it_reads_anything(tmp_path, monkeypatch, fails):
    monkeypatch.setattr("lightning_qlora.adapters.peft_folder.read_adapter", lambda *_: pytest.fail("work was done"))
    (tmp_path / "link").symlink_to("nothing")
    assert "symbolic link" in fails("merge", tmp_path, tmp_path / "link")


WRONG_INDICES = [
    ([1], "its 'weight_map' is [1]; it must be an object"),
    ({}, "its 'weight_map' is {}; it must be an object"),
    ({"a": 5}, "the file of 'a' is 5, which is not a file"),
]


def test_wrong_values_of_an_index_are_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in WRONG_INDICES:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with raises_in_one_line(ValueError, re.escape(f"{index}: {message}")):
            WeightFolder(tmp_path)


@pytest.mark.parametrize(("command", "source"), [("merge", "adapter"), ("export", "last.ckpt")])
def test_a_full_disk_is_one_line_and_nothing_is_left(command, source, trained, tmp_path, fails):
    """As a full disk, a limit on the size of a file lets a write fail after a part of its bytes."""
    resource = pytest.importorskip("resource")  # of POSIX
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        error = fails(command, trained[0] / source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.startswith(f"lightning-qlora: error: {tmp_path / 'out'}: could not be written")
    assert not list(tmp_path.iterdir())


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"lightning-qlora {lightning_qlora.__version__}"


def test_help_and_mistakes_do_not_import_torch():
    script = (
        "import sys; from lightning_qlora.tools.cli import main\n"
        "helps = ['--help'], ['merge', '--help'], ['plan', '--help']\n"
        "for arguments in (*helps, ['plan', 'x', '--lora_r', '4'], ['merge']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0", "0", "0", "2", "2"]
    assert done.stdout.splitlines()[-1] == "[]"
    words = " ".join(done.stdout.split())  # of `plan`, with the descriptions in QLoRAConfig
    assert "--lora_alpha LORA_ALPHA The output of an adapter is multiplied by lora_alpha / r." in words
    assert "{auto,bf16,fp16,fp32}" in done.stdout and "default: auto" in done.stdout
    assert "--lora_r" in done.stderr and "usage:" not in done.stderr


def test_plan_as_json(trained, tmp_path, read):
    import transformers

    base = trained[0] / "base"
    transformers.logging.set_verbosity_warning()
    plan = read("plan", base, "--r", "4", "--sequence_length", "32", "--gpu_memory", "1GB")
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR  # its hints are about running a model
    estimate = estimate_memory(f"{base}", sequence_length=32, r=4)
    needed = estimate.device
    answer = fits(needed, 10**9, QLoRAConfig(r=4))
    totals = {"total": estimate.total, "device": estimate.device, "on_each_device": needed, "fits": answer}
    assert plan == json.loads(json.dumps(vars(estimate) | totals))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.ViTConfig(**sizes, image_size=32, patch_size=8).save_pretrained(tmp_path)
    unknown = read("plan", tmp_path, "--r", "4", "--gpu_memory", "1GB")
    assert unknown["fits"] == "It is not known whether it fits: the activations could not be counted."
