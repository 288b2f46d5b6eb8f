"""Parameter trees as nested dicts, and paths into them such as "layers/attention/query".

Every function leaves its input unchanged and accepts arrays and abstract leaves (ShapeDtypeStruct) alike.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from moe_reduce.core.errors import UserError

Tree = Mapping[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Map paths to leaves, {"a": {"b": x}} -> {"a/b": x}, in sorted order."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(tree[key], Mapping):
            flat.update(flatten(tree[key], path))
        else:
            flat[path] = tree[key]
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the nested tree of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def select(tree: Tree, pattern: str, expect: int) -> dict[str, Any]:
    """Select the leaves whose whole path matches a regular expression, by path.

    Raises UserError when their number is not `expect`, so that a renamed parameter is not missed silently.
    """
    found = {path: leaf for path, leaf in flatten(tree).items() if re.fullmatch(pattern, path)}
    if len(found) != expect:
        raise UserError(f"pattern {pattern!r} matches {len(found)} parameters, expected {expect}: {sorted(found)}")
    return found


def update(tree: Tree, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new tree with the leaves at some paths replaced; a path that does not exist raises UserError."""
    flat = flatten(tree)
    unknown = sorted(set(leaves) - set(flat))
    if unknown:
        raise UserError(f"no parameter at {unknown}; known: {sorted(flat)}")
    return unflatten(flat | dict(leaves))


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Apply function(path, leaf) to every leaf; return a tree of the same structure."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def size(tree: Tree) -> int:
    """Number of values in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())
