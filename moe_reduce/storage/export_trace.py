"""Trace a model as a function of token ids alone, with its weights as constants, for export to other formats."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.core
import jax.export
import jax.numpy as jnp
from jax.interpreters import partial_eval

from moe_reduce.core.errors import UserError
from moe_reduce.models.decoder import Decoder

if TYPE_CHECKING:
    from moe_reduce.models.model import Model

DISPATCH = "reference"  # other dispatches need groups of dynamic size, which no export format can express
SIZES = ("batch", "time")  # names of dynamic sizes of the token ids


@dataclass(frozen=True)
class Traced:
    """A function tokens_BT int32 -> logits_BTV fp32, and the shape that it was traced for."""

    function: Callable[[jax.Array], jax.Array]
    tokens: jax.ShapeDtypeStruct  # dynamic sizes are symbolic (jax.export)
    vocab_size: int

    @property
    def shape(self) -> tuple[int | str, ...]:
        """[B, T]; each a number, or the name of a dynamic size."""
        return tuple(size if isinstance(size, int) else str(size) for size in self.tokens.shape)


def trace(model: "Model", batch_size: int | None, sequence_length: int | None) -> Traced:
    """Trace a model in fp32; a size of None is dynamic.

    Operations that do not affect the logits, such as router statistics, are removed; the formats could not express most
    of them. Raises UserError when the model cannot be traced with dynamic sizes.
    """
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params)
    execution = dataclasses.replace(
        model.execution, compute_dtype="float32", attention="xla", products="plain", dispatch=DISPATCH,
        expert_gradients=False, remat="none", scan_unroll=1,
    )  # fmt: skip

    def logits(tokens_BT: jax.Array) -> jax.Array:
        logits_BTV = Decoder(model.config, execution).apply({"params": params}, tokens_BT)
        assert isinstance(logits_BTV, jax.Array)
        return logits_BTV

    tokens = jax.ShapeDtypeStruct(_shape(batch_size, sequence_length), jnp.int32)
    try:
        closed = jax.make_jaxpr(logits)(tokens)
    except jax.core.InconclusiveDimensionOperation as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"this model needs --batch-size and --sequence-length to be exported ({reason})") from error
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)

    def needed(tokens_BT: jax.Array) -> jax.Array:
        return jax.core.eval_jaxpr(jaxpr, closed.consts, tokens_BT)[0]

    return Traced(needed, tokens, model.config.vocab_size)


def _shape(batch_size: int | None, sequence_length: int | None) -> tuple:
    named = zip((batch_size, sequence_length), SIZES, strict=True)
    return tuple(jax.export.symbolic_shape(", ".join(name if size is None else str(size) for size, name in named)))
