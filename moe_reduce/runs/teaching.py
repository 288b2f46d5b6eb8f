"""The teacher of a distillation: checked before training, then loaded for every step, or run once over the text."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moe_reduce.core import locks
from moe_reduce.core.config import DataConfig, DistillConfig, ExecutionConfig, MeshConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.data import teacher_logits
from moe_reduce.data.batches import WholeSplit, fingerprint
from moe_reduce.data.pieces import TRAIN
from moe_reduce.data.shards import TokenSource
from moe_reduce.data.teacher_logits import Origin, TaughtTokens, TeacherLogits
from moe_reduce.data.tokenizers import Tokenizer, load_tokenizer
from moe_reduce.families import read_config
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import stored_params
from moe_reduce.storage import manifest
from moe_reduce.storage.model_directory import load
from moe_reduce.storage.parameter_tensors import open_tensors, widest
from moe_reduce.training import sharding
from moe_reduce.training.distillation import Distillation, most_probable
from moe_reduce.training.job import Job
from moe_reduce.training.task import TEACHER

COMPARED = 512  # tokens of two vocabularies that are compared


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a run, as its batches read it."""

    tokens: TokenSource
    data: DataConfig
    batch_size: int


def resolved(distill: DistillConfig) -> DistillConfig:
    """Record the teacher's hash. Raises UserError where the teacher is missing, or another one than recorded."""
    if not distill.active:
        return distill
    read_teacher(distill)
    found = input_of(distill).sha256
    if distill.teacher_sha256 not in (None, found):
        raise UserError(
            f"distill.teacher={distill.teacher} is another one than distill.teacher_sha256 says (its hash is {found}): "
            f"give the teacher with the hash {distill.teacher_sha256}"
        )
    return dataclasses.replace(distill, teacher_sha256=found)


def inputs(distill: DistillConfig) -> tuple[Input, ...]:
    """Inputs of a step that the distillation adds: its teacher, if one counts."""
    return (input_of(distill),) if distill.active else ()


def input_of(distill: DistillConfig) -> Input:
    """Name an active distillation's teacher as the history of a model does."""
    assert distill.teacher is not None
    return manifest.input_of(Path(distill.teacher))


def read_teacher(distill: DistillConfig, key: str = "distill.teacher") -> ModelConfig:
    """Read the architecture of an active distillation's teacher; UserError, which begins with the key, without one."""
    try:
        return read_config(Path(str(distill.teacher)))[0]
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def check(distill: DistillConfig, model: ModelConfig, mesh: MeshConfig, key: str = "distill.teacher") -> None:
    """Raise UserError when the teacher has another vocabulary than the model, or does not divide over the mesh."""
    if not distill.active:
        return
    teacher = read_teacher(distill, key)
    if teacher.vocab_size != model.vocab_size:
        raise UserError(
            f"{key}={distill.teacher} has a vocabulary of {teacher.vocab_size} tokens and the model one of "
            f"{model.vocab_size}: choose a teacher with the model's vocabulary"
        )
    mesh.check_fits(teacher)


def check_vocabulary(distill: DistillConfig, tokenizer: Tokenizer | None, key: str = "distill.teacher") -> None:
    """Raise UserError when the teacher's tokenizer gives other tokens to the ids of the text.

    Passes where the text is token ids, or the teacher's directory holds no tokenizer.
    """
    if not distill.active or tokenizer is None:
        return
    try:
        teachers = load_tokenizer(str(distill.teacher))
    except UserError:
        return
    if teachers.hash == tokenizer.hash:
        return
    size = min(teachers.vocab_size, tokenizer.vocab_size)
    for token in np.unique(np.linspace(0, size - 1, COMPARED, dtype=int)).tolist():
        ours, theirs = (one.decode([token]) for one in (tokenizer, teachers))
        if ours.strip() != theirs.strip():
            raise UserError(
                f"{key}={distill.teacher} has another vocabulary than the text: its token {token} is {theirs!r}, not "
                f"{ours!r}; set data.tokenizer to the teacher's, or choose another teacher"
            )


def distillation_of(distill: DistillConfig, execution: ExecutionConfig) -> Distillation | None:
    """Return the distillation of a loss; None where no teacher counts."""
    if not distill.active:
        return None
    return Distillation(distill, None if distill.logits else Model(read_teacher(distill), {}, execution))


