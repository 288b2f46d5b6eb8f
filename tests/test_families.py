"""Every family: layouts of all parameters, config.json there and back, and which family a config belongs to."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from moe_reduce import families
from moe_reduce.core.attention_config import LatentAttention, LinearAttention, RotaryScaling
from moe_reduce.core.config import MeshConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig, to_dict
from moe_reduce.core.config_dict import completed
from moe_reduce.core.errors import UserError
from moe_reduce.families import FAMILIES, ParameterLayout, by_path, from_hf, of_config, parameter_layouts, to_hf
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor, layouts, to_stored
from moe_reduce.models.parameters import Parameter, parameter_count, parameters
from moe_reduce.runs.train import train

SIZES = {"vocab_size": 60, "layers": 3, "width": 24, "query_heads": 4, "key_value_heads": 2, "head_width": 6}
DENSE = SIZES | {"feed_forward_width": 40}
EXPERTS = MoEConfig(experts=5, active=2, width=20, normalize=False)
POOL = dataclasses.replace(
    EXPERTS, placement="shared", router="shared", selection_bias=True, score_offset=True, output_gain=True
)
UNTIED = {"tied_embeddings": False, "rope_theta": 5e5, "norm_epsilon": 1e-5, "max_positions": 99, "init_std": 0.1}
NEOX = DENSE | {"key_value_heads": 4, "norm": "layer", "biases": True, "feed_forward": "gelu", "rotary_share": 1 / 3}
WINDOW = {"sliding_window": 7, "window_pattern": "fww"}
SHARED_EXPERT = dataclasses.replace(EXPERTS, shared_width=16, shared_gate=True)
OSS = SIZES | {
    "attention_biases": "all", "sinks": True, "feed_forward": "clamped_swiglu",
    "moe": dataclasses.replace(EXPERTS, normalize=True, biases=True),
}  # fmt: skip
SIGMOID = dataclasses.replace(
    EXPERTS, experts=6, normalize=True, score_function="sigmoid", selection_bias=True, bias_on="scores_of_choice"
)
GLM = dataclasses.replace(SIGMOID, group_score="best_two", shared_width=20, weight_scale=1.5)
AIR = SIZES | {"rotary_share": 2 / 3, "dense_layers": 1, "feed_forward_width": 40, "moe": GLM}
LATENT = LatentAttention(rank=10, rotary_width=4, value_width=5, query_rank=14)
V3 = AIR | {"key_value_heads": 4, "head_width": 10, "rotary_share": 1.0, "rotary_interleaved": True, "latent": LATENT}
V2 = V3 | {"moe": dataclasses.replace(EXPERTS, experts=6, shared_width=40)}
LINEAR = LinearAttention(key_heads=2, value_heads=4, key_width=3, value_width=5, taps=3, pattern="lls")
NEXT = SIZES | {
    "qk_norm": True, "output_gate": True, "norm": "centred_rms", "rotary_share": 1 / 3, "linear": LINEAR,
    "moe": dataclasses.replace(SHARED_EXPERT, normalize=True),
}  # fmt: skip
JOINED = {"linear": dataclasses.replace(LINEAR, joined=True)}
OWN_ATTENTION = {"attention_biases": "all", "sinks": True, "sliding_window": 3, "feed_forward": "clamped_swiglu"}
YARN = RotaryScaling("yarn", factor=4.0, original_positions=16, mscale=0.7, mscale_all_dim=1.2, truncate=False)
LLAMA3 = RotaryScaling("llama3", factor=8.0, original_positions=32)
OLMOE = SIZES | {"qk_norm": True, "qk_norm_scope": "projection", "moe": EXPERTS}
CONFIGS = {  # several of each family, which between them have all of its parameters
    "llama": [ModelConfig(**DENSE), ModelConfig(**DENSE, **UNTIED), ModelConfig(**DENSE | {"head_width": 8})],
    "qwen3": [ModelConfig(**DENSE, qk_norm=True), ModelConfig(**DENSE, **UNTIED, qk_norm=True)],
    "qwen3_moe": [
        ModelConfig(**SIZES, qk_norm=True, moe=EXPERTS),
        ModelConfig(**SIZES, **UNTIED, qk_norm=True, moe=dataclasses.replace(EXPERTS, normalize=True, init_scale=2.0)),
    ],
    "gpt_neox": [ModelConfig(**NEOX), ModelConfig(**NEOX, **UNTIED, parallel_residual=True)],
    "olmoe": [
        ModelConfig(**OLMOE),
        ModelConfig(**OLMOE, **UNTIED, clip_qkv=8.0),
        ModelConfig(**OLMOE | {"moe": dataclasses.replace(EXPERTS, normalize=True)}),
    ],
    "qwen2": [
        ModelConfig(**DENSE, attention_biases="inputs"),
        ModelConfig(**DENSE, **UNTIED, **WINDOW, attention_biases="inputs", rotary_scaling=LLAMA3),
    ],
    "mistral": [
        ModelConfig(**DENSE, sliding_window=7),
        ModelConfig(**DENSE, **UNTIED, sliding_window=9, rotary_scaling=RotaryScaling("linear", factor=2.0)),
    ],
    "mixtral": [
        ModelConfig(**SIZES, moe=dataclasses.replace(EXPERTS, normalize=True)),
        ModelConfig(**SIZES, **UNTIED, sliding_window=7, moe=dataclasses.replace(EXPERTS, normalize=True)),
    ],
    "qwen2_moe": [
        ModelConfig(**SIZES, moe=SHARED_EXPERT),
        ModelConfig(**SIZES, **UNTIED, **WINDOW, attention_biases="inputs", moe=SHARED_EXPERT),
    ],
    "gpt_oss": [
        ModelConfig(**OSS, sliding_window=7, window_pattern="wfw", rotary_scaling=YARN),
        ModelConfig(**OSS, **UNTIED, swiglu_limit=3.0, swiglu_alpha=2.0),
    ],
    "glm4_moe": [
        ModelConfig(**AIR, attention_biases="inputs"),
        ModelConfig(**AIR, **UNTIED, qk_norm=True),
        ModelConfig(**SIZES, moe=dataclasses.replace(GLM, groups=3, active_groups=2)),
    ],
    "deepseek_v3": [
        ModelConfig(**V3, rotary_scaling=YARN),
        ModelConfig(**V3 | {"latent": dataclasses.replace(LATENT, query_rank=None)}, **UNTIED),
    ],
    "deepseek_v2": [
        ModelConfig(**V2, rotary_scaling=YARN),
        ModelConfig(**V2 | {"latent": dataclasses.replace(LATENT, query_rank=None)}, **UNTIED),
    ],
    "minimax_m2": [
        ModelConfig(**OLMOE | {"moe": SIGMOID}, rotary_share=1 / 3),
        ModelConfig(**OLMOE | {"moe": SIGMOID}, **UNTIED),
    ],
    "qwen3_next": [
        ModelConfig(**NEXT | JOINED | {"moe": SHARED_EXPERT}),
        ModelConfig(**NEXT | JOINED, **UNTIED, attention_biases="all"),
        ModelConfig(**NEXT | {"linear": None}),
    ],
    "qwen3_5_moe_text": [ModelConfig(**NEXT, attention_biases="all"), ModelConfig(**NEXT, **UNTIED)],
    "moe_reduce": [
        ModelConfig(**NEXT | {"moe": POOL}),
        ModelConfig(**DENSE, **JOINED),
        ModelConfig(**SIZES, qk_norm=True, moe=POOL, embedding_factor=6),
        ModelConfig(**SIZES, **UNTIED, moe=dataclasses.replace(POOL, router="layer")),
        ModelConfig(**SIZES, moe=EXPERTS),
        ModelConfig(**DENSE, clip_qkv=3.0, biases=True, norm="layer"),
        ModelConfig(**DENSE, qk_norm=True, qk_norm_scope="projection"),
        ModelConfig(**AIR | {"moe": dataclasses.replace(SHARED_EXPERT, biases=True)}, **OWN_ATTENTION, qk_norm=True),
        ModelConfig(**AIR | {"moe": dataclasses.replace(POOL, biases=True)}, **OWN_ATTENTION),
        ModelConfig(**V3, embedding_factor=6),
        ModelConfig(**V3 | {"latent": dataclasses.replace(LATENT, query_rank=None)}, rotary_scaling=LLAMA3),
    ],
}
PUBLISHED = [family.name for family in FAMILIES if family.name != "moe_reduce"]
ROOT = Path(__file__).parent.parent
# A family that takes no unstated config, because it was added later, is stated.
CASES = [
    pytest.param(
        name,
        config if families.named(name).takes_unstated else dataclasses.replace(config, family=name),
        id=f"{name}-{number}",
    )
    for name, found in CONFIGS.items()
    for number, config in enumerate(found)
]


def test_every_family_is_walked():
    assert [family.name for family in FAMILIES] == list(CONFIGS)


def test_the_readme_counts_the_families():
    numbers = {14: "fourteen", 15: "fifteen", 16: "sixteen"}
    assert f"**Model families:** {numbers[len(PUBLISHED)]} of Hugging Face" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["docs/guides/adapt.md", "docs/guides/evaluate.md"])
def test_documents_list_every_family(page: str):
    lists = re.findall(r"`\w+`(?:(?:,| and| or)\s`\w+`){2,}", (ROOT / page).read_text())
    (listed,) = [names for names in (re.findall(r"\w+(?=`)", found) for found in lists) if "llama" in names]
    assert sorted(listed) == sorted(PUBLISHED)


def test_the_guide_of_exports_says_where_every_family_opens():
    assert set(PUBLISHED) <= set(re.findall(r"`(\w+)`", (ROOT / "docs/guides/export.md").read_text()))


@pytest.mark.parametrize(("name", "config"), CASES)
def test_a_config_that_states_no_family_is_of_the_one_that_takes_it(name: str, config: ModelConfig):
    assert of_config(config).name == name
    taking = [family.name for family in FAMILIES if family.takes_unstated and family.represents(config)]
    assert taking in ([name, "moe_reduce"], ["moe_reduce"])


@pytest.mark.parametrize(("name", "config"), CASES)
def test_config_json_there_and_back(name: str, config: ModelConfig):
    raw = to_hf(config, None, "float32")
    found = from_hf(raw)
    assert raw["model_type"] == found.family == name
    if config.moe is not None and name != "moe_reduce":  # no file of transformers has it
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, init_scale=1.0))
    assert found == config
    assert to_hf(found, raw, "float32") == raw


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_parameter_has_a_layout_and_every_tensor_one_name(name: str, config: ModelConfig):
    assert [leaf.path for leaf in parameter_layouts(config)] == [record.path for record in parameters(config)]
    stored: dict[str, list[ParameterLayout]] = {}
    for leaf in parameter_layouts(config):
        assert len(set(leaf.names())) == math.prod(leaf.stacked)
        for tensor in leaf.names():
            stored.setdefault(tensor, []).append(leaf)
    assert all(len(sharing) == leaf.parts for sharing in stored.values() for leaf in sharing)
    assert all("{" not in tensor for tensor in stored)
    assert sum(math.prod(sharing[0].stored_shape) for sharing in stored.values()) == parameter_count(config)
    assert not any(of_config(config).ignored.fullmatch(tensor) for tensor in stored), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_layout_is_left_over(family: families.Family):
    paths = {record.path for config in CONFIGS[family.name] for record in parameters(config)}
    assert paths == set(family.tensors)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_tensors_hold_every_value_of_a_parameter_once(name: str, config: ModelConfig):
    for leaf in parameter_layouts(config):
        shape = leaf.shape[len(leaf.stacked) :]
        array = np.arange(math.prod(shape)).reshape(shape)
        tensor = np.full(leaf.stored_shape, -1)
        leaf.from_stored(tensor)[...] = array
        np.testing.assert_array_equal(leaf.from_stored(tensor), array, err_msg=f"{name} {leaf.path}")
        assert np.sum(tensor >= 0) == array.size
        if leaf.parts == 1:
            np.testing.assert_array_equal(leaf.to_stored(array), tensor)


@pytest.mark.parametrize("axes", ["E {}F D", "E D {}F", "E F{} D", "E D F{}"])
def test_experts_of_one_tensor_in_any_order(axes: str):
    """Gate and up side by side or in turn, with inputs first or outputs first."""
    family = families.named("mixtral")
    fused = {
        f"layers/experts/{name}": Tensor("fused.{layer}", axes.format(part)) for part, name in enumerate(("gate", "up"))
    }
    found = layouts({**family.tensors, **fused}, CONFIGS["mixtral"][0])
    gate, up = (found[path] for path in fused)
    assert (gate.numbered, gate.parts, gate.names()) == ("N", 2, up.names())
    first, second = np.random.default_rng(0).normal(size=(2, 5, 24, 20))
    stored = to_stored([(gate, first), (up, second)])
    last = axes.index("F") > axes.index("D")
    wanted = [part if last else part.swapaxes(1, 2) for part in (first, second)]
    axis = 2 if last else 1
    if "{}F" in axes:
        np.testing.assert_array_equal(stored, np.concatenate(wanted, axis=axis))
    else:
        every = (slice(None),) * axis
        for part, array in enumerate(wanted):
            np.testing.assert_array_equal(stored[*every, part::2], array)
    assert gate.stored_expert_axis == 0
    np.testing.assert_array_equal(up.from_stored(stored), second)


def test_matrices_are_stored_as_torch_stores_them():
    config = CONFIGS["olmoe"][0]
    shapes = {path: leaf.stored_shape for path, leaf in by_path(config).items()}
    assert shapes["layers/attention/key"] == (12, 24)
    assert shapes["layers/attention/output"] == (24, 24)
    assert shapes["layers/experts/down"] == (24, 20)
    assert shapes["layers/router/weight"] == (5, 24)
    assert shapes["layers/attention/key_norm/scale"] == (12,)
    assert by_path(CONFIGS["qwen3_moe"][0])["layers/attention/key_norm/scale"].stored_shape == (6,)
    assert by_path(config)["layers/experts/up"].name((2, 4)) == "model.layers.2.mlp.experts.4.up_proj.weight"
    assert by_path(config)["layers/experts/up"].module((2, 4)) == "model.layers.2.mlp.experts.4.up_proj"


@pytest.mark.parametrize("takes_unstated", [False, True])
def test_a_family_added_later_takes_no_config_that_states_none(takes_unstated: bool, monkeypatch: pytest.MonkeyPatch):
    """Even if it is listed first; one that says so does, which shows that this test can fail."""
    later = dataclasses.replace(families.named("llama"), name="later", takes_unstated=takes_unstated)
    monkeypatch.setattr(families, "FAMILIES", (later, *FAMILIES))
    families._family.cache_clear()
    try:
        assert of_config(CONFIGS["llama"][1]).name == ("later" if takes_unstated else "llama")
        assert of_config(dataclasses.replace(CONFIGS["llama"][1], family="later")).name == "later"
    finally:
        families._family.cache_clear()


def test_an_optional_key_is_none_by_null_and_else_its_default():
    olmoe = families.named("olmoe")
    family = dataclasses.replace(olmoe, defaults={**olmoe.defaults, "clip_qkv": 8.0})
    raw = olmoe.write(CONFIGS["olmoe"][0])
    assert (raw["clip_qkv"], family.read(raw).clip_qkv) == (None, None)
    del raw["clip_qkv"]
    assert (olmoe.read(raw).clip_qkv, family.read(raw).clip_qkv) == (None, 8.0)


def test_a_family_that_reads_a_key_does_not_refuse_it():
    llama = families.named("llama")
    raw = llama.write(CONFIGS["llama"][0]) | {"partial_rotary_factor": 0.5}
    with pytest.raises(UserError, match=r"partial_rotary_factor=0\.5 is not supported"):
        llama.read(raw)
    reading = dataclasses.replace(llama, keys={**llama.keys, "rotary_share": Key("partial_rotary_factor", float)})
    assert reading.read(raw).rotary_share == 0.5


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A config that states a family with the fields of LLaMA and tensor names of its own."""
    llama = families.named("llama")
    tensors = {path: tensor._replace(name=f"twin.{tensor.name}") for path, tensor in llama.tensors.items()}
    family = dataclasses.replace(llama, name="twin", architecture="TwinForCausalLM", tensors=tensors)
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, family))
    return dataclasses.replace(CONFIGS["llama"][0], family="twin")


