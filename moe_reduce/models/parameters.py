"""One record per parameter: everything that the code asks about a parameter.

`parameters(config)` lists the records of a model. Initialisation, abstract parameters, sharding, weight decay, counts,
casts, adapter targets, slices by expert or layer, and the layout on disk all read these records and nothing else.
Letters of `axes`, `inputs` and `outputs` are those of moe_reduce.models; a leading N is the axis of stacked layers.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import ADAPTER, BANK

Records = Mapping[str, "Parameter"]
MeshAxis = str | tuple[str, ...] | None
FSDP = ("fsdp", "expert")  # for all parameters but experts, the mesh's expert axis is a second fsdp axis
GAIN = "/magnitude"  # path suffix of DoRA's magnitudes, which are not decayed, unlike other adapter leaves
ROUTER_BIAS = "layers/router_bias"  # path of the selection biases, which load balancing updates without a gradient


@dataclass(frozen=True)
class Parameter:
    """Everything that is known about one parameter.

    path: keys below `params`, joined by "/". axes: one letter for each axis of `shape`. init: linen initialiser of one
    layer's values. component: name in counts and in `components=`. decays: whether AdamW decays it. precision:
    `compute` is cast to the compute dtype where it is used; `float32` is used in fp32; `float32_stored` is used in
    fp32, and runs also hold and save it in fp32. mesh_axes: mesh axis for each axis. inputs, outputs: axes that a
    product contracts and produces; both empty unless the parameter is a matrix.
    """

    path: str
    axes: str
    shape: tuple[int, ...]
    init: nn.initializers.Initializer
    component: str
    decays: bool
    precision: Literal["compute", "float32", "float32_stored"]
    mesh_axes: tuple[MeshAxis, ...]
    inputs: str = ""
    outputs: str = ""

    @property
    def name(self) -> str:
        """Last key of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def stacked(self) -> bool:
        """True where the first axis numbers layers."""
        return self.axes.startswith("N")

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer's values."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def expert_axis(self) -> int | None:
        """Axis that numbers experts; None without one."""
        return self.axes.index("E") if "E" in self.axes else None

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes that a product contracts."""
        return tuple(self.axes.index(letter) for letter in self.inputs)

    @property
    def is_matrix(self) -> bool:
        """True if the parameter is the matrix of a matrix product."""
        return bool(self.inputs)

    @property
    def outputs_first(self) -> bool:
        """True for a matrix whose output axes come before its input axes, such as a token table."""
        return self.axes.index(self.outputs[0]) < self.axes.index(self.inputs[0])

    @property
    def per_expert(self) -> bool:
        """True if each expert has a matrix of its own; False for the router, whose outputs are the experts."""
        return self.is_matrix and "E" in self.axes and "E" not in self.inputs + self.outputs

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(I, O) of one matrix: products of the sizes of `inputs` and of `outputs`."""
        sizes = dict(zip(self.axes, self.shape, strict=True))
        return math.prod(sizes[x] for x in self.inputs), math.prod(sizes[x] for x in self.outputs)


@functools.cache
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Records of every parameter of a model, in path order."""
    found = [*_embeddings(config), *_attention(config), *_norms(config)]
    found += _dense_block(config) if config.moe is None else _experts(config)
    return tuple(sorted(found, key=lambda record: record.path.split("/")))


@functools.cache
def by_path(config: ModelConfig) -> Records:
    """The records of `parameters`, by path."""
    return {record.path: record for record in parameters(config)}


def record_in_module(config: ModelConfig, scope: tuple[str, ...], name: str) -> Parameter:
    """Record of parameter `name` of the linen module at `scope`; ValueError if the model has none."""
    record = find_in_module(config, scope, name)
    if record is None:
        raise ValueError(f"the model has no parameter {name} in the module {'/'.join(scope) or '(root)'}")
    return record


@functools.cache
def find_in_module(config: ModelConfig, scope: tuple[str, ...], name: str) -> Parameter | None:
    """Record of parameter `name` of the linen module at `scope`, or None.

    The scope of an unstacked layer begins with `layers_0`, `layers_1`, …. Layer-wise code applies a block's modules
    outside a Decoder, where their scope lacks the leading keys, so a path may also match by its end.
    """
    path = re.sub(r"^layers_\d+/", "layers/", "/".join((*scope, name)))
    known = by_path(config)
    return known[path] if path in known else next((known[p] for p in known if p.endswith(f"/{path}")), None)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Parameters as jax.ShapeDtypeStruct leaves of one dtype; nothing is allocated."""
    return trees.unflatten({p.path: jax.ShapeDtypeStruct(p.shape, dtype) for p in parameters(config)})