def planned(job: Job, distill: DistillConfig) -> Job:
    """Return the job with the abstract leaves of its live teacher, or with the arrays of a stored one."""
    if not distill.active:
        return job
    if distill.logits is not None:
        return dataclasses.replace(job, stored_teacher=True)
    return dataclasses.replace(job, frozen=job.frozen | {TEACHER: abstract_teacher(str(distill.teacher)).params})


def prepared(job: Job, distill: DistillConfig, mesh: Any, tokens: TokenSource) -> tuple[Job, TokenSource]:
    """Return the job of `planned` with the teacher's arrays, and the tokens with its stored distribution."""
    if not distill.active:
        return job, tokens
    if distill.logits is None:
        frozen = job.frozen | {TEACHER: load_teacher(str(distill.teacher), job.execution, mesh).params}
        return dataclasses.replace(job, frozen=frozen), tokens
    return job, stored(distill, Text(tokens, job.data, job.train.batch_size), job.execution, mesh)


def abstract_teacher(directory: str) -> Model:
    """Return the model of a directory with abstract leaves of the widest dtype that it stores."""
    config, _ = read_config(Path(directory))
    dtype = widest({entry.dtype for entry in open_tensors(Path(directory), config).entries.values()})
    return Model(config, stored_params(config, dtype), ExecutionConfig())


def load_teacher(directory: str, execution: ExecutionConfig, mesh: Any) -> Model:
    """Load the model of a directory onto the mesh."""
    config, _ = read_config(Path(directory))
    return load(directory, None, execution, sharding.model_shardings(mesh, config))


def stored(distill: DistillConfig, text: Text, execution: ExecutionConfig, mesh: Any) -> TaughtTokens:
    """Open the teacher's stored distribution, computing the rows that are missing, and put it beside the tokens.

    Raises UserError for a store of another teacher, text or temperature, while another process works on it, and where
    rows are missing in a run of several processes.
    """
    assert distill.logits is not None
    directory, vocabulary = Path(distill.logits), read_teacher(distill).vocab_size
    origin = Origin(
        teacher=input_of(distill).sha256,
        corpus=fingerprint(text.tokens, text.data),
        temperature=distill.temperature,
        sequence_length=text.data.sequence_length,
        document_mask=text.data.document_mask,
        rows=text.tokens.rows(TRAIN, text.data.sequence_length),
        largest=min(teacher_logits.LARGEST, vocabulary),
    )
    found = TeacherLogits(directory, origin)
    if not found.complete:
        if jax.process_count() > 1:
            raise UserError(f"{directory} lacks the logits of some rows: make them in a run of one process first")
        with _alone(directory), found.writing():
            _compute(found, distill, text, load_teacher(str(distill.teacher), execution, mesh), mesh)
    return TaughtTokens(text.tokens, found)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(directory / ".lock"))
        except locks.LockHeld as holder:
            raise UserError(f"{directory} is being written by {holder}: wait until that run has made it") from None
        except locks.LocksMissing:
            pass  # two runs would write the same numbers
        yield


def _compute(found: TeacherLogits, distill: DistillConfig, text: Text, teacher: Model, mesh: Any) -> None:
    """Run the teacher over the rows of the training text that are not stored yet."""
    skeleton = teacher.with_params({})

    def distribution(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        return most_probable(skeleton.with_params(params).apply(batch).logits_BTV, distill.temperature)

    run, batches = sharding.compiled(distribution, mesh), WholeSplit(text.tokens, text.data, text.batch_size)
    assert found.done is not None
    first = found.done // text.batch_size
    size = found.origin.rows * found.origin.sequence_length * found.origin.largest * 6 / 1e9
    print(f"teacher: {found.origin.rows:,} rows of text, {size:.2f} GB in {found.directory}", flush=True)
    for number in tqdm(range(first, len(batches)), unit="batch", disable=not sys.stderr.isatty()):
        arrays = run(teacher.params, sharding.put_batch(mesh, batches[number]))
        ids, values = (np.asarray(array) for array in arrays)
        found.write(number * text.batch_size, {teacher_logits.IDS: ids, teacher_logits.LOG_PROBABILITIES: values})
