"""Formats of quantised matrices: how a value is coded, how many values share a scale, and the bytes that this takes."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from moe_reduce.core.errors import UserError

Code = Literal["int8", "int4", "fp8", "nf4", "mxfp4", "ternary"]
Scope = Literal["tensor", "channel", "group", "block"]

PER_BYTE: dict[Code, int] = {"int8": 1, "int4": 2, "fp8": 1, "nf4": 2, "mxfp4": 2, "ternary": 5}  # values in a byte
GROUPS = (32, 64, 128)  # inputs that may share a scale
BLOCK = 128  # sides of a square block that shares a scale
SECOND_GROUP = 256  # scales of NF4 that share a scale of their own (QLoRA, arXiv:2305.14314)


@dataclass(frozen=True)
class Scheme:
    """Format of a quantised matrix.

    code: int8, int4, fp8 (e4m3), nf4 (16 quantiles of a Gaussian, arXiv:2305.14314), mxfp4 (e2m1, OCP microscaling
    1.0) or ternary (-1, 0 and 1, arXiv:2402.17764). scope: the values that share a scale: all of a matrix, all inputs
    of an output, `group` inputs of an output (0: the largest of GROUPS that divides them), or a block of 128 inputs by
    128 outputs. affine: each scale has a zero point, so that the range need not be symmetric.
    """

    code: Code
    scope: Scope
    group: int = 0
    affine: bool = False

    def __str__(self) -> str:
        """Name that `parse` reads."""
        return next(name for name, scheme in NAMES.items() if scheme == self)

    def block(self, inputs: int, outputs: int) -> tuple[int, int]:
        """(inputs, outputs) of the values of a matrix [inputs, outputs] that share a scale."""
        sizes = {"tensor": (inputs, outputs), "channel": (inputs, 1), "group": (self.group, 1), "block": (BLOCK, BLOCK)}
        return sizes[self.scope]

    @property
    def shares_outputs(self) -> bool:
        """True if several outputs share a scale."""
        return self.scope in ("tensor", "block")

    @property
    def bits(self) -> float:
        """Bits of a value, without its share of a scale."""
        return 8 / PER_BYTE[self.code]

    def scales(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Numbers of scales along the inputs and along the outputs of a matrix."""
        rows, columns = self.block(inputs, outputs)
        return math.ceil(inputs / rows), math.ceil(outputs / columns)

    def packed(self, inputs: int) -> int:
        """Bytes that hold the values of one output."""
        return math.ceil(inputs / PER_BYTE[self.code])

    def bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of a matrix [inputs, outputs], scales and zero points included."""
        count = math.prod(self.scales(inputs, outputs))
        if self.code == "nf4":
            return self.packed(inputs) * outputs + count + 4 * math.ceil(count / SECOND_GROUP) + 4
        scale = 1 if self.code == "mxfp4" else 2 if self.scope == "group" else 4
        return self.packed(inputs) * outputs + count * (scale + self.affine)

    def fitted(self, inputs: int, what: str) -> "Scheme":
        """The scheme of a matrix with this many inputs; UserError if its groups do not divide them. what: its name."""
        if self.scope != "group" or (self.group and inputs % self.group == 0):
            return self
        sizes = (self.group,) if self.code in ("nf4", "mxfp4") else GROUPS
        fitting = [dataclasses.replace(self, group=size) for size in sizes if inputs % size == 0]
        if fitting and not self.group:
            return fitting[-1]
        remedy = f"choose {fitting[-1]}" if fitting else "choose another scheme for it, or keep it"
        groups = f"groups of {self.group or sizes[0]}"
        raise UserError(f"{self}: {groups} do not divide the {inputs} inputs of {what}: {remedy}")


def _integers(code: Code) -> dict[str, Scheme]:
    """Schemes of an integer code by name."""
    channel = "int8" if code == "int8" else f"{code}-channel"
    found = {channel: Scheme(code, "channel")} | {f"{code}-g{size}": Scheme(code, "group", size) for size in GROUPS}
    affine = {
        name.replace(code, f"{code}-affine"): Scheme(code, scheme.scope, scheme.group, affine=True)
        for name, scheme in found.items()
    }
    return found | affine


NAMES: dict[str, Scheme] = {
    **_integers("int8"),
    **_integers("int4"),
    "fp8": Scheme("fp8", "channel"),
    "fp8-tensor": Scheme("fp8", "tensor"),
    "fp8-block": Scheme("fp8", "block"),
    "nf4": Scheme("nf4", "group", 64),
    "mxfp4": Scheme("mxfp4", "group", 32),
    "ternary": Scheme("ternary", "tensor"),
}
NAMES |= {"int4": Scheme("int4", "group"), "int4-affine": Scheme("int4", "group", affine=True)}
SCHEMES = tuple(scheme for scheme in NAMES.values() if scheme.group or scheme.scope != "group")  # those of one matrix


KEEP = "keep"  # in place of the scheme of a component that stays as it is


def split(text: str) -> tuple[str | None, dict[str, str]]:
    """Names of schemes in a text such as int4,attention=int8,router=keep: (of all components, by component)."""
    usual, named = None, {}
    for part in filter(None, text.split(",")):
        component, equals, name = part.rpartition("=")
        if equals:
            named[component] = name
        else:
            usual = name
    return usual, named


def parse(name: str) -> Scheme:
    """The scheme of a name, such as int8, int4, int4-affine-g64 or fp8-block; UserError for others."""
    if name not in NAMES:
        raise UserError(f"scheme {name!r} is unknown; known: {', '.join(NAMES)}")
    return NAMES[name]
