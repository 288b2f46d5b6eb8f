"""The layouts of AutoGPTQ, GPTQModel and AutoAWQ: unsigned integers of 4 or 8 bits, packed in words of int32.

    gptq  MODULE.qweight [inputs / n, outputs], MODULE.qzeros [groups, outputs / n], and mostly MODULE.g_idx [inputs],
          the group of each input; zero points are stored less 1, unless `checkpoint_format` is gptq_v2
    awq   MODULE.qweight [inputs, outputs / 8], MODULE.qzeros [groups, outputs / 8], in the version `gemm`

A word holds n = 32 / bits values, the first in its lowest bits; in awq the eight columns of a word are in the order of
`AWQ_ORDER`. Both have MODULE.scales [groups, outputs]; a value is scale · (integer - zero point).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.core.expressions import Expressions
from moe_reduce.core.expressions import check as check_expressions
from moe_reduce.core.schemes import GROUPS, Scheme
from moe_reduce.families import QUANTISATION, QUANTISATION_METHOD, ParameterLayout, to_stored
from moe_reduce.storage.native_layout import BFLOAT16, BYTES, FLOAT16, FLOAT32, INTEGERS
from moe_reduce.storage.tensors import Tensors
from moe_reduce.storage.weight_parts import Part

GPTQ, AWQ = "gptq", "awq"  # names of the layouts in config.json
METHODS = (GPTQ, AWQ)
BITS = {GPTQ: (4, 8), AWQ: (4,)}
VERSIONS = {GPTQ: ("gptq", "gptq_v2"), AWQ: ("gemm",)}
VERSION_KEYS = {GPTQ: ("checkpoint_format", "format"), AWQ: ("version", "format")}
WORD, WORD_BITS = np.dtype(np.int32), 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each four bits of a word
FLOATS = (FLOAT16, BFLOAT16, FLOAT32)
CODES, ZEROS, SCALES, ORDER, BIAS = "qweight", "qzeros", "scales", "g_idx", "bias"  # names of a module's tensors
WHOLE = -1  # group_size where all inputs share a scale


@dataclass(frozen=True)
class Words:
    """How integers lie in words. axis: of a tensor [rows, columns] along which they are packed."""

    bits: int
    axis: int
    order: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Values in a word."""
        return WORD_BITS // self.bits

    def unpack(self, words: np.ndarray) -> np.ndarray:
        """The integers of words, uint8, with `count` times as many rows or columns."""
        packed = np.ascontiguousarray(np.moveaxis(words, self.axis, -1)).view(np.uint8)
        values = packed if self.bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1)
        values = values.reshape(len(packed), -1, self.count)
        if self.order is not None:
            values = values[..., np.argsort(self.order)]
        return np.moveaxis(values.reshape(len(packed), -1), -1, self.axis)

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Inverse of `unpack`."""
        moved = np.moveaxis(values, self.axis, -1)
        parts = moved.reshape(len(moved), -1, self.count)
        parts = parts if self.order is None else parts[..., list(self.order)]
        parts = parts if self.bits == 8 else parts[..., ::2] | (parts[..., 1::2] << 4)
        words = np.ascontiguousarray(parts).view(WORD)[..., 0]
        return np.moveaxis(words, -1, self.axis)


@dataclass(frozen=True)
class Packed(Part):
    """Integers in words, on disk [rows, outputs]; in memory, codes packed along the inputs, or zero points.

    less: what is subtracted from the integers before they are stored.
    """

    words: Words = Words(4, 0)
    less: int = 0

    def from_disk(self, tensor: np.ndarray) -> np.ndarray:
        """The codes or zero points in one tensor."""
        mask, half = 2**self.words.bits - 1, 2 ** (self.words.bits - 1)
        values = (self.words.unpack(tensor) + np.uint8(self.less)) & np.uint8(mask)
        if self.key == "codes" and self.words.bits == 4:
            held = values[::2] | (values[1::2] << 4)  # our codes are integers plus 8 too
        else:
            held = (values - np.uint8(half)).view(np.int8) if half == 128 else values.astype(np.int8) - half
        return self.leaf.from_stored(held.T.reshape(self.leaf.stored_shape))

    def to_disk(self, pieces: Sequence[tuple[ParameterLayout, np.ndarray]]) -> np.ndarray:
        """One tensor of words."""
        mask, half = 2**self.words.bits - 1, 2 ** (self.words.bits - 1)
        held = to_stored(pieces).T
        if self.key == "codes" and self.words.bits == 4:
            values = np.stack([held & 15, held >> 4], axis=1).reshape(-1, held.shape[1])
        else:
            values = (held.astype(np.int16) + half - self.less) & mask
        return self.words.pack(np.ascontiguousarray(values.astype(np.uint8)))


@dataclass(frozen=True)
class Transposed(Part):
    """An array with its inputs first on disk."""

    def from_disk(self, tensor: np.ndarray) -> np.ndarray:
        """The array's values in one tensor."""
        return self.leaf.from_stored(tensor.T.reshape(self.leaf.stored_shape))

    def to_disk(self, pieces: Sequence[tuple[ParameterLayout, np.ndarray]]) -> np.ndarray:
        """One tensor, made of the pieces of all parameters that share it."""
        return np.ascontiguousarray(to_stored(pieces).T)


