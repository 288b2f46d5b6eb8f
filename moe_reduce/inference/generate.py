"""Continuations of prompts of any lengths, one token after the other, from a cache of keys and values.

Prompts are read at once (prefill) and continued in a loop within jit (decode), each compiled once for each number of
prompts and bucket of lengths. Rows are padded on the right, and each has its own positions: a pad is never seen. Its
place lies behind all that a row has read, until the row's own next token takes that place.

On a mesh attention, feed-forward, experts and embedding are split along `tensor`, and the cache with its heads: each
device reads its own part of the weights.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moe_reduce.core import trees
from moe_reduce.core.config import DISPATCH_BY_PLATFORM, ExecutionConfig, GenerateConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.inference.sampling import Choice, Sampler, choose
from moe_reduce.models import cache, weights
from moe_reduce.models.cache import KEYS_VALUES
from moe_reduce.models.decoder import unstacked
from moe_reduce.models.mesh import BATCH_AXES
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameters, records
from moe_reduce.training import sharding

STEPS = 32  # tokens between two looks at what was made
LEAST_BUCKET = 16
NOWHERE = 2**31 - 1  # in place of a place in the cache, for a row that has ended
NOTHING = -1  # in place of an id, where a row has ended


@dataclass(frozen=True, eq=False)
class Ready:
    """A model made ready to generate: worth keeping where it does so more than once."""

    config: ModelConfig
    execution: ExecutionConfig
    params: dict[str, Any]  # in the compute dtype; on a CPU each layer's by itself
    mesh: Mesh | None = None

    @property
    def stacked(self) -> bool:
        """Whether layers are computed in one scan."""
        return self.execution.platform != "cpu"

    def place(self) -> contextlib.AbstractContextManager[Any]:
        """In which its programs are compiled and run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


class Program(NamedTuple):
    """All that is fixed when a loop is compiled, beside shapes."""

    config: ModelConfig
    execution: ExecutionConfig
    stacked: bool
    sampler: Sampler
    cache_dtype: Literal["auto", "int8"]

    def run(self, params: Any, batch: dict[str, Any], cache: Any = None) -> tuple[jax.Array, Any]:
        """(logits, keys and values of the batch's tokens)."""
        logits, collected = Model(self.config, params, self.execution).apply(batch, (KEYS_VALUES,), cache)
        return logits, collected[KEYS_VALUES]


class State(NamedTuple):
    """Where B rows stand between two steps."""

    cache: dict[str, Any]  # of all tokens but the last
    last_B: jax.Array  # int32, the newest token
    positions_B: jax.Array  # int32, of the newest token
    ended_B: jax.Array
    made: jax.Array  # int32, tokens made so far


def generate(model: Model | Ready, prompts: Sequence[Sequence[int]], settings: GenerateConfig) -> list[list[int]]:
    """What follows each prompt (token ids): at most `max_tokens` ids, up to the first of `end_ids`, which is left out.

    Greedy rows do not depend on the other prompts of the batch; a sampled row depends on its index, so that the same
    prompt given twice is continued in two ways. Raises UserError for an empty prompt or numbers out of range.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for new in chunks(model, prompts, settings):
        for row, ids in zip(rows, new, strict=True):
            row.extend(ids)
    return rows


def chunks(
    model: Model | Ready, prompts: Sequence[Sequence[int]], settings: GenerateConfig, steps: int = STEPS
) -> Iterator[list[list[int]]]:
    """As `generate`, piece by piece: the first id of every row, then up to `steps` further ones at a time."""
    found, program, arguments, places = _arguments(model, prompts, settings)
    choice = _choice(settings)
    with found.place():
        state, first_B = _prefill(program, places, found.params, *arguments, choice)
    yield _rows(np.asarray(first_B)[:, None])
    made = 1
    while made < settings.max_tokens and not np.all(np.asarray(state.ended_B)):
        count = min(steps, STEPS, settings.max_tokens - made)
        with found.place():
            state, ids_BX = _decode(program, found.params, state, choice, jnp.int32(count))
        yield _rows(np.asarray(ids_BX)[:, :count])
        made += count


def compile_for(model: Ready, prompts: Sequence[Sequence[int]], settings: GenerateConfig) -> None:
    """What `chunks` would otherwise compile at its first use; runs nothing."""
    found, program, arguments, places = _arguments(model, prompts, settings)
    choice = _choice(settings)
    with found.place():
        prefill = _prefill.lower(program, places, found.params, *arguments, choice)
        compiled = prefill.compile()
        state, _ = prefill.out_info
        if found.mesh is not None:  # on one device nothing says where it lies, as at the first use
            state = sharding.placed(state, compiled.output_shardings[0])
        _decode.lower(program, found.params, state, choice, jnp.int32(1)).compile()


def ready(model: Model | Ready, mesh: Mesh | None = None) -> Ready:
    """The model with its matrices in the compute dtype and, on a CPU, its layers apart: a copy where it is neither.

    mesh: with sizes of 1 but for `tensor`. Raises UserError when it does not divide the model.
    """
    if isinstance(model, Ready):
        return model
    execution = dataclasses.replace(model.execution, remat="none", expert_gradients=False)
    if execution.dispatch == "capacity":  # what a token's experts are must not depend on the other rows
        execution = dataclasses.replace(execution, dispatch=DISPATCH_BY_PLATFORM[execution.platform])
    given = model.params
    if mesh is not None:
        given = jax.tree.map(jax.device_put, given, sharding.shardings(mesh, given, records(model.config, given)))
    computed = [record.path for record in parameters(model.config) if record.precision == "compute"]
    flat = trees.flatten(given)
    params = trees.update(given, {path: weights.cast(flat[path], execution.compute_dtype) for path in computed})
    found = Ready(model.config, execution, params, mesh)
    return found if found.stacked else dataclasses.replace(found, params=unstacked(params))


def bucket(length: int) -> int:
    """The smallest power of two, or one and a half of one, that is at least the length and `LEAST_BUCKET`."""
    power = max(LEAST_BUCKET, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > LEAST_BUCKET and length <= power * 3 // 4 else power


def _arguments(model: Model | Ready, prompts: Sequence[Sequence[int]], settings: GenerateConfig):
    """(the model made ready, its program, (tokens_BT, lengths_B), places of the cache) once all is checked."""
    settings.check()
    check_prompts(prompts, model.config.vocab_size)
    found = ready(model)
    sampler = Sampler.of(settings, found.config.vocab_size)
    program = Program(found.config, found.execution, found.stacked, sampler, settings.cache_dtype)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_B.max())
    tokens_BT = np.zeros((len(prompts), bucket(longest)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    places = max(bucket(longest + settings.max_tokens), tokens_BT.shape[1])
    return found, program, (jnp.asarray(tokens_BT), jnp.asarray(lengths_B)), places


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises UserError for what cannot be continued."""
    if not prompts:
        raise UserError("there is no prompt: give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(
                f"prompt {number} has token ids {min(prompt)}..{max(prompt)}, the model has 0..{vocab_size - 1}"
            )


