"""Our own architectures: every ModelConfig, under the names of its fields, and tensor names in the style of LLaMA."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_reduce.core import config as configuration
from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.families import common, delta_net
from moe_reduce.families.common import ATTENTION, EXPERT, LAYER
from moe_reduce.families.family import CARRIED, Family
from moe_reduce.families.layout import Tensor

NAME = "moe_reduce"
# Fields of the first version, which config.json always has. It has a later field only if it differs from its default.
FIRST_FIELDS = (
    "vocab_size", "layers", "width", "query_heads", "key_value_heads", "head_width", "feed_forward_width", "moe",
    "embedding_factor", "tied_embeddings", "qk_norm", "rope_theta", "norm_epsilon", "max_positions", "init_std",
)  # fmt: skip
FIRST_MOE_FIELDS = (
    "experts", "active", "width", "placement", "router", "score_function", "normalize", "selection_bias",
    "score_offset", "output_gain", "init_scale",
)  # fmt: skip


def later_fields(kind: type, first: tuple[str, ...]) -> dict[str, Any]:
    """Defaults of the fields that the first version of a configuration did not have."""
    return {field.name: field.default for field in dataclasses.fields(kind) if field.name not in first}


LATER_FIELDS = later_fields(ModelConfig, FIRST_FIELDS)
LATER_MOE_FIELDS = later_fields(MoEConfig, FIRST_MOE_FIELDS)


@dataclass(frozen=True, kw_only=True)
class Own(Family):
    """The family that represents every config."""

    def read(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a config.json; UserError names a key that is missing, unknown or ill-typed."""
        outside = {"architectures", "model_type", *CARRIED}
        inside = {key: value for key, value in raw.items() if key not in outside}
        if isinstance(inside.get("moe"), Mapping):
            inside["moe"] = LATER_MOE_FIELDS | inside["moe"]
        return dataclasses.replace(configuration.model_from_dict(LATER_FIELDS | inside, NAME), family=NAME)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The fields of the config; later ones only if they differ from the default."""
        fields = configuration.to_dict(dataclasses.replace(config, family=None))
        if fields["moe"] is not None:
            fields["moe"] = _without_defaults(fields["moe"], LATER_MOE_FIELDS)
        return _without_defaults(fields, LATER_FIELDS)

    def update(self, raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """`raw` with the fields of the config."""
        return {key: value for key, value in raw.items() if key not in LATER_FIELDS} | self.write(config)

    def represents(self, config: ModelConfig) -> bool:  # noqa: ARG002
        """True: every field has a key."""
        return True

    def same(self, left: ModelConfig, right: ModelConfig) -> bool:
        """True if equal."""
        return left == right


def _without_defaults(fields: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in later or value != later[key]}


LAYER_TENSORS = (
    common.TENSORS
    | common.QK_NORM_TENSORS
    | common.LATENT_TENSORS
    | common.DENSE_TENSORS
    | {
        "layers/attention/query_bias": Tensor(f"{ATTENTION}.q_proj.bias"),
        "layers/attention/key_bias": Tensor(f"{ATTENTION}.k_proj.bias"),
        "layers/attention/value_bias": Tensor(f"{ATTENTION}.v_proj.bias"),
        "layers/attention/output_bias": Tensor(f"{ATTENTION}.o_proj.bias"),
        "layers/attention/sinks": Tensor(f"{ATTENTION}.sinks"),
    }
)

FAMILY = Own(
    name=NAME,
    architecture="MoeReduceForCausalLM",
    takes_unstated=True,
    tensors=LAYER_TENSORS
    | common.of_dense_layers(LAYER_TENSORS)
    | common.EXPERT_TENSORS
    | common.SHARED_TENSORS
    | delta_net.COMMON_TENSORS
    | delta_net.SEPARATE_TENSORS
    | {
        "layers/linear_attention/rates": Tensor(f"{delta_net.LINEAR_ATTENTION}.in_proj_ba.weight"),
        "embedding/factor": Tensor("model.embed_tokens.factor"),
        "embedding/projection": Tensor("model.embed_tokens.projection", "K D"),
        "final_norm/bias": Tensor("model.norm.bias"),
        "layers/attention_norm/bias": Tensor(f"{LAYER}.input_layernorm.bias"),
        "layers/mlp_norm/bias": Tensor(f"{LAYER}.post_attention_layernorm.bias"),
        "layers/mlp/gate_bias": Tensor(f"{LAYER}.mlp.gate_proj.bias"),
        "layers/mlp/up_bias": Tensor(f"{LAYER}.mlp.up_proj.bias"),
        "layers/mlp/down_bias": Tensor(f"{LAYER}.mlp.down_proj.bias"),
        "experts/gate": Tensor("model.experts.{expert}.gate_proj.weight"),
        "experts/up": Tensor("model.experts.{expert}.up_proj.weight"),
        "experts/down": Tensor("model.experts.{expert}.down_proj.weight"),
        "experts/gate_bias": Tensor("model.experts.{expert}.gate_proj.bias"),
        "experts/up_bias": Tensor("model.experts.{expert}.up_proj.bias"),
        "experts/down_bias": Tensor("model.experts.{expert}.down_proj.bias"),
        "layers/experts/gate_bias": Tensor(f"{EXPERT}.gate_proj.bias"),
        "layers/experts/up_bias": Tensor(f"{EXPERT}.up_proj.bias"),
        "layers/experts/down_bias": Tensor(f"{EXPERT}.down_proj.bias"),
        "layers/router/bias": Tensor(f"{LAYER}.mlp.gate.bias"),
        "layers/shared_expert_gate": Tensor(f"{LAYER}.mlp.shared_expert_gate.weight", "0 D"),
        "router/weight": Tensor("model.router.weight"),
        "router/bias": Tensor("model.router.bias"),
        "layers/router_bias": Tensor(f"{LAYER}.router_bias"),
        "layers/score_offset": Tensor(f"{LAYER}.score_offset"),
        "layers/output_gain": Tensor(f"{LAYER}.output_gain"),
    },
    ignored=common.IGNORED,
)
