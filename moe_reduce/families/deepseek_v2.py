"""DeepSeek-V2 and Lite (arXiv:2405.04434): latent attention, and softmax scores that are not renormalised."""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import common, deepseek
from moe_reduce.families.deepseek import DeepSeek
from moe_reduce.families.key import Key

GREEDY, IN_GROUPS = "greedy", "group_limited_greedy"  # ways of choosing experts


class DeepSeekV2(DeepSeek):
    """The family, which reads the groups of experts only if the way of choosing says so."""

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of latent attention, experts and groups."""
        method = flat["topk_method"]
        if method not in (GREEDY, IN_GROUPS):
            raise UserError(f"topk_method={method!r} is not supported, only {GREEDY!r} and {IN_GROUPS!r}")
        groups = {"moe.groups": "n_group", "moe.active_groups": "topk_group"}
        found = {name: 1 if method == GREEDY else Key(key, int).value(flat) for name, key in groups.items()}
        return super().derive(flat) | found

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of latent attention, experts and groups."""
        moe = config.moe
        assert moe is not None
        if moe.groups == 1:
            return super().derived(config) | {"topk_method": GREEDY}
        groups = {"n_group": moe.groups, "topk_group": moe.active_groups}
        return super().derived(config) | {"topk_method": IN_GROUPS} | groups


TENSORS = {path: tensor for path, tensor in deepseek.EXPERT_TENSORS.items() if path not in deepseek.BIAS_TENSOR}

FAMILY = DeepSeekV2(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=deepseek.KEYS,
    fixed={"rotary_interleaved": True, "moe.normalize": False},
    derived_names=deepseek.DERIVED_NAMES,
    derived_keys=deepseek.DERIVED_KEYS | {"topk_method", "n_group", "topk_group"},
    defaults=deepseek.DEFAULTS
    | {
        "max_position_embeddings": 2048,
        "topk_method": GREEDY,
        "first_k_dense_replace": 0,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
    },
    accepted=common.ACCEPTED | deepseek.ACCEPTED | {"scoring_func": ("softmax",), "norm_topk_prob": (False, None)},
    constants=common.CONSTANTS | {"norm_topk_prob": False},
    aliases={"num_experts": "n_routed_experts"},
    neutral=deepseek.NEUTRAL | {"n_group", "topk_group"},  # which the greedy way does not read
    tensors=deepseek.TENSORS | TENSORS | common.of_dense_layers(deepseek.TENSORS | common.DENSE_TENSORS),
    ignored=common.IGNORED,
)
