"""The one rule of which keys a query sees: every form that it is asked for says the same."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.core.config import ModelConfig
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.planning.flops import forward_flops_per_token, matmul_parameters_per_token

CONFIG = ModelConfig(
    vocab_size=60, layers=3, width=24, query_heads=4, key_value_heads=2, head_width=8, feed_forward_width=40
)
TIME = 12


def _rule(segments_T=None) -> np.ndarray:
    """Mask by hand, [query, key]."""
    segments_T = np.zeros(TIME) if segments_T is None else segments_T
    return np.array([[key <= query and segments_T[key] == segments_T[query] for key in range(TIME)]
                     for query in range(TIME)])  # fmt: skip


@pytest.mark.parametrize("ends", [None, (5, 9)])
def test_within_rows_a_query_sees_the_past_of_its_segment(ends):
    segments_T = None if ends is None else np.searchsorted(ends, np.arange(TIME), side="right")
    segments_BT = None if segments_T is None else jnp.asarray(segments_T)[None]
    np.testing.assert_array_equal(Visibility(CONFIG, segments_BT).within_rows(TIME)[0, 0], _rule(segments_T))


@pytest.mark.parametrize(("start", "end"), [(0, 3), (3, 6), (7, 12)])
def test_the_range_of_a_tile_holds_every_key_that_its_queries_see_and_no_more(start, end):
    (seen,) = np.nonzero(_rule()[start:end].any(axis=0))
    assert Visibility(CONFIG).key_range(start, end) == (seen[0], seen[-1] + 1)


def test_a_cache_shows_what_the_row_would_show():
    """Entries after the cached ones hold padding, which none sees."""
    past, new, entries = np.array([3, 7]), 4, 9
    positions_BT = jnp.asarray(past[:, None] + np.arange(new), jnp.int32)
    allowed = np.asarray(Visibility(CONFIG).with_cache(positions_BT, entries))[:, 0, 0]
    assert allowed.shape == (2, new, entries + new)
    for row, first in enumerate(past):
        wanted = _rule()[first : first + new]
        np.testing.assert_array_equal(allowed[row, :, :first], wanted[:, :first])
        np.testing.assert_array_equal(allowed[row, :, entries:], wanted[:, first : first + new])
        assert not allowed[row, :, first:entries].any()


def test_the_splash_kernel_gets_the_same_mask():
    np.testing.assert_array_equal(Visibility(CONFIG).splash_mask(TIME)[:, :], _rule())


def test_fused_attention_gets_the_same_mask():
    segments_BT = jnp.asarray(np.arange(TIME) // 5)[None]
    arguments = Visibility(CONFIG, segments_BT).arguments()
    mask = np.asarray(arguments["mask"])[0, 0] & np.tri(TIME, dtype=bool)
    assert arguments["is_causal"]
    np.testing.assert_array_equal(mask, _rule(np.arange(TIME) // 5))


def test_flops_count_the_keys_that_are_seen():
    """Two products of two FLOPs with each channel of each visible key, in every head and layer."""
    keys = np.mean(np.sum(_rule(), axis=1))
    attention = 4 * CONFIG.layers * CONFIG.query_heads * CONFIG.head_width * keys
    products = 2 * matmul_parameters_per_token(CONFIG)
    assert Visibility(CONFIG).keys_per_token(TIME) == CONFIG.layers * CONFIG.query_heads * keys
    assert forward_flops_per_token(CONFIG, TIME) == products + attention