def scheme_of(leaf: ParameterLayout, files: Tensors) -> Scheme | None:
    """The scheme of a weight; None for an array. UserError for bits, groups or a version that are not supported."""
    module = leaf.module((0,) * len(leaf.stacked))
    if f"{module}.{CODES}" not in files.entries:
        return None
    stated, method = _stated(files, module), files.quantisation[QUANTISATION_METHOD]
    bits, version = stated.get("bits"), _version(files)
    size: Any = stated.get("group_size")
    for name, value, known in (
        ("version", version, VERSIONS[method]),
        ("bits", bits, BITS[method]),
        ("group_size", size, (WHOLE, *GROUPS)),
    ):
        if value not in known:
            shown = f"{QUANTISATION}: {name}={value!r} of {method} in {files.directory}"
            raise UserError(f"{shown} is not supported, only {' and '.join(map(str, known))}")
    code, inputs = "int4" if bits == 4 else "int8", leaf.record.matrix_shape[0]
    if size == WHOLE:
        return Scheme(code, "channel", affine=True)
    if inputs % size or leaf.parts > 1:
        why = f"{inputs} inputs in groups of {size}" if inputs % size else "several matrices in one"
        raise UserError(f"{module} in {files.directory} has {why}, which is not supported: dequantise it elsewhere")
    return Scheme(code, "group", size, affine=True)


def _version(files: Tensors) -> Any:
    """The version of the layout that config.json states, in small letters; the first without a statement."""
    method = files.quantisation[QUANTISATION_METHOD]
    if files.quantisation.get("is_marlin_format"):
        return "marlin"
    stated = next((files.quantisation[key] for key in VERSION_KEYS[method] if files.quantisation.get(key)), None)
    return VERSIONS[method][0] if stated is None else str(stated).lower()


def _stated(files: Tensors, module: str) -> Mapping[str, Any]:
    """Settings of a module in config.json: GPTQModel's `dynamic` has rules for some modules."""
    rules = files.quantisation.get("dynamic")
    if not isinstance(rules, Mapping):
        return files.quantisation
    expressions, patterns = Expressions(files.directory), {key.removeprefix("+:"): rules[key] for key in rules}
    check_expressions(f"{QUANTISATION}.dynamic in {files.directory}", patterns)
    for pattern, changes in patterns.items():
        if isinstance(changes, Mapping) and expressions.match(pattern, module) is not None:
            return {**files.quantisation, **changes}
    return files.quantisation


def parts_like(stored: ParameterLayout, leaf: ParameterLayout, scheme: Scheme, files: Tensors) -> list[Part]:
    """The arrays of a matrix `leaf` in the layout in which these files hold `stored`."""
    inputs, outputs = leaf.record.matrix_shape
    groups, _ = scheme.scales(inputs, outputs)
    bits, of_gptq = int(scheme.bits), files.quantisation[QUANTISATION_METHOD] == GPTQ
    along = Words(bits, 1, None if of_gptq else AWQ_ORDER)
    words = Words(bits, 0) if of_gptq else along
    if outputs % along.count or inputs % words.count:
        raise UserError(f"{leaf.path} is {inputs} by {outputs}, and words hold {along.count}: give multiples of that")
    codes = _named(leaf.part("", scheme.packed(inputs)), CODES)
    zeros, scales = (_named(leaf.part("", groups), name) for name in (ZEROS, SCALES))
    shape = (inputs // words.count, outputs) if of_gptq else (inputs, outputs // along.count)
    less = int(of_gptq and _version(files) == GPTQ)
    # a scale of each output is fp32 in our own layout
    wide = FLOAT32 if scheme.scope == "channel" else None
    found: list[Part] = [
        Packed("codes", codes, (WORD,), shape, BYTES if bits == 4 else INTEGERS, words),
        Packed("zeros", zeros, (WORD,), (groups, outputs // along.count), INTEGERS, along, less),
        Transposed("scales", scales, FLOATS, (groups, outputs), wide),
    ]
    if _named(stored, ORDER).names()[0] in files.entries:
        found.append(Part("", _named(leaf.part("", inputs, 0), ORDER), (WORD,)))
    return found


def _named(leaf: ParameterLayout, name: str) -> ParameterLayout:
    """The layout of another tensor of the same module."""
    module = leaf.tensor.name.removesuffix(".weight")
    return dataclasses.replace(leaf, tensor=leaf.tensor._replace(name=f"{module}.{name}"))


def order_of(leaf: ParameterLayout, scheme: Scheme, files: Tensors, index: tuple[int, ...]) -> np.ndarray | None:
    """The group of each input of one matrix; None where groups are neighbours, as without act-order."""
    name = _named(leaf, ORDER).name(index)
    inputs = leaf.record.matrix_shape[0]
    if name not in files.entries or scheme.scope == "channel":
        return None
    groups = files.read(name)
    return None if np.array_equal(groups, np.arange(inputs) // scheme.group) else groups


def check_order(leaf: ParameterLayout, scheme: Scheme, files: Tensors) -> None:
    """Raise UserError for a matrix whose groups are chosen by activations, which a product cannot read."""
    for index in np.ndindex(leaf.stacked):
        if order_of(leaf, scheme, files, index) is not None:
            name = _named(leaf, ORDER).name(index)
            raise UserError(
                f"{name} in {files.directory} spreads groups over all inputs (desc_act), which only prune and score "
                "--layer-wise read: give a version with desc_act=false"
            )


def is_spare(name: str, files: Tensors) -> bool:
    """True for the biases of zero that AutoGPTQ adds to modules without one."""
    module = name.removesuffix(f".{BIAS}")
    return module != name and f"{module}.{CODES}" in files.entries and not np.any(files.read(name))