def test_families_with_equal_fields_are_told_apart_by_what_a_config_states(twin: ModelConfig):
    plain = CONFIGS["llama"][0]
    assert twin == plain
    assert hash(twin) == hash(plain)  # the same architecture, and compiled once
    assert of_config(twin).name == "twin"
    assert of_config(plain).name == "llama"
    raw = to_hf(twin, None, "float32")
    assert (raw["model_type"], raw["architectures"]) == ("twin", ["TwinForCausalLM"])
    assert from_hf(raw).family == "twin"
    assert by_path(plain)["final_norm/scale"].name() == "model.norm.weight"
    assert by_path(twin)["final_norm/scale"].name() == "twin.model.norm.weight"
    assert by_path(plain)["final_norm/scale"].name() == "model.norm.weight"  # no cache takes one for the other
    changed = to_hf(dataclasses.replace(twin, layers=1), raw, "float32")
    assert (changed["model_type"], changed["num_hidden_layers"]) == ("twin", 1)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "moe_reduce"])
def test_a_stated_family_that_cannot_say_it_any_more_becomes_ours(name: str):
    stated = dataclasses.replace(CONFIGS[name][0], family=name)
    assert of_config(stated).name == name
    moved = dataclasses.replace(stated, tied_embeddings=True, embedding_factor=6)
    assert of_config(moved).name == "moe_reduce"
    assert to_hf(moved, to_hf(stated, None, "float32"), "float32")["model_type"] == "moe_reduce"
    for other in CONFIGS:
        if other != name and (name, other) != ("llama", "mistral"):  # which are the same without a window
            assert of_config(dataclasses.replace(stated, family=other)).name == "moe_reduce"


