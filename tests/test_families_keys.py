"""Every key of a foreign config.json is read, checked, known to change nothing, or refused by name."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from families_cases import CASES, config_class
from transformers_models import CLASSES, SIZES_OF, written

import moe_reduce
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import from_hf, named, to_hf
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.neutral_keys import GENERATION, NEUTRAL

CHANGED = {  # a value of each type that is no default of any key
    bool: lambda value: not value, int: lambda value: value + 2, float: lambda value: value * 3 + 0.5,
    str: lambda value: f"{value}x", list: lambda value: [*value, 7], dict: lambda value: value | {"other": 1},
    type(None): lambda _: "other",
}  # fmt: skip
KINDS = [*CLASSES, *CASES]
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))


def config_of(kind: str, **changes) -> dict:
    sizes = SIZES_OF[kind] if kind in SIZES_OF else CASES[kind][0]
    return config_class(kind)(**sizes | changes).to_dict()


def family_of(kind: str) -> HuggingFaceFamily:
    family = named(kind)
    assert isinstance(family, HuggingFaceFamily)
    return family


def attempted(raw: dict) -> tuple[ModelConfig | None, str]:
    """(the config, "") or (None, the refusal)."""
    try:
        return from_hf(raw), ""
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_that_transformers_writes_is_in_a_table(kind: str):
    written_keys = {key for key in config_of(kind) if not key.startswith("_")}
    written_keys |= {field.name for field in dataclasses.fields(config_class(kind)) if not field.name.startswith("_")}
    off = {"is_encoder_decoder"}  # false in every decoder, and refused otherwise
    assert written_keys - family_of(kind).known_keys <= off


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_changed_is_read_or_refused_by_name_or_changes_nothing(kind: str):
    raw, family = config_of(kind), family_of(kind)
    before = from_hf(raw)
    for key, value in raw.items():
        if key == "model_type":
            continue
        changed = raw | {key: CHANGED[type(value)](value)}
        after, message = attempted(changed)
        neutral = key in NEUTRAL | family.neutral or key.startswith("_")
        assert key in message if message else neutral or after != before, f"{key} is accepted and not read: {message}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", ["rope_parameters", "rope_scaling"])
def test_every_key_within_the_groups_of_rotation(kind: str, group: str):
    family = family_of(kind)
    raw = {key: value for key, value in config_of(kind).items() if key != "rope_parameters"}
    assert from_hf(raw | {group: {"rope_type": "default", "rope_theta": 5e4}}).rope_theta == 5e4
    assert from_hf(raw | {group: {"type": "default", "rope_theta": 5e4}}).rope_theta == 5e4
    for name in ("factor", "original_max_position_embeddings", "low_freq_factor", "long_factor", "beta_fast", "other"):
        with pytest.raises(UserError, match=rf"{group}\.{name}"):
            from_hf(raw | {group: {"rope_type": "default", name: 2.0}})
    for kind_of_rope in ("longrope", "proportional", "other"):
        with pytest.raises(UserError, match=f"{group}.rope_type={kind_of_rope!r}"):
            from_hf(raw | {group: {"rope_type": kind_of_rope, "factor": 2.0}})
    for kind_of_rope in ("linear", "dynamic", "yarn"):
        for name in ("rope_type", "type"):
            scaling = from_hf(raw | {group: {name: kind_of_rope, "factor": 2.0}}).rotary_scaling
            assert scaling is not None
            assert (scaling.kind, scaling.factor) == (kind_of_rope, 2.0)
        with pytest.raises(UserError, match=f"{group}.other=1"):
            from_hf(raw | {group: {"rope_type": kind_of_rope, "factor": 2.0, "other": 1}})
        with pytest.raises(UserError, match=f"{group}.factor is missing"):
            from_hf(raw | {group: {"rope_type": kind_of_rope}})
    (first, *_) = family.rope
    with pytest.raises(UserError, match=f"{first}=.* and {group}.rope_theta=.* contradict"):
        from_hf(raw | {first: 1e4, group: {"rope_type": "default", "rope_theta": 5e4}})


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt_neox"])
def test_theta_within_rope_scaling_gives_the_logits_of_transformers(tmp_path, kind: str):
    written(tmp_path, kind)
    raw = json.loads((tmp_path / "config.json").read_text())
    theta = raw.pop("rope_parameters") | {"rope_theta": 50.0}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": theta}))
    theirs = CLASSES[kind][1].from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(moe_reduce.load(tmp_path)(TOKENS), expected, atol=1e-4 * np.abs(expected).max())


def test_settings_of_generation_are_those_of_transformers():
    theirs = set(transformers.GenerationConfig._get_default_generation_params())
    assert theirs - GENERATION <= {"use_cache"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("residual_multiplier", 0.22), ("sliding_window", 4096), ("layer_sharing", True), ("quantization", {"bits": 4}),
        ("dual_chunk_attention_config", {"chunk_size": 8}), ("per_layer_config", {"0": {"head_dim": 4}}),
        ("is_encoder_decoder", True), ("rope_interleaved", True), ("num_experts", 8), ("attn_logit_softcapping", 50.0),
    ],
)  # fmt: skip
def test_unknown_keys_of_llama_are_refused_unless_off(key: str, value):
    raw = config_of("llama")
    with pytest.raises(UserError, match=key) as caught:
        from_hf(raw | {key: value})
    assert "\n" not in str(caught.value)
    for off in (None, False):
        assert from_hf(raw | {key: off}) == from_hf(raw)


def test_two_spellings_agree_and_are_rewritten_together():
    raw = config_of("qwen3_moe")
    raw = {key: value for key, value in raw.items() if key not in ("num_experts", "num_local_experts", "dtype")}
    both = raw | {"num_experts": 6, "num_local_experts": 6}
    with pytest.raises(UserError, match="num_experts=6 and num_local_experts=3 contradict"):
        from_hf(both | {"num_local_experts": 3})
    with pytest.raises(UserError, match="num_experts is missing"):
        from_hf(raw)
    model = from_hf(both)
    assert model.moe is not None
    fewer = dataclasses.replace(model, moe=dataclasses.replace(model.moe, experts=3))
    assert to_hf(fewer, both, "float32") == both | {"num_experts": 3, "num_local_experts": 3}
    only = raw | {"num_local_experts": 6}
    assert to_hf(fewer, only, "float32") == only | {"num_local_experts": 3}


def test_theta_given_twice_is_rewritten_in_both_places():
    raw = config_of("llama")
    group = {"rope_type": "default", "rope_theta": 1e4}
    both = {key: value for key, value in raw.items() if key != "rope_parameters"}
    both |= {"rope_theta": 1e4, "rope_scaling": {"type": "default"}, "rope_parameters": group}
    model = dataclasses.replace(from_hf(both), rope_theta=5e5)
    written_again = to_hf(model, both, "float32")
    assert written_again["rope_theta"] == written_again["rope_parameters"]["rope_theta"] == 5e5
    assert from_hf(written_again) == model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("vocab_size", 2**62), ("hidden_size", 2**40), ("num_attention_heads", 2**40),
        ("num_key_value_heads", 2**40), ("head_dim", 2**40), ("num_experts", 10**9), ("moe_intermediate_size", 2**62),
        ("max_position_embeddings", 2**62), ("num_experts", 10**6),
    ],
)  # fmt: skip
def test_sizes_beyond_any_model_are_refused_by_name(key: str, value: int):
    raw = config_of("qwen3_moe") | {key: value}
    raw.pop("num_local_experts", None) if key == "num_experts" else None
    with pytest.raises(UserError, match="must be at most") as caught:
        from_hf(raw)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
