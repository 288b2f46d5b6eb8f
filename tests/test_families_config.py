"""config.json <-> ModelConfig: both spellings, byte-identical round trips, and refusals that name the key."""

import dataclasses
import json
from pathlib import Path

import pytest
from families_cases import CASES, config_class
from test_models_counts import PYTHIA_160M
from transformers_models import CLASSES, SIZES_OF

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import FAMILIES, dumps, from_hf, of_config, own, read_config, to_hf

PUBLISHED = {  # the spelling of Qwen3-30B-A3B on the hub
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SHARED = ModelConfig(
    vocab_size=61, layers=3, width=24, query_heads=4, key_value_heads=2, head_width=8, embedding_factor=6,
    moe=MoEConfig(experts=6, active=2, width=20, placement="shared", router="shared"),
)  # fmt: skip


PYTHIA = {  # the spelling of Pythia-160M on the hub
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


KINDS = [*CLASSES, *CASES]


def config_of(kind: str, **changes):
    sizes = SIZES_OF[kind] if kind in SIZES_OF else CASES[kind][0]
    return config_class(kind)(**sizes | changes)


def test_every_published_family_is_compared_with_transformers():
    assert sorted([*KINDS, "moe_reduce"]) == sorted(family.name for family in FAMILIES)


def test_published_spelling():
    model = from_hf(PUBLISHED)
    assert model == ModelConfig(
        vocab_size=151936, layers=48, width=2048, query_heads=32, key_value_heads=4, head_width=128, qk_norm=True,
        moe=MoEConfig(experts=128, active=8, width=768), tied_embeddings=False, rope_theta=1e6, max_positions=40960,
    )  # fmt: skip
    assert of_config(model).name == "qwen3_moe"
    assert to_hf(model, PUBLISHED, "bfloat16") == PUBLISHED


def test_published_spelling_of_pythia():
    assert from_hf(PYTHIA) == PYTHIA_160M
    assert of_config(PYTHIA_160M).name == "gpt_neox"
    assert to_hf(PYTHIA_160M, PYTHIA, "float16") == PYTHIA
    other = dataclasses.replace(PYTHIA_160M, rotary_share=0.5, parallel_residual=False, rope_theta=2e4)
    changes = {"rotary_pct": 0.5, "use_parallel_residual": False, "rotary_emb_base": 2e4}
    assert to_hf(other, PYTHIA, "float16") == PYTHIA | changes
    assert from_hf(PYTHIA | changes) == from_hf(CLASSES["gpt_neox"][0](**PYTHIA | changes).to_dict()) == other


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_file_keeps_every_byte(tmp_path: Path, kind: str):
    config_of(kind).save_pretrained(tmp_path)
    model, raw = read_config(tmp_path)
    assert of_config(model).name == kind
    assert dumps(to_hf(model, raw, "float32")) == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_left_out_mean_what_transformers_means(kind: str):
    theirs = config_class(kind)().to_dict()
    required = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = ("intermediate_size", "num_key_value_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    sizes += ("num_local_experts", "n_routed_experts")
    full = {key: value for key, value in theirs.items() if value is not None}
    given = {
        "qwen3_moe": {"num_experts": 128},
        "deepseek_v2": {"num_experts_per_tok": 6},
        "glm4_moe": {"head_dim": 128},
    }
    full |= given.get(kind, {})
    short = {key: value for key, value in full.items() if key in (*required, *sizes, *given.get(kind, {}))}
    assert from_hf(short) == from_hf(full)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_fields_only(tmp_path: Path, kind: str):
    config_of(kind).save_pretrained(tmp_path)
    model, raw = read_config(tmp_path)
    first = model.dense_layers + 1
    linear = model.linear and dataclasses.replace(model.linear, pattern=model.linear.pattern[:first])
    changed = dataclasses.replace(model, layers=first, rope_theta=5e5, window_pattern=None, linear=linear)
    written = to_hf(changed, raw, "float32")
    assert from_hf(written) == changed
    different = {key for key in written if key not in raw or written[key] != raw[key]}
    fewer = {"num_hidden_layers", *({"layer_types"} & set(raw))} if first < model.layers else set()
    assert different == {"rope_parameters"} | fewer
    assert config_class(kind)(**written).num_hidden_layers == first


def test_defaults_that_no_longer_fit_are_written():
    raw = {key: value for key, value in PUBLISHED.items() if key not in ("head_dim", "num_key_value_heads")}
    model = from_hf(raw)
    fewer = dataclasses.replace(model, query_heads=16, key_value_heads=16)
    assert from_hf(to_hf(fewer, raw, "bfloat16")) == fewer


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_config_is_read_by_transformers(tmp_path: Path, kind: str):
    model = from_hf(config_of(kind).to_dict())
    raw = to_hf(model, None, "float32")
    assert from_hf(raw) == model
    (tmp_path / "config.json").write_text(dumps(raw))
    theirs = config_class(kind).from_pretrained(tmp_path)
    assert from_hf(theirs.to_dict()) == model


def test_own_type_holds_every_field():
    raw = json.loads(dumps(to_hf(SHARED, None, "float32")))
    assert raw["model_type"] == "moe_reduce"
    assert from_hf(raw) == SHARED
    with pytest.raises(UserError, match="colour"):
        from_hf(raw | {"colour": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"placement": "shared"},
        {"score_function": "sigmoid"},
        {"selection_bias": True},
        {"output_gain": True},
    ],
)
def test_what_transformers_lacks_is_ours(change: dict):
    model = from_hf(PUBLISHED)
    assert model.moe is not None
    assert of_config(dataclasses.replace(model, moe=dataclasses.replace(model.moe, **change))).name == "moe_reduce"
    assert of_config(dataclasses.replace(model, qk_norm=False)).name == "moe_reduce"


@pytest.mark.parametrize(
    "change",
    [
        {"key_value_heads": 4},
        {"head_width": 32},
        {"biases": False},
        {"norm": "rms"},
        {"feed_forward": "swiglu"},
        {"qk_norm": True},
        {"tied_embeddings": True, "embedding_factor": 64},
    ],
)
def test_what_gpt_neox_lacks_is_ours(change: dict):
    model = dataclasses.replace(PYTHIA_160M, **change)
    raw = to_hf(model, PYTHIA, "float16")
    assert raw["model_type"] == "moe_reduce"
    assert from_hf(raw) == model
    assert from_hf(to_hf(PYTHIA_160M, raw, "float16")) == PYTHIA_160M
    shallow = dataclasses.replace(model, layers=6)
    assert from_hf(to_hf(shallow, raw, "float16")) == shallow


def test_one_family_with_a_trait_of_another_is_ours():
    llama = from_hf(config_of("llama").to_dict())
    for change in ({"parallel_residual": True}, {"rotary_share": 0.5}, {"biases": True}, {"norm": "layer"}):
        assert of_config(dataclasses.replace(llama, **change)).name == "moe_reduce"


def test_own_files_name_later_fields_only_where_they_differ():
    """Files from before these fields are read, and written again, as they are."""
    raw = to_hf(SHARED, None, "float32")
    later = {"norm", "biases", "parallel_residual", "feed_forward", "rotary_share", "qk_norm_scope", "clip_qkv"}
    assert not (later | {"family"}) & set(raw)
    assert from_hf(raw) == SHARED
    turned = dataclasses.replace(SHARED, rotary_share=0.5)
    assert to_hf(turned, raw, "float32") == raw | {"rotary_share": 0.5}
    assert to_hf(SHARED, raw | {"rotary_share": 0.5}, "float32") == raw


def test_own_files_open_when_the_experts_have_got_a_field(monkeypatch):
    """A file without a field that MoEConfig got later is read with its default, and written again as it is."""
    first = tuple(name for name in own.FIRST_MOE_FIELDS if name != "init_scale")
    monkeypatch.setattr(own, "LATER_MOE_FIELDS", own.later_fields(MoEConfig, first))
    raw = to_hf(SHARED, None, "float32")
    assert "init_scale" not in raw["moe"]
    assert from_hf(raw) == SHARED
    assert SHARED.moe is not None
    turned = dataclasses.replace(SHARED, moe=dataclasses.replace(SHARED.moe, init_scale=0.5))
    assert to_hf(turned, raw, "float32")["moe"] == raw["moe"] | {"init_scale": 0.5}
    assert from_hf(to_hf(turned, raw, "float32")) == turned


def test_change_of_type_keeps_the_token_ids():
    model = from_hf(PUBLISHED)
    assert model.moe is not None
    pooled = dataclasses.replace(model, moe=dataclasses.replace(model.moe, placement="shared", experts=6144))
    raw = to_hf(pooled, PUBLISHED, "bfloat16")
    assert raw["eos_token_id"] == 151645
    assert "num_experts" not in raw
    assert from_hf(raw) == pooled


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mamba"}, ", ".join(family.name for family in FAMILIES)),
        ({"model_type": "qwen3_mo"}, "; the nearest is qwen3_moe"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "query_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": 0.0}, "norm_epsilon"),
    ],
)
def test_refusals_name_file_and_key(tmp_path: Path, change: dict, words: str):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | change))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": False}, "attention_bias"),
        ({"hidden_act": "gelu_fast"}, "hidden_act"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 32}, "head_dim"),
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 1.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "default", "rope_theta": 2e4}}, "rope_scaling"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rotary_pct": 0.0}, "rotary_share"),
        ({"rotary_pct": 1.5}, "rotary_share"),
        ({"rotary_pct": 0.05}, "rotary_share=0.05 turns 3 of the 64"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "query_heads"),
        ({"use_parallel_residual": 1}, "use_parallel_residual"),
    ],
)
def test_refusals_of_pythia_name_file_and_key(tmp_path: Path, change: dict, words: str):
    (tmp_path / "config.json").write_text(json.dumps(PYTHIA | change))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("feed_forward", "gelu"), ("biases", True), ("norm", "layer")])
def test_experts_take_no_part_of_gpt_neox(name: str, value: object):
    raw = to_hf(SHARED, None, "float32")
    with pytest.raises(UserError, match=rf"model.{name}={value} is for dense models"):
        from_hf(raw | {name: value})


def test_unreadable_directories(tmp_path: Path):
    with pytest.raises(UserError, match="hf download Qwen/Qwen3-8B fetches the model"):
        read_config(Path("Qwen/Qwen3-8B"))
    with pytest.raises(UserError, match="not a directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(tmp_path)
    for content in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="JSON"):
            read_config(tmp_path)
