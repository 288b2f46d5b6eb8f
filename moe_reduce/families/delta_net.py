"""Keys and tensor names of families with Gated DeltaNet (arXiv:2412.06464) in most of their layers.

Their layers with softmax attention have an output gate, and their norms store a scale's difference from 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_reduce.core.attention_config import LINEAR, SOFTMAX, LinearAttention
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import common
from moe_reduce.families.common import ATTENTION, LAYER
from moe_reduce.families.huggingface import LAYER_TYPES, ROPE, HuggingFaceFamily
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor
from moe_reduce.families.qwen2_moe import SHARED_TENSORS

SHARE = "partial_rotary_factor"
INTERVAL = "full_attention_interval"  # every so many layers, one has softmax attention; layer_types says the same
BIASES = "attention_bias"
TYPES = {"linear_attention": LINEAR, "full_attention": SOFTMAX}
SIZES = {
    "key_heads": Key("linear_num_key_heads", int),
    "value_heads": Key("linear_num_value_heads", int),
    "key_width": Key("linear_key_head_dim", int),
    "value_width": Key("linear_value_head_dim", int),
    "taps": Key("linear_conv_kernel_dim", int),
}
KEYS = (
    common.KEYS
    | common.HEAD_WIDTH
    | {
        "rotary_share": Key(SHARE, float),
        "moe.experts": common.EXPERT_KEYS["moe.experts"],
        "moe.active": common.EXPERT_KEYS["moe.active"],
        "moe.width": Key("moe_intermediate_size", int),
        "moe.shared_width": Key("shared_expert_intermediate_size", int),
    }
)
FIXED = {"qk_norm": True, "output_gate": True, "norm": "centred_rms", "moe.shared_gate": True}
DERIVED_KEYS = frozenset({LAYER_TYPES, INTERVAL, BIASES, *(key.name for key in SIZES.values())})
DERIVED_NAMES = {"linear": LAYER_TYPES, "attention_biases": BIASES}
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 2,
    "head_dim": 256,
    SHARE: 0.25,
    INTERVAL: 4,
    BIASES: False,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
ROTARY = {**ROPE, SHARE: SHARE}
LINEAR_ATTENTION = f"{LAYER}.linear_attn"
COMMON_TENSORS = {
    "layers/linear_attention/output": Tensor(f"{LINEAR_ATTENTION}.out_proj.weight"),
    "layers/linear_attention/convolution": Tensor(f"{LINEAR_ATTENTION}.conv1d.weight", "U 0 P"),
    "layers/linear_attention/log_decay": Tensor(f"{LINEAR_ATTENTION}.A_log"),
    "layers/linear_attention/decay_offset": Tensor(f"{LINEAR_ATTENTION}.dt_bias"),
    "layers/linear_attention/norm/scale": Tensor(f"{LINEAR_ATTENTION}.norm.weight"),
}
JOINED_TENSORS = {
    "layers/linear_attention/inputs": Tensor(f"{LINEAR_ATTENTION}.in_proj_qkvz.weight"),
    "layers/linear_attention/rates": Tensor(f"{LINEAR_ATTENTION}.in_proj_ba.weight"),
}
SEPARATE_TENSORS = {
    "layers/linear_attention/inputs": Tensor(f"{LINEAR_ATTENTION}.in_proj_qkv.weight"),
    "layers/linear_attention/gate": Tensor(f"{LINEAR_ATTENTION}.in_proj_z.weight"),
    "layers/linear_attention/beta": Tensor(f"{LINEAR_ATTENTION}.in_proj_b.weight"),
    "layers/linear_attention/decay": Tensor(f"{LINEAR_ATTENTION}.in_proj_a.weight"),
}
TENSORS = (
    common.TENSORS
    | common.INPUT_BIAS_TENSORS
    | {"layers/attention/output_bias": Tensor(f"{ATTENTION}.o_proj.bias")}
    | common.QK_NORM_TENSORS
    | common.EXPERT_TENSORS
    | SHARED_TENSORS
    | COMMON_TENSORS
)


class DeltaNet(HuggingFaceFamily):
    """A family with linear attention. Its tensors say whether one matrix makes all inputs of it."""

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of linear attention and of biases."""
        pattern = _pattern(flat)
        linear = LinearAttention(
            **{field: key.value(flat) for field, key in SIZES.items()}, joined=self._joined, pattern=pattern
        )
        return {
            "linear": linear if LINEAR in pattern else None,
            "attention_biases": "all" if Key(BIASES, bool).value(flat) else "none",
        }

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of linear attention and of biases."""
        names = {letter: name for name, letter in TYPES.items()}
        pattern = SOFTMAX * config.layers if config.linear is None else config.linear.pattern
        keys: dict[str, Any] = {LAYER_TYPES: [names[letter] for letter in pattern]}
        if config.linear is not None:
            keys |= {key.name: getattr(config.linear, field) for field, key in SIZES.items()}
        return keys | {BIASES: config.attention_biases == "all"}

    @property
    def _joined(self) -> bool:
        return "layers/linear_attention/rates" in self.tensors


def _pattern(flat: Mapping[str, Any]) -> str:
    """A letter for each layer."""
    layers, interval = flat["num_hidden_layers"], Key(INTERVAL, int).value(flat)
    if interval < 1:
        raise UserError(f"{INTERVAL} must be positive, got {interval}")
    names = ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(layers)]
    types = names if flat.get(LAYER_TYPES) is None else flat[LAYER_TYPES]
    if not isinstance(types, Sequence) or not all(isinstance(one, str) and one in TYPES for one in types):
        raise UserError(f"{LAYER_TYPES}={types!r} is not supported, only a list of {' and '.join(map(repr, TYPES))}")
    if len(types) != layers:
        raise UserError(
            f"{LAYER_TYPES} has {len(types)} entries and num_hidden_layers is {layers}: correct one of them"
        )
    return "".join(TYPES[one] for one in types)
