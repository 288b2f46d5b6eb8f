"""Every transform gives under eval_shape the shapes, dtypes and configuration that it gives on arrays."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import MODELS

from moe_reduce.adapters.adapter import activate, init
from moe_reduce.adapters.merging import merge
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import parse
from moe_reduce.core.stages import PoolStage
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import only_record, select
from moe_reduce.models.weights import quantise
from moe_reduce.reduction.canonical import canonical
from moe_reduce.reduction.embedding import factorise_embedding
from moe_reduce.reduction.heads import group_heads
from moe_reduce.reduction.layers import drop_layers
from moe_reduce.reduction.neurons import prune_neurons
from moe_reduce.reduction.pool import pool
from moe_reduce.reduction.prune import prune
from moe_reduce.reduction.sparsity import prune_magnitude, prune_two_four
from moe_reduce.reduction.transform import abstract_model, expert_rows

EXECUTION = ExecutionConfig().resolve("cpu")


def _changed(kind, **changes):
    moe = {name: changes.pop(name) for name in ("selection_bias", "score_offset", "output_gain") if name in changes}
    config = dataclasses.replace(MODELS[kind], **changes)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe)) if moe else config


CONFIGS = {
    "dense": MODELS["dense"],  # tied, with a full table
    "biases": MODELS["neox"],
    "layer": MODELS["layer"],
    "layer_with_options": _changed("layer", selection_bias=True, score_offset=True, output_gain=True),
    "layer_projection_norm": _changed("layer", qk_norm_scope="projection"),
    "shared": MODELS["shared"],
    "shared_with_options": MODELS["pool"],  # a router in each layer
}
PER_LAYER = tuple(name for name in CONFIGS if name.startswith("layer"))
MIXTURES = (*PER_LAYER, "shared", "shared_with_options")
LORA = AdapterConfig(targets="q,v", rank=2)
SKEMA = AdapterConfig(method="skema", targets="attention,mlp", sketch_width=2)


def _with_adapter(config, model):
    return activate(model, init(config, model))


def _merged(config, model):
    return merge(model, init(config, model))


def _keep_some(model):
    """A different half of the experts in each row."""
    rows = expert_rows(model.config)
    return prune(model, tuple((row, 3) if row < 3 else (0, 3) for row in range(rows)))


POOLS = [
    PoolStage(canonical=False, start=start, router=router, score_function=score)
    for start, router, score in itertools.product(
        ("lossless", "concat", "random"), ("shared", "layer"), ("softmax", "sigmoid")
    )
]
TRANSFORMS = {
    **{
        f"pool_{options.start}_{options.router}_{options.score_function}": (
            functools.partial(pool, options=options),
            PER_LAYER,
        )
        for options in POOLS
    },
    "canonical": (canonical, PER_LAYER),
    "canonical_pool": (lambda model: pool(model, PoolStage()), PER_LAYER),
    "pruned_pool": (
        lambda model: prune(pool(model, PoolStage(canonical=False, router="layer")), ((0, 1, 6),)),
        PER_LAYER,
    ),
    "prune": (_keep_some, MIXTURES),
    "group_heads": (lambda model: group_heads(model, 1), tuple(CONFIGS)),
    "drop_layers": (lambda model: drop_layers(model, [0]), tuple(CONFIGS)),
    "factorise_embedding": (lambda model: factorise_embedding(model, 5), ("dense", "shared_with_options")),
    "prune_neurons": (lambda model: prune_neurons(model, 7), tuple(CONFIGS)),
    "prune_magnitude": (lambda model: prune_magnitude(model, 0.5), tuple(CONFIGS)),
    "prune_two_four": (prune_two_four, tuple(CONFIGS)),
    "lora": (lambda model: _with_adapter(LORA, model), tuple(CONFIGS)),
    "skema": (lambda model: _with_adapter(SKEMA, model), tuple(CONFIGS)),
    "merged_lora": (lambda model: _merged(LORA, model), tuple(CONFIGS)),
    "merged_skema": (lambda model: _merged(SKEMA, model), tuple(CONFIGS)),
}


@functools.cache
def _real(kind):
    """Parameters in bf16 but for those that are always stored in fp32, as a published model that has been tuned."""
    wanted = trees.flatten(abstract_model(CONFIGS[kind], jnp.bfloat16).params)
    keys = jax.random.split(jax.random.key(0), len(wanted))
    drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, wanted.values(), strict=True)]
    return Model(CONFIGS[kind], trees.unflatten(dict(zip(wanted, drawn, strict=True))), EXECUTION)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in TRANSFORMS.items() for kind in kinds])
def test_the_plan_is_what_a_transform_makes(name, kind):
    transform, _ = TRANSFORMS[name]
    planned = transform(abstract_model(CONFIGS[kind], jnp.bfloat16))
    made = transform(_real(kind))
    assert planned.config == made.config
    abstract, arrays = trees.flatten(planned.params), trees.flatten(made.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in abstract.values())
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in abstract.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in arrays.items()
    }
    own = {path: leaf.shape for path, leaf in arrays.items() if not path.startswith("adapter/")}
    assert own == {path: leaf.shape for path, leaf in trees.flatten(abstract_model(made.config).params).items()}


@pytest.mark.parametrize("kind", ["layer", "shared"])
@pytest.mark.parametrize("name", ["prune", "drop_layers"])
def test_quantised_weights_are_sliced_with_their_scales(name, kind):
    """Each output has a scale of its own, so that slicing and quantising commute."""
    transform, _ = TRANSFORMS[name]
    sliced = transform(_quantised(_real(kind)))
    expected = _quantised(transform(_real(kind)))
    jax.tree.map(np.testing.assert_array_equal, sliced.params, expected.params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _quantised(_real(kind)).params)
    planned = transform(dataclasses.replace(_real(kind), params=shapes))
    assert jax.tree.map(lambda leaf: leaf.shape, planned.params) == jax.tree.map(lambda leaf: leaf.shape, sliced.params)


@pytest.mark.parametrize("name", [next(iter(TRANSFORMS)), "canonical", "prune_neurons", "prune_magnitude"])
def test_reductions_that_change_values_refuse_quantised_weights(name):
    transform, _ = TRANSFORMS[name]
    with pytest.raises(UserError, match=r"is quantised.*reduce, then quantise"):
        transform(_quantised(_real("layer")))


def _quantised(model):
    records = [*select(model.config, component="experts"), only_record(model.config, "router")]
    flat = trees.flatten(model.params)
    flat |= {record.path: quantise(flat[record.path], record, parse("int8")) for record in records}
    return dataclasses.replace(model, params=trees.unflatten(flat))
