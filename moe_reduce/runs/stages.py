"""The stages of a reduction, each a model in and a model out; and what each makes of an architecture."""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import merging
from moe_reduce.adapters.checks import check_split
from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig, MoEConfig, PoolStage, PruneStage, ReduceConfig, Stage, TuneStage
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step, home_layers, originals
from moe_reduce.data.batches import train_batches
from moe_reduce.data.shards import TokenSource
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import by_path, stored_params
from moe_reduce.reduction import pool as pooling
from moe_reduce.reduction import prune as pruning
from moe_reduce.reduction import scores, selection
from moe_reduce.reduction.selection import Kept
from moe_reduce.runs import tuning
from moe_reduce.training import sharding
from moe_reduce.training.job import Job, fit
from moe_reduce.training.task import TEACHER

Home = list[list[list[int]]]  # of each expert of each row, its layer and index in the first model


@dataclass(frozen=True)
class Place:
    """Where a stage runs: the reduction that it belongs to, its name there, and a directory of its own."""

    run: ReduceConfig
    name: str
    mesh: Mesh
    tokens: TokenSource
    first: ModelConfig  # of the model that the reduction began with, and
    load_first: Callable[[], Model]  # the model itself
    directory: Path


@dataclass(frozen=True)
class Result:
    """What a stage made, and what its summary and the chain say about it."""

    model: Model
    kept_experts: Home | None = None
    figures: dict[str, Any] = field(default_factory=lambda: {"tokens": 0})  # trained on, and what else there is to say


def run_stage(stage: Stage, model: Model, place: Place) -> Result:
    """Applies one stage."""
    if isinstance(stage, PoolStage):
        return pool_experts(stage, model, place.run.train.seed)
    if isinstance(stage, PruneStage):
        return _prune(stage, model, place)
    return _tune(stage, model, place)


def configurations(first: ModelConfig, run: ReduceConfig) -> Iterator[tuple[str, ModelConfig]]:
    """(name, architecture) behind each stage. Raises UserError when one cannot follow the one before it."""
    config = first
    total = experts_of(first)
    for name, stage in run.stages.items():
        try:
            config = _after(stage, config, total)
            if isinstance(stage, TuneStage):
                _check_tune(stage, config, first, run.mesh.tensor)
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None
        yield name, config


def experts_of(config: ModelConfig) -> int:
    """Experts of a whole model."""
    moe = scores.moe_of(config)
    return moe.experts if moe.placement == "shared" else config.layers * moe.experts


def _after(stage: Stage, config: ModelConfig, total: int) -> ModelConfig:
    moe = scores.moe_of(config)
    if isinstance(stage, PoolStage):
        pooling.check_options(stage.start, stage.score_function, stage.bias, stage.offset)
        pooling.check_poolable(config)
        if stage.canonical:
            config = dataclasses.replace(config, moe=dataclasses.replace(moe, output_gain=True))
        return pooling.pooled_config(config, experts_of(config), stage.router, stage.score_function)
    if isinstance(stage, PruneStage):
        scores.check_criteria([stage.criterion])
        keep = _keep(stage, config, total)
        if not moe.active <= keep <= moe.experts:
            raise UserError(f"{keep} experts of {moe.experts} cannot be kept where {moe.active} are active for a token")
        return dataclasses.replace(config, moe=dataclasses.replace(moe, experts=keep))
    return config


