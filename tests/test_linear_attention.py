"""Layers with linear attention in training, generation, scoring, adapters and reductions."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_adapters import disturbed

import moe_reduce
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import bank
from moe_reduce.adapters.merging import merge
from moe_reduce.adapters.targets import targets_of, word_of
from moe_reduce.core import trees
from moe_reduce.core.attention_config import LinearAttention
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, GenerateConfig, ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import own_config
from moe_reduce.inference.generate import generate, prepared
from moe_reduce.inference.scoring import score
from moe_reduce.models import cache
from moe_reduce.models.attention import delta_rule as rule
from moe_reduce.models.decoder import init_params, unstacked
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import abstract_params
from moe_reduce.planning.flops import forward_flops_per_token
from moe_reduce.planning.serving import cache_bytes
from moe_reduce.reduction.layers import drop_layers
from moe_reduce.storage.parameter_tensors import write_items

LINEAR = LinearAttention(key_heads=2, value_heads=4, key_width=6, value_width=5, taps=3, pattern="ls")
CONFIG = ModelConfig(
    vocab_size=40, layers=2, width=16, query_heads=2, key_value_heads=1, head_width=8, qk_norm=True, output_gate=True,
    norm="centred_rms", linear=LINEAR, moe=MoEConfig(experts=3, active=2, width=8),
)  # fmt: skip
EXECUTION = ExecutionConfig(dispatch="reference").resolve("cpu")


LENGTH = 16  # of every row that a whole model reads, so that one program serves all tests


def made(config: ModelConfig) -> Model:
    """A model with random parameters, made without compiling anything."""
    rng = np.random.default_rng(0)
    flat = trees.flatten(abstract_params(config))
    values = {path: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    return Model(config, trees.unflatten({path: jnp.asarray(value) for path, value in values.items()}), EXECUTION)


@pytest.fixture(scope="module")
def model() -> Model:
    return made(CONFIG)


def longer(layers: str) -> ModelConfig:
    """The configuration with these layers."""
    return dataclasses.replace(CONFIG, layers=len(layers), linear=dataclasses.replace(LINEAR, pattern=layers))


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, shape, dtype=np.int32)


def logits_of(model: Model, ids: list[int]) -> np.ndarray:
    """Logits of a text by itself. Tokens behind its end change none of them."""
    return np.asarray(model(np.asarray([[*ids, *[0] * (LENGTH - len(ids))]], np.int32)))[0, : len(ids)]


def assert_same_params(left: Model, right: Model):
    ours, theirs = trees.flatten(left.params), trees.flatten(right.params)
    assert set(ours) == set(theirs)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_fresh_parameters_are_stacked_by_kind():
    config = longer("lsls")
    fresh = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    flat = {path: leaf.shape for path, leaf in trees.flatten(fresh).items()}
    assert flat["layers/attention/query"] == (2, 16, 2, 16)
    assert flat["layers/linear_attention/convolution"] == (2, 44, 3)
    assert flat["layers/experts/gate"][0] == 4
    assert flat == {path: leaf.shape for path, leaf in trees.flatten(abstract_params(config)).items()}


def test_a_scan_and_a_loop_over_layers_compute_the_same():
    batch, model = {"tokens": tokens(2, 11)}, made(longer("lsls"))
    scanned = dataclasses.replace(model, execution=dataclasses.replace(EXECUTION, remat="full"))
    one_by_one = model.with_params(unstacked(model.params, model.config))

    def run(model: Model, *collect: str):
        def loss(params):
            logits, found = model.with_params(params).apply(batch, collect)
            return jnp.mean(jnp.square(logits)), (logits, found)

        return jax.jit(jax.grad(loss, has_aux=True))(model.params)

    (gradients, (logits, found)), (others, (expected, _)) = run(scanned, "hidden", "routing"), run(one_by_one)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert found["hidden"]["block_input"].shape == (4, 2, 11, 16)
    assert found["routing"]["counts_E"].shape == (4, 3)
    wanted = trees.flatten(others)
    for path, leaf in trees.flatten(unstacked(gradients, model.config)).items():
        assert np.abs(leaf - wanted[path]).max() <= 1e-4 * max(np.abs(wanted[path]).max(), 1e-3), path


def test_a_document_does_not_depend_on_the_ones_before_it(model: Model, monkeypatch):
    monkeypatch.setattr(rule, "CHUNK", 4)
    lengths = [6, 2, 8]
    ids = tokens(1, LENGTH)
    segments = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int32)
    run = jax.jit(lambda batch: model.apply(batch).logits_BTV)
    packed = run({"tokens": ids, "segments": segments, "positions": positions})[0]
    start = 0
    for length in lengths:
        alone = logits_of(model, ids[0, start : start + length].tolist())
        np.testing.assert_allclose(packed[start : start + length], alone, atol=1e-4)
        start += length
    assert np.abs(logits_of(model, ids[0].tolist())[6:] - packed[6:]).max() > 1e-2


def test_text_of_a_cache_is_that_of_the_whole_model(model: Model):
    prompts = [tokens(1, 9)[0].tolist(), tokens(1, 4)[0].tolist()]
    found = generate(model, prompts, GenerateConfig(max_tokens=6))
    for prompt, row in zip(prompts, found, strict=True):
        logits = logits_of(model, [*prompt, *row])
        assert np.argmax(logits, axis=-1)[len(prompt) - 1 : -1].tolist() == row


def test_continuations_that_share_a_context_score_as_each_alone(model: Model):
    context = tokens(1, 7)[0].tolist()
    pairs = [(context, [1, 2, 3]), (context, [4]), (context[:3], [5, 6])]
    found = dict(score(prepared(model), pairs, 4))
    for index, (before, after) in enumerate(pairs):
        log_p = np.asarray(jax.nn.log_softmax(logits_of(model, [*before, *after])))[len(before) - 1 : -1]
        expected = sum(float(log_p[place, token]) for place, token in enumerate(after))
        assert found[index].log_likelihood == pytest.approx(expected, abs=1e-4)


def test_a_quantised_cache_keeps_states_as_they_are():
    new = {"attention": {name: jnp.ones((1, 3, 1, 8)) for name in ("keys", "values")}}
    new["linear_attention"] = {"state": jnp.full((1, 4, 6, 5), 0.3), "history": jnp.ones((1, 2, 44))}
    held = cache.of_prompts(new, 8, "int8", stacked=False)
    assert held["attention"]["keys"].dtype == jnp.int8
    np.testing.assert_array_equal(held["linear_attention"]["state"], new["linear_attention"]["state"])
    later = jax.tree.map(lambda leaf: 2 * leaf[:, :1] if leaf.shape[1] == 3 else 2 * leaf, new)
    found = cache.written(held, later, jnp.asarray([3]), stacked=False)
    np.testing.assert_array_equal(found["linear_attention"]["state"], later["linear_attention"]["state"])


def test_layers_of_either_kind_can_be_dropped():
    model = made(longer("lsls"))
    for layers, pattern in (([0], "sls"), ([1, 3], "ll"), ([0, 2], None)):
        small = drop_layers(model, layers)
        assert (small.config.linear and small.config.linear.pattern) == pattern
        assert_shapes(small)
    kept = trees.flatten(drop_layers(model, [0]).params)["layers/linear_attention/output"]
    np.testing.assert_array_equal(kept, model.params["layers"]["linear_attention"]["output"][1:])


def assert_shapes(model: Model):
    expected = trees.flatten(abstract_params(model.config))
    assert {path: leaf.shape for path, leaf in trees.flatten(model.params).items()} == {
        path: leaf.shape for path, leaf in expected.items()
    }


def test_an_adapter_of_some_layers_computes_what_the_merged_model_does():
    model = made(longer("lsls"))
    config = AdapterConfig(method="lora", rank=2, targets="attention", layers="2+3")
    targets = {word_of(target) for target in targets_of(config, model.config)}
    assert targets == {f"linear_{name}@2" for name in ("in", "gate", "beta", "decay", "out")} | {
        f"{name}@3" for name in "qkvo"
    }
    adapter = disturbed(adapters.init(config, model), 0)
    ids = tokens(1, LENGTH)
    active = adapters.activate(model, adapter)(ids)
    np.testing.assert_allclose(active, merge(model, adapter)(ids), atol=1e-4)
    assert np.abs(active - model(ids)).max() > 1e-2
    in_bank = bank.activate(model, [None, adapter])
    run = jax.jit(lambda entries: in_bank.apply({"tokens": ids, "adapter": entries}).logits_BTV)
    np.testing.assert_allclose(run(jnp.asarray([1], jnp.int32)), active, atol=1e-4)


def test_a_model_of_our_own_family_is_read_again(model: Model, tmp_path: Path):
    moe_reduce.save(dataclasses.replace(model, config=own_config(CONFIG)), tmp_path / "own")
    again = moe_reduce.load(tmp_path / "own")
    assert again.config == CONFIG
    assert_same_params(again, model)


def test_costs_count_states_and_no_keys_of_linear_layers():
    half = dataclasses.replace(CONFIG, linear=None)
    states = 4 * 4 * 6 * 5 + 2 * 2 * 44
    assert cache_bytes(CONFIG, 100, 3, 16) == cache_bytes(half, 100, 3, 16) // 2 + 3 * states
    flops = [forward_flops_per_token(CONFIG, length) for length in (100, 200)]
    assert flops[1] - flops[0] == 4 * 8 * 2 * 50  # one layer of two heads reads 50 keys more on average


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"pattern": "lsl"}, "model.linear.pattern"), ({"pattern": "ss"}, "model.linear.pattern"),
        ({"value_heads": 3}, "model.linear.value_heads"), ({"taps": 0}, "model.linear.taps"),
    ],
)  # fmt: skip
def test_sizes_that_contradict_each_other_are_named(changes, culprit: str):
    config = dataclasses.replace(CONFIG, linear=dataclasses.replace(LINEAR, **changes))
    with pytest.raises(UserError, match=culprit):
        config.check()


def test_fused_experts_of_a_multimodal_model_are_read(tmp_path: Path, capsys):
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, shared_width=6, shared_gate=True))
    config = dataclasses.replace(config, tied_embeddings=False, rotary_share=0.5, family="qwen3_5_moe_text")
    plain = made(config)
    moe_reduce.save(plain, tmp_path / "plain")
    arrays = {name: array() for name, _, _, array in write_items(plain.params, config)}
    for layer in range(config.layers):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([arrays.pop(f"{at}.{expert}.{name}_proj.weight") for expert in range(3)])
            for name in ("gate", "up", "down")
        )
        arrays |= {f"{at}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{at}.down_proj": down}
    whole = {name.replace("model.", "model.language_model.", 1): array for name, array in arrays.items()}
    whole |= {"model.visual.blocks.0.norm1.weight": np.ones(3, np.float32), "mtp.fc.weight": np.ones(2, np.float32)}
    (tmp_path / "model").mkdir()
    safetensors.numpy.save_file(whole, tmp_path / "model/model.safetensors")
    inner = json.loads((tmp_path / "plain/config.json").read_text())
    outer = {"model_type": "qwen3_5_moe", "architectures": ["X"], "text_config": inner, "vision_config": {"depth": 1}}
    (tmp_path / "model/config.json").write_text(json.dumps(outer))
    found = moe_reduce.load(tmp_path / "model")
    assert "2 tensors, such as model.visual.blocks.0.norm1.weight, are not of the language" in capsys.readouterr().err
    assert_same_params(found, plain)
    outer["text_config"] = inner | {"num_experts": 4}
    (tmp_path / "model/config.json").write_text(json.dumps(outer))
    with pytest.raises(UserError, match=r"gate_up_proj .* config\.json says 4 experts"):
        moe_reduce.load(tmp_path / "model")
