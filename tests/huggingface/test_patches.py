"""Quantizing while loading is a matter of one thread or task: what others load at the same time is as without it."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_qlora import QLoRALinear, QLoRAPrecision
from tests.toys import toy

transformers = pytest.importorskip("transformers")
from transformers import modeling_utils  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    toy("llama").save_pretrained(path)
    return path


ONE_LOAD = threading.Lock()  # transformers replaces `tie_weights` of its classes while it loads, in no order of threads


def layers_of_loaded(folder):
    with ONE_LOAD:
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
    return sum(isinstance(layer, QLoRALinear) for layer in model.modules())


def test_a_load_in_another_thread_is_not_quantized(folder):
    with ThreadPoolExecutor(1) as pool, QLoRAPrecision(r=4).init():
        for _ in range(5):
            assert pool.submit(layers_of_loaded, folder).result() == 0
            assert layers_of_loaded(folder) == 14
    assert layers_of_loaded(folder) == 0


def test_contexts_that_overlap_in_two_threads_leave_nothing_behind(folder):
    """The first one to begin is the first one to end."""
    both = threading.Barrier(2)
    first_left = threading.Event()
    arguments = {}

    def first():
        with QLoRAPrecision(r=4, target_modules=["q_proj"]).init():
            both.wait()
            arguments["first"] = layers_of_loaded(folder)
        arguments["after first"] = layers_of_loaded(folder)
        first_left.set()

    def second():
        with QLoRAPrecision(r=4).init():
            both.wait()
            first_left.wait()
            arguments["second"] = layers_of_loaded(folder)
        arguments["after second"] = layers_of_loaded(folder)

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert arguments == {"first": 2, "after first": 0, "second": 14, "after second": 0}
    assert layers_of_loaded(folder) == 0


def test_tasks_of_asyncio_do_not_share_a_context(folder):
    async def quantizing(entered, leave):
        with QLoRAPrecision(r=4).init():
            entered.set()
            await leave.wait()
            return (
                layers_of_loaded(folder),
                await asyncio.create_task(inner()),
                await asyncio.to_thread(layers_of_loaded, folder),
            )

    async def inner():
        return layers_of_loaded(folder)

    async def plain(entered, leave):
        await entered.wait()
        found = layers_of_loaded(folder)
        leave.set()
        return found

    async def both():
        entered = asyncio.Event()
        leave = asyncio.Event()
        return await asyncio.gather(quantizing(entered, leave), plain(entered, leave))

    # A task, and a thread of asyncio's, that is started within the context is a part of it.
    assert asyncio.run(both()) == [(14, 14, 14), 0]


def test_contexts_inside_each_other_and_errors_end_as_they_should(folder):
    outer = QLoRAPrecision(r=4)
    inner = QLoRAPrecision(r=4, target_modules=["q_proj"])
    with outer.init():
        with inner.init():
            assert layers_of_loaded(folder) == 2
        assert layers_of_loaded(folder) == 14
        with pytest.raises(KeyError), inner.init():
            raise KeyError
        assert layers_of_loaded(folder) == 14
    assert layers_of_loaded(folder) == 0


def test_transformers_function_is_replaced_once_whatever_refers_to_it(folder):
    from_pretrained = transformers.LlamaForCausalLM.from_pretrained
    with QLoRAPrecision(r=4).init():
        replaced = modeling_utils.get_hf_quantizer
        assert any(isinstance(layer, QLoRALinear) for layer in from_pretrained(folder).modules())
    with QLoRAPrecision(r=4).init():
        assert modeling_utils.get_hf_quantizer is replaced
    assert replaced.__wrapped__.__module__ == "transformers.quantizers.auto"


def test_transformers_loads_an_adapter_of_peft_into_a_plain_model_afterwards(folder, tmp_path):
    """`load_adapter` of a plain model calls `_load_pretrained_model` on the model itself."""
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False)).save_pretrained(tmp_path)
    with QLoRAPrecision(r=4).init():
        transformers.LlamaForCausalLM.from_pretrained(folder)
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    plain.load_adapter(tmp_path)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=0, atol=0)