def stored_params(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Abstract parameters as a run holds them: `float32_stored` ones in fp32, the others in `dtype`."""
    return trees.unflatten(
        {
            p.path: jax.ShapeDtypeStruct(p.shape, jnp.float32 if p.precision == "float32_stored" else dtype)
            for p in parameters(config)
        }
    )


def records(config: ModelConfig, params: trees.Tree) -> dict[str, Parameter]:
    """Records of every leaf of `params`, adapter leaves included, by path. UserError for a path that has none."""
    found: dict[str, Parameter] = {}
    for path, leaf in trees.flatten(params).items():
        if path.startswith((f"{ADAPTER}/", f"{BANK}/")):
            found[path] = _adapter_leaf(config, path, tuple(leaf.shape))
        else:
            found[path] = record_at(by_path(config), path)
    return found


def record_at(known: Records, path: str) -> Parameter:
    """The record at a path; raises UserError where there is none."""
    if path not in known:
        raise UserError(f"parameter {path} has no record: add it to models/parameters.py")
    return known[path]


def nested_under(prefix: str, known: Records) -> dict[str, Parameter]:
    """The records of a tree nested under the key `prefix` of another tree, such as a teacher's."""
    return {f"{prefix}/{path}": record for path, record in known.items()}


def _adapter_leaf(config: ModelConfig, path: str, shape: tuple[int, ...]) -> Parameter:
    """Record of a leaf of an adapter or a bank, with axes [N if stacked, E if per expert, Z if of a bank, …]."""
    key, _, rest = path.partition("/")
    target = next((record for record in parameters(config) if rest.startswith(f"{record.path}/")), None)
    if target is None:
        raise UserError(f"adapter leaf {path} belongs to no parameter of this model: give the adapter of this model")
    several = {4: "EZIO", 3: "ZIO"} if key == BANK else {3: "EIO"}
    count = len(shape) - target.stacked
    axes = "N" * target.stacked + several.get(count, "IO"[:count])
    mesh_axes = tuple("expert" if letter == "E" else None for letter in axes)
    zeros, decays = nn.initializers.zeros, not path.endswith(GAIN)
    return Parameter(path, axes, shape, zeros, ADAPTER, decays, "float32", mesh_axes)


def counts_by_component(config: ModelConfig) -> dict[str, int]:
    """Number of parameters of each component, by name."""
    counts: dict[str, int] = {}
    for record in parameters(config):
        counts[record.component] = counts.get(record.component, 0) + math.prod(record.shape)
    return dict(sorted(counts.items()))


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters of a model."""
    return sum(counts_by_component(config).values())


def select(config: ModelConfig, *, component: str | None = None, matrix: bool | None = None) -> tuple[Parameter, ...]:
    """Records filtered by component and by matrix (True: matrices, False: all others). UserError if none is left."""
    found = tuple(
        record
        for record in parameters(config)
        if component in (None, record.component) and matrix in (None, record.is_matrix)
    )
    if not found:
        known = ", ".join(counts_by_component(config))
        raise UserError(f"the model has no parameters of component {component!r}; it has {known}")
    return found


def only_record(config: ModelConfig, component: str, name: str | None = None) -> Parameter:
    """The only record of a component, or of a name within it; ValueError if there is none, or more than one."""
    (record,) = [p for p in parameters(config) if p.component == component and name in (None, p.name)]
    return record


def bias_of(config: ModelConfig, matrix: Parameter) -> Parameter | None:
    """Record of the bias added to the output of a matrix; None without one."""
    return by_path(config).get(f"{matrix.path}_bias")


def ffn_norm_scale(config: ModelConfig) -> Parameter:
    """Record of the scale of the norm before the feed-forward block, or in an MoE before the router and experts."""
    return by_path(config)["layers/mlp_norm/scale"]


def norm_before(config: ModelConfig, half: Literal["attention", "mlp"]) -> tuple[Parameter, ...]:
    """Records of the norm before a half of each block: its scale and, in a LayerNorm, its bias."""
    known = by_path(config)
    paths = (f"layers/{half}_norm/{name}" for name in ("scale", "bias"))
    return tuple(known[path] for path in paths if path in known)


def normal_init(std: float) -> nn.initializers.Initializer:
    """Gaussian of standard deviation `std`."""
    return nn.initializers.normal(std)


def residual_std(config: ModelConfig) -> float:
    """Initial std of matrices that write to the residual stream: init_std / √(2N) for 2N writes, as GPT-2."""
    return config.init_std / (2 * config.layers) ** 0.5


def _sizes(config: ModelConfig) -> dict[str, int]:
    moe = config.moe
    return {
        "N": config.layers, "D": config.width, "H": config.query_heads, "G": config.key_value_heads,
        "C": config.head_width, "V": config.vocab_size, "K": config.embedding_factor or 0,
        "F": (config.feed_forward_width or 0) if moe is None else moe.width, "E": 0 if moe is None else moe.experts,
    }  # fmt: skip


def _matrix(config: ModelConfig, path: str, axes: str, product: str, mesh_axes: Any, **named: Any) -> Parameter:
    """Record of a matrix. product: its input and output axes, such as "D HC"."""
    std = named.pop("std", config.init_std)
    inputs, outputs = product.split()
    defaults = {"component": path.split("/")[-2], "precision": "compute", "init": normal_init(std)} | named
    return _record(config, path, axes, mesh_axes, decays=True, inputs=inputs, outputs=outputs, **defaults)


def _vector(config: ModelConfig, path: str, axes: str, component: str, mesh_axes: Any = None, init: Any = None):
    """Record of a parameter that is added or multiplied elementwise, initialised to zeros by default."""
    init = nn.initializers.zeros if init is None else init
    mesh_axes = (None,) * len(axes.removeprefix("N")) if mesh_axes is None else mesh_axes
    named = {"component": component, "precision": "float32", "init": init}
    return _record(config, path, axes, mesh_axes, decays=False, **named)


def _record(config: ModelConfig, path: str, axes: str, mesh_axes: Any, **named: Any) -> Parameter:
    sizes = _sizes(config)
    mesh_axes = (None, *mesh_axes) if axes.startswith("N") else tuple(mesh_axes)
    return Parameter(path, axes, tuple(sizes[x] for x in axes), mesh_axes=mesh_axes, **named)


def _embeddings(config: ModelConfig) -> list[Parameter]:
    table = ("tensor", FSDP)
    if config.embedding_factor is None:
        found = [_matrix(config, "embedding/table", "VD", "D V", table)]
    else:
        # with this std of the projection W, factor·W has entries of std init_std, and ‖x·Wᵀ‖ is about ‖x‖
        std = config.embedding_factor**-0.5
        found = [
            _matrix(config, "embedding/factor", "VK", "K V", (("tensor", *FSDP), None)),
            _matrix(config, "embedding/projection", "KD", "K D", (None, FSDP), std=std),
        ]
    if not config.tied_embeddings:
        found.append(_matrix(config, "unembedding/table", "VD", "D V", table))
    return found


def _attention(config: ModelConfig) -> list[Parameter]:
    at, inward = "layers/attention", (FSDP, "tensor", None)
    found = [
        _matrix(config, f"{at}/query", "NDHC", "D HC", inward),
        _matrix(config, f"{at}/key", "NDGC", "D GC", inward),
        _matrix(config, f"{at}/value", "NDGC", "D GC", inward),
        _matrix(config, f"{at}/output", "NHCD", "HC D", ("tensor", None, FSDP), std=residual_std(config)),
    ]
    if config.biases:
        heads = ("tensor", None)
        found += [
            _vector(config, f"{at}/query_bias", "NHC", "bias", heads),
            _vector(config, f"{at}/key_bias", "NGC", "bias", heads),
            _vector(config, f"{at}/value_bias", "NGC", "bias", heads),
            _vector(config, f"{at}/output_bias", "ND", "bias"),
        ]
    if config.qk_norm:
        query, key = ("NHC", "NGC") if config.qk_norm_scope == "projection" else ("NC", "NC")
        ones = nn.initializers.ones
        found += [
            _vector(config, f"{at}/query_norm/scale", query, "norm", init=ones),
            _vector(config, f"{at}/key_norm/scale", key, "norm", init=ones),
        ]
    return found


def _norms(config: ModelConfig) -> list[Parameter]:
    found = []
    for path, axes in (("layers/attention_norm", "ND"), ("layers/mlp_norm", "ND"), ("final_norm", "D")):
        found.append(_vector(config, f"{path}/scale", axes, "norm", init=nn.initializers.ones))
        if config.norm == "layer":
            found.append(_vector(config, f"{path}/bias", axes, "norm"))
    return found


def _dense_block(config: ModelConfig) -> list[Parameter]:
    at, named = "layers/mlp", {"component": "feed_forward"}
    inward = ("gate", "up") if config.feed_forward == "swiglu" else ("up",)
    found = [_matrix(config, f"{at}/{name}", "NDF", "D F", (FSDP, "tensor"), **named) for name in inward]
    std = residual_std(config)
    found.append(_matrix(config, f"{at}/down", "NFD", "F D", ("tensor", FSDP), std=std, **named))
    if config.biases:
        found += [_vector(config, f"{at}/{name}_bias", "NF", "bias", ("tensor",)) for name in inward]
        found.append(_vector(config, f"{at}/down_bias", "ND", "bias"))
    return found


def _experts(config: ModelConfig) -> list[Parameter]:
    moe = config.moe
    assert moe is not None
    pool, router = ("N" if moe.placement == "layer" else ""), ("N" if moe.router == "layer" else "")
    at = "layers/experts" if pool else "experts"
    inward = {"mesh_axes": ("expert", "fsdp", "tensor"), "std": config.init_std * moe.init_scale}
    std = residual_std(config) * moe.init_scale
    found = [
        _matrix(config, f"{at}/gate", f"{pool}EDF", "D F", **inward),
        _matrix(config, f"{at}/up", f"{pool}EDF", "D F", **inward),
        _matrix(config, f"{at}/down", f"{pool}EFD", "F D", ("expert", "tensor", "fsdp"), std=std),
        _matrix(
            config, f"{'layers/' if router else ''}router/weight", f"{router}DE", "D E", (FSDP, None),
            precision="float32_stored",
        ),
    ]  # fmt: skip
    if moe.selection_bias:
        bias = _vector(config, ROUTER_BIAS, "NE", "router_bias")
        found.append(dataclasses.replace(bias, precision="float32_stored"))
    if moe.score_offset:
        found.append(_vector(config, "layers/score_offset", "N", "score_offset"))
    if moe.output_gain:
        found.append(_vector(config, "layers/output_gain", "ND", "output_gain", init=nn.initializers.ones))
    return found
