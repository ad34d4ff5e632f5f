"""`lightning-qlora`: what each command prints, its exit codes, and errors in one line."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_qlora
from lightning_qlora import QLoRAConfig, QLoRAPrecision, convert, estimate_memory, save_adapter
from lightning_qlora.kernels.cpu.products import products
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.memory_estimate import fits
from lightning_qlora.training.report import size_text
from tests.conftest import ROOT
from tests.toys import ARGUMENTS, Lit, logits, perturb, save_in_4_bits, toy

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _restore_handlers():
    import signal

    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def trained(tmp_path, trainer):
    """A base folder, a trained module, its checkpoint, and its PEFT folder."""
    toy("llama").save_pretrained(tmp_path / "base")
    lit = Lit(type(toy("llama")).from_pretrained(tmp_path / "base"))
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=2)
    run.fit(lit)
    run.save_checkpoint(tmp_path / "last.ckpt")
    save_adapter(lit, tmp_path / "adapter")
    return lit


def fails(arguments, capsys, code=1):
    with pytest.raises(SystemExit) as raised:
        main([str(argument) for argument in arguments])
    assert raised.value.code == code
    error = capsys.readouterr().err.strip()
    if code == 1:
        assert error.startswith("lightning-qlora: error: ") and "\n" not in error
    return error


def prints(arguments, capsys):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.mark.usefixtures("trained")
def test_inspect(tmp_path, capsys):
    ckpt = prints(["inspect", tmp_path / "last.ckpt"], capsys)
    adapter = prints(["inspect", tmp_path / "adapter"], capsys)
    for text in (ckpt, adapter):
        assert "q_proj x2" in text and f"{tmp_path}/base" in text and "quant_type=nf4" in text
        assert "trained on                     the model in 4 bits (quant_type=nf4" in text
    assert "base fingerprint" in ckpt
    sizes = {name: float(size) for name, size in re.findall(r"size of the (\w+) +([\d.]+) kB", ckpt)}
    assert sizes["checkpoint"] == pytest.approx((tmp_path / "last.ckpt").stat().st_size / 1e3, rel=1e-3)
    assert sizes["weights"] < sizes["checkpoint"] / 3  # two moments of the optimizer as well
    base = prints(["inspect", tmp_path / "base"], capsys)
    assert "LlamaForCausalLM" in base and "F32" in base
    save_in_4_bits(type(toy("llama")), tmp_path / "base", tmp_path / "4bit")
    lines = json.loads(prints(["inspect", tmp_path / "4bit", "--json"], capsys))
    state = load_file(tmp_path / "4bit/model.safetensors")
    packed = tuple(key.removesuffix(".absmax") for key in state if key.endswith(".absmax"))
    in_4_bits = sum(value.nbytes for key, value in state.items() if key.startswith(packed))
    assert lines["kind"] == "model folder, 4-bit (bitsandbytes)"
    assert lines["quantization"] == "bitsandbytes, nf4, double quantization"
    assert (lines["4-bit layers"], lines["tensors"]) == (str(len(packed)), str(len(state)))
    assert f"4-bit {size_text(in_4_bits)}" in lines["size"].split(", ")


def test_inspect_names_the_kind_of_lora_and_counts(tmp_path, capsys):
    lit = Lit(toy("llama"))
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "modules_to_save": ["norm", "lm_head"]}
    convert(lit, **ARGUMENTS, use_dora=True, use_rslora=True, **patterns)
    save_adapter(lit, tmp_path)
    lines = json.loads(prints(["inspect", tmp_path, "--json"], capsys))
    bits = "quant_type=nf4, block_size=64, double_quant=True"
    assert lines.pop("trained on").startswith(
        f"the model in 4 bits ({bits}). On the model in 16 bits its outputs differ"
    )
    trained = [p for p in lit.parameters() if p.requires_grad]
    assert lines == {
        "kind": "PEFT adapter",
        "base": "unknown",
        "quantization": f"{bits}, init_lora_weights=default, base_changed=False",
        "layers": "14: down_proj x2, gate_proj x2, up_proj x2, k_proj x2, o_proj x2, q_proj x2, v_proj x2",
        "rank": "4 (x12), 2 (x2)",
        "alpha": "8 (x12), 3 (x2)",
        "kind of LoRA": "rsLoRA, DoRA",
        "modules_to_save": "lm_head, model.norm",
        "weights": f"{sum(p.numel() for p in trained):,}",
        "size of the weights": size_text(sum(p.nbytes for p in trained)),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "a byte that is not UTF-8: \udcff"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "a byte that is not UTF-8: \\udcff\n" in prints(["inspect", tmp_path], capsys)
    toy("llama").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert json.loads(prints(["inspect", tmp_path / "base", "--json"], capsys)) == {
        "kind": "model folder",
        "architecture": "LlamaForCausalLM",
        "quantization": "none",
        "4-bit layers": "0",
        "tensors": "21",
        "files": "8: model-00001-of-00008.safetensors to model-00008-of-00008.safetensors",
        "size": f"F32 {size_text(sum(p.nbytes for p in toy('llama').parameters()))}",
    }


def test_export_and_merge(trained, tmp_path, capsys):
    main(["export", str(tmp_path / "last.ckpt"), str(tmp_path / "exported")])
    out = capsys.readouterr()
    assert out.out.startswith(
        f"{tmp_path}/exported: 14 layers for {tmp_path}/base\ntrained on: the model in 4 bits (quant"
    )
    assert not out.err
    for number, source in enumerate(("last.ckpt", "exported", "adapter")):
        text = prints(["merge", tmp_path / source, tmp_path / f"merged{number}"], capsys)
        files = sorted((tmp_path / f"merged{number}").iterdir())
        size = sum(path.stat().st_size for path in files) / 1e6
        names = f"{tmp_path}/merged{number}: {tmp_path}/base with {tmp_path / source} merged"
        assert text == f"{names}; {len(files)} files, {size:.1f} MB\n"
        merged = type(trained.model).from_pretrained(tmp_path / f"merged{number}")
        torch.testing.assert_close(logits(merged), logits(trained.model), atol=1e-5, rtol=0)


def test_lines_are_as_wide_as_a_terminal(tmp_path, monkeypatch, capsys):
    toy("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    whole = prints(["inspect", tmp_path], capsys)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for width in (80, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        text = prints(["inspect", tmp_path], capsys)
        assert (text == whole) == (width == 60)
        if width == 80:
            assert max(map(len, text.splitlines())) <= 80 and re.sub(r"\n {31}", " ", text) == whole
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main(["plan", str(tmp_path), "--r", "4", "--sequence_length", "16"])
    assert capsys.readouterr().err == f"Running a step of {tmp_path} without weights ...\n"


def test_plan(tmp_path, capsys):
    toy("llama").save_pretrained(tmp_path / "base")
    arguments = ["--r", "4", "--batch-size", "2", "--sequence_length", "32", "--gradient_checkpointing", "true"]
    out = prints(["plan", tmp_path / "base", *arguments], capsys)
    assert "4-bit weights" in out and "total" in out


def test_doctor(capsys):
    start = time.perf_counter()
    out = prints(["doctor"], capsys)
    assert "torch" in out and "self-test on cpu: training" in out and "wrong" not in out
    assert str(products(torch.bfloat16)) in out
    assert time.perf_counter() - start < 30


def test_doctor_lists_the_ops_whose_kernels_fail_and_checks_them_again(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("lightning_qlora.tools.doctor._self_test", lambda device: [])
    wrong = {"adamw_step": "differs by 1"}
    monkeypatch.setattr("lightning_qlora.kernels.backends.failures", lambda *given: asked.append(given) or wrong)
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--check"])
    assert raised.value.code == 1 and asked == [(torch.device("cpu"), True)]
    assert "in plain torch, because its kernels fail: differs by 1  <-- wrong" in capsys.readouterr().out


def test_doctor_looks_at_an_apple_gpu_and_says_what_to_use_in_its_place(monkeypatch):
    from lightning_qlora.tools import doctor

    if torch.backends.mps.is_available():
        pytest.skip("has one")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.warns(UserWarning, match='accelerator="cpu"$'):
        checks = {name: (what, good) for name, what, good in doctor.examine()}
    assert "never run" in checks["mps"][0]
    what, good = checks["self-test on mps: ops"]
    assert what.endswith('use accelerator="cpu"') and not good
    what, good = checks["self-test on mps"]
    assert what.endswith('use accelerator="cpu"') and not good


def test_doctor_on_a_machine_with_a_card(monkeypatch):
    from lightning_qlora.tools import doctor

    card = SimpleNamespace(name="A card", is_integrated=0)
    for name, value in {"is_available": True, "device_count": 1, "mem_get_info": (10**9, 2 * 10**9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(doctor, "why_not_managed", lambda device: "no driver")
    monkeypatch.setattr(doctor.backends, "failures", lambda device, check: {})
    monkeypatch.setattr(doctor.backends, "describe", lambda device: f"kernels of {device}")
    monkeypatch.setattr(doctor, "_self_test", lambda device: [(f"self-test on {device}", "ran", True)])
    monkeypatch.setattr(doctor.build, "compiler", lambda: (_ for _ in ()).throw(doctor.build.BuildError("none found")))
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


def test_doctor_says_which_op_is_wrong_and_whether_a_layer_learns(monkeypatch):
    from lightning_qlora.tools import doctor

    (ops, text, good), (training, losses, learns) = doctor._self_test(torch.device("cpu"))
    assert (ops, good) == (
        "self-test on cpu: ops",
        True,
    ) and text == f"all {len(doctor.OPS)} compute what the reference does"
    first, last = map(float, re.match(r"loss ([\d.]+) to ([\d.]+) in 20 steps; \d+\.\d s in total$", losses).groups())
    assert training == "self-test on cpu: training" and learns and last < 0.9 * first
    monkeypatch.setattr(doctor, "fault", lambda backend, device, op: "differs" if op in doctor.OPS[:2] else None)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    (_, text, good), (_, _, learns) = doctor._self_test(torch.device("cpu"))
    assert text == "; ".join(f"{op}: differs" for op in doctor.OPS[:2]) and not good and not learns


def test_doctor_names_the_remedy_for_loops_without_threads(monkeypatch):
    from lightning_qlora.tools import doctor

    monkeypatch.setattr(doctor, "_self_test", lambda device: [])
    monkeypatch.setattr(doctor.backends, "describe", lambda device: "C kernels, NEON, one thread")
    checks = {name: what for name, what, _ in doctor.examine()}
    assert checks["cpu kernels"] == f"C kernels, NEON, one thread. {doctor.build.remedy()}"


def test_doctor_says_which_extra_is_missing_and_where_paging_brings_nothing(monkeypatch):
    from lightning_qlora.tools import doctor

    def version(name):
        if name in ("jsonargparse", "triton"):
            raise doctor.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_self_test", lambda device: [])
    checks = {name: (what, good) for name, what, good in doctor.examine()}
    assert checks["jsonargparse"] == (
        'not installed (extra cli: pip install ".[cli]" in a clone of the repository)',
        True,
    )
    assert checks["triton"][0].startswith("not installed") and checks["triton"][1] and checks["peft"] == ("1.0", True)
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in doctor.PACKAGES.items():
        if extra is None:
            continue
        listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
        assert any(re.match(rf"{package}\b", entry) for entry in listed), package
    card = torch.device("cuda", 0)
    assert "brings nothing" in doctor.paging(card, SimpleNamespace(is_integrated=1))
    monkeypatch.setattr(doctor, "why_not_managed", lambda device: None)
    assert doctor.paging(card, SimpleNamespace(is_integrated=0)) == "unified memory"


def test_doctor_fails_if_something_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("lightning_qlora.tools.doctor.examine", lambda check: [("CPU", "on fire", False)])
    with pytest.raises(SystemExit) as raised:
        main(["doctor"])
    assert raised.value.code == 1
    assert "on fire  <-- wrong" in capsys.readouterr().out


@pytest.mark.usefixtures("trained")
def test_errors_are_one_line(tmp_path, capsys):
    assert fails(["inspect", tmp_path / "nothing"], capsys).endswith(
        "the connection, and that huggingface_hub is installed."
    )
    assert "not an empty folder" in fails(["merge", tmp_path / "adapter", tmp_path / "base"], capsys)
    (tmp_path / "other").mkdir()
    toy("gpt2").save_pretrained(tmp_path / "other")
    capsys.readouterr()
    error = fails(["merge", tmp_path / "adapter", tmp_path / "out", "--base_model", tmp_path / "other"], capsys)
    assert "adapter_model.safetensors: key 'base_model.model.model.layers.0" in error
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert "adapter_model.safetensors: not a safetensors file, or truncated" in fails(
        ["inspect", tmp_path / "adapter"], capsys
    )
    (tmp_path / "x.ckpt").write_bytes(b"x")
    assert "x.ckpt: not a checkpoint" in fails(["export", tmp_path / "x.ckpt", tmp_path / "out"], capsys)
    assert "dtype" in fails(["merge", "a", "b", "--dtype", "int8"], capsys, code=2)
    assert "--base_mod" in fails(["merge", "a", "b", "--base_mod", "c"], capsys, code=2)
    assert "devices=0: must be an integer >= 1" in fails(["plan", tmp_path / "base", "--devices", "0"], capsys)
    (tmp_path / "gguf").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "gguf" / name).touch()
    merge_into = ["merge", tmp_path / "last.ckpt", tmp_path / "out", "--base_model"]
    assert "gguf: has 2 GGUF files, ['a.gguf', 'b.gguf']. Pass one" in fails([*merge_into, tmp_path / "gguf"], capsys)
    (tmp_path / "base/config.json").unlink()
    assert "base: has no config.json, which names the model" in fails([*merge_into, tmp_path / "base"], capsys)
    assert not (tmp_path / "out").exists()


def test_an_error_that_is_none_of_the_user_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_qlora.tools.inspect_path.inspect_path", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        main(["inspect", str(tmp_path)])


@pytest.mark.usefixtures("trained")
def test_merge_refuses_an_output_that_cannot_be_replaced_before_it_reads_anything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_qlora.adapters.peft_folder.read_adapter", lambda path: pytest.fail("work was done"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "empty")
    for place, reason in (
        ("../link", "symbolic link"),
        ("../dangling", "symbolic link"),
        (".", "the current directory"),
    ):
        assert reason in fails(["merge", tmp_path / "adapter", place], capsys)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha_pattern": [1]}, "alpha_pattern=[1]: must be a dict whose keys are non-empty strings"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern='(': not a valid regular expression"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj']='x': must be a number"),
        ({"lora_alpha": "abc"}, "lora_alpha='abc': must be a number"),
        ({"lora_alpha": None}, "lora_alpha=None: must be a number"),
        ({"lora_dropout": "x"}, "lora_dropout='x': must be a number"),
        ({"modules_to_save": 5}, "modules_to_save=5: must be a list of non-empty names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': must be a list of non-empty names"),
        ({"target_modules": 5}, "target_modules=5: must be a list of non-empty names, or a regular expression"),
        ({"use_rslora": "maybe"}, "use_rslora='maybe': must be True or False"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path=5: must be a string"),
    ],
)
def test_wrong_values_of_an_adapter_config_are_named(values, message, tmp_path, capsys):
    lit = Lit(toy("llama"))
    convert(lit, **ARGUMENTS)
    save_adapter(lit, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert f"{path}: {message}" in fails(["inspect", tmp_path], capsys)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([1], "its 'weight_map' is [1]; it must be an object"),
        ("x", "its 'weight_map' is 'x'; it must be an object"),
        ({}, "its 'weight_map' is {}; it must be an object"),
        (None, "its 'weight_map' is None; it must be an object"),
        ({"a": 5}, "the file of 'a' is 5, which is not a file"),
    ],
)
def test_wrong_indices_are_named(weight_map, message, tmp_path, capsys):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert f"{index}: {message}" in fails(["inspect", tmp_path], capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.index_fill(0, torch.tensor([1]), float("inf")), "{key}: weight: holds NaN or Inf"),
        (lambda w: w[0].clone(), "'{key}.weight' has shape [64], and a LlamaForCausalLM with"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_merge_names_a_weight_that_it_cannot_merge(change, message, tmp_path, capsys):
    key, path = "model.layers.0.self_attn.q_proj", tmp_path / "base/model.safetensors"
    state = load_file(path)
    save_file({**state, f"{key}.weight": change(state[f"{key}.weight"])}, path, metadata={"format": "pt"})
    error = fails(["merge", tmp_path / "adapter", tmp_path / "out"], capsys)
    assert f"{tmp_path / 'base'}: {message.replace('{key}', key)}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(("command", "source"), [("merge", "adapter"), ("export", "last.ckpt")])
def test_a_full_disk_is_one_line_and_nothing_is_left(command, source, tmp_path, capsys):
    """As a full disk, a limit on the size of a file lets a write fail after a part of its bytes."""
    resource = pytest.importorskip("resource")  # of POSIX
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        error = fails([command, tmp_path / source, tmp_path / "out"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.startswith(f"lightning-qlora: error: {tmp_path / 'out'}: could not be written")
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_that_names_no_base_is_one_error(tmp_path, capsys):
    lit = Lit(toy("llama"))
    convert(lit, **ARGUMENTS)
    save_adapter(perturb(lit), tmp_path / "adapter")
    assert "names no base model. Pass it: --base_model FOLDER" in fails(
        ["merge", tmp_path / "adapter", tmp_path / "out"], capsys
    )


def test_help_names_types_and_defaults():
    run = subprocess.run(
        [sys.executable, "-m", "lightning_qlora.tools.cli", "merge", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "{auto,bf16,fp16,fp32}" in run.stdout and "default: auto" in run.stdout


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"lightning-qlora {lightning_qlora.__version__}"


def test_help_and_mistakes_do_not_import_torch():
    script = (
        "import sys; from lightning_qlora.tools.cli import main\n"
        "for arguments in (['--help'], ['plan', '--help'], ['plan', 'x', '--lora_r', '4'], ['merge']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0", "0", "2", "2"]
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--lora_r" in done.stderr and "lora_r: use r." in done.stderr and "usage:" not in done.stderr


def vit(folder):
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.ViTConfig(**sizes, image_size=32, patch_size=8).save_pretrained(folder)


@pytest.mark.usefixtures("trained")
def test_json(tmp_path, capsys):
    def read(*arguments):
        return json.loads(prints([*arguments, "--json"], capsys))

    assert read("inspect", tmp_path / "adapter")["kind"].startswith("PEFT adapter")
    merged = read("merge", tmp_path / "last.ckpt", tmp_path / "merged")
    files = {path.name: path.stat().st_size for path in (tmp_path / "merged").iterdir()}
    names = {"output": f"{tmp_path}/merged", "base_model": f"{tmp_path}/base", "adapter": f"{tmp_path}/last.ckpt"}
    assert merged == names | {"files": files}
    vit(tmp_path / "vit")
    plan = read("plan", tmp_path / "base", "--r", "4", "--sequence_length", "32", "--gpu_memory", "1GB")
    estimate = estimate_memory(f"{tmp_path}/base", sequence_length=32, r=4)
    needed = estimate.device + estimate.parts["decode buffer"]
    answer = fits(needed, 10**9, QLoRAConfig(r=4))
    totals = {"total": estimate.total, "device": estimate.device, "on_each_device": needed, "fits": answer}
    assert plan == json.loads(json.dumps(vars(estimate) | totals))
    unknown = read("plan", tmp_path / "vit", "--r", "4", "--gpu_memory", "1GB")
    assert unknown["fits"] == "It is not known whether it fits: the activations could not be counted."


@pytest.mark.usefixtures("trained")
def test_a_flag_may_have_a_value(tmp_path, capsys):
    text = prints(["inspect", tmp_path / "adapter"], capsys)
    assert prints(["inspect", tmp_path / "adapter", "--json", "false"], capsys) == text
    assert json.loads(prints(["inspect", tmp_path / "adapter", "--json", "true"], capsys))
