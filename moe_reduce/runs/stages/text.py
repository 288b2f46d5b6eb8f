"""The text that a stage reads."""

import zlib

import numpy as np

from moe_reduce.runs.stages.stage import StageContext


def text_seed(context: StageContext, added: int = 0) -> int:
    """Seed of a stage's text: differs between stages; stages of the same name in all variants share it."""
    words = [context.run.train.seed + added, zlib.crc32(context.name.encode())]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
