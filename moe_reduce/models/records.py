"""One record per parameter: which parameters a model has, and everything that is known about each.

Letters of `axes`, `inputs` and `outputs` are those of moe_reduce.models; a leading N is the axis of stacked layers.
models/parameters.py answers questions about the records.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig

MeshAxis = str | tuple[str, ...] | None
FSDP = ("fsdp", "expert")  # for all parameters but experts, the mesh's expert axis is a second fsdp axis
ATTENTION, LINEAR_ATTENTION = "attention", "linear_attention"  # parts of a layer, of which it has one
STACK, FIRST_STACK = "layers", "dense_layers"  # keys of the stacked layers; dense ones before experts lie apart
ROUTER_BIAS = "layers/router_bias"  # path of the selection biases, which load balancing updates without a gradient


@dataclass(frozen=True)
class Parameter:
    """Everything that is known about one parameter.

    path: keys below `params`, joined by "/". axes: one letter for each axis of `shape`. init: linen initialiser of one
    layer's values. component: name in counts and in `components=`. decays: whether AdamW decays it. precision:
    `compute` is cast to the compute dtype where it is used; `float32` is used in fp32; `float32_stored` is used in
    fp32, and runs also hold and save it in fp32. mesh_axes: mesh axis for each axis. inputs, outputs: axes that a
    product contracts and produces; both empty unless the parameter is a matrix. layers: numbers of the layers that the
    first axis stands for; empty if it does not number layers.
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
    layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Last key of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def stacked(self) -> bool:
        """True where the first axis numbers layers."""
        return self.axes.startswith("N")

    @property
    def stack(self) -> str:
        """First key of the path."""
        return self.path.split("/", 1)[0]

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


@dataclass(frozen=True)
class Stack:
    """Layers whose arrays are stacked: key among the parameters, number of layers, first layer's number.

    All have the same parameters, but for the kind of their attention.

    dense: True where the layers have a feed-forward block, False where they have experts.
    """

    key: str
    layers: int
    first: int
    dense: bool


@functools.cache
def stacks(config: ModelConfig) -> tuple[Stack, ...]:
    """The stacks of a model in order: one, or two where dense layers come before layers with experts."""
    if config.moe is None:
        return (Stack(STACK, config.layers, 0, dense=True),)
    first = config.dense_layers
    dense = (Stack(FIRST_STACK, first, 0, dense=True),) if first else ()
    return (*dense, Stack(STACK, config.layers - first, first, dense=False))


def stack_of(config: ModelConfig, layer: int) -> Stack:
    """The stack of a layer, counted from 0."""
    return next(stack for stack in stacks(config) if layer < stack.first + stack.layers)


def layers_with(config: ModelConfig, stack: Stack, part: str) -> tuple[int, ...]:
    """Numbers of the layers of a stack that have a part, the key below that of the stack."""
    numbers = range(stack.first, stack.first + stack.layers)
    if part not in (ATTENTION, LINEAR_ATTENTION):
        return tuple(numbers)
    return tuple(layer for layer in numbers if config.is_linear(layer) == (part == LINEAR_ATTENTION))


