"""A model as a function of token ids alone, its weights inside, in operations that exchange formats can express."""

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

DISPATCH = "reference"  # the others sort rows into groups of sizes known only at run time, which neither format has
SIZES = ("batch", "time")  # names of the axes of token ids, where their size is left open


@dataclass(frozen=True)
class Traced:
    """tokens_BT int32 -> logits_BTV fp32, and the shape that it is for."""

    function: Callable[[jax.Array], jax.Array]
    tokens: jax.ShapeDtypeStruct  # with symbolic sizes, of jax.export, where any size is taken
    vocab_size: int

    @property
    def shape(self) -> tuple[int | str, ...]:
        """[B, T], each a number, or its name where any size is taken."""
        return tuple(size if isinstance(size, int) else str(size) for size in self.tokens.shape)


def trace(model: "Model", batch_size: int | None, sequence_length: int | None) -> Traced:
    """The model in fp32; a size that is None stays open.

    What the model computes for statistics only is left out: it is most of what the formats lack. Raises UserError when
    the model cannot be traced without knowing its sizes.
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
