"""Parts that only some families have: adapters beside them, caches, windows in kernels, and the context they allow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters.merging import merge
from moe_reduce.adapters.targets import targets_of, word_of
from moe_reduce.core import trees
from moe_reduce.core.attention_config import LatentAttention, RotaryScaling
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, GenerateConfig, ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.inference.generate import generate
from moe_reduce.models.attention.attention import self_attention
from moe_reduce.models.attention.softmax import Softmax
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.model import Model
from moe_reduce.models.moe.routing import route
from moe_reduce.models.parameters import abstract_params
from moe_reduce.planning.serving import cache_bytes
from moe_reduce.reduction.layers import drop_layers
from moe_reduce.reduction.selection import keep_by_row

SIZES = {"vocab_size": 61, "layers": 3, "width": 24, "query_heads": 4, "head_width": 10}
LATENT = ModelConfig(
    **SIZES, key_value_heads=4, dense_layers=1, feed_forward_width=20, latent=LatentAttention(10, 4, 5, 14),
    moe=MoEConfig(experts=6, active=2, width=12, shared_width=12, normalize=False),
)  # fmt: skip
PATTERN = ModelConfig(
    **SIZES, key_value_heads=2, feed_forward_width=20, sliding_window=3, window_pattern="wfw", sinks=True
)
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7]]
EXECUTION = ExecutionConfig().resolve("cpu")


def random(tree, seed: int = 0):
    """Random values for abstract leaves."""
    generator = np.random.default_rng(seed)
    return trees.map_with_path(
        lambda path, leaf: jnp.asarray(generator.normal(0, 0.3, leaf.shape) + ("scale" in path), jnp.float32), tree
    )


def model_of(config: ModelConfig) -> Model:
    return Model(config, random(abstract_params(config)), EXECUTION)


def test_an_adapter_of_two_stacks_of_layers_computes_what_its_merge_computes():
    """With the cache of latent attention too, whose matrix an adapter changes."""
    model = model_of(LATENT)
    adapter = adapters.init(AdapterConfig(rank=2, targets="attention,mlp"), model)
    matrices = {path: leaf for path, leaf in trees.flatten(adapter.tree).items() if path.endswith("out/matrix")}
    assert {path.split("/")[0] for path in matrices} == {"dense_layers", "layers"}
    changed = trees.flatten(random(trees.unflatten(matrices)))
    adapter = dataclasses.replace(adapter, tree=trees.update(adapter.tree, changed))
    active, merged = adapters.activate(model, adapter), merge(model, adapter)
    tokens_BT = np.arange(20).reshape(2, 10)
    wanted = np.asarray(merged(tokens_BT))
    np.testing.assert_allclose(active(tokens_BT), wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(wanted - model(tokens_BT)).max() > 0.1
    settings = GenerateConfig(max_tokens=6)
    assert generate(active, PROMPTS, settings) == generate(merged, PROMPTS, settings)


@pytest.mark.parametrize(("words", "paths"), [
    ("q@0", ["dense_layers/attention/query"]),
    ("q@1+2,v@0", ["dense_layers/attention/value", "layers/attention/query"]),
    ("gate@top:2", ["layers/experts/gate"]),
    ("gate,shared_gate", ["dense_layers/mlp/gate", "layers/experts/gate", "layers/shared_expert/gate"]),
])  # fmt: skip
def test_words_name_layers_of_both_stacks(words: str, paths: list[str]):
    config = dataclasses.replace(LATENT, latent=None, key_value_heads=2)
    found = targets_of(AdapterConfig(rank=2, targets=words), config)
    assert [target.path for target in found] == paths
    again = targets_of(AdapterConfig(rank=2, targets=",".join(map(word_of, found))), config)
    assert again == found


def test_a_word_for_layers_that_lack_it_is_refused():
    with pytest.raises(UserError, match="shared_up@0"):
        targets_of(AdapterConfig(rank=2, targets="shared_up@0"), LATENT)


@pytest.mark.parametrize("config", [LATENT, PATTERN], ids=["latent", "pattern"])
def test_a_cache_gives_the_text_that_the_whole_row_gives(config: ModelConfig):
    model = model_of(config)
    found = generate(model, PROMPTS, GenerateConfig(max_tokens=6))
    for prompt, made in zip(PROMPTS, found, strict=True):
        row = list(prompt)
        for token in made:
            assert int(jnp.argmax(model(np.array([row + [0] * (12 - len(row))]))[0, len(row) - 1])) == token
            row.append(token)
    stacked = [len(row) for row in generate(model, PROMPTS, GenerateConfig(max_tokens=6, cache_dtype="int8"))]
    assert stacked == [6, 6]


def test_latent_attention_caches_one_vector():
    collected = model_of(LATENT).apply({"tokens": jnp.ones((2, 5), jnp.int32)}, collect=("keys_values",)).collected
    sizes = [leaf.size for leaf in jax.tree.leaves(collected["keys_values"])]
    assert sum(sizes) * 4 == cache_bytes(LATENT, context=5, batch=2, bits=32)
    assert sum(sizes) == 3 * 2 * 5 * (10 + 4)


def test_every_kernel_computes_a_window_and_another_width_of_values():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k = (jax.random.normal(key, (2, 140, 4, 16)) for key in keys[:2])
    v = jax.random.normal(keys[2], (2, 140, 4, 8))
    scores = jnp.einsum("BTHC,BSHC->BHTS", q, k) * 0.2
    steps = np.arange(140)
    seen = (steps[:, None] >= steps[None]) & (steps[:, None] - steps[None] < 50)
    wanted = jnp.einsum("BHTS,BSHW->BTHW", jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf)), v)
    for kernel in ("xla", "blocks", "splash"):
        execution = ExecutionConfig(platform="cpu", attention=kernel, products="plain")
        found = self_attention(q, k, v, Visibility(PATTERN, None, 50), execution, Softmax(0.2))
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=kernel)


def test_dropping_layers_keeps_the_pattern_of_windows():
    model = model_of(PATTERN)
    assert drop_layers(model, [0]).config.window_pattern == "fw"
    same = drop_layers(model, [1]).config
    assert (same.sliding_window, same.window_pattern) == (3, None)
    full = drop_layers(model, [0, 2]).config
    assert (full.sliding_window, full.window_pattern) == (None, None)
    shallow = drop_layers(model_of(LATENT), [1])
    assert (shallow.config.layers, shallow.config.expert_layers) == (2, 1)
    assert shallow.params["layers"]["experts"]["gate"].shape[0] == 1
    assert np.isfinite(shallow(np.ones((1, 4), np.int32))).all()
    with pytest.raises(UserError, match="the first 1 have no experts and cannot be dropped"):
        drop_layers(model_of(LATENT), [0])


@pytest.mark.parametrize(("scaling", "context"), [
    (None, 2048),
    (RotaryScaling("linear", factor=4.0), 8192),
    (RotaryScaling("dynamic", factor=2.0), 4096),
    (RotaryScaling("yarn", factor=32.0, original_positions=4096), 131_072),
    (RotaryScaling("yarn", factor=1.5, original_positions=512), 2048),
    (RotaryScaling("llama3", factor=8.0, original_positions=512), 2048),
])  # fmt: skip
def test_the_context_that_a_scaling_allows(scaling: RotaryScaling | None, context: int):
    assert dataclasses.replace(PATTERN, rotary_scaling=scaling).context == context


def test_groups_keep_equally_many_experts():
    scores = np.array([[9, 8, 7, 6, 1, 2, 3, 4]], np.float32)
    assert keep_by_row(scores, 4, groups=2) == ((0, 1, 6, 7),)
    assert keep_by_row(scores, 4, frozenset({(0, 4)}), groups=4) == ((0, 2, 4, 7),)
    with pytest.raises(UserError, match="3 experts cannot be kept equally of 2 groups"):
        keep_by_row(scores, 3, groups=2)


def test_a_router_chooses_in_the_best_groups_and_weights_without_the_bias():
    """By hand: scores 0.5 to 0.9; the bias makes expert 0 best; groups of two, by the sum of their best two."""
    scores = np.array([[0.5, 0.6, 0.9, 0.1, 0.7, 0.65]])
    logits = jnp.asarray(np.log(scores / (1 - scores)), jnp.float32)
    moe = MoEConfig(
        experts=6, active=2, width=1, score_function="sigmoid", selection_bias=True, bias_on="scores_of_choice",
        groups=3, active_groups=1, group_score="best_two", weight_scale=2.0,
    )  # fmt: skip
    bias_E = jnp.array([0.3, 0.0, 0.0, 0.0, 0.0, 0.0])  # group sums 1.4, 1.0, 1.35
    found = route(logits, bias_E, moe)
    np.testing.assert_array_equal(found.experts_SA, [[0, 1]])
    np.testing.assert_allclose(found.weights_SA, [[2 * 0.5 / 1.1, 2 * 0.6 / 1.1]], rtol=1e-5)
    best = route(logits, bias_E, dataclasses.replace(moe, group_score="maximum", normalize=False, weight_scale=1.0))
    np.testing.assert_array_equal(best.experts_SA, [[2, 3]])
    np.testing.assert_allclose(best.weights_SA, [[0.9, 0.1]], rtol=1e-5)


def test_a_bias_on_logits_changes_weights_too():
    logits = jnp.array([[1.0, 2.0, 3.0]])
    moe = MoEConfig(experts=3, active=1, width=1, normalize=False, selection_bias=True, bias_on="logits")
    found = route(logits, jnp.array([0.0, 0.0, -1e4]), moe)
    np.testing.assert_array_equal(found.experts_SA, [[1]])
    np.testing.assert_allclose(found.weights_SA, [[1 / (1 + np.exp(-1.0))]], rtol=1e-6)
