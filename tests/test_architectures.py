"""Tiny transformers models of many kinds: they train under the Trainer, their gradients are right, they are restored.

Two models of each kind are compared: the converted one, and the same with W + s B A as dense weights. With D the
gradient of such a dense weight, those of the adapter are dA = s B^T D and dB = s D A^T.
"""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils._pytree import tree_leaves

from lightning_qlora import QLoRAPrecision, convert, merge
from lightning_qlora.layers.qlora_linear import QLoRAConv1D, adapted_layers
from tests.toys import ids, perturb

transformers = pytest.importorskip("transformers")

# Sizes by the names that configurations give them; a configuration takes those that it has.
SIZES = {
    "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 32, "embedding_size": 64,
    "intermediate_size": 128, "d_ff": 128, "d_inner": 128, "ffn_dim": 128, "hidden_dim": 128, "n_inner": 128,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "ffn_hidden_size": 128,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16,
    "num_kv_heads": 2, "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64,
    "image_size": 32, "patch_size": 8, "rotary_dim": 8,
}  # fmt: skip
SPEECH = {
    "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
PART = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**PART, "image_size": 32, "patch_size": 8}
TEXT = {**PART, "vocab_size": 128, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}

# Type of the model -> its inputs and what its configuration has beside SIZES.
MODELS = {
    "llama": ("text", {}),
    "gpt2": ("text", {}),
    "bert": ("text", {}),
    "t5": ("text to text", {}),
    "wavlm": ("speech", SPEECH),
    "falcon": ("text", {}),
    "vit": ("image", {}),
    "clip": ("text and image", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 32}),
    "whisper": ("spectrogram", {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32}),
    "mamba": ("text", {"state_size": 8}),
    "swin": ("image", {"patch_size": 2, "window_size": 4, "depths": [1, 1], "num_heads": [2, 4]}),
    "mobilebert": ("text", {"true_hidden_size": 64, "intra_bottleneck_size": 64}),
}
DECODER = {**TEXT, "head_dim": 16, "num_key_value_heads": 2}
MORE = {
    "gpt_neo": ("text", {"attention_types": [[["global", "local"], 1]]}),
    "hubert": ("speech", SPEECH),
    "mamba2": ("text", {"head_dim": 16, "num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "modernbert": ("text", {"global_attn_every_n_layers": 1}),
    "opt": ("text", {"word_embed_proj_dim": 64}),
    "pvt": (
        "image",
        {
            "hidden_sizes": [32, 64], "depths": [1, 1], "num_attention_heads": [2, 4], "num_encoder_blocks": 2,
            "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [4, 4], "sequence_reduction_ratios": [2, 1],
        },
    ),
    "recurrent_gemma": ("text", {"num_hidden_layers": 3, "lru_width": 64, "use_cache": False}),
    "t5gemma": ("text to text", {"encoder": DECODER, "decoder": DECODER}),
    "wav2vec2": ("speech", SPEECH),
    **dict.fromkeys(["bart", "blenderbot", "mbart", "mt5", "pegasus"], ("text to text", {})),
    **dict.fromkeys(
        [
            "aimv2_vision_model", "beit", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit",
            "dpt", "ijepa", "siglip_vision_model",
        ],
        ("image", {}),
    ),
    **dict.fromkeys(
        [
            "albert", "apertus", "arcee", "bert-generation", "big_bird", "biogpt", "bitnet", "bloom", "camembert",
            "canine", "clip_text_model", "codegen", "cohere", "cohere2", "convbert", "ctrl", "data2vec-text",
            "deberta", "deberta-v2", "diffllama", "distilbert", "dpr", "electra", "ernie", "ernie4_5", "esm",
            "exaone4", "falcon_mamba", "fnet", "fsmt", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
            "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "gptj", "granite", "helium", "hunyuan_v1_dense", "ibert",
            "imagegpt", "layoutlm", "mistral", "mpnet", "mpt", "nemotron", "olmo", "olmo2", "phi", "phi3", "qwen2",
            "qwen3", "roberta", "roformer", "squeezebert", "stablelm", "starcoder2", "xglm", "xlm-roberta",
        ],
        ("text", {}),
    ),
}  # fmt: skip
CASES = [
    *((kind, *how) for kind, how in MODELS.items()),
    *(pytest.param(kind, *how, marks=pytest.mark.slow) for kind, how in MORE.items()),
]
# Without two blocks of one class that hold linear layers: gradient checkpointing warns.
WITHOUT_BLOCKS = {"albert", "ibert", "squeezebert"}
ARGUMENTS = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}


def build(kind, sizes):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"{kind} is not in this version of transformers")
    config = transformers.CONFIG_MAPPING[kind]
    other_names = config.attribute_map  # name -> that which the configuration uses
    has = {*config().to_dict(), *(name for name in other_names if other_names[name] not in {**SIZES, **sizes})}
    arguments = {name: value for name, value in SIZES.items() if name in has} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModel.from_config(config(**arguments), dtype=torch.float32).eval()