@functools.cache
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Records of every parameter of a model, in path order."""
    found = [*_embeddings(config), *_norm(config, "final_norm", "D")]
    for stack in stacks(config):
        found += [*_layer_norms(config, stack), *_attention(config, stack), *_linear_attention(config, stack)]
        found += _dense_block(config, stack) if stack.dense else _expert_layers(config, stack)
    if config.moe is not None:
        found += _experts(config)
    return tuple(sorted(found, key=lambda record: record.path.split("/")))


def normal_init(std: float) -> nn.initializers.Initializer:
    """Gaussian of standard deviation `std`."""
    return nn.initializers.normal(std)


def residual_std(config: ModelConfig) -> float:
    """Initial std of matrices that write to the residual stream: init_std / √(2N) for 2N writes, as GPT-2."""
    return config.init_std / (2 * config.layers) ** 0.5


def _sizes(config: ModelConfig, layers: int) -> dict[str, int]:
    """Size by letter, but for U, of which a model may have two."""
    moe, latent = config.moe, config.latent
    found = {
        "N": layers, "D": config.width, "H": config.query_heads, "G": config.key_value_heads,
        "C": config.head_width, "V": config.vocab_size, "K": config.embedding_factor or 0,
        "F": (config.feed_forward_width or 0) if moe is None else moe.width, "E": 0 if moe is None else moe.experts,
    }  # fmt: skip
    if config.linear is not None:
        found |= {"R": config.linear.value_heads, "P": config.linear.taps}
    if latent is not None:
        unrotated = config.head_width - latent.rotary_width
        found |= {"L": latent.rank, "Q": latent.query_rank or 0, "Y": latent.cached_width, "W": latent.value_width}
        found |= {"X": unrotated + latent.value_width}
    return found


def _matrix(config: ModelConfig, path: str, axes: str, product: str, mesh_axes: Any, **named: Any) -> Parameter:
    """Record of a matrix. product: its input and output axes, such as "D HC"."""
    std = named.pop("std", config.init_std)
    inputs, outputs = product.split()
    defaults = {"component": path.split("/")[-2], "precision": "compute", "init": normal_init(std)} | named
    return _record(config, path, axes, mesh_axes, decays=True, inputs=inputs, outputs=outputs, **defaults)


def _vector(config: ModelConfig, path: str, axes: str, component: str, mesh_axes: Any = None, **named: Any):
    """Record of a parameter that is added or multiplied elementwise, initialised to zeros by default."""
    mesh_axes = (None,) * len(axes.removeprefix("N")) if mesh_axes is None else mesh_axes
    named = {"component": component, "precision": "float32", "init": nn.initializers.zeros} | named
    return _record(config, path, axes, mesh_axes, decays=False, **named)


def _record(config: ModelConfig, path: str, axes: str, mesh_axes: Any, **named: Any) -> Parameter:
    """Record of a parameter. named: fields of Parameter, and `width`, the size of U."""
    stack = next((stack for stack in stacks(config) if path.startswith(f"{stack.key}/")), None)
    layers = () if stack is None or axes[0] != "N" else layers_with(config, stack, path.split("/")[1])
    sizes = _sizes(config, len(layers)) | {"U": named.pop("width", 0)}
    mesh_axes = (None, *mesh_axes) if axes.startswith("N") else tuple(mesh_axes)
    return Parameter(path, axes, tuple(sizes[x] for x in axes), mesh_axes=mesh_axes, layers=layers, **named)


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


def _attention(config: ModelConfig, stack: Stack) -> list[Parameter]:
    if config.latent is not None:
        return _latent_attention(config, f"{stack.key}/attention")
    if not layers_with(config, stack, ATTENTION):
        return []
    at, inward, heads = f"{stack.key}/{ATTENTION}", (FSDP, "tensor", None), ("tensor", None)
    # a head's gate lies behind its query
    query = {"width": 2 * config.head_width} if config.output_gate else {}
    channels = "U" if config.output_gate else "C"
    found = [
        _matrix(config, f"{at}/query", f"NDH{channels}", f"D H{channels}", inward, **query),
        _matrix(config, f"{at}/key", "NDGC", "D GC", inward),
        _matrix(config, f"{at}/value", "NDGC", "D GC", inward),
        _matrix(config, f"{at}/output", "NHCD", "HC D", ("tensor", None, FSDP), std=residual_std(config)),
    ]
    if config.biases or config.attention_biases != "none":
        found += [
            _vector(config, f"{at}/query_bias", f"NH{channels}", "bias", heads, **query),
            _vector(config, f"{at}/key_bias", "NGC", "bias", heads),
            _vector(config, f"{at}/value_bias", "NGC", "bias", heads),
        ]
    if config.biases or config.attention_biases == "all":
        found.append(_vector(config, f"{at}/output_bias", "ND", "bias"))
    if config.qk_norm:
        query, key = ("NHC", "NGC") if config.qk_norm_scope == "projection" else ("NC", "NC")
        found += [*_norm(config, f"{at}/query_norm", query), *_norm(config, f"{at}/key_norm", key)]
    if config.sinks:
        found.append(_vector(config, f"{at}/sinks", "NH", "sinks", ("tensor",)))
    return found


def _latent_attention(config: ModelConfig, at: str) -> list[Parameter]:
    assert config.latent is not None
    heads = (FSDP, "tensor", None)
    found = [
        _matrix(config, f"{at}/latent", "NDY", "D Y", (FSDP, None)),
        *_norm(config, f"{at}/latent_norm", "NL"),
        _matrix(config, f"{at}/latent_up", "NLHX", "L HX", heads),
        _matrix(config, f"{at}/output", "NHWD", "HW D", ("tensor", None, FSDP), std=residual_std(config)),
    ]
    if config.latent.query_rank is None:
        return [*found, _matrix(config, f"{at}/query", "NDHC", "D HC", heads)]
    return [
        *found,
        _matrix(config, f"{at}/query_down", "NDQ", "D Q", (FSDP, None)),
        *_norm(config, f"{at}/query_down_norm", "NQ"),
        _matrix(config, f"{at}/query_up", "NQHC", "Q HC", heads),
    ]


def _linear_attention(config: ModelConfig, stack: Stack) -> list[Parameter]:
    """Records of Gated DeltaNet. Value heads are on axis R, the inputs that a convolution reads on axis P."""
    linear = config.linear
    if linear is None:
        return []
    at, component = f"{stack.key}/{LINEAR_ATTENTION}", LINEAR_ATTENTION

    def inward(name: str, width: int) -> Parameter:
        named = {"component": component, "width": width}
        return _matrix(config, f"{at}/{name}", "NDU", "D U", (FSDP, "tensor"), **named)

    if linear.joined:
        projections = {"inputs": linear.channels + linear.values, "rates": 2 * linear.value_heads}
    else:
        rates = dict.fromkeys(("beta", "decay"), linear.value_heads)
        projections = {"inputs": linear.channels, "gate": linear.values} | rates
    std = residual_std(config)
    outward = {"component": component, "width": linear.values, "std": std}
    return [
        *(inward(name, width) for name, width in projections.items()),
        _matrix(config, f"{at}/output", "NUD", "U D", ("tensor", FSDP), **outward),
        _vector(
            config, f"{at}/convolution", "NUP", component, width=linear.channels,
            init=nn.initializers.uniform(2 * linear.taps**-0.5),
        ),
        _vector(config, f"{at}/log_decay", "NR", component, ("tensor",), init=_log_decay_init),
        _vector(config, f"{at}/decay_offset", "NR", component, ("tensor",), init=nn.initializers.ones),
        _vector(config, f"{at}/norm/scale", "NU", "norm", width=linear.value_width, init=nn.initializers.ones),
    ]  # fmt: skip


def _log_decay_init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Logarithms of numbers between 0.01 and 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))


def _norm(config: ModelConfig, path: str, axes: str) -> list[Parameter]:
    init = nn.initializers.zeros if config.norm == "centred_rms" else nn.initializers.ones
    found = [_vector(config, f"{path}/scale", axes, "norm", init=init)]
    if config.norm == "layer" and axes.endswith("D"):  # norms within attention have no bias
        found.append(_vector(config, f"{path}/bias", axes, "norm"))
    return found


def _layer_norms(config: ModelConfig, stack: Stack) -> list[Parameter]:
    names = ("attention_norm", "mlp_norm")
    return [record for name in names for record in _norm(config, f"{stack.key}/{name}", "ND")]


def _dense_block(config: ModelConfig, stack: Stack) -> list[Parameter]:
    letter = "F" if config.moe is None else "U"
    return _feed_forward(config, f"{stack.key}/mlp", letter, "feed_forward", config.feed_forward_width)


def _feed_forward(config: ModelConfig, at: str, letter: str, component: str, width: Any) -> list[Parameter]:
    """Records of a feed-forward block of some width, on an axis of this letter."""
    named = {"component": component, "width": width}
    inward = ("up",) if config.feed_forward == "gelu" else ("gate", "up")
    found = [
        _matrix(config, f"{at}/{name}", f"ND{letter}", f"D {letter}", (FSDP, "tensor"), **named) for name in inward
    ]
    std = residual_std(config)
    found.append(_matrix(config, f"{at}/down", f"N{letter}D", f"{letter} D", ("tensor", FSDP), std=std, **named))
    if config.biases:
        found += [_vector(config, f"{at}/{name}_bias", f"N{letter}", "bias", ("tensor",)) for name in inward]
        found.append(_vector(config, f"{at}/down_bias", "ND", "bias"))
    return found


def _experts(config: ModelConfig) -> list[Parameter]:
    """Records of the experts and the routers, in their layers or shared by all."""
    moe = config.moe
    assert moe is not None
    pool, router = ("N" if moe.placement == "layer" else ""), ("N" if moe.router == "layer" else "")
    at, router_at = ("layers/experts" if pool else "experts"), ("layers/router" if router else "router")
    inward = {"mesh_axes": ("expert", "fsdp", "tensor"), "std": config.init_std * moe.init_scale}
    std = residual_std(config) * moe.init_scale
    found = [
        _matrix(config, f"{at}/gate", f"{pool}EDF", "D F", **inward),
        _matrix(config, f"{at}/up", f"{pool}EDF", "D F", **inward),
        _matrix(config, f"{at}/down", f"{pool}EFD", "F D", ("expert", "tensor", "fsdp"), std=std),
        _matrix(
            config, f"{router_at}/weight", f"{router}DE", "D E", (FSDP, None), precision="float32_stored",
        ),
    ]  # fmt: skip
    if moe.biases:
        split = ("expert", "tensor")
        found += [_vector(config, f"{at}/{name}_bias", f"{pool}EF", "experts", split) for name in ("gate", "up")]
        found.append(_vector(config, f"{at}/down_bias", f"{pool}ED", "experts", ("expert", None)))
        found.append(_vector(config, f"{router_at}/bias", f"{router}E", "router", precision="float32_stored"))
    return found


def _expert_layers(config: ModelConfig, stack: Stack) -> list[Parameter]:
    """Records of what each layer with experts has beside experts and router."""
    moe, found = config.moe, []
    assert moe is not None
    if moe.shared_width is not None:
        found += _feed_forward(config, f"{stack.key}/shared_expert", "U", "shared_expert", moe.shared_width)
    if moe.shared_gate:
        found.append(
            _vector(config, f"{stack.key}/shared_expert_gate", "ND", "shared_expert", init=normal_init(config.init_std))
        )
    if moe.selection_bias:
        found.append(_vector(config, ROUTER_BIAS, "NE", "router_bias", precision="float32_stored"))
    if moe.score_offset:
        found.append(_vector(config, "layers/score_offset", "N", "score_offset"))
    if moe.output_gain:
        found.append(_vector(config, "layers/output_gain", "ND", "output_gain", init=nn.initializers.ones))
    return found
