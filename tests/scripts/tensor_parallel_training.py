"""Run by test_tensor_parallel, in two or four processes: each case is compared with one device, in place."""

import copy
import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lightning_qlora import (
    QLoRAPrecision,
    convert,
    disable_adapter,
    load_adapter,
    save_adapter,
    to_parameters,
)
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tensors.dtensor import clip_grad_norm, gather
from tests.conftest import every_pair, make_trainer, run_rank
from tests.kernels.shares import share
from tests.toys import Lit, delta, ids, save_in_4_bits, toy

ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "block_size": 32}
PLAN = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


class Llama(Lit):
    """As users write it for tensor parallelism."""

    def __init__(self, folder):
        super().__init__(None)
        self.save_hyperparameters()

    def configure_model(self):
        if self.model is None:
            self.model = LlamaForCausalLM.from_pretrained(self.hparams.folder)
            for layer in self.model.model.layers if self._device_mesh is not None else ():
                parallelize_module(layer, self.device_mesh["tensor_parallel"], PLAN)

    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_step)
        loss = loss_of(self.model)
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(3))


def loss_of(model):
    decoder = {"decoder_input_ids": ids(seed=1)} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids(), **decoder).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids(seed=2).flatten())


def train(model, steps, clip=None):
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = loss_of(model)
        loss.backward()
        if clip:
            clip_grad_norm(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check(one, split, losses, expected):
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for (name, layer), other in zip(adapted_layers(one).items(), adapted_layers(split).values(), strict=True):
        assert other.base_fingerprint() == layer.base_fingerprint(), name
        for key, value in layer._parameters.items():
            if value is not None and value.requires_grad:
                assert not any(p.is_partial() for p in other._parameters[key].placements)
                torch.testing.assert_close(gather(other._parameters[key].detach()), value.detach(), rtol=0, atol=1e-4)
        packed = other._parameters["packed"]
        assert packed.to_local().numel() * 2 == packed.numel()


def fit(root, epochs, ckpt=None, devices=2, single_file=False):
    strategy = ModelParallelStrategy(1, 2, save_distributed_checkpoint=not single_file) if devices > 1 else "auto"
    run = make_trainer(
        root,
        plugins=QLoRAPrecision(**ARGUMENTS),
        strategy=strategy,
        devices=devices,
        max_epochs=epochs,
        enable_checkpointing=False,
        gradient_clip_val=1.0,
    )
    module = Llama(str(root / "llama"))
    run.fit(module, ckpt_path=ckpt)
    return run, module


def with_trainer(root):
    """Equal to one device; resumes exactly; the folder of the adapter is that of one device, and loads."""
    _, straight = fit(root, 2)
    one = LlamaForCausalLM.from_pretrained(root / "llama")
    convert(one, **ARGUMENTS)
    initial = copy.deepcopy(one)
    check(one, straight, straight.losses, train(one, 6, clip=1.0))
    for single_file in (False, True):
        path = str(root / f"half{single_file}.ckpt")
        fit(root, 1, single_file=single_file)[0].save_checkpoint(path)
        _, resumed = fit(root, 2, path, single_file=single_file)
        for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
            assert torch.equal(gather(ours.detach()), gather(theirs.detach()))
    _, moved = fit(root, 2, str(root / "one.ckpt"))  # of one device
    torch.testing.assert_close(moved.losses, straight.losses[3:], rtol=1e-5, atol=1e-6)
    save_adapter(straight, root / "adapter")  # rank 0 writes
    save_adapter(one, root / "one")
    torch.distributed.barrier()
    load_adapter(initial, root / "adapter")
    for name, layer in adapted_layers(initial).items():
        of_ranks = straight.get_submodule("model." + name)
        assert torch.equal(layer.lora_B, gather(of_ranks.lora_B)) and torch.equal(delta(layer), delta(of_ranks))
    load_adapter(straight, root / "one")
    assert torch.equal(
        gather(adapted_layers(straight)["model.model.layers.0.mlp.down_proj"].lora_A.detach()),
        adapted_layers(one)["model.layers.0.mlp.down_proj"].lora_A,
    )
    return straight.losses


def with_any_plan(mesh):
    """All layers of GPT-2 (Conv1D) and T5, by outputs and by inputs in turn, with whole inputs and outputs."""
    for name, size, arguments in (
        ("gpt2", "n_layer", {}),
        ("t5", "num_layers", {}),
        ("llama", "num_hidden_layers", {"use_dora": True}),
        ("llama", "num_hidden_layers", {"double_quant": False}),
    ):
        one = toy(name, **{size: 1})
        convert(one, **ARGUMENTS | arguments)
        split = copy.deepcopy(one)
        for number, layer in enumerate(adapted_layers(split)):
            by_inputs = number % 2 and "use_dora" not in arguments
            style = (
                RowwiseParallel(input_layouts=Replicate()) if by_inputs else ColwiseParallel(output_layouts=Replicate())
            )
            parallelize_module(split, mesh, {layer: style})
        check(one, split, train(split, 2), train(one, 2))
        layer = next(iter(adapted_layers(split).values()))
        torch.testing.assert_close(layer.weight, next(iter(adapted_layers(one).values())).weight, rtol=0, atol=1e-4)
        assert isinstance(torch.autograd.grad(layer.weight.sum(), layer.lora_B)[0], DTensor)
        with pytest.raises(RuntimeError, match="is split over ranks, and its weight was multiplied by a plain tensor"):
            torch.zeros(1, layer.in_features) @ (layer.weight if name == "gpt2" else layer.weight.T)


def with_dropout(mesh):
    """Each rank drops other columns: of the two ones in a sum, one of each rank, half of the sums lose exactly one."""
    net = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))
    convert(net, r=32, lora_alpha=32, lora_dropout=0.5, block_size=32)
    net[0].set_adapter(torch.eye(32, 64).repeat(1, 2), torch.eye(128, 32))
    parallelize_module(net, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    x = torch.ones(200, 128)
    added = net.train()(x)
    with disable_adapter(net):
        added = (added - net(x))[:, :32].round()
    counts = [(added == value).float().mean().item() for value in (0, 2, 4)]
    assert counts == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def with_one_rounding(mesh):
    """A small adapter's part arrives in the sum over the ranks, in y and in dX (`tests/kernels/shares.py`)."""
    styles = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    for style, dtype, bias in every_pair(styles, (torch.bfloat16, torch.float16), (0.0, 8.0)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(512, 512, dtype=dtype))
        torch.nn.init.normal_(net[0].bias, bias, 0.1)
        convert(net, **ARGUMENTS)
        x, grad = torch.randn(2, 256, 512).to(dtype)
        a = net[0].lora_A.detach().double()
        b = 2e-4 * torch.randn(512, 4).sign()
        parallelize_module(net, mesh, {"0": style})
        results = []
        for value in (torch.zeros_like(b), b):
            net[0].write("lora_B", value)
            inputs = x.clone().requires_grad_()
            y = net(inputs)
            results.append((y.detach().double(), torch.autograd.grad(y, inputs, grad)[0].double()))
        expected = net[0].scaling * x.double() @ a.T @ b.T.double(), net[0].scaling * grad.double() @ b.double() @ a
        for new, old, wanted in zip(*reversed(results), expected, strict=True):
            assert share(new - old, wanted) == pytest.approx(1, abs=0.1), (style, dtype, bias)


def with_whole_parts(root, mesh):
    """Experts, or rows of an embedding, that no plan splits: they train on each rank; all are clipped together."""
    for name, arguments in (("moe", {}), ("llama", {"trainable_token_indices": list(range(40))})):
        one = AutoModelForCausalLM.from_pretrained(root / name)
        convert(one, **ARGUMENTS | arguments)
        split = copy.deepcopy(one)
        parallelize_module(split.model.layers[0], mesh, {name: PLAN[name] for name in PLAN if "attn" in name})
        losses = train(split, 2, clip=0.1)
        expected = train(one, 2, clip=0.1)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        trained = ([p for p in model.parameters() if p.requires_grad] for model in (split, one))
        for ours, theirs in zip(*trained, strict=True):
            torch.testing.assert_close(gather(ours.detach()), theirs.detach(), rtol=0, atol=1e-4)
    for style in (ColwiseParallel(), RowwiseParallel()):
        with pytest.raises(ValueError, match="an embedding with rows that train can't be split over ranks"):
            parallelize_module(split.model, mesh, {"embed_tokens": style})


def load(folder, **arguments):
    with QLoRAPrecision(**ARGUMENTS).init():
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    convert(model, **ARGUMENTS)
    return model


def with_fsdp(root):
    """Run on four ranks: the layers are split, and the parts are sharded."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    one = load(root / "llama")
    split = copy.deepcopy(one)
    for layer in split.model.layers:
        parallelize_module(layer, mesh["tensor_parallel"], PLAN)
    to_parameters(split)
    for part in (*split.model.layers, split):
        fully_shard(part, mesh=mesh["data_parallel"])
    for name, parameter in one.named_parameters():
        assert torch.equal(gather(split.get_parameter(name).detach()), parameter.detach()), name
    layer = split.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.packed.to_local().numel() * 4 == layer.packed.numel()
    torch.testing.assert_close(train(split, 4, clip=1.0), train(one, 4, clip=1.0), rtol=1e-5, atol=1e-6)
    torch.distributed.barrier()


def with_transformers(root):
    """A tp_plan splits the layers while they load; experts are refused."""
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    one = load(root / "llama")
    split = load(root / "llama", distributed_config=plan)
    check(one, split, train(split, 2), train(one, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT can load the folder
        save_adapter(split, root / "of_tp_plan")
    torch.distributed.barrier()
    torch.testing.assert_close(
        load_file(root / "of_tp_plan/adapter_model.safetensors"),
        load_file(root / "adapter/adapter_model.safetensors"),
        rtol=0,
        atol=0.1,
    )
    with torch.no_grad():  # transformers' path for inference
        torch.testing.assert_close(loss_of(split.eval()), loss_of(one.eval()), rtol=1e-5, atol=1e-6)
    if torch.distributed.get_rank() == 0:
        save_in_4_bits(LlamaForCausalLM, root / "llama", root / "in_4_bits")
    torch.distributed.barrier()
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM: .* from files in 16 or 32 bit"):
        load(root / "in_4_bits", distributed_config=plan)
    fused = DistributedConfig(tp_size=2, tp_plan={"model.layers.*.mlp.up_proj": "packed_colwise"})
    with pytest.raises(ValueError, match=r"up_proj.*not by a plan for fused layers\. Remove it"):
        load(root / "llama", distributed_config=fused)
    # "auto" leaves experts whole since transformers 5.25.
    split_experts = {"ep_size": 2} if hasattr(DistributedConfig, "ep_size") else {"enable_expert_parallel": True}
    try:
        load(root / "moe", distributed_config=DistributedConfig(tp_size=2, tp_plan="auto", **split_experts))
    except ValueError as error:
        return str(error)
    return "not refused"


def main(root):
    root = Path(root)
    pl.seed_everything(1, verbose=False)
    if os.environ.get("WORLD_SIZE") == "4":
        return with_fsdp(root)
    losses = with_trainer(root)
    mesh = init_device_mesh("cpu", (2,))
    with_any_plan(mesh)
    with_dropout(mesh)
    with_one_rounding(mesh)
    with_whole_parts(root, mesh)
    results = {"losses": losses, "experts": with_transformers(root)}
    torch.save(results, root / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    run_rank(main, ranks=1 if "WORLD_SIZE" in os.environ else 2)