def inputs_of(form):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 32, 32, generator=generator)
    return {
        "text": {"input_ids": ids()},
        "text to text": {"input_ids": ids(), "decoder_input_ids": ids(seed=1)},
        "image": {"pixel_values": image},
        "text and image": {"input_ids": ids(), "pixel_values": image},
        "speech": {"input_values": torch.randn(2, 400, generator=generator)},
        "spectrogram": {
            "input_features": torch.randn(2, 16, 32, generator=generator), "decoder_input_ids": ids(seed=1),
        },
    }[form]  # fmt: skip


class Lit(LightningModule):
    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.inputs = model, inputs

    def outputs(self):
        """All tensors of floating point that the model returns."""
        outputs = tree_leaves(dict(self.model(**self.inputs)))
        return [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]

    def training_step(self, batch=None, batch_idx=0):
        """A loss that every output has a part in."""
        return sum((y.flatten() * torch.arange(y.numel()).sin()).sum() / y.numel() ** 0.5 for y in self.outputs())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(4))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def check_gradients(lit):
    layers = adapted_layers(lit)
    twin = merge(copy.deepcopy(lit))
    for name in layers:
        twin.get_submodule(name).weight.requires_grad_(True)
    ours, expected = lit.training_step(), twin.training_step()
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    lit.zero_grad()
    ours.backward()
    expected.backward()
    for name, layer in layers.items():
        dense, a, b = twin.get_submodule(name).weight.grad, layer.lora_A.grad, layer.lora_B.grad
        if dense is None:
            assert a is None and b is None, name
            continue
        dense = dense.T if isinstance(layer, QLoRAConv1D) else dense
        for grad, formula in ((a, layer.lora_B.T @ dense), (b, dense @ layer.lora_A.T)):
            formula = layer.scaling * formula.detach()
            torch.testing.assert_close(grad, formula, atol=1e-3 * formula.abs().max().item() + 1e-7, rtol=1e-3)
    lit.zero_grad()


@pytest.mark.parametrize(("kind", "form", "sizes"), CASES)
def test_it_trains_with_right_gradients_and_is_restored_bit_equal(kind, form, sizes, trainer, tmp_path):
    lit, plugin = Lit(build(kind, sizes), inputs_of(form)), QLoRAPrecision(**ARGUMENTS)
    run = trainer(plugins=plugin, max_steps=2)
    run.fit(lit)
    assert plugin.report.unused == {}
    for name, layer in adapted_layers(lit).items():
        assert layer.lora_B.abs().max() > 0, name
    run.save_checkpoint(tmp_path / "c.ckpt")
    again = Lit(build(kind, sizes), inputs_of(form))
    convert(again, **ARGUMENTS)
    again.load_state_dict(torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"])
    with torch.no_grad():
        assert all(map(torch.equal, lit.outputs(), again.outputs()))
    check_gradients(perturb(again))


@pytest.mark.parametrize(("kind", "form", "sizes"), CASES)
def test_gradient_checkpointing_recomputes_its_blocks_with_equal_gradients(kind, form, sizes, trainer):
    class Recording(Lit):
        def on_after_backward(self):
            self.grads = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    found = []
    for checkpointing in (False, True):
        lit = Recording(build(kind, sizes), inputs_of(form))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            plugin = QLoRAPrecision(**ARGUMENTS, gradient_checkpointing=checkpointing)
            trainer(plugins=plugin, max_steps=1, enable_checkpointing=False).fit(lit)
        warned = any("gradient_checkpointing" in str(one.message) for one in seen)
        assert warned == (checkpointing and kind in WITHOUT_BLOCKS)
        found.append(lit.grads)
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5 * grad.abs().max().item() + 1e-8, rtol=1e-4)
