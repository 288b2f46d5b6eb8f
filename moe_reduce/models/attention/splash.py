"""Attention on TPU by jax's Splash kernel, forward and backward (FlashAttention, arXiv:2205.14135).

Scores are computed tile by tile and never written to memory; fully masked tiles are skipped. Off a TPU the kernel is
interpreted, for tests.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from moe_reduce.models import products
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.mesh import BATCH_AXES, on_one_device

LANES = 128  # width of a TPU's registers; the last axis in memory is padded to a multiple of it
# positions in a tile: sequences are padded to a multiple of the smallest, then use the largest that divides them
TILES = (512, 256, LANES)


def attention(q_BTHC, k_BTGC, v_BTGC, visibility: Visibility, scale: float, interpret: bool) -> jax.Array:
    """Softmax attention of a row's tokens to one another, [B, T, H, C]; query head h reads key/value head h·G/H.

    scale: factor of the scores. On the mesh in context each device computes its rows and, along `tensor`, its heads.
    """
    segments_BT = visibility.segments_BT
    if segments_BT is None:
        segments_BT = jnp.zeros(q_BTHC.shape[:2], jnp.int32)
    q_BTHC = q_BTHC * jnp.asarray(scale, q_BTHC.dtype)
    attend = partial(_attention, visibility=visibility, interpret=interpret)
    if not on_one_device():
        rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")
        attend = jax.shard_map(attend, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return attend(q_BTHC, k_BTGC, v_BTGC, segments_BT)


def _attention(q_BTHC, k_BTGC, v_BTGC, segments_BT, visibility: Visibility, interpret: bool) -> jax.Array:
    _, time, heads, width = q_BTHC.shape
    padded = time + -time % TILES[-1]
    tile = next(tile for tile in TILES if padded % tile == 0)
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    # If the head width is not a multiple of LANES, positions become the last axis in memory. At width 64 this saves
    # the padding to 128, and each half of a head, which the rotary embedding combines, fills whole registers.
    last = kernels.QKVLayout.SEQ_MINOR if width % LANES else kernels.QKVLayout.HEAD_DIM_MINOR
    layouts = ("q_layout", "k_layout", "v_layout")
    attend = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([visibility.splash_mask(padded)] * heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(sizes, tile), **dict.fromkeys(layouts, last)),
        residual_checkpoint_name=products.REMAT_SAVED,
        interpret=interpret,
    )

    def laid_out(x_BTHC: jax.Array) -> jax.Array:
        return jnp.pad(x_BTHC, ((0, 0), (0, padded - time), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    @jax.vmap
    def row(q_HTC, k_GTC, v_GTC, segments_T):
        return attend(q_HTC, k_GTC, v_GTC, segment_ids=kernels.SegmentIds(segments_T, segments_T))

    # padded positions come last, so the causal mask hides them from real ones
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padded - time)))
    mixed_BHTC: Any = row(laid_out(q_BTHC), laid_out(k_BTGC), laid_out(v_BTGC), segments_BT)
    return mixed_BHTC[:, :, :time].transpose(0, 2, 1, 3)
