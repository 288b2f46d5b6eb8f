"""Quantisation-aware training: schemes by which matrices are rounded while they train."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QATConfig:
    """Schemes of quantisation-aware training (quantization/fake.py); none by default."""

    # one scheme for all matrices but the router, such as int4-g64 or ternary, and exceptions by component, as in
    # "int4,attention=int8,embedding=keep"; components that no scheme names stay as they are, as in "experts=ternary"
    schemes: str = ""
