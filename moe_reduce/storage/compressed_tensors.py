"""The layouts of compressed-tensors, which transformers and vLLM open with the package of that name.

    pack-quantized         int4, and int8 of experts: NAME_packed int32 [outputs, words], NAME_shape, NAME_scale
    int-quantized          int8: NAME int8 [outputs, inputs], NAME_scale
    float-quantized        fp8: NAME float8_e4m3fn [outputs, inputs], NAME_scale
    mxfp4-pack-quantized   mxfp4: NAME_packed uint8 [outputs, bytes], NAME_scale uint8

Scales are [outputs, groups], [1] for a whole matrix, or [blocks, blocks]; NAME_zero_point goes with affine integers.
Activations that another program would round are not rounded here. Other programs pack all matrices of int8; experts
must be packed, since transformers reads no others.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.core.expressions import Expressions
from moe_reduce.core.expressions import check as check_expressions
from moe_reduce.core.schemes import BLOCK, SCHEMES, Scheme
from moe_reduce.families import QUANTISATION, QUANTISATION_METHOD, ParameterLayout, to_stored
from moe_reduce.storage.native_layout import BFLOAT16, BYTES, FLOAT32, FP8, INTEGERS
from moe_reduce.storage.tensors import Tensors
from moe_reduce.storage.weight_parts import Part

METHOD = "compressed-tensors"  # name of the layout in config.json
FORMATS = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized"}
FLOATS = (FLOAT32, BFLOAT16, np.dtype(np.float16))
WORDS = np.dtype(np.int32)
WORD = 8  # values of 4 bits in a word
MIXED = "mixed-precision"
REGULAR = "re:"  # prefix of a target that is a regular expression


@dataclass(frozen=True)
class Shape(Part):
    """The shape of the matrix, which is stored with packed codes."""

    def to_disk(self, pieces: Sequence[tuple[ParameterLayout, np.ndarray]]) -> np.ndarray:
        """Shape on disk of the whole tensor."""
        del pieces
        return np.array(self.leaf.stored_shape, np.int64)

    def stored_dtype(self, array: Any) -> np.dtype:
        """int64."""
        del array
        return self.dtypes[0]


@dataclass(frozen=True)
class PackedZeros(Part):
    """Zero points, plus 8, packed along the outputs."""

    def from_disk(self, tensor: np.ndarray) -> np.ndarray:
        """The zero points in one tensor, int8."""
        packed = np.ascontiguousarray(tensor.T).view(np.uint8)
        values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).T
        return self.leaf.from_stored(values[: self.leaf.stored_shape[0]].astype(np.int8) - 8)

    def to_disk(self, pieces: Sequence[tuple[ParameterLayout, np.ndarray]]) -> np.ndarray:
        """One tensor of words."""
        values = (to_stored(pieces) + 8).astype(np.uint8).T
        values = np.pad(values, [(0, 0), (0, -values.shape[1] % WORD)])
        packed = values[:, ::2] | (values[:, 1::2] << 4)
        return np.ascontiguousarray(np.ascontiguousarray(packed).view(WORDS).T)

    def stored_dtype(self, array: Any) -> np.dtype:
        """int32."""
        del array
        return WORDS


@dataclass(frozen=True)
class PackedBytes(Part):
    """8-bit integers, plus 128, four in a word."""

    def from_disk(self, tensor: np.ndarray) -> np.ndarray:
        """The integers in one tensor, int8."""
        flipped = (np.ascontiguousarray(tensor).view(np.uint8) ^ 128).view(np.int8)
        return self.leaf.from_stored(flipped.reshape(self.leaf.stored_shape))

    def to_disk(self, pieces: Sequence[tuple[ParameterLayout, np.ndarray]]) -> np.ndarray:
        """One tensor of words."""
        flipped = np.ascontiguousarray(to_stored(pieces)).view(np.uint8) ^ 128
        return flipped.view(WORDS).reshape(self.stored_shape)


def parts(leaf: ParameterLayout, scheme: Scheme, packed: bool | None = None) -> list[Part]:
    """The arrays of a matrix. packed: int8 is packed in words, as int4 always is; None: as we write it."""
    inputs, outputs = leaf.record.matrix_shape
    groups, shared = scheme.scales(inputs, outputs)
    outer = shared if scheme.shares_outputs else None
    found = _codes(leaf, scheme, leaf.record.per_expert if packed is None else packed)
    scales = leaf.part("_scale", groups, outer)
    shape = scales.stored_shape[:-1] if scheme.scope == "tensor" else None
    found.append(Part("scales", scales, (BYTES,) if scheme.code == "mxfp4" else FLOATS, shape))
    if scheme.affine:
        zeros = leaf.part("_zero_point", groups, outer)
        rows, columns = zeros.stored_shape
        if scheme.code == "int4":
            found.append(PackedZeros("zeros", zeros, (WORDS,), (-(-rows // WORD), columns)))
        else:
            found.append(Part("zeros", zeros, (INTEGERS,)))
    return found


def _codes(leaf: ParameterLayout, scheme: Scheme, packed: bool) -> list[Part]:
    """The codes of a matrix, and its shape if these are packed in words."""
    size = scheme.packed(leaf.record.matrix_shape[0])
    if scheme.code == "fp8":
        return [Part("codes", leaf.part("", size), (FP8,))]
    if scheme.code == "mxfp4":
        return [Part("codes", leaf.part("_packed", size), (BYTES,))]
    if scheme.code == "int8" and not packed:
        return [Part("codes", leaf.part("", size), (INTEGERS,))]
    codes = leaf.part("_packed", size)
    shape = (codes.stored_shape[0], codes.stored_shape[1] // WORDS.itemsize)
    kind = PackedBytes if scheme.code == "int8" else Part
    whole = leaf.part("_shape", leaf.record.matrix_shape[0])
    return [
        kind("codes", codes, (WORDS,), shape, BYTES if scheme.code == "int4" else INTEGERS),
        Shape("", whole, (np.dtype(np.int64),), (2,)),
    ]


def parts_like(stored: ParameterLayout, leaf: ParameterLayout, scheme: Scheme, files: Tensors) -> list[Part]:
    """The arrays of a matrix `leaf` in the layout in which these files hold `stored`."""
    return parts(leaf, scheme, f"{_first(stored)}_packed" in files.entries)


def scheme_of(leaf: ParameterLayout, files: Tensors) -> Scheme | None:
    """The scheme of a weight; None for an array. UserError for a scheme that is not supported."""
    name = _first(leaf)
    if not {f"{name}_packed", f"{name}_scale"} & set(files.entries):
        return None
    groups = files.quantisation.get("config_groups")
    if not isinstance(groups, Mapping):
        raise UserError(f"{QUANTISATION} in {files.directory} has no config_groups: fetch config.json again")
    module, where = name.removesuffix(".weight"), f"{QUANTISATION} in {files.directory}"
    expressions = Expressions(files.directory)
    for key, group in groups.items():
        targets, weights = _group(group, f"{where}: config_groups.{key}")
        if any(_matches(target, module, expressions) for target in targets):
            return _scheme(weights, where)
    raise UserError(f"{QUANTISATION} in {files.directory} names no group for {module}: fetch config.json again")


def _group(group: Any, where: str) -> tuple[list[str], Mapping[str, Any]]:
    """(targets, weights) of a group of config_groups; UserError for values of other types."""
    targets, weights = (group.get("targets"), group.get("weights")) if isinstance(group, Mapping) else (None, None)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{where}.targets must be a list of names, got {targets!r}: fetch config.json again")
    if not isinstance(weights, Mapping):
        raise UserError(f"{where}.weights must be an object, got {weights!r}: fetch config.json again")
    regular = (target.removeprefix(REGULAR) for target in targets if target.startswith(REGULAR))
    check_expressions(f"{where}.targets", regular)
    return targets, weights


def _first(leaf: ParameterLayout) -> str:
    return leaf.name((0,) * len(leaf.stacked))


def _matches(target: str, module: str, expressions: Expressions) -> bool:
    if target.startswith(REGULAR):
        return expressions.match(target.removeprefix(REGULAR), module) is not None
    return target in ("Linear", module)


def _scheme(arguments: Mapping[str, Any], where: str) -> Scheme:
    for scheme in SCHEMES:
        if scheme.code in FORMATS and all(arguments.get(key) == value for key, value in _arguments(scheme).items()):
            return scheme
    kind = " ".join(str(arguments.get(key)) for key in ("num_bits", "type", "strategy", "group_size"))
    raise UserError(f"{where}: weights of {kind} are not supported, only int4, int8, fp8 and mxfp4")


def _arguments(scheme: Scheme) -> dict[str, Any]:
    """QuantizationArgs of a scheme."""
    kind = "float" if scheme.code in ("fp8", "mxfp4") else "int"
    found: dict[str, Any] = {"num_bits": 8 if scheme.code in ("int8", "fp8") else 4, "type": kind}
    found |= {"symmetric": not scheme.affine, "strategy": scheme.scope}
    if scheme.scope == "group":
        found["group_size"] = scheme.group
    if scheme.scope == "block":
        found["block_structure"] = [BLOCK, BLOCK]
    return found


def described(chosen: Sequence[tuple[ParameterLayout, Scheme]]) -> dict[str, Any]:
    """`quantization_config` of a model; UserError for a matrix that the layout cannot hold."""
    targets: dict[tuple[Scheme, str], list[str]] = {}
    for leaf, scheme in chosen:
        _check(leaf, scheme)
        form = FORMATS["int4"] if scheme.code == "int8" and leaf.record.per_expert else FORMATS[scheme.code]
        module = re.sub(r"\\\{(layer|expert)\\\}", r"\\d+", re.escape(leaf.tensor.name.removesuffix(".weight")))
        found = targets.setdefault((scheme, form), [])
        if f"{REGULAR}{module}$" not in found:
            found.append(f"{REGULAR}{module}$")
    formats = {form for _, form in targets}
    groups = {
        f"group_{number}": {"targets": modules, "weights": _arguments(scheme), "format": form}
        for number, ((scheme, form), modules) in enumerate(targets.items())
    }
    return {
        QUANTISATION_METHOD: METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def _check(leaf: ParameterLayout, scheme: Scheme) -> None:
    if scheme.code not in FORMATS:
        raise UserError(f"{METHOD} has no {scheme}: choose another scheme, or --format=native")
    if leaf.record.outputs_first:
        component = leaf.record.component
        raise UserError(f"{METHOD} opens no quantised token table: add {component}=keep, or choose --format=native")
    if leaf.record.per_expert and leaf.stored_expert_axis is not None:
        raise UserError(
            f"{METHOD} has a tensor for each expert, {leaf.tensor.name} all of them: choose --format=native"
        )
    if leaf.record.per_expert and (scheme.affine or scheme.scope == "block"):
        raise UserError(f"transformers opens no experts of {scheme} in {METHOD}: choose another, or --format=native")
    if leaf.parts > 1 and scheme.shares_outputs:
        raise UserError(f"{METHOD} has one {scheme} for all of {leaf.tensor.name}: choose fp8, or --format=native")
    inputs = leaf.record.matrix_shape[0]
    if scheme.code == "int4" and inputs % WORD:
        raise UserError(f"{METHOD} packs 8 inputs, and {leaf.path} has {inputs}: choose int8, or --format=native")
    if scheme.code == "int8" and leaf.record.per_expert and inputs % WORDS.itemsize:
        raise UserError(f"{METHOD} packs 4 inputs, and {leaf.path} has {inputs}: choose fp8, or --format=native")
