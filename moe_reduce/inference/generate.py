"""Text generation: continuations of prompts of any lengths, one token at a time, from a KV cache.

Prompts are read at once (prefill) and continued in a loop inside jit (decode). Each program is compiled once for each
batch size and bucket of lengths. Rows are padded on the right and keep positions of their own, so that no row attends
to padding: a pad lies behind everything that its row has read, until the row's next token overwrites it.

The cache holds every position up to the longest row's end. A sliding window (models/attention/visibility.py) masks old
entries, but does not shorten the cache.

On a mesh, weights are split along `tensor`, and the cache along its heads, so that each device reads its own part.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_reduce.core import trees
from moe_reduce.core.config import DISPATCH_BY_PLATFORM, ExecutionConfig, GenerateConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.generate_config import CacheDtype
from moe_reduce.inference.lengths import bucket, padded_batch
from moe_reduce.inference.sampling import Choice, Sampler, choose
from moe_reduce.models import cache, weights
from moe_reduce.models.cache import HISTORY, KEYS_VALUES
from moe_reduce.models.decoder import STACK, unstacked
from moe_reduce.models.deltas import BANK, bank_size
from moe_reduce.models.mesh import BATCH_AXES
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameters, records
from moe_reduce.training import sharding

STEPS = 32  # most tokens that one call of the decode program makes
NO_SLOT = 2**31 - 1  # cache slot of a row that has ended: beyond the cache, so nothing is written
NO_TOKEN = -1  # in place of a token id of a row that has ended


class Program(NamedTuple):
    """Everything besides shapes that is fixed at compile time."""

    config: ModelConfig
    execution: ExecutionConfig
    sampler: Sampler
    cache_dtype: CacheDtype

    def run(self, params: Any, batch: dict[str, Any], cache: Any = None) -> tuple[jax.Array, Any]:
        """Logits, and the keys and values of the batch's tokens."""
        logits, collected = Model(self.config, params, self.execution).apply(batch, (KEYS_VALUES,), cache)
        return logits, collected[KEYS_VALUES]


class State(NamedTuple):
    """Progress of B rows between two steps."""

    cache: dict[str, Any]  # keys and values of every token but the newest
    last_B: jax.Array  # int32, the newest token
    positions_B: jax.Array  # int32, position of the newest token
    ended_B: jax.Array
    made: jax.Array  # int32, tokens made so far
    entries_B: jax.Array | None  # int32, entry of each row in the model's bank of adapters; None without a bank


class Prompts(NamedTuple):
    """A batch of prompts."""

    tokens_BT: jax.Array  # int32, padded on the right
    lengths_B: jax.Array  # int32
    entries_B: jax.Array | None  # as in State


class Request(NamedTuple):
    """A batch of prompts, ready to run on a prepared model."""

    model: Model
    program: Program
    choice: Choice
    prompts: Prompts
    slots: int  # length of the cache: all positions, whatever a query sees of them (models/attention/visibility.py)


