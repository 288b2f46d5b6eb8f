"""The stage that stores the matrices in fewer bits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_reduce.core import trees
from moe_reduce.core.stages import QuantizeStage
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import by_path
from moe_reduce.models.weights import Quantised
from moe_reduce.quantization.choice import choose
from moe_reduce.quantization.clipping import ranges
from moe_reduce.quantization.round_to_nearest import KEPT, quantise
from moe_reduce.runs.stages.stage import Result, RunContext, Stage, StageContext


@dataclass(frozen=True)
class Quantize(Stage):
    """Round the matrices of some components to nearest."""

    config: QuantizeStage

    def after(self, model: Model, context: StageContext) -> Result:
        """Do what `run` does, on abstract leaves."""
        keep = [name for name in self.config.keep.split(",") if name and name not in KEPT]
        chosen = choose(model.config, self.config.scheme, (*keep, *KEPT), f"stages.{context.name}.scheme")
        return Result(quantise(model, chosen, ranges(self.config.clip)))

    def run(self, model: Model, context: RunContext) -> Result:
        """Quantise, and measure the error of each component."""
        result = self.after(model, context)
        figures = {"tokens": 0, "relative_errors": _errors(model, result.model)}
        return Result(result.model, figures=figures)


def _errors(before: Model, after: Model) -> dict[str, float]:
    """Norm of the error of each component's matrices, relative to the norm of the matrices."""
    flat, records = trees.flatten(before.params), by_path(before.config)
    found: dict[str, jax.Array] = {}
    for path, value in trees.flatten(after.params).items():
        if isinstance(value, Quantised):
            squares = _squares(flat[path], value)
            component = records[path].component
            found[component] = found.get(component, jnp.zeros(2)) + squares
    return {name: float(jnp.sqrt(error / size)) for name, (error, size) in sorted(found.items())}


@jax.jit
def _squares(array: jax.Array, value: Quantised) -> jax.Array:
    wide = array.astype(jnp.float32)
    return jnp.stack([jnp.sum(jnp.square(value.dequantised() - wide)), jnp.sum(jnp.square(wide))])
