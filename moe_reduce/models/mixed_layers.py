"""Layers of several kinds, run in a scan over the shortest pattern of kinds that repeats.

The arrays of a part that only some layers have, such as the attention of one kind, are stacked over these layers alone.
"""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.models.records import Stack, layers_with

# (number of a layer, its variables by collection, carry) -> (carry, what the layer sows)
Run = Callable[[int, dict[str, Any], Any], tuple[Any, Any]]


def scan(config: ModelConfig, stack: Stack, variables: Mapping[str, Any], carry: Any, run: Run, unroll: int):
    """(carry after all layers, what they sow); variables: those of the stack, by collection."""
    size = period(config)
    count = stack.layers // size

    def body(carry: Any, held: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        found: dict[str, list[Any]] = {}
        for layer in range(size):
            carry, sown = run(layer, _of_layer(config, held, layer), carry)
            for path, leaf in trees.flatten(sown).items():
                found.setdefault(path, []).append(leaf)
        return carry, {path: jnp.stack(leaves) for path, leaves in found.items()}

    grouped = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), dict(variables))
    carry, sown = jax.lax.scan(body, carry, grouped, unroll=min(unroll, count))
    return carry, trees.unflatten({path: leaf.reshape(-1, *leaf.shape[2:]) for path, leaf in sown.items()})


def period(config: ModelConfig) -> int:
    """Number of layers in the shortest pattern that, repeated, gives the kinds of all layers."""
    kinds = [config.is_linear(layer) for layer in range(config.layers)]
    return next(size for size in range(1, len(kinds) + 1) if kinds == kinds[:size] * (len(kinds) // size))


def _of_layer(config: ModelConfig, held: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Variables of one layer. held: those of the layers of one pattern, by collection and part of a layer."""
    first = Stack("", period(config), 0, dense=False)
    found: dict[str, Any] = {}
    for name, parts in held.items():
        numbers = {part: layers_with(config, first, part) for part in parts}
        found[name] = {
            part: jax.tree.map(itemgetter(numbers[part].index(layer)), tree)
            for part, tree in parts.items()
            if layer in numbers[part]
        }
    return found