def generate(
    model: Model, prompts: Sequence[Sequence[int]], settings: GenerateConfig, entries: Sequence[int] | None = None
) -> list[list[int]]:
    """Continue each prompt (token ids) by at most `max_tokens` ids, ending before the first of `end_ids`.

    model: from `ready`, or any model, which is then made ready anew at each call. entries: for each prompt, its entry
    in the model's bank of adapters (adapters/bank.py), if one is active. Greedy rows do not depend on the
    other prompts of the batch. A sampled row depends on its index, so the same prompt given twice gets two
    continuations. UserError for an empty prompt or numbers out of range.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for new in chunks(model, prompts, settings, entries=entries):
        for row, ids in zip(rows, new, strict=True):
            row.extend(ids)
    return rows


def chunks(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: GenerateConfig,
    steps: int = STEPS,
    entries: Sequence[int] | None = None,
) -> Iterator[list[list[int]]]:
    """Stream `generate`: the first id of every row, then up to `steps` more ids of each row at a time."""
    request = _request(model, prompts, settings, entries)
    params = request.model.params
    with on_mesh(request.model):
        state, first_B = _prefill(request.program, request.slots, params, request.prompts, request.choice)
    yield _rows(np.asarray(first_B)[:, None])
    made = 1
    while made < settings.max_tokens and not np.all(np.asarray(state.ended_B)):
        count = min(steps, STEPS, settings.max_tokens - made)
        with on_mesh(request.model):
            state, ids_BX = _decode(request.program, params, state, request.choice, jnp.int32(count))
        yield _rows(np.asarray(ids_BX)[:, :count])
        made += count


def compile_for(
    model: Model, prompts: Sequence[Sequence[int]], settings: GenerateConfig, entries: Sequence[int] | None = None
) -> None:
    """Compile what `chunks` would compile at its first use, and run nothing."""
    request = _request(model, prompts, settings, entries)
    params = request.model.params
    with on_mesh(request.model):
        prefill = _prefill.lower(request.program, request.slots, params, request.prompts, request.choice)
        compiled = prefill.compile()
        state, _ = prefill.out_info
        if mesh_of(request.model) is not None:  # on one device, arguments carry no sharding
            state = sharding.placed(state, compiled.output_shardings[0])
        _decode.lower(request.program, params, state, request.choice, jnp.int32(1)).compile()


def prepared(model: Model, mesh: Mesh | None = None) -> Model:
    """Prepare a model for inference on long rows: matrices in the compute dtype, layers stacked.

    mesh: places the parameters, split along `tensor`; the other axes must have size 1. UserError if `tensor` does not
    divide the model.
    """
    execution = dataclasses.replace(model.execution, remat="none", expert_gradients=False)
    if execution.dispatch == "capacity":  # a token's experts must not depend on the other rows
        execution = dataclasses.replace(execution, dispatch=DISPATCH_BY_PLATFORM[execution.platform])
    params = model.params
    if mesh is not None:
        params = jax.tree.map(jax.device_put, params, sharding.shardings(mesh, params, records(model.config, params)))
    flat = trees.flatten(params)
    matrices = [record.path for record in parameters(model.config) if record.precision == "compute"]
    params = trees.update(params, {path: weights.cast(flat[path], execution.compute_dtype) for path in matrices})
    return dataclasses.replace(model, params=params, execution=execution)


def ready(model: Model, mesh: Mesh | None = None) -> Model:
    """Prepare a model for decoding, as `prepared` does; preparing it again changes nothing.

    On a CPU the layers are also unstacked, which copies them.
    """
    if STACK not in model.params:  # prepared already
        return model
    model = prepared(model, mesh)
    if model.execution.platform != "cpu":
        return model
    return model.with_params(unstacked(model.params, model.config))


def mesh_of(model: Model) -> Mesh | None:
    """Mesh that the parameters lie on; None if they lie on one device without a mesh."""
    place = getattr(jax.tree.leaves(model.params)[0], "sharding", None)
    mesh: Any = place.mesh if isinstance(place, NamedSharding) else None
    return mesh


def on_mesh(model: Model) -> contextlib.AbstractContextManager[Any]:
    """Context to compile and run the model's programs in."""
    mesh = mesh_of(model)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise UserError for prompts that cannot be continued."""
    if not prompts:
        raise UserError("there is no prompt: give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(
                f"prompt {number} has token ids {min(prompt)}..{max(prompt)}, the model has 0..{vocab_size - 1}"
            )


def _request(
    model: Model, prompts: Sequence[Sequence[int]], settings: GenerateConfig, entries: Sequence[int] | None
) -> Request:
    settings.check()
    check_prompts(prompts, model.config.vocab_size)
    model = ready(model)
    sampler = Sampler.of(settings, model.config.vocab_size)
    program = Program(model.config, model.execution, sampler, settings.cache_dtype)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_B.max())
    tokens_BT = np.zeros((len(prompts), bucket(longest)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    slots = max(bucket(longest + settings.max_tokens), tokens_BT.shape[1])
    entries_B = None if entries is None else _entries(model, prompts, entries)
    batch = Prompts(jnp.asarray(tokens_BT), jnp.asarray(lengths_B), entries_B)
    return Request(model, program, _choice(settings), batch, slots)


def _entries(model: Model, prompts: Sequence[Sequence[int]], entries: Sequence[int]) -> jax.Array:
    size = bank_size(model.params[BANK]) if BANK in model.params else 0
    if len(entries) != len(prompts) or not all(0 <= entry < size for entry in entries):
        raise UserError(
            f"entries must name one of the {size} adapters of the bank for each prompt, got {list(entries)}"
        )
    return jnp.asarray(entries, jnp.int32)


def _rows(ids_BX: np.ndarray) -> list[list[int]]:
    return [[int(token) for token in row if token != NO_TOKEN] for row in ids_BX]


def _choice(settings: GenerateConfig) -> Choice:
    return Choice(
        jnp.float32(settings.temperature),
        jnp.float32(settings.top_p),
        jax.random.key(settings.seed),
        jnp.asarray((NO_TOKEN, *settings.end_ids), jnp.int32),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(program: Program, slots: int, params: Any, prompts: Prompts, choice: Choice):
    """Read the prompts and make the first token of each: (state, ids_B)."""
    tokens_BT, lengths_B, entries_B = prompts
    batch = padded_batch(program.config, tokens_BT, lengths_B)
    logits_B1V, new = program.run(params, batch | {"last": lengths_B - 1, "adapter": entries_B})
    filled = cache.of_prompts(new, slots, program.cache_dtype, STACK in params)
    ended_B = jnp.zeros(lengths_B.shape, bool)
    state = State(filled, lengths_B, lengths_B - 1, ended_B, jnp.int32(0), entries_B)
    return _constrained(program, params, *_next(program, state, logits_B1V, choice))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(program: Program, params: Any, state: State, choice: Choice, steps: jax.Array):
    """Make `steps` tokens of each row, fewer once all rows have ended: (state, ids [B, STEPS])."""

    def unfinished(carry):
        index, state, _ = carry
        return (index < steps) & ~jnp.all(state.ended_B)

    def step(carry):
        index, state, ids_BX = carry
        batch = {"tokens": state.last_B[:, None], "positions": state.positions_B[:, None], "adapter": state.entries_B}
        logits_B1V, new = program.run(params, batch, state.cache)
        following, ids_B = _next(program, state, logits_B1V, choice)
        # The slot depends on the chosen token, which orders the write after every read: else XLA copies the cache.
        slots_B = jnp.where(following.ended_B, NO_SLOT, state.positions_B)
        written = cache.written(state.cache, new, slots_B, STACK in params)
        state = following._replace(cache=written)
        return index + 1, state, ids_BX.at[:, index].set(ids_B)

    ids_BX = jnp.full((state.last_B.shape[0], STEPS), NO_TOKEN, jnp.int32)
    _, state, ids_BX = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, ids_BX))
    return _constrained(program, params, state, ids_BX)


def _constrained(program: Program, params: Any, state: State, ids: jax.Array) -> tuple[State, jax.Array]:
    """Pin the shardings of state and cache on a mesh, so that the next call does not recompile."""
    if jax.sharding.get_abstract_mesh().empty:
        return state, ids
    # in latent attention all heads share one cache
    split = "tensor" if program.config.latent is None else None
    heads = PartitionSpec(*(None,) * (STACK in params), BATCH_AXES, split)
    rest, ids = jax.lax.with_sharding_constraint((state._replace(cache={}), ids), PartitionSpec())
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: PartitionSpec(*heads[:-1]) if path[-1].key == HISTORY else heads, state.cache
    )
    return rest._replace(cache=jax.lax.with_sharding_constraint(state.cache, specs)), ids


def _next(program: Program, state: State, logits_B1V: jax.Array, choice: Choice) -> tuple[State, jax.Array]:
    """Choose the next token of each row: (state, ids_B with NO_TOKEN for rows that have ended)."""
    chosen_B = choose(logits_B1V[:, 0], program.sampler, choice, state.made)
    ended_B = state.ended_B | jnp.any(chosen_B[:, None] == choice.end_ids[None], axis=-1)
    state = State(state.cache, chosen_B, state.positions_B + 1, ended_B, state.made + 1, state.entries_B)
    return state, jnp.where(ended_B, NO_TOKEN, chosen_B)
