"""Attention of TPUs, its kernels interpreted: equal to the plain one, over a mesh too, and kept by remat."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.core.config import ExecutionConfig, MeshConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.attention.attention import self_attention
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.decoder import Decoder
from moe_reduce.models.parameters import abstract_params
from moe_reduce.training.sharding import make_mesh

BATCH, TIME, HEADS, GROUPS = 4, 300, 4, 2  # padded to 384: three tiles of 128


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _heads(width: int = 16) -> tuple[jax.Array, ...]:
    shapes = (HEADS, GROUPS, GROUPS)
    return tuple(_normal(number, BATCH, TIME, heads, width) for number, heads in enumerate(shapes))


def _segments() -> jax.Array:
    """Documents of other lengths in each row."""
    ends_B1 = jnp.array([[70], [130], [1], [299]])
    return (jnp.arange(TIME)[None] >= ends_B1).astype(jnp.int32)


def _value_and_gradients(kernel: str, segments_BT, heads):
    weight_BTHC = _normal(3, *heads[0].shape)
    execution, visibility = ExecutionConfig(platform="cpu", attention=kernel), Visibility(ModelConfig(), segments_BT)

    def total(*heads):
        return jnp.sum(self_attention(*heads, visibility, execution) * weight_BTHC)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*heads)


def _alike(found, wanted, tolerance: float):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)


@pytest.mark.parametrize("width", [16, 128])  # laid out with positions last, and with channels last
@pytest.mark.parametrize("segmented", [False, True])
def test_attention_in_tiles_and_its_gradient_equal_the_plain_one(segmented, width):
    segments_BT = _segments() if segmented else None
    found, wanted = (_value_and_gradients(kernel, segments_BT, _heads(width)) for kernel in ("splash", "xla"))
    _alike(found, wanted, 1e-4)


def test_each_device_of_a_mesh_computes_its_rows_and_heads():
    wanted = _value_and_gradients("splash", _segments(), _heads())
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        specs = jax.sharding.PartitionSpec(("data", "fsdp", "expert"), None, "tensor")
        heads = jax.device_put(_heads(), jax.NamedSharding(mesh, specs))
        found = _value_and_gradients("splash", _segments(), heads)
    _alike(found, wanted, 1e-5)
    assert found[1][0].sharding.shard_shape(found[1][0].shape) == (BATCH // 4, TIME, HEADS // 2, 16)


@pytest.mark.parametrize(("remat", "again"), [("dots", False), ("full", True)])
def test_remat_of_products_keeps_what_the_kernel_made(remat, again):
    sizes = {"width": 16, "query_heads": 2, "key_value_heads": 1, "head_width": 8, "feed_forward_width": 8}
    config = ModelConfig(vocab_size=8, layers=1, **sizes)
    execution = ExecutionConfig(platform="cpu", attention="splash", remat=remat)
    params, tokens_BT = abstract_params(config), jnp.zeros((1, 128), jnp.int32)

    def total(params):
        return jnp.sum(Decoder(config, execution).apply({"params": params}, tokens_BT))

    program = jax.jit(jax.grad(total)).lower(params).compile().as_text()
    assert re.search(r"jvp\S*/splash_mha_fwd", program)
    assert bool(re.search(r"rematted_computation\S*/splash_mha_fwd", program)) == again


def test_platforms_have_their_own():
    assert ExecutionConfig().resolve("tpu").attention == "splash"
    assert ExecutionConfig(platform="tpu").resolve("cpu").attention == "xla"  # a TPU's configuration, tried on a CPU
    with pytest.raises(UserError, match=r"execution.attention=splash is for TPUs, but jax sees gpu"):
        ExecutionConfig(attention="splash").resolve("gpu")
