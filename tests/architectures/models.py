"""Tiny transformers models of many architectures, and inputs for them."""

import torch
import transformers

from tests.toys import ids

# Sizes by the names that configurations give them; a configuration takes those that it has.
SIZES = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embedding_size"], 64),
    "embed_dim": 32,
    **dict.fromkeys(["intermediate_size", "d_ff", "d_inner", "ffn_dim", "hidden_dim", "n_inner"], 128),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"], 128),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 64),
    "image_size": 32,
    "patch_size": 8,
    "rotary_dim": 8,
}
SPEECH = {
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
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
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
MANY = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 16)
LATENT["num_key_value_heads"] = 4
DEEPSEEK = {**MANY, **GROUPS, **LATENT}
INDEX = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 4}
MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {**RESNET, "out_features": ["stage2"]},
    "num_queries": 4,
}
IMAGE_TOKENS = {"image_token_id": 5, "image_token_index": 5, "vision_feature_layer": -1, "mm_tokens_per_image": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
PATCHES = {"hidden_size": 64, "depth": 2, "num_heads": 4}
QWEN_VL = {**IMAGE_TOKENS, "text_config": {**DECODER, **MROPE}, "video_token_id": 6, "vision_start_token_id": 7}
FOLDERS = {  # transformers renames or converts the tensors of these when it saves them
    "llava": (
        "image tokens",
        {
            **IMAGE_TOKENS,
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        },
    ),
    "paligemma": (
        "image tokens",
        {
            **IMAGE_TOKENS,
            "text_config": {**DECODER, "model_type": "gemma"},
            "projection_dim": 64,
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        },
    ),
    "gemma3": ("image tokens", {**IMAGE_TOKENS, "text_config": DECODER, "vision_config": VISION}),
    "qwen2_vl": ("image patches", {**QWEN_VL, "vision_config": {**PATCHES, "embed_dim": 64}}),
    "qwen2_5_vl": (
        "image patches",
        {
            **QWEN_VL,
            "vision_config": {**PATCHES, "intermediate_size": 128, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
        },
    ),
    "dinov2:swiglu": ("image", {"use_swiglu_ffn": True}),
    "conditional_detr": ("image", DETR),
    "nomic_bert": ("text", {}),
    "mixtral": ("text", EXPERTS),
    "deepseek_v3": ("text", DEEPSEEK),
}
# Without more than SIZES.
PLAIN = [
    "albert", "apertus", "arcee", "bert-generation", "big_bird", "biogpt", "bitnet", "bloom", "camembert", "canine",
    "clip_text_model", "codegen", "cohere", "cohere2", "convbert", "ctrl", "data2vec-text", "deberta", "deberta-v2",
    "diffllama", "distilbert", "dpr", "electra", "ernie", "ernie4_5", "esm", "exaone4", "falcon_mamba", "fnet",
    "fsmt", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "gptj",
    "granite", "gte", "helium", "hunyuan_v1_dense", "ibert", "imagegpt", "jina_embeddings_v3", "layoutlm",
    "mistral", "mpnet", "mpt", "nemotron", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "roberta", "roformer",
    "seed_oss", "smollm3", "squeezebert", "stablelm", "starcoder2", "xglm", "xlm-roberta", "xlnet",
]  # fmt: skip
IMAGE = [
    "aimv2_vision_model", "beit", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dpt",
    "ijepa", "siglip_vision_model",
]  # fmt: skip
TO_TEXT = ["bart", "blenderbot", "longt5", "m2m_100", "marian", "mbart", "mt5", "pegasus", "umt5"]
MORE = {
    "qwen3_moe": ("text", {**MANY, "num_experts": 4}),
    **dict.fromkeys(["gpt_oss", "granitemoe", "phimoe", "minimax_m2"], ("text", EXPERTS)),
    **dict.fromkeys(["olmoe", "flex_olmo"], ("text", OLMOE)),
    "llama4_text": ("text", {**EXPERTS, "num_experts_per_tok": 2, "intermediate_size_mlp": 64}),
    "dbrx": (
        "text",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "jetmoe": ("text", {**EXPERTS, "kv_channels": 16}),
    "longcat_flash": (
        "text",
        {
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 32,
            "head_dim": 16,
            **LATENT,
        },
    ),
    "hunyuan_v1_moe": ("text", {"num_experts": 4, "moe_topk": 2}),
    "nllb-moe": (
        "text to text",
        {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 64},
    ),
    "switch_transformers": (
        "text to text",
        {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64},
    ),
    "qwen2_moe": ("text", {**MANY, "num_experts": 4, "shared_expert_intermediate_size": 64}),
    "qwen3_next": (
        "text",
        {
            **MANY,
            "num_experts": 4,
            "shared_expert_intermediate_size": 64,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "glm4_moe": ("text", {**MANY, **GROUPS}),
    **dict.fromkeys(["solar_open", "dots1"], ("text", {**MANY, **GROUPS, "n_shared_experts": 1})),
    "deepseek_v2": ("text", {**DEEPSEEK, "topk_method": "greedy"}),
    **dict.fromkeys(["deepseek_v32", "glm_moe_dsa"], ("text", {**DEEPSEEK, **INDEX})),
    "ernie4_5_moe": ("text", {**MANY, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "afmoe": ("text", {**MANY, "num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1}),
    "minimax": ("text", {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    "jamba": (
        "text",
        {
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_expand": 1,
            "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": (
        "text",
        {**EXPERTS, **MAMBA, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    ),
    "nemotron_h": (
        "text",
        {
            **MANY,
            **GROUPS,
            "intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "head_dim": 16,
            "layers_block_type": ["moe", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            # transformers 5.25 asks the first block for the length of its cache; a block of experts has none.
            "use_cache": False,
        },
    ),
    "bamba": ("text", {**MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("text", {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "lfm2": ("text", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128}),
    "gemma3n_text": (
        "text",
        {
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.9, 0.0],
            "laurel_rank": 8,
            "intermediate_size": [128, 128],
        },
    ),
    # In eval mode it changes its weights every `rescale_every` layers, and its cache between forward and backward.
    "rwkv": ("text", {"attention_hidden_size": 64, "context_length": 64, "rescale_every": 0, "use_cache": False}),
    "longformer": ("text", {"attention_window": [4, 4]}),
    "led": ("text to text", {"attention_window": [4, 4]}),
    "convnext": ("image", {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}),
    "segformer": (
        "image",
        {
            "hidden_sizes": [32, 64],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "sr_ratios": [2, 1],
            "mlp_ratios": [4, 4],
        },
    ),
    "siglip": ("text and image", {"text_config": TEXT, "vision_config": VISION}),
    "vitdet": ("image", {"window_block_indices": []}),
    "sew": ("speech", {**SPEECH, "squeeze_factor": 1}),
    "detr": ("image", DETR),
    "gpt_neo": ("text", {"attention_types": [[["global", "local"], 1]]}),
    "mamba2": ("text", {"head_dim": 16, "num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "modernbert": ("text", {"global_attn_every_n_layers": 1}),
    "opt": ("text", {"word_embed_proj_dim": 64}),
    "pvt": (
        "image",
        {
            "hidden_sizes": [32, 64],
            "depths": [1, 1],
            "num_attention_heads": [2, 4],
            "num_encoder_blocks": 2,
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "mlp_ratios": [4, 4],
            "sequence_reduction_ratios": [2, 1],
        },
    ),
    "recurrent_gemma": ("text", {"num_hidden_layers": 3, "lru_width": 64, "use_cache": False}),
    "t5gemma": ("text to text", {"encoder": DECODER, "decoder": DECODER}),
    **dict.fromkeys(["unispeech-sat", "data2vec-audio", "hubert", "wav2vec2"], ("speech", SPEECH)),
    **dict.fromkeys(TO_TEXT, ("text to text", {})),
    **dict.fromkeys(IMAGE, ("image", {})),
    **dict.fromkeys(PLAIN, ("text", {})),
}
ALL = MODELS | FOLDERS | MORE


def configuration(kind):
    """A tiny configuration."""
    sizes = ALL[kind][1]
    config = transformers.CONFIG_MAPPING[kind.partition(":")[0]]
    other_names = config.attribute_map  # name -> that which the configuration uses
    has = {*config().to_dict(), *(name for name in other_names if other_names[name] not in {**SIZES, **sizes})}
    return config(**{name: value for name, value in SIZES.items() if name in has} | sizes)


def build(kind, auto=transformers.AutoModel):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(configuration(kind), dtype=torch.float32).eval()


def inputs_of(form):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    text = {"input_ids": ids()}
    images = {"pixel_values": normal(2, 3, 32, 32)}
    places = torch.cat([torch.full((2, 16), 5), ids() % 100 + 10], dim=1)  # a place for each of 16 patches
    return {
        "text": text,
        "text to text": {**text, "decoder_input_ids": ids(seed=1)},
        "image": images,
        "text and image": {**text, **images},
        "image tokens": {"input_ids": places, **images, "token_type_ids": (places == 5).long()},
        "image patches": {
            "input_ids": places[:, 12:],
            "pixel_values": normal(32, 1176),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "mm_token_type_ids": (places[:, 12:] == 5).int(),
        },
        "speech": {"input_values": normal(2, 400)},
        "spectrogram": {"input_features": normal(2, 16, 32), "decoder_input_ids": ids(seed=1)},
    }[form]
