"""The text that a stage reads."""

import zlib

import numpy as np

from moe_reduce.runs.stages.stage import StageContext


def text_seed(context: StageContext, added: int = 0) -> int:
    """Seed of the text of a stage: different for each stage, and equal for stages of one name in all variants."""
    words = [context.run.train.seed + added, zlib.crc32(context.name.encode())]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
