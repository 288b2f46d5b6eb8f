"""The order of the text that a stage reads."""

import zlib

import numpy as np

from moe_reduce.runs.stages.stage import StageContext


def text_seed(context: StageContext, added: int = 0) -> int:
    """Seed of the text that a stage reads: one for each stage name, so that variants share the text of a stage."""
    words = [context.run.train.seed + added, zlib.crc32(context.name.encode())]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
