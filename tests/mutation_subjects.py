"""Tiny valid files of every format that is read, and the function that reads each, for the mutation harness."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot  # noqa: F401  imported before the forks, as are the next four
import numpy as np
import pandas  # noqa: F401
import pyarrow
import pyarrow.parquet
import sentencepiece  # noqa: F401
import tokenizers
import transformers  # noqa: F401
import zstandard
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_llama
from quantised_models import quantise_int8

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter, adapter_directory
from moe_reduce.adapters.hypernetwork import directory as hypernetwork_directory
from moe_reduce.adapters.hypernetwork import hypernetwork
from moe_reduce.commands import inspect
from moe_reduce.core.config import AdapterConfig, DataConfig, ExecutionConfig, ModelConfig, RunConfig, TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.hypernetwork_config import HypernetworkConfig
from moe_reduce.core.provenance import Input, Step
from moe_reduce.data import library_reader, sources  # noqa: F401
from moe_reduce.data.pieces import SPLITS, TRAIN
from moe_reduce.data.prepare import prepare
from moe_reduce.data.rows import TokenRows
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.reduction import scores
from moe_reduce.reports import comparison, results
from moe_reduce.runs import workdir
from moe_reduce.training.checkpoints import Checkpoints
from moe_reduce.training.metrics import read_metrics
from moe_reduce.training.steps import State

CONFIG = ModelConfig(
    vocab_size=61, layers=2, width=12, query_heads=2, key_value_heads=1, head_width=6, feed_forward_width=20,
    family="llama",
)  # fmt: skip
HYPERNETWORK = HypernetworkConfig(
    adapter=AdapterConfig(method="lora", rank=2, targets="q,v"), encoder="encoder",
)  # fmt: skip
TEXTS = ["One document, naïve.\n", "\tAnother  one 🙂\r\n", "last " * 40]
ROWS = "".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(TEXTS)).encode()


class Subject(NamedTuple):
    """A kind of input: its name, what makes a valid one, the files that are mutated, and what reads them all."""

    name: str
    make: Callable[[Path], None]
    files: str  # glob below the directory
    read: Callable[[Path], Any]


def _array(array: Any) -> tuple[Any, ...]:
    array = np.asarray(array)
    return array.shape, str(array.dtype), array.tobytes()


def _arrays(tree: Any) -> dict[str, tuple[Any, ...]]:
    """Values by path, those of a quantised weight included."""
    return {jax.tree_util.keystr(path): _array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _model(directory: Path, shard_bytes: int = 10**9) -> None:
    model = Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ExecutionConfig())
    step = Step("train", {"seed": 0}, (Input("text", "0" * 64),), 0, 10, {"loss": 1.0})
    moe_reduce.save(model, directory, step, shard_bytes=shard_bytes)


def _read_model(directory: Path) -> Any:
    model = moe_reduce.load(directory)
    return model.config, _arrays(model.params), model.chain


def _adapter(directory: Path) -> None:
    model = Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ExecutionConfig())
    made = adapter.init(AdapterConfig(method="lora", rank=2, targets="attention"), model)
    directory.mkdir()
    adapter_directory.save(made, CONFIG, Input("base", "0" * 64), directory)


def _peft(directory: Path) -> None:
    _adapter(directory)
    for file in directory.glob("adapter.*"):
        file.unlink()


def _read_adapter(directory: Path) -> Any:
    found = adapter_directory.load(directory, CONFIG, None)
    return found.config, _arrays(found.tree)


def _sentencepiece(directory: Path) -> None:
    directory.mkdir()
    train_tokenizer(iter(TEXTS * 20), 290).save(directory)


def _tokenizer_json(directory: Path) -> None:
    directory.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(TEXTS * 20, trainer)
    made.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _read_tokenizer(directory: Path) -> Any:
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode_batch(TEXTS)
    return ids, [tokenizer.decode(row) for row in ids], tokenizer.end_of_text, tokenizer.begin_of_text


def _written(name: str, content: bytes) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        directory.mkdir()
        (directory / name).write_bytes(content)

    return make


def _parquet(directory: Path) -> None:
    directory.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), directory / "text.parquet")


def _read_documents(directory: Path) -> Any:
    return list(sources.documents(DataConfig(source=str(directory))))


def _token_ids(directory: Path) -> None:
    directory.mkdir()
    np.save(directory / "ids.npy", np.arange(32, dtype=np.int32).reshape(4, 8))


def _read_token_ids(directory: Path) -> Any:
    source = TokenRows(DataConfig(source=str(directory / "ids.npy"), sequence_length=8, validation_fraction=0.0), 61)
    return [_array(source.row(TRAIN, index, 8)[0]) for index in range(source.rows(TRAIN, 8))]


def _cached(directory: Path) -> DataConfig:
    return DataConfig(source=str(directory / "corpus.jsonl"), cache=str(directory / "cache"), workers=1)


def _token_cache(directory: Path) -> None:
    directory.mkdir()
    (directory / "corpus.jsonl").write_bytes(ROWS * 20)
    prepare(_cached(directory), 290)


def _read_token_cache(directory: Path) -> Any:
    store, tokenizer = prepare(_cached(directory), 290)
    assert tokenizer is not None
    tokens = [_array(store.window(split, 0, store.length(split))) for split in SPLITS]
    return tokens, store.end_of_text, tokenizer.encode_batch(TEXTS)


def _run(directory: Path) -> None:
    directory.mkdir()
    summary = {
        "name": "one", "seed": 0, "tokens": 640, "steps": 10, "parameters": 100, "bytes": 400,
        "train_flops_per_token": 600.0, "validation": {"loss": 2.0, "perplexity": 7.4, "accuracy": 0.4},
        "tokens_per_second": 100.0, "expert_use": [[0.5, 0.5]], "data": {"fingerprint": "0" * 64},
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": step, "split": split, "loss": 3.0} for step in (5, 10) for split in ("train", "validation")]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_run(directory: Path) -> Any:
    results.collect([directory], "title", "command", directory / "out")
    return (directory / "out/summary.json").read_text(), (directory / "out/curves.jsonl").read_text()


def _read_run_to_compare(directory: Path) -> Any:
    found = comparison.entries([directory])
    return comparison.table(comparison.rows(found, {entry.name: None for entry in found}))


def _read_run_to_resume(directory: Path) -> Any:
    return workdir.finished(directory), read_metrics(directory / "metrics.jsonl")


def _run_config(directory: Path) -> None:
    workdir.claim(directory, RunConfig())
    (directory / "checkpoints").mkdir()


def _read_run_config(directory: Path) -> Any:
    workdir.claim(directory, RunConfig())
    return (directory / "config.json").read_text()


def _scores(directory: Path) -> None:
    directory.mkdir()
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    scores.write(scores.Scores(8, values, {"reap": values / 8}, values, Input("model", "0" * 64)), directory / "s.json")


def _read_scores(directory: Path) -> Any:
    found = scores.read(directory / "s.json")
    by_layer = found.counts_by_layer
    named = {name: _array(values) for name, values in found.scores.items()}
    return found.tokens, _array(found.counts), named, None if by_layer is None else _array(by_layer), found.model


def _state(step: int) -> State:
    params = {"layer": {"weight": jnp.full((4, 4), step, jnp.float32)}, "scale": jnp.arange(3.0) + step}
    return State(jnp.int32(step), params, {"mean": jax.tree.map(jnp.negative, params)}, None)


def _checkpoints(directory: Path) -> None:
    kept = Checkpoints(directory / "checkpoints", TrainConfig())
    for step in (2, 4):
        kept.save(step, _state(step), {"corpus": "0" * 64, "next_index": step})
        kept.wait()
    kept.close()


def _read_checkpoints(directory: Path) -> Any:
    def set_position(step: int, position: dict[str, Any]) -> None:
        if position["next_index"] != step:
            raise ValueError(position["next_index"])
        if position["corpus"] != "0" * 64:
            raise UserError("another corpus")

    resumed = Checkpoints(directory / "checkpoints", TrainConfig()).resume(
        jax.eval_shape(lambda: _state(0)), set_position
    )
    assert resumed is not None
    state, step = resumed
    if step == 2 and jax.tree.all(jax.tree.map(np.array_equal, state, _state(2))):
        raise UserError("a line says that the run goes on from step 2")
    return step, [_array(leaf) for leaf in jax.tree.leaves(state)]


def _int8(directory: Path) -> None:
    model = Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ExecutionConfig())
    moe_reduce.save(quantise_int8(model), directory)


def _compressed_tensors(directory: Path) -> None:
    base = directory.with_name("base")
    _model(base)
    arguments = [f"--model={base}", f"--out={directory}", "--scheme=int8", "--format=compressed-tensors"]
    assert main(["quantize", *arguments]) == 0
    shutil.rmtree(base)


def _gguf(directory: Path, kind: Kind = Kind.F32) -> None:
    directory.mkdir()
    write_llama(directory / "m.gguf", kind)


def _read_gguf(directory: Path) -> Any:
    model = moe_reduce.load(directory / "m.gguf")
    return model.config, _arrays(model.params)


def _hypernetwork(directory: Path) -> None:
    model = Model(CONFIG, init_params(CONFIG, jax.random.key(0)), ExecutionConfig())
    made = hypernetwork.init(HYPERNETWORK, model, 3)
    directory.mkdir()
    encoder = {"name": "encoder", "sha256": "0" * 64, "width": 3}
    hypernetwork_directory.save(
        hypernetwork_directory.Trained(made, Input("base", "0" * 64), encoder, ("a",)), directory
    )


def _read_hypernetwork(directory: Path) -> Any:
    found = hypernetwork_directory.load(directory)
    made = found.hypernetwork
    return made.config, made.base, _arrays(made.params), found.base, found.encoder, found.tasks


SUBJECTS = (
    Subject("safetensors", _model, "model.safetensors", _read_model),
    Subject("sharded safetensors", lambda directory: _model(directory, 4000), "model-*", _read_model),
    Subject("index", lambda directory: _model(directory, 4000), "*.index.json", _read_model),
    Subject("config.json", _model, "config.json", _read_model),
    Subject("manifest.json", _model, "manifest.json", lambda directory: inspect.describe(directory, verify=True)),
    Subject("int8", _int8, "model.safetensors", _read_model),
    Subject("compressed-tensors", _compressed_tensors, "[cm]o*", _read_model),
    Subject("gguf", _gguf, "*", _read_gguf),
    Subject("gguf Q8_0", lambda directory: _gguf(directory, Kind.Q8_0), "*", _read_gguf),
    Subject("tokenizer of gguf", _gguf, "*", lambda directory: _read_tokenizer(directory / "m.gguf")),
    Subject("hypernetwork", _hypernetwork, "*", _read_hypernetwork),
    Subject("adapter", _adapter, "adapter.*", _read_adapter),
    Subject("adapter of PEFT", _peft, "adapter_*", _read_adapter),
    Subject("tokenizer.model", _sentencepiece, "tokenizer.model", _read_tokenizer),
    Subject("tokenizer.json", _tokenizer_json, "tokenizer.json", _read_tokenizer),
    Subject("tokenizer_config.json", _tokenizer_json, "tokenizer_config.json", _read_tokenizer),
    Subject("txt", _written("a.txt", TEXTS[0].encode()), "*", _read_documents),
    Subject("txt.gz", _written("a.txt.gz", gzip.compress(TEXTS[0].encode())), "*", _read_documents),
    Subject("jsonl", _written("a.jsonl", ROWS), "*", _read_documents),
    Subject("jsonl.gz", _written("a.jsonl.gz", gzip.compress(ROWS)), "*", _read_documents),
    Subject("jsonl.zst", _written("a.jsonl.zst", zstandard.compress(ROWS)), "*", _read_documents),
    Subject("parquet", _parquet, "*", _read_documents),
    Subject("npy", _token_ids, "ids.npy", _read_token_ids),
    Subject("tokens", _token_cache, "cache/*/*", _read_token_cache),
    Subject("result", _run, "*.json*", _read_run),
    Subject("compared run", _run, "summary.json", _read_run_to_compare),
    Subject("resumed run", _run, "*.json*", _read_run_to_resume),
    Subject("config of a run", _run_config, "config.json", _read_run_config),
    Subject("scores", _scores, "s.json", _read_scores),
    Subject("checkpoints", _checkpoints, "checkpoints/4/**/*", _read_checkpoints),
)
