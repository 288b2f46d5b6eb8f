"""Distillation: the teacher whose distribution over the next token a model learns beside the token itself."""

from dataclasses import dataclass

from moe_reduce.core.checks import positive
from moe_reduce.core.errors import UserError


@dataclass(frozen=True)
class DistillConfig:
    """Loss weight · τ² · KL(teacher ‖ model) + (1 − weight) · cross-entropy, with temperature τ (arXiv:1503.02531)."""

    teacher: str | None = None  # model directory of any family with the same vocabulary; None: no distillation
    teacher_sha256: str | None = None  # expected hash of the teacher (as in a manifest); recorded when a run starts
    weight: float = 0.5
    temperature: float = 1.0  # τ, by which the logits of both models are divided
    # directory of the teacher's 64 largest probabilities for each training token, which are computed before training
    # where it holds none yet; None: the teacher stays in memory and runs in every step
    logits: str | None = None

    @property
    def active(self) -> bool:
        """True if a teacher's distribution counts in the loss."""
        return self.teacher is not None and self.weight > 0

    def check(self, path: str = "distill") -> None:
        """Raise UserError at the first key that cannot work. path: the section's name in the configuration."""
        positive(path, self, "temperature")
        if not 0 <= self.weight <= 1:
            raise UserError(f"{path}.weight must be from 0 to 1, got {self.weight}")
        for name in ("teacher", "logits"):
            if getattr(self, name) == "":
                raise UserError(f"{path}.{name} is empty: name a directory, or leave it None")
        if self.logits is not None and not self.active:
            raise UserError(f"{path}.logits needs {path}.teacher and a weight above 0: nothing would read the logits")
