"""The network of a hypernetwork: exact counts, no change at the start, one call for all, ordinary adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import MODELS, assert_close, initial_params

import moe_reduce
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, merging
from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.hypernetwork_config import HypernetworkConfig
from moe_reduce.models.deltas import BANK
from moe_reduce.models.model import Model
from moe_reduce.storage import manifest

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

MISTRAL_SHAPE = ModelConfig(
    vocab_size=32_000, layers=32, width=4096, query_heads=32, key_value_heads=8, head_width=128,
    feed_forward_width=14_336,
)  # fmt: skip
EXECUTION = ExecutionConfig(platform="cpu", block_rows=8).resolve("cpu")
LORA = AdapterConfig(method="rslora", targets="q,v", rank=2, alpha=16.0)
SKEMA = AdapterConfig(method="skema", targets="q,v", sketch_width=4)
CONFIGS = {head: HypernetworkConfig(head=head, adapter=LORA) for head in ("L", "M", "S")} | {
    "core": HypernetworkConfig(head="core", adapter=SKEMA)
}
WIDTH = 6
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))


def model_of(kind: str) -> Model:
    config = dataclasses.replace(MODELS[kind], init_std=0.3)
    return Model(config, initial_params(config), EXECUTION)


def with_targets(head: str, targets: str) -> HypernetworkConfig:
    config = CONFIGS[head]
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, targets=targets))


def disturbed(hypernetwork: hypernetworks.Hypernetwork) -> hypernetworks.Hypernetwork:
    """With random numbers in every parameter, as training would leave it."""
    draw = np.random.default_rng(1)

    def change(leaf):
        return leaf + 0.05 * draw.standard_normal(leaf.shape).astype(np.float32)

    return hypernetwork.with_params(jax.tree.map(change, hypernetwork.params))


def embeddings(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(("head", "expected"), [("L", 55_424_000), ("M", 34_412_288), ("S", 4_994_816)])
def test_counts_on_the_shape_of_mistral(head, expected):
    found = hypernetworks.abstract(HypernetworkConfig(head=head), MISTRAL_SHAPE, 1024)
    assert hypernetworks.count(found) == expected
    assert trees.size(found.params["trunk"]) == 791_552 + (0 if head == "L" else 768)
    core = HypernetworkConfig(head="core", adapter=AdapterConfig(method="skema", sketch_width=256))
    assert hypernetworks.count(hypernetworks.abstract(core, MISTRAL_SHAPE, 1024)) == 791_552 + 2 * 256**2 * 513
    paths = {path for path in hypernetworks.records(found) if path.startswith("hypernetwork/")}
    assert paths == {f"hypernetwork/{path}" for path in trees.flatten(found.params)}


@pytest.mark.parametrize(
    ("head", "kind"), [*((head, "dense") for head in CONFIGS), ("S", "layer"), ("M", "shared"), ("core", "layer")]
)
def test_nothing_changes_at_the_start_and_something_once_it_trained(kind, head):
    model = model_of(kind)
    new = hypernetworks.init(with_targets(head, "q,o@1,mlp"), model, WIDTH)
    (adapter,) = hypernetworks.written(new, embeddings(1))
    start = adapters.activate(model, adapter)(TOKENS)
    np.testing.assert_array_equal(start, model(TOKENS))
    adapters.check_fits(adapter, model.config)
    for path, leaf in trees.flatten(adapter.tree).items():
        if path.endswith("in/matrix") and head != "core":  # a useful start, as a LoRA's
            bound = leaf.shape[-2] ** -0.5
            matrices = np.asarray(leaf).reshape(-1, *leaf.shape[-2:])
            assert np.abs(matrices).max() <= bound
            assert np.abs(matrices).mean() == pytest.approx(bound / 2, rel=0.4)
            assert all(np.linalg.matrix_rank(matrix) == LORA.rank for matrix in matrices)
    (changed,) = hypernetworks.written(disturbed(new), embeddings(1))
    for path, leaf in trees.flatten(changed.tree).items():
        if path.endswith(("out/matrix", "core")) and path not in new.fixed:  # layers, experts and ranks differ
            rows = np.asarray(leaf).reshape(-1, leaf.shape[-1])
            assert len(np.unique(rows.round(5), axis=0)) == len(rows), path
    logits = adapters.activate(model, changed)(TOKENS)
    assert np.abs(logits - start).max() > 1e-3
    merged = merging.merge(model, changed)(TOKENS)
    np.testing.assert_allclose(merged, logits, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("head", list(CONFIGS))
def test_one_call_writes_what_single_calls_write(head):
    hypernetwork = disturbed(hypernetworks.init(CONFIGS[head], model_of("dense"), WIDTH))
    given = embeddings(3)
    together = hypernetworks.written(hypernetwork, given)
    for adapter, row in zip(together, given, strict=True):
        (alone,) = hypernetworks.written(hypernetwork, row[None])
        assert_close(adapter.tree, alone.tree, rtol=1e-4, atol=1e-5)
    different = [np.asarray(leaf) for leaf in jax.tree.leaves(together[0].tree)]
    assert not all(np.array_equal(x, y) for x, y in zip(different, jax.tree.leaves(together[1].tree), strict=True))


@pytest.mark.parametrize(("head", "kind"), [("L", "dense"), ("S", "layer"), ("core", "shared")])
def test_each_row_of_a_batch_runs_with_its_own_description(head, kind):
    model = model_of(kind)
    hypernetwork = disturbed(hypernetworks.init(with_targets(head, "q,o@1,mlp"), model, WIDTH))
    entries = np.array([2, 0, 2], np.int32)
    tokens = np.random.default_rng(1).integers(0, 61, (3, 8))

    @jax.jit
    def batched(given):
        bank = hypernetworks.bank(hypernetwork, hypernetworks.emit(hypernetwork, given))
        adapted = model.with_params(model.params | {BANK: bank})
        return adapted.apply({"tokens": jnp.asarray(tokens), "adapter": jnp.asarray(entries)}).logits_BTV

    adapters_written = hypernetworks.written(hypernetwork, embeddings(3))
    for row, logits in enumerate(batched(embeddings(3))):
        alone = adapters.activate(model, adapters_written[entries[row]])(tokens[row][None])[0]
        np.testing.assert_allclose(logits, alone, atol=1e-3, rtol=1e-3)
        assert np.abs(alone - model(tokens[row][None])[0]).max() > 0.1


def test_gradients_reach_the_trunk_as_those_of_a_free_adapter():
    """The bias of head L is added to each layer's factors, so its gradient is the sum of theirs."""
    model = model_of("dense")
    hypernetwork = disturbed(hypernetworks.init(CONFIGS["L"], model, WIDTH))
    path = "layers/attention/value"

    def loss(emitted):
        flat = dict(hypernetwork.fixed) | {name: leaf[0] for name, leaf in emitted.items()}
        logits = adapters.activate(model, Adapter(LORA, trees.unflatten(flat)))(TOKENS)
        return jax.nn.log_softmax(logits)[..., 3].mean()

    def generated(params):
        return loss(hypernetworks.emit(hypernetwork.with_params(params), embeddings(1)))

    @jax.jit
    def gradients():
        emitted = hypernetworks.emit(hypernetwork, embeddings(1))
        return jax.grad(loss)(emitted), jax.grad(generated)(hypernetwork.params)

    free, found = gradients()
    a_RI = np.asarray(free[f"{path}/in/matrix"]).sum((0, 1)).T
    b_RO = np.asarray(free[f"{path}/out/matrix"]).sum((0, 1))
    expected = np.concatenate([a_RI.ravel(), b_RO.ravel()])
    np.testing.assert_allclose(found["head_value"]["bias"], expected, rtol=1e-3, atol=1e-7)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found["trunk"]["task"]))


