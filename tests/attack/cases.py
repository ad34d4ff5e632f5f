"""Attacks with random cases: arguments, layers, modules, threads, and many conversions in one process."""

import gc
import json
import math
import random
import resource
import threading
from collections import Counter

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_qlora import QLoRALinear, convert, merge
from lightning_qlora.adapters.peft_config import CONFIG_FILE
from lightning_qlora.adapters.peft_folder import BASE, CHECKSUMS, WEIGHTS_FILE, read_adapter, write_adapter
from lightning_qlora.config import BLOCK_SIZES, QUANT_TYPES, QLoRAConfig
from tests.adapters.test_peft_folder import adapter
from tests.toys import perturb

JSON = (type(None), bool, int, float, str, list)

VALUES = (
    None, True, False, 0, 1, -1, 64, 3.5, math.nan, math.inf, 1e308, 10**30, "", "nf4", "auto", "x" * 500, "(",
    b"a", "é\n", [], [""], ["a", 1], {}, {"a": 1}, {"(": 2}, {"a": -1}, {1: 2}, object(), torch.float32, ("a",),
    {"a"},
)  # fmt: skip


def arguments(seed, count, _):
    """Random values of random arguments: a config, or TypeError or ValueError that names the argument."""
    draw = random.Random(seed)
    found = Counter()
    names = list(QLoRAConfig.__dataclass_fields__)
    for _ in range(count):
        chosen = {name: draw.choice(VALUES) for name in draw.sample(names, draw.randint(1, 3))}
        try:
            QLoRAConfig(**chosen)
            found["accepted"] += 1
        except (TypeError, ValueError) as error:
            found["refused" if any(name in str(error) for name in chosen) else f"unclear: {chosen}: {error}"] += 1
    assert found.keys() <= {"accepted", "refused"}, f"seed {seed}: {found}"
    return found


def layers(seed, count, _):
    """Layers of random shapes, types and arguments against y = x W^T + b + s x A^T B^T in fp64, with gradients."""
    draw = random.Random(seed)
    found = Counter(wrong=0)
    for number in range(count):
        torch.manual_seed(draw.randrange(1 << 30))
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
        inputs = draw.randint(1, 300)
        outputs = draw.randint(1, 200)
        rows = draw.choice([1, 2, 7, 65, 130])
        layer = nn.Linear(inputs, outputs, bias=draw.random() < 0.5).to(dtype)
        module = nn.Sequential(layer)
        rank = draw.randint(1, 16)
        if rank * (inputs + outputs) >= inputs * outputs:
            continue  # trains in full
        report = convert(
            module,
            r=rank,
            lora_dropout=0.0,
            quant_type=draw.choice(QUANT_TYPES),
            block_size=draw.choice(BLOCK_SIZES),
            double_quant=draw.random() < 0.5,
            use_rslora=draw.random() < 0.5,
        )
        if not report.converted:
            continue  # takes fewer bytes in 16 bits
        perturb(module, seed=number)
        x = torch.randn(rows, inputs).to(dtype).requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        w, a, b = (t.detach().double() for t in (layer.decode(), layer.lora_A, layer.lora_B))
        xd = x.detach().double().requires_grad_()
        expected = xd @ (w + layer.scaling * b @ a).T + (0 if layer.bias is None else layer.bias.double())
        expected.square().sum().backward()
        error = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
        for one, other in ((y, expected), (x.grad, xd.grad)):
            scale = other.abs().max().item() + 1e-6
            assert (one.double() - other).abs().max().item() <= error * scale, f"seed {seed}, case {number}: {module}"
        found["right"] += 1
    return found


def foreign_values(seed, count, folder):
    """Random values in PEFT's two files, of any JSON and tensor type: an adapter, or an error of one line, soon."""
    draw = random.Random(seed)
    found = Counter()
    values = [value for value in VALUES if isinstance(value, JSON)]
    values += [
        10**400,
        {"(a|b)": 10**400},
        [[1]],
        [4, 0, False, False, True],
    ]
    names = ("float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64", "int64", "bool", "bfloat16")
    for number in range(count):
        write_adapter(adapter(1), folder)
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        config = json.loads((folder / CONFIG_FILE).read_text())
        del metadata[CHECKSUMS]
        which = number % 3
        if which == 0:
            config |= {name: draw.choice(values) for name in draw.sample([*config, "target_parameters"], 2)}
        elif which == 1:
            inner = {draw.choice(["quant_type", "init_lora_weights", "layers.0.proj", "a"]): draw.choice(values)}
            entry = {draw.choice(["quantization", "fingerprints"]): draw.choice([*values, inner])}
            metadata[BASE] = json.dumps(draw.choice([*values, entry]))
        else:
            key = draw.choice(list(tensors))
            value = tensors[key].to(getattr(torch, draw.choice(names)))
            tensors[key] = draw.choice([value, value[:0], value[None], value.view(-1)[:1]]).contiguous()
        save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        try:
            read_adapter(folder)
            found["read"] += 1
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            assert str(folder) in text and "\n" not in text and len(text) < 1500, f"seed {seed}, case {number}: {text}"
            found["refused"] += 1
    return found