def _rows(ids_BX: np.ndarray) -> list[list[int]]:
    return [[int(identity) for identity in row if identity != NOTHING] for row in ids_BX]


def _choice(settings: GenerateConfig) -> Choice:
    return Choice(
        jnp.float32(settings.temperature),
        jnp.float32(settings.top_p),
        jax.random.key(settings.seed),
        jnp.asarray((NOTHING, *settings.end_ids), jnp.int32),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(program: Program, places: int, params: Any, tokens_BT, lengths_B, choice: Choice):
    """Reads the prompts and makes the first token of each: (state, ids_B)."""
    logits_B1V, new = program.run(params, {"tokens": tokens_BT, "last": lengths_B - 1})
    quantised = program.cache_dtype == "int8"
    filled = cache.of_prompts(new, places, quantised, program.stacked)
    ended_B = jnp.zeros(lengths_B.shape, bool)
    state = State(filled, lengths_B, lengths_B - 1, ended_B, jnp.int32(0))
    return _settled(program, *_next(program, state, logits_B1V, choice))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(program: Program, params: Any, state: State, choice: Choice, steps: jax.Array):
    """Makes `steps` tokens of each row, fewer where all have ended: (state, ids [B, STEPS])."""

    def unfinished(carry):
        index, state, _ = carry
        return (index < steps) & ~jnp.all(state.ended_B)

    def step(carry):
        index, state, ids_BX = carry
        batch = {"tokens": state.last_B[:, None], "positions": state.positions_B[:, None]}
        logits_B1V, new = program.run(params, batch, state.cache)
        following, ids_B = _next(program, state, logits_B1V, choice)
        # That the place depends on the choice also puts the write behind every read: else XLA copies the whole cache.
        places_B = jnp.where(following.ended_B, NOWHERE, state.positions_B)
        written = cache.written(state.cache, new, places_B, program.stacked)
        state = following._replace(cache=written)
        return index + 1, state, ids_BX.at[:, index].set(ids_B)

    ids_BX = jnp.full((state.last_B.shape[0], STEPS), NOTHING, jnp.int32)
    _, state, ids_BX = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, ids_BX))
    return _settled(program, state, ids_BX)


def _settled(program: Program, state: State, ids: jax.Array) -> tuple[State, jax.Array]:
    """As every call leaves them on a mesh, so that the next needs no other program: a cache by its rows and heads."""
    if jax.sharding.get_abstract_mesh().empty:
        return state, ids
    heads = PartitionSpec(*(None,) * program.stacked, BATCH_AXES, "tensor")
    rest, ids = jax.lax.with_sharding_constraint((state._replace(cache={}), ids), PartitionSpec())
    return rest._replace(cache=jax.lax.with_sharding_constraint(state.cache, heads)), ids


def _next(program: Program, state: State, logits_B1V: jax.Array, choice: Choice) -> tuple[State, jax.Array]:
    """A token for each row behind its newest: (state, ids_B with NOTHING where a row has ended)."""
    chosen_B = choose(logits_B1V[:, 0], program.sampler, choice, state.made)
    ended_B = state.ended_B | jnp.any(chosen_B[:, None] == choice.end_ids[None], axis=-1)
    state = State(state.cache, chosen_B, state.positions_B + 1, ended_B, state.made + 1)
    return state, jnp.where(ended_B, NOTHING, chosen_B)
