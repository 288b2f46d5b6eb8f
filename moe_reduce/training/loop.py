"""The training loop. It knows tasks, batches and meshes; never models, adapters or routers."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moe_reduce.core.config import TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.training import sharding, steps
from moe_reduce.training.checkpoints import Checkpoints
from moe_reduce.training.metrics import MetricsLog, Stopwatch
from moe_reduce.training.steps import State
from moe_reduce.training.task import Batch, Params, Task, join
from moe_reduce.training.throughput import Peak
from moe_reduce.training.validation import added, summarize

CORPUS, NEXT = "corpus", "next_index"  # keys of a checkpoint's data position: ours, and grain's number of batches read
# the norms show a divergence that the loss shows a step later, or never
MUST_BE_FINITE = ("loss", "gradient_norm", "parameter_norm")
HostBatch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """An optimisation problem: the task, its initial parameters, and the settings of the optimiser."""

    task: Task
    initial: Params | Callable[[], Params]  # the leaves that train, or a function that makes them under jit
    frozen: Params  # all other leaves that the task reads
    train: TrainConfig


@dataclass(frozen=True)
class Feed:
    """The batches of a run."""

    batches: grain.DatasetIterator  # training batches, endless and resumable
    validation: Sequence[HostBatch]
    corpus: str  # fingerprint of the text; a run resumes only with the corpus that it began with


@dataclass(frozen=True)
class Speed:
    """Conversion of seconds into tokens/s and MFU."""

    tokens_per_step: int
    flops_per_token: float | None  # None: not counted, and no MFU
    peak: Peak

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation: the model's FLOP/s as a share of the peak."""
        return None if self.flops_per_token is None else tokens_per_second * self.flops_per_token / self.peak.flops


@dataclass
class Outcome:
    """Result of a finished run."""

    params: Params  # the trained leaves, or their moving average where train.ema_decay is set
    validation: dict[str, Any]  # loss, perplexity, accuracy, the task's other means, and arrays such as counts_NE
    measured: dict[str, float]  # the task's own measurements
    tokens_per_second: float  # median over the logged intervals of this process; NaN if it trained nothing
    compile_seconds: float
    intervals: list[float] = field(default_factory=list)


class Measurement(NamedTuple):
    """Result of `Task.measure` after a step."""

    step: int
    values: dict[str, float]