def test_dropout_is_drawn_by_key():
    hypernetwork = disturbed(hypernetworks.init(CONFIGS["M"], model_of("dense"), WIDTH))
    leaf = "layers/attention/value/out/matrix"
    emit = jax.jit(lambda key: hypernetworks.emit(hypernetwork, embeddings(1), key)[leaf])
    keys = (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)
    one, same, other, without = (np.asarray(emit(key)) for key in keys)
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, without)


@pytest.mark.parametrize("head", ["L", "S", "core"])
def test_z_scores_of_a_library(head):
    model = model_of("dense")
    new = hypernetworks.init(CONFIGS[head], model, WIDTH)
    library = hypernetworks.written(disturbed(new), embeddings(4))
    scored = hypernetworks.z_scored(new, library)
    emitted = [hypernetworks.emitted_of(new, adapter) for adapter in library]
    for path, deviation in scored.statistics.deviation.items():
        values = np.stack([leaves[path] for leaves in emitted])
        np.testing.assert_allclose(scored.statistics.mean[path], values.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(deviation, np.maximum(values.std(0), 1e-8), rtol=1e-4, atol=1e-7)
    (start,) = hypernetworks.written(scored, embeddings(1))  # heads of zero emit the mean
    mean = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *[adapter.tree for adapter in library])
    assert_close(start.tree, mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="at least 2 adapters"):
        hypernetworks.z_scored(new, library[:1])
    others = [dataclasses.replace(a, config=dataclasses.replace(a.config, alpha=3.0)) for a in library]
    with pytest.raises(UserError, match="give adapters of one configuration"):
        hypernetworks.z_scored(new, others)


