"""What vLLM cannot do with an adapter."""

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.layers.dotted_names import owner_name

VLLM_BASE = "its base must be the model that the adapter was trained on, or merge the adapter and serve the result"


def vllm_objections(adapter: Adapter, max_lora_rank: int = 512) -> list[str]:
    """Reasons why vLLM refuses an adapter, or computes something else with it; empty if it works.

    Source: vllm/lora/peft_helper.py (validate_legal) and vllm/config/lora.py (ranks up to 512, `max_lora_rank`).
    """
    reasons = []
    if adapter.saved:
        modules = ", ".join(sorted({owner_name(key) for key in adapter.saved})[:3])
        reasons.append(f"it trains modules in full ({modules}): vLLM supports no modules_to_save. Merge it instead.")
    if adapter.use_dora:
        reasons.append("use_dora: vLLM does not support DoRA. Merge it instead.")
    if adapter.experts or adapter.expert_adapters:
        reasons.append("it adapts experts, which vLLM supports for a few models only. Merge it instead.")
    elif adapter.rank_pattern or adapter.alpha_pattern:
        name = next(iter(adapter.rank_pattern or adapter.alpha_pattern))
        reasons.append(f"{name} has another rank or alpha: vLLM uses one scaling for all layers. Merge it instead.")
    rank = max((layer.r for layer in adapter.layers.values()), default=0)
    if rank > max_lora_rank:
        reasons.append(f"rank {rank} is above vLLM's limit of {max_lora_rank}.")
    return reasons