def test_runs_from_before_families_were_stated_go_on():
    run = to_dict(RunConfig(model=CONFIGS["llama"][0]))
    earlier = run | {"model": {name: value for name, value in run["model"].items() if name != "family"}}
    assert earlier != run
    assert completed(RunConfig, earlier) == run


def test_an_unknown_family_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match=r"'mamba' is not supported; known: llama, .*, moe_reduce"):
        of_config(dataclasses.replace(CONFIGS["llama"][0], family="mamba"))
    with pytest.raises(UserError, match="'mamba' is not supported"):  # before anything is prepared
        train(
            RunConfig(
                model=dataclasses.replace(CONFIGS["llama"][0], family="mamba"),
                mesh=MeshConfig(data=1),
                train=TrainConfig(steps=1, batch_size=1),
            ),
            tmp_path / "run",
        )
    assert not list(tmp_path.iterdir())
    for raw in ({}, {"model_type": ["llama"]}):
        with pytest.raises(UserError, match="model_type"):
            from_hf(raw)


def test_a_scale_is_laid_out_like_its_matrix():
    for name, path, shape, stored in (
        ("llama", "layers/attention/query", (3, 1, 4, 6), (24, 1)),
        ("olmoe", "layers/experts/down", (3, 5, 1, 24), (24, 1)),
        ("gpt_neox", "layers/attention/key", (3, 1, 4, 6), (72, 1)),
    ):
        leaf = by_path(CONFIGS[name][0])[path]
        scale = leaf.part("_scale", 1)
        assert (scale.shape, scale.stored_shape, scale.stacked) == (shape, stored, leaf.stacked)
        assert scale.names() == [f"{tensor}_scale" for tensor in leaf.names()]
    rows = np.arange(72).reshape(4, 3, 6)
    np.testing.assert_array_equal(scale.from_stored(rows.reshape(-1, 1)), rows[None, :, 1])


def test_a_layout_numbers_the_leading_axes_only():
    record = Parameter("x", "DN", (2, 3), lambda *_: None, "x", False, "compute", (None, None))
    with pytest.raises(AssertionError):
        ParameterLayout(record, Tensor("x.{layer}")).stacked  # noqa: B018