@pytest.mark.parametrize("head", list(CONFIGS))
def test_peft_computes_the_same_with_a_written_adapter(tmp_path, head):
    import peft  # here, so that the other tests need no peer
    import torch
    from transformers_models import tiny, written

    written(tmp_path / "base", "llama")
    model = moe_reduce.load(tmp_path / "base")
    hypernetwork = disturbed(hypernetworks.init(with_targets(head, "q,v,down@1"), model, WIDTH))
    (adapter,) = hypernetworks.written(hypernetwork, embeddings(1))
    (tmp_path / "adapter").mkdir()
    adapter_directory.save(adapter, model.config, manifest.input_of(tmp_path / "base"), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(adapters.activate(model, adapter)(TOKENS), expected, atol=2e-4, rtol=1e-3)
    assert np.abs(expected - np.asarray(model(TOKENS))).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"head": "core"}, "head=core writes skema, not adapter.method=rslora"),
        ({"adapter": SKEMA}, "head=L writes lora or rslora, not adapter.method=skema"),
        (
            {"head": "core", "adapter": dataclasses.replace(SKEMA, core="low_rank", core_rank=2)},
            "set adapter.core=full",
        ),
        ({"adapter": dataclasses.replace(LORA, rank=1000)}, "adapter.rank .1000. exceeds"),
        ({"dropout": 1.0}, "hypernetwork.dropout must be at least"),
        ({"encoder": ""}, "hypernetwork.encoder is empty"),
        ({"seed": -1}, "hypernetwork.seed must be at least 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes, part):
    config = dataclasses.replace(CONFIGS["L"], **changes)
    with pytest.raises(UserError, match=part) as caught:
        hypernetworks.abstract(config, MODELS["dense"], WIDTH)
    assert "\n" not in str(caught.value)


def test_an_embedding_of_another_width_is_refused():
    hypernetwork = hypernetworks.abstract(CONFIGS["L"], MODELS["dense"], WIDTH)
    with pytest.raises(UserError, match=f"reads embeddings of width {WIDTH} .*, and these have 5"):
        hypernetworks.written(hypernetwork, np.zeros((1, 5)))
