"""What a step sends, planned and counted by a hook on the collectives."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qlora import convert
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.devices import FROZEN, GRADIENTS, TRAINED, traffic
from tests.toys import ids, toy

pytest.importorskip("transformers")
PARTS = {"_allgather_base_": "gather", "_reduce_scatter_base_": "scatter", "allreduce_": "reduce"}


class Count(TorchDispatchMode):
    """Bytes of the whole tensors of each kind of collective."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(PARTS.values(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and (part := PARTS.get(func._opname)):
            self.bytes[part] += max(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks():
    """Any number of ranks, of which this process is the first and the others do not exist."""
    yield lambda count: torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("replicas", "shards"), [(1, 2), (1, 8), (2, 4)])
@pytest.mark.parametrize("policy", [{}, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}])
def test_what_fsdp2_and_hsdp_send_is_planned_to_the_byte(replicas, shards, policy, ranks):
    ranks(replicas * shards)
    shape, names = ((shards,), ("shards",)) if replicas == 1 else ((replicas, shards), ("replicas", "shards"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = toy("llama")
    convert(model, r=8, lora_dropout=0.0)
    # Dense frozen weights are cast too, so that only bytes and adapters differ from the plan.
    planned = traffic(model.bfloat16() if policy else model, replicas, shards)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, **policy)
    with Count() as counted:
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
    share, found = (shards - 1) / shards, counted.bytes
    assert found["gather"] * share == planned[FROZEN] + planned[TRAINED]
    reduced = found["scatter"] * share + found["reduce"] * 2 * (replicas - 1) / replicas
    assert reduced == (2 if policy else 1) * planned[GRADIENTS]  # reduced in fp32


def test_the_plan_of_several_devices(tmp_path, capsys):
    toy("llama").config.save_pretrained(tmp_path)

    def plan(*arguments):
        main(["plan", str(tmp_path), "--r", "8", "--batch_size", "1", "--sequence_length", "16", *arguments])
        lines = [line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines()]
        return {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}

    fsdp, ddp = plan("--devices", "8", "--link", "300GB/s"), plan("--devices", "8", "--strategy", "ddp")
    assert "on each" in fsdp["8 devices with FSDP2, 1 x 16"] and "ms" in fsdp["time at 300GB/s"]
    assert ddp["each sends in a step"] == ddp["gradients"] and "frozen weights" not in ddp
    assert "2x4 devices with HSDP, 1 x 16" in plan("--devices", "2x4")
    for wrong in (
        ("--devices", "0"), ("--devices", "2x4", "--strategy", "ddp"), ("--devices", "2", "--link", "fast"),
        ("--link", "300GB/s"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            plan(*wrong)