class Counting(nn.Linear):
    """A subclass with a parameter and a buffer of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.extra = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(2))


def tree(draw, width, depth):
    """A random module of linear layers, norms, nested and shared modules, and buffers."""
    parts = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.randrange(7)
        if kind == 0 and depth:
            parts.append(tree(draw, width, depth - 1))
        elif kind == 1 and parts:
            parts.append(draw.choice(parts))  # shared
        elif kind == 2:
            parts += [nn.LayerNorm(width), nn.GELU()]
        elif kind == 3:
            parts.append(Counting(width, width))
        else:
            linear = nn.Linear(width, width, bias=draw.random() < 0.5)
            if draw.random() < 0.3:
                linear.register_buffer("seen", torch.ones(3), persistent=draw.random() < 0.5)
            parts.append(linear)
    return nn.Sequential(*parts)


def modules(seed, count, _):
    """Random modules: a state dict loads into a fresh one with the same outputs, and merging keeps outputs and keys."""
    draw = random.Random(seed)
    found = Counter(wrong=0)
    for number in range(count):
        shape_seed = draw.randrange(1 << 30)
        width = draw.choice([48, 64, 96])
        arguments = {"r": draw.randint(1, 8), "lora_dropout": 0.0, "checkpoint": draw.choice(["adapter", "full"])}
        arguments["use_dora"] = draw.random() < 0.3

        def build(shape_seed=shape_seed, width=width):
            torch.manual_seed(shape_seed)
            return tree(random.Random(shape_seed), width, 2)

        made = build()
        again = build()
        names = set(made.state_dict())
        if not any(isinstance(part, nn.Linear) for part in made.modules()):
            continue
        for module in (made, again):
            convert(module, **arguments)
        perturb(made, scale=0.02, seed=number)
        x = torch.randn(3, width)
        again.load_state_dict(made.state_dict())
        y = made(x)
        assert torch.equal(again(x), y), f"seed {seed}, case {number}: {made}"
        merge(again)
        assert set(again.state_dict()) == names, f"seed {seed}, case {number}: {made}"
        torch.testing.assert_close(again(x), y, atol=1e-3, rtol=1e-3, msg=f"seed {seed}, case {number}: {made}")
        found["right"] += 1
    return found


def threads(seed, count, _):
    """Threads convert and run modules of their own at the same time, with the results of one after the other."""
    draw = random.Random(seed)
    failures = []
    seeds = [draw.randrange(1 << 30) for _ in range(count)]

    def result(number):
        generator = torch.Generator().manual_seed(number)
        module = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        convert(module, r=4, lora_dropout=0.0, block_size=32 << number % 4)
        perturb(module, seed=number)
        x = torch.randn(9, 64, generator=generator).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        return torch.cat([y.detach().view(-1), x.grad.view(-1), module[0].lora_A.grad.view(-1)])

    expected = {number: result(number) for number in seeds}

    def work(numbers):
        try:
            failures.extend(f"{n}" for n in numbers if not torch.equal(result(n), expected[n]))
        except Exception as error:
            failures.append(repr(error))

    workers = [threading.Thread(target=work, args=(draw.sample(seeds, len(seeds)),)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, f"seed {seed}: {failures[:3]}"
    return Counter({"right": 4 * count, "wrong": 0})


def soak(seed, count, _):
    """Convert, train, save, load and merge again and again in one process: memory does not grow."""
    torch.manual_seed(seed)

    def once():
        module = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        convert(module, r=8)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        module(torch.randn(16, 256)).square().mean().backward()
        optimizer.step()
        module.load_state_dict(module.state_dict())
        merge(module)
        assert not any(isinstance(part, QLoRALinear) for part in module.modules())

    for _ in range(max(10, count // 10)):
        once()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        once()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30_000 + 10 * count, f"{grown} KiB more after {count} cycles"
    return Counter({"cycles": count, "KiB more": grown})
