"""Two documents in one row do not see each other when `data.document_mask` is set."""

import jax
import numpy as np

from moe_reduce.core.config import DataConfig, ExecutionConfig, ModelConfig
from moe_reduce.data.batches import WholeSplit
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model

END = 1
SECOND = [7, 9, 11, 13, 15, 17, END, 3]


class OneRow:
    """A corpus of one row of token ids, in which END closes each document."""

    directory = None
    end_of_text = END

    def __init__(self, ids):
        self.ids = np.asarray(ids, np.int32)

    def rows(self, *_):
        return 1

    def row(self, _split, _index, length):
        return self.ids, np.ones(length, np.float32)

    def describe(self, _split):
        return ""


def logits_of(model, ids, masked=True):
    """Logits [T, V] of a row, and the weights [T] of its targets."""
    data = DataConfig(sequence_length=len(ids) - 1, document_mask=masked)
    batch = WholeSplit(OneRow(ids), data, 1)[0]
    return np.asarray(model.apply(batch)[0])[0], batch["weights"][0]


def test_a_document_does_not_depend_on_the_one_before_it_nor_on_its_place():
    config = ModelConfig(
        vocab_size=40, layers=2, width=32, query_heads=4, key_value_heads=2, head_width=8, feed_forward_width=48
    )
    model = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig().resolve("cpu"))
    first, weights = logits_of(model, [2, 4, 6, 8, END, *SECOND])
    other, _ = logits_of(model, [30, 31, 32, 33, END, *SECOND])
    alone, _ = logits_of(model, SECOND)
    np.testing.assert_allclose(first[5:], other[5:], atol=1e-5)
    np.testing.assert_allclose(first[5:], alone, atol=1e-5)
    assert weights[4] == 0, "the first document's end does not predict the second document"
    without, _ = logits_of(model, [2, 4, 6, 8, END, *SECOND], masked=False)
    assert np.abs(without[5:] - alone).max() > 1e-2
