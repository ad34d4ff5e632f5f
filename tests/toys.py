"""Small transformers models of four architectures, each in a LightningModule that knows nothing of 4 bits."""

import math
from importlib.metadata import version

import lightning.pytorch as pl
import pytest
import torch

from lightning_qlora import convert
from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.kernels import ops
from lightning_qlora.layers.dora import dora_scale
from lightning_qlora.layers.names import join, parameter_name

ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}

# bitsandbytes 0.50 decodes wrongly on a CPU where a width is no multiple of the block: all widths here are of 64.
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
BERT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
T5 = {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 128,
    "decoder_start_token_id": 0,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NAMES = ("llama", "gpt2", "bert", "t5")


def assert_equal(ours, expected):
    """Assert that tensors, or lists and dicts of tensors, are exactly equal."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def needs(package: str, least: str, reason: str):
    """A mark for tests of what older versions of a package can't do."""
    installed = tuple(int(part) for part in version(package).split(".")[:2])
    return pytest.mark.skipif(installed < tuple(map(int, least.split("."))), reason=f"{package} {least}: {reason}")


def toy(name: str, seed: int = 0, **changes):
    """A transformers model in fp32, in eval mode."""
    import transformers

    kind, config, arguments = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, LLAMA),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2),
        "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, BERT),
        "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, T5),
    }[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config(**{**arguments, **changes})).eval()


def chat_model(folder, texts) -> str:
    """A folder with a small random Llama, and a byte-level tokenizer of these texts with a chat template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[1], pad_token=special[1])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def ids(rows: int = 2, columns: int = 12, seed: int = 0):
    return torch.randint(3, 128, (rows, columns), generator=torch.Generator().manual_seed(seed))


def logits(model):
    """Of fixed inputs; bitsandbytes' layers in training mode, since in eval its CPU path computes in bf16."""
    for layer in model.modules():
        if type(layer).__module__.startswith("bitsandbytes"):
            layer.training = True
    if getattr(model.config, "is_encoder_decoder", False):
        return model(input_ids=ids(), decoder_input_ids=ids(seed=1)).logits.detach()
    return model(input_ids=ids()).logits.detach()


class Lit(pl.LightningModule):
    """As users write it: the model under an attribute, a loss, an optimizer."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.losses = []

    def training_step(self, batch, batch_idx):
        labels = torch.zeros(2, dtype=torch.long) if hasattr(self.model, "classifier") else ids()
        loss = self.model(input_ids=ids(), labels=labels).loss
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(4))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Loaded(Lit):
    """Loads a folder where Lightning's documentation has it for large models."""

    def __init__(self, folder):
        super().__init__(None)
        self.folder = folder

    def configure_model(self):
        from transformers import AutoModelForCausalLM

        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder)


def perturb(module, scale: float = 0.05, seed: int = 0):
    """Give what trains other values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def delta(layer):
    """What the adapter adds to W: s B A, with DoRA g (W + s B A) - W; fp32, in the shape of the dense weight."""
    parts = []
    for matrix in layer.matrices():
        added = layer.scaling * (matrix.lora_B.float() @ matrix.lora_A.float())
        if layer.lora_magnitude_vector is not None:
            base = ops.dequantize(matrix.weight, torch.float32)
            added = dora_scale(layer, matrix)[:, None] * (base + added) - base
        parts.append(added)
    return layer.as_dense(parts).detach()


def converted(name: str, seed: int = 0, **arguments) -> Lit:
    """A toy in 4 bits whose adapters have other values, as if it had been trained."""
    lit = Lit(toy(name))
    convert(lit, **{**ARGUMENTS, **arguments})
    return perturb(lit, seed=seed)


def save_in_4_bits(model_class, base, folder, **changes):
    """Write a folder in 4 bits, as transformers and bitsandbytes do."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    arguments = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}
    config = BitsAndBytesConfig(load_in_4bit=True, **arguments | changes)
    model_class.from_pretrained(base, quantization_config=config, device_map="cpu").save_pretrained(folder)
    return folder


@torch.no_grad()
def pretrain(module, seed: int = 0):
    """Give all parameters values as those of a long training: heavy tails, rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim > 1:
            values *= 0.5 + torch.rand(parameter.shape[0], generator=generator).view(-1, *[1] * (parameter.ndim - 1))
            values *= 0.5 * (1 + values.abs()) / math.sqrt(parameter[0].numel())
        else:
            values = 0.1 * values + parameter.float().mean().round()  # about 1 in norms
        parameter.copy_(values)
    return module


def expert_stacks(modules):
    """Full name, owner, key and experts of every stack in modules."""
    for name, owner in modules:
        for key, part in owner._modules.items():
            if isinstance(part, QLoRAExperts):
                key = parameter_name(key)
                yield join(name, key), owner, key, part
