"""Loading and saving model directories; loading GGUF files."""

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_reduce import families
from moe_reduce.core import hub, outputs, trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.gguf_file import is_gguf
from moe_reduce.core.provenance import Step
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameter_count
from moe_reduce.models.weights import Quantised, is_quantised
from moe_reduce.storage import manifest, native_layout
from moe_reduce.storage.parameter_tensors import open_tensors, read_params, write_items
from moe_reduce.storage.tensors import SHARD_BYTES, TensorItem, write_tensors

# Files that are copied to a saved model from the directory that it was loaded from.
COMPANIONS = (
    "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
CONVERSION = "convert"  # command of the step that made a model directory of a GGUF file

KIND = outputs.json_kind("a model directory", manifest.MANIFEST_FILE, ("chain", "files", "parameters"))

Also = Callable[[Path, Mapping[str, str]], Collection[str]]


def load(
    path: str | Path,
    dtype: Any = None,
    execution: ExecutionConfig | None = None,
    shardings: trees.Tree | None = None,
    blocks: bool = False,
) -> Model:
    """Load a model directory, ours or a Hugging Face one of a family in moe_reduce.families, or a GGUF file.

    path: a path, or the name of a model on the Hugging Face hub, which is fetched into the hub's cache.

    dtype: dtype of the parameters, such as "bfloat16"; None keeps the stored one. execution: how to compute; None
    chooses by platform. shardings: tree of jax.sharding.Sharding with the structure of the parameters; each device then
    reads only its own slices. Quantised tensors of a GGUF file are dequantised to fp32. blocks: those of Q8_0 and Q4_0
    stay quantised instead, where all layers of a matrix have them. Raises UserError, naming the file and the tensor or
    key, when the model is not whole.
    """
    place = hub.local(Path(path))
    config, raw = families.read_config(place)
    params = read_params(open_tensors(place, config, blocks), config, dtype, shardings)
    execution = (execution or ExecutionConfig()).resolve(jax.default_backend())
    return Model(config, params, execution, place, raw, manifest.read_chain(place))


def save(
    model: Model,
    path: str | Path,
    step: Step | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    also: Also | None = None,
) -> None:
    """Write a model directory: config.json, safetensors, the tokenizer of `model.source`, manifest.json.

    Files are written to a temporary directory beside `path`, which is renamed at the end, so a kill or a full disk
    leaves nothing half-made. step: appended to the model's history, which begins with a conversion where the model was
    read from a GGUF file and saved as it is. overwrite: replace a model directory that was written by this function
    (see moe_reduce.core.outputs). shard_bytes: largest size of a weight file. also: writes further files; called with
    the unfinished directory and the SHA-256 of each weight file by name, it returns the names of files with dates and
    times, which get no hash. A model with quantised weights is saved as one
    of our own, whatever its family. Raises UserError when the path exists or cannot be written.
    """
    flat = trees.flatten(model.params)
    unquantised = [leaf for leaf in flat.values() if not is_quantised(leaf)]
    # other programs must not take the integers for the weights
    config = model.config if len(unquantised) == len(flat) else families.own_config(model.config)
    contents = Contents(
        config=config,
        items=write_items(model.params, config),
        dtype=str(unquantised[0].dtype),  # that of the embedding, if not quantised
        source=model.source,
        hf_config=model.hf_config,
        chain=_chain(model, step),
        quantisation=native_layout.described(
            {path: leaf.scheme for path, leaf in flat.items() if isinstance(leaf, Quantised)}
        ),
    )
    write_directory(contents, path, overwrite, shard_bytes, also)


def _chain(model: Model, step: Step | None) -> tuple[Step, ...]:
    if step is None and not model.chain and model.source is not None and is_gguf(model.source):
        count = parameter_count(model.config)
        step = Step(CONVERSION, {}, (manifest.input_of(model.source),), count, count)
    return model.chain if step is None else (*model.chain, step)


@dataclass(frozen=True)
class Contents:
    """Content of a model directory to be written; tensors may be copied from other files, one at a time.

    quantisation: layout of quantised weights, for config.json; None for the one that needs no statement.
    """

    config: ModelConfig
    items: Iterable[TensorItem]
    dtype: str
    source: Path | None  # directory or GGUF file to copy the tokenizer from
    hf_config: dict[str, Any] | None
    chain: tuple[Step, ...]
    quantisation: Mapping[str, Any] | None = None


def write_directory(
    contents: Contents,
    path: str | Path,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    also: Also | None = None,
) -> None:
    """Write a model directory whole or not at all; arguments as in `save`."""
    with outputs.directory(Path(path).absolute(), KIND, overwrite) as unfinished:
        _write(contents, unfinished, shard_bytes, also)


def _write(contents: Contents, directory: Path, shard_bytes: int, also: Also | None) -> None:
    hashes = write_tensors(directory, contents.items, shard_bytes)
    raw = families.to_hf(contents.config, contents.hf_config, contents.dtype)
    raw.pop(families.QUANTISATION, None)
    if contents.quantisation is not None:
        raw[families.QUANTISATION] = contents.quantisation
    (directory / families.CONFIG_FILE).write_text(families.dumps(raw))
    if contents.source is not None:
        _copy_companions(contents.source, directory)
    reports = () if also is None else also(directory, hashes)
    manifest.write(directory, contents.config, contents.chain, hashes, reports)


def _copy_companions(source: Path, directory: Path) -> None:
    if is_gguf(source):
        load_tokenizer(source).save(directory)
        return
    for file in [source / name for name in COMPANIONS]:
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