class Fit:
    """One run of the loop: `Fit(...).run()`. Running it again in the same workdir resumes at the last checkpoint."""

    def __init__(self, problem: Problem, feed: Feed, mesh: Mesh, workdir: Path, speed: Speed):
        """Prepare a run without compiling anything; UserError when the batch does not divide over the mesh."""
        self.task, self.train, self.mesh = problem.task, problem.train, mesh
        self.feed, self.workdir, self.speed = feed, workdir, speed
        self.frozen = jax.device_put(problem.frozen, sharding.shardings(mesh, problem.frozen, problem.task.records))
        steps.check_batch(mesh, problem.train)
        self.checkpoints = Checkpoints(workdir / "checkpoints", problem.train)
        self.clock = Stopwatch()
        self.intervals: list[float] = []
        self._last_logged = (0, 0.0)  # step, and seconds on the clock
        self._measurement = Measurement(step=-1, values={})
        self.validation = [sharding.put_batch(mesh, batch) for batch in feed.validation]
        self._build(problem.initial)

    def _build(self, initial: Params | Callable[[], Params]) -> None:
        params = jax.eval_shape(initial) if callable(initial) else initial
        program = steps.program(self.task, self.train, self.mesh, params)
        sharded = partial(jax.jit, out_shardings=program.shardings)
        make = program.new_state
        self._initial_state = sharded(lambda: make(initial())) if callable(initial) else partial(sharded(make), initial)
        self._abstract, self._step, self._evaluate = program.state, program.step, program.evaluate

    def run(self) -> Outcome:
        """Train to the last step. Raises UserError when a loss is not finite; the last good checkpoint stays."""
        # outside the mesh: initialisation runs the model on a single token, which a mesh cannot divide
        state, start = self._restore_or_start()
        with jax.set_mesh(self.mesh):
            self.log = MetricsLog(self.workdir, start, active=jax.process_index() == 0)
            compile_seconds = 0.0
            try:
                if start < self.train.steps:
                    compile_seconds = self._compile(state)
                    state = self._train(state, start)
                self.checkpoints.wait()
                return self._outcome(state, compile_seconds)
            finally:
                self.log.close()
                self.checkpoints.close()

    def _restore_or_start(self) -> tuple[State, int]:
        resumed = self.checkpoints.resume(self._abstract, self._set_position)
        if resumed is None:
            return self._initial_state(), 0
        state, step = resumed
        if jax.process_index() == 0:
            print(f"resuming {self.workdir} after step {step} of {self.train.steps}", flush=True)
        return state, step

    def _set_position(self, step: int, position: dict[str, Any]) -> None:
        """Go on with the batch after a step; UserError for another corpus, other exceptions for a damaged position."""
        if position.pop(CORPUS, self.feed.corpus) != self.feed.corpus:
            raise UserError(
                f"data.source, or its tokenizer, is not what {self.workdir} began with: restore it, or choose another "
                "workdir"
            )
        if position[NEXT] != step:
            raise ValueError(f"its data position is {position[NEXT]}")
        self.feed.batches.set_state(position)

    def _compile(self, state: State) -> float:
        """Compile the training step ahead of time, so that its seconds are known and do not count as training."""
        position = self.feed.batches.get_state()
        batch = sharding.put_batch(self.mesh, next(self.feed.batches))
        self.feed.batches.set_state(position)
        started = time.perf_counter()
        self._step = self._step.lower(state, self.frozen, batch).compile()
        return time.perf_counter() - started

    def _train(self, state: State, start: int) -> State:
        train = self.train
        pending: tuple[int, Any] | None = None
        self._last_logged = (start, 0.0)
        bar = tqdm(total=train.steps, initial=start, unit="step", disable=not sys.stderr.isatty(), smoothing=0.05)
        with bar, jax.transfer_guard("disallow"):
            self.clock.start()
            for step in range(start + 1, train.steps + 1):
                batch = sharding.put_batch(self.mesh, next(self.feed.batches))
                state, metrics = self._step(state, self.frozen, batch)
                if pending is not None:  # fetch the previous step's metrics while the device computes this step
                    self._record(*pending, bar)
                pending = (step, metrics)
                evaluating = step % train.evaluate_every == 0 or step == train.steps
                saving = step % train.checkpoint_every == 0 or step == train.steps
                if evaluating or saving:
                    self._record(*pending, bar)
                    pending = None
                    self._pause(state, step, evaluating, saving)
        return state

    def _pause(self, state: State, step: int, evaluating: bool, saving: bool) -> None:
        """Evaluate and save, with the clock stopped."""
        self.clock.stop()
        # Before a save, evaluate at least one batch: this step's loss was computed before its update, which may have
        # ruined the parameters.
        validation = self._validate(state, self.validation if evaluating else self.validation[:1])
        if not math.isfinite(validation["loss"]):
            self._stop_diverged(step, f"validation loss is {validation['loss']} after")
        if evaluating:
            with jax.transfer_guard("allow"):
                values = self.task.measure(join(_evaluated(state), self.frozen))
            self._measurement = Measurement(step, values)
            validation |= values
            self.log.write(step, "validation", {k: v for k, v in validation.items() if isinstance(v, float)})
        if saving:
            self.checkpoints.save(step, state, {CORPUS: self.feed.corpus, **self.feed.batches.get_state()})
        self.clock.start()

    def _record(self, step: int, metrics: dict[str, jax.Array], bar: tqdm) -> None:
        """Check one step's metrics and log them where due; waits until the device has computed them."""
        scalars = {name: value for name, value in metrics.items() if value.ndim == 0}
        if step % self.train.log_every and step != self.train.steps:
            scalars = {name: metrics[name] for name in MUST_BE_FINITE}
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        bar.update()
        for name in MUST_BE_FINITE:
            if not math.isfinite(values[name]):
                self._stop_diverged(step, f"{name} is {values[name]} at")
        if step % self.train.log_every == 0 or step == self.train.steps:
            bar.set_postfix(loss=f"{values['loss']:.3f}")
            self.log.write(step, "train", values | self._speed_since_last(step))
            reason = self.task.stop(values)
            if reason:
                raise UserError(f"{reason}, at step {step}; {self._kept()}")

    def _speed_since_last(self, step: int) -> dict[str, float | None]:
        last_step, last_seconds = self._last_logged
        seconds = self.clock.elapsed()
        self._last_logged = (step, seconds)
        if step == last_step or seconds <= last_seconds:
            return {"tokens_per_second": None, "mfu": None}
        rate = (step - last_step) * self.speed.tokens_per_step / (seconds - last_seconds)
        self.intervals.append(rate)
        return {"tokens_per_second": rate, "mfu": self.speed.mfu(rate)}

    def _stop_diverged(self, step: int, what: str) -> NoReturn:
        raise UserError(
            f"{what} step {step}, batch {step - 1} of the training order with train.seed={self.train.seed}; "
            f"{self._kept()}: lower train.learning_rate or raise train.warmup_steps, in a new --workdir"
        )

    def _kept(self) -> str:
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        kept = "no checkpoint was due yet" if latest is None else f"the last good checkpoint is of step {latest}"
        return f"{kept} in {self.workdir / 'checkpoints'}"

    def _validate(self, state: State, batches: Sequence[Batch]) -> dict[str, Any]:
        params = _evaluated(state)
        return summarize(added(jax.device_get([self._evaluate(params, self.frozen, batch) for batch in batches])))

    def _outcome(self, state: State, compile_seconds: float) -> Outcome:
        params = _evaluated(state)
        rate = float(np.median(self.intervals)) if self.intervals else math.nan
        measured = self._measurement.values
        if self._measurement.step != self.train.steps:  # resumed after the last step
            measured = self.task.measure(join(params, self.frozen))
        return Outcome(params, self._validate(state, self.validation), measured, rate, compile_seconds, self.intervals)


def _evaluated(state: State) -> Params:
    """Return the parameters that are evaluated and kept: the moving average where there is one."""
    return state.params if state.average is None else state.average