def _keep(stage: PruneStage, config: ModelConfig, total: int) -> int:
    """Experts to keep in each pool of the model: `keep` speaks of all experts of the first model."""
    moe = scores.moe_of(config)
    rows = 1 if moe.placement == "shared" else config.layers
    return -(-selection.count_of(stage.keep, total) // rows)


def _check_tune(stage: TuneStage, config: ModelConfig, first: ModelConfig, tensor: int) -> None:
    moe = scores.moe_of(config)
    tuning.check_components("tune", stage, config)
    if stage.adapter is not None:
        adapters.abstract(stage.adapter, config)
        check_split(stage.adapter, config, tensor)
        if "experts" in stage.components.split(",") and stage.objective == "language_model":
            raise UserError("components names experts, which train whole: leave the adapter out")
    if stage.bias_from is not None and not (moe.placement == "shared" and moe.selection_bias):
        raise UserError("bias_from needs a pool, whose layers have a selection bias: put a pool stage before")
    one_pool = moe.placement == "shared" and scores.moe_of(first).placement == "layer"
    if stage.objective == "router" and not (one_pool and moe.experts == experts_of(first)):
        raise UserError("objective=router compares a whole pool with the routers it came from: put it before pruning")


def pool_experts(stage: PoolStage, model: Model, seed: int) -> Result:
    """One pool of all experts, in canonical form if the stage says so. seed: of a random start."""
    scores.moe_of(model.config)
    home = [pair for row in originals(model.config, model.chain) for pair in row]
    start = pooling.canonical(model) if stage.canonical else model
    pooled = pooling.pool(start, stage.start, stage.score_function, stage.router, stage.bias, stage.offset, seed)
    return Result(pooled, [home])


def _prune(stage: PruneStage, model: Model, place: Place) -> Result:
    moe: MoEConfig = scores.moe_of(model.config)
    sums = scores.collect(model, _calibration(stage, place), place.mesh)
    criteria = dict.fromkeys((stage.criterion, "frequency", "max_activation"))
    found = scores.scores(moe, sums, criteria, _seed(place, stage.seed))
    if jax.process_index() == 0:
        scores.write(found, place.directory / "scores.json")
    protected: frozenset = frozenset()
    if stage.protect_super_experts:
        home_NE = home_layers(model.config, model.chain)
        protected = selection.super_experts(found.of("max_activation"), home_NE, model.config.layers)
    keep = _keep(stage, model.config, experts_of(place.first))
    kept: Kept = selection.keep_by_row(found.of(stage.criterion), keep, protected)
    home = originals(model.config, model.chain)
    names = [[home[row][index] for index in indices] for row, indices in enumerate(kept)]
    return Result(pruning.prune(model, kept), names, {"tokens": 0, "calibration_tokens": sums.tokens})


def _calibration(stage: PruneStage, place: Place) -> Iterator[Any]:
    run = place.run
    share = sharding.batch_share(place.mesh)
    batches = train_batches(place.tokens, run.data, run.train.batch_size, _seed(place, stage.seed), *share)
    return (sharding.put_batch(place.mesh, batch) for batch in itertools.islice(batches, stage.calibration_batches))


def _seed(place: Place, added: int = 0) -> int:
    """Of the text that a stage reads: another for each stage, and the same for stages of one name in all variants."""
    words = [place.run.train.seed + added, zlib.crc32(place.name.encode())]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _tune(stage: TuneStage, model: Model, place: Place) -> Result:
    run = place.run
    foreign_NE, others = None, {}
    if stage.adapter is not None:
        model = adapters.activate(model, adapters.init(stage.adapter, model))
    params = model.params
    if stage.bias_from is not None:
        foreign_NE = foreign(model.config, model.chain)
        params = tuning.start_annealing(params, stage, foreign_NE)
    first = place.first
    if _reads_first(stage):
        teacher = place.load_first()
        if stage.objective == "router" and any(_is_canonical(other) for other in run.stages.values()):
            teacher = pooling.canonical(teacher)  # whose routers read what the pool's read
        first, others = teacher.config, {TEACHER: teacher.params}
    task = tuning.tuning_task(model.config, first, stage, run.execution, run.balance, foreign_NE)
    schedule = dataclasses.replace(stage.schedule(run.train), seed=_seed(place))
    job = Job(task, model.config, params, run.execution, run.data, schedule, others)
    trained, figures = fit(job, place.mesh, place.tokens, place.directory)
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(model.params).items()}

    # routers stay in fp32, in which they are computed; anything else returns to the dtype of its neighbours
    def keep(path: str, leaf: Any) -> Any:
        record = by_path(model.config).get(path)
        return leaf if record is not None and record.precision == "float32_stored" else leaf.astype(dtypes[path])

    kept = trees.map_with_path(keep, trained)
    tuned = dataclasses.replace(model, params=kept)
    if stage.adapter is not None:
        whole = sharding.to_host(place.mesh, {ADAPTER: kept[ADAPTER]})
        tuned = merging.merge(tuned, adapters.Adapter(stage.adapter, whole[ADAPTER]))
    return Result(tuned, None, figures)


def _reads_first(stage: TuneStage) -> bool:
    """Whether the model that the reduction began with is at hand while the stage trains."""
    return stage.objective == "router" or stage.teacher_weight > 0


def planned_jobs(first: ModelConfig, run: ReduceConfig, dtype: Any) -> Iterator[tuple[str, Job]]:
    """(name, what it trains) of each tune stage, on abstract leaves of a dtype; run.execution: resolved."""
    for name, config in configurations(first, run):
        stage = run.stages[name]
        if not isinstance(stage, TuneStage):
            continue
        params = stored_params(config, dtype)
        if stage.adapter is not None:
            params[ADAPTER] = adapters.abstract(stage.adapter, config)
        foreign_NE = None
        if stage.bias_from is not None:
            home_E = np.arange(scores.moe_of(config).experts) * config.layers // scores.moe_of(config).experts
            foreign_NE = home_E[None] != np.arange(config.layers)[:, None]
        others = {TEACHER: stored_params(first, dtype)} if _reads_first(stage) else {}
        task = tuning.tuning_task(config, first, stage, run.execution, run.balance, foreign_NE)
        yield name, Job(task, config, params, run.execution, run.data, stage.schedule(run.train), others)


def _is_canonical(stage: Stage) -> bool:
    return isinstance(stage, PoolStage) and stage.canonical


def check_origins(run: ReduceConfig, first: ModelConfig, chain: tuple[Step, ...]) -> None:
    """Raises UserError when a stage anneals a pool that the reduction begins with, and whose chain knows no layers."""
    anneals = any(isinstance(stage, TuneStage) and stage.bias_from is not None for stage in run.stages.values())
    if anneals and scores.moe_of(first).placement == "shared":
        foreign(first, chain)


def foreign(config: ModelConfig, chain: tuple[Step, ...]) -> np.ndarray:
    """Where an expert of the pool is another layer's by origin, [N, E]."""
    home_1E = home_layers(config, chain)
    if home_1E is None:
        raise UserError(
            "the manifest of this pool does not say which layer each expert came from, which bias_from needs: "
            "leave it out, or pool the model anew"
        )
    return home_1E != np.arange(config.layers)[:, None]
