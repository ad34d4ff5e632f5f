"""One class for each architecture that transformers has, with a tiny configuration made from the default one.

A class is named `TYPE:CLASS`, for example `llama:LlamaForCausalLM`. The checks of folders need
no inputs.
"""

from copy import deepcopy
from functools import cache

import torch
import transformers
from transformers.models.auto import modeling_auto

from tests.architectures.models import ALL, DETR, MROPE, SIZES, configuration

HEADS = [
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CTC", "SEQUENCE_CLASSIFICATION",
    "MASKED_LM", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION",
]  # fmt: skip
MORE_SIZES = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "linear_num_key_heads", "depth"], 2),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 16),
    **dict.fromkeys(["encoder_hidden_size", "decoder_hidden_size", "out_hidden_size", "projection_dim"], 64),
    "vocab_size_per_layer_input": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "mlp_dim": 128,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "audio_hidden_size": 64,
}
DEPTH = ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"]
LARGEST = 100_000_000  # parameters of a model
FULL_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
INKLING = {"text_config": {"unpadded_vocab_size": 100}, "vision_config": {"text_hidden_size": 64}}
# What configurations lack or check, so that sizes alone do not do.
EXTRA = {
    **{name: {"vocab_size": 128} for name in ("wav2vec2-bert", "wav2vec2-conformer")},
    **{name: {"prediction_length": 4} for name in ("autoformer", "informer", "time_series_transformer")},
    **dict.fromkeys(("dab-detr", "deformable_detr", "table-transformer"), DETR),
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "inkling2": INKLING,
    "inkling2_loop": INKLING,
    **{name: {"unpadded_vocab_size": 100} for name in ("inkling2_text", "inkling2_loop_text")},
    "reformer": {"is_decoder": True},
    "esmc": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1], "text_hidden_size": 64}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "ernie4_5_vl_moe": {"text_config": MROPE},
    "cohere_compass_text": {"rope_parameters": FULL_ROPE},
    "cohere_compass": {"text_config": {"rope_parameters": FULL_ROPE}},
    "zaya": {"num_experts_per_tok": 1},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "out_hidden_size": 64, "hidden_sizes": [32, 32, 64, 64]}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
}


def all_types():
    """The architectures that transformers has, those without a row in the table first."""
    names = dict.fromkeys(name for table in _tables() for name in table)
    return sorted(names, key=lambda name: name in ALL)


def class_of(name):
    """`TYPE:CLASS` of an architecture: the first class that can be built here, those with a head first."""
    found = [table[name] for table in _tables() if name in table]
    kinds = [f"{name}:{one if isinstance(one, str) else one[0]}" for one in found]
    return next((kind for kind in kinds if not isinstance(find_configuration(kind), str)), kinds[0])


def _tables():
    heads = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in HEADS]
    return [*heads, modeling_auto.MODEL_MAPPING_NAMES]


@cache
def find_configuration(kind):
    """The first configuration that gives a model of at most LARGEST parameters, or why there is none."""
    name, _, class_name = kind.partition(":")
    reasons = []
    for make in _attempts(name):
        try:
            config = make()
            with torch.device("meta"):
                model = getattr(transformers, class_name)._from_config(config)
        except Exception as error:
            reasons.append(" ".join(f"{type(error).__name__} {error}".split())[:160])
            continue
        if model.num_parameters() <= LARGEST:
            return config
        reasons.append(f"{model.num_parameters() / 1e6:.0f} million parameters")
    return reasons[0]


def _attempts(name):
    """Functions that make a configuration: the one in `models.py`, or the default one with fewer and fewer changes."""
    if name in ALL:
        yield lambda: configuration(name)
    everything = SIZES | MORE_SIZES
    kept = {"image_size", "patch_size", "vocab_size", "max_position_embeddings"}
    for sizes in (
        everything,
        {size: value for size, value in everything.items() if size not in kept},
        {size: value for size, value in everything.items() if "head" not in size},
        {"vocab_size": 128, **{size: everything[size] for size in DEPTH}},
        {size: everything[size] for size in DEPTH},
    ):
        yield lambda sizes=sizes: _smaller(transformers.CONFIG_MAPPING[name](), sizes, EXTRA.get(name, {}))


def _smaller(config, sizes, extra):
    """A configuration, and those inside it, with these sizes where it has numbers."""
    own = vars(config)
    names = config.attribute_map
    changes = {}
    for size, value in sizes.items():
        if type(own.get(names.get(size, size))) is type(value):
            changes.setdefault(names.get(size, size), value)
    changes |= extra
    for part, inner in own.items():
        if isinstance(inner, transformers.PreTrainedConfig) and "model_type" not in extra.get(part, {}):
            changes[part] = _smaller(inner, sizes, extra.get(part, {}))
    return type(config)(**changes)


def build_class(kind):
    """A model of the class, in eval mode.

    Raises:
        NotBuiltError: If it can't be built here; says why.
    """
    config = find_configuration(kind)
    if isinstance(config, str):
        raise NotBuiltError(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind.partition(":")[2])._from_config(deepcopy(config), dtype=torch.float32)
    return model.eval()


class NotBuiltError(Exception):
    """A class that can't be built here."""
