"""The layouts of compressed-tensors: files that transformers opens with that package, and its values bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import parse
from moe_reduce.families import read_config
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.weights import is_quantised
from moe_reduce.storage.tensors import TensorFiles

WHY = "needs the package compressed-tensors"
library = pytest.importorskip("compressed_tensors.quantization", reason=WHY)
lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward", reason=WHY)
compressors = pytest.importorskip("compressed_tensors.compressors", reason=WHY)
torch = pytest.importorskip("torch", reason="needs torch")
TOKENS_BT = np.arange(16, dtype=np.int32).reshape(2, 8)
SHARED = ("fp8-tensor", "fp8-block")  # one scale for several outputs
NAMES = ("int8", "int4-g32", "int4-affine-g64", "int4-channel", "fp8", "fp8-tensor", "fp8-block", "mxfp4")


def wide(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, width=128, head_width=32, feed_forward_width=256)


@pytest.fixture(params=["tiny_dense", "tiny_neox"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = wide(request.getfixturevalue(request.param))
    model = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig().resolve("cpu"))
    moe_reduce.save(model, tmp_path / "model")
    return tmp_path / "model"


def theirs(directory: Path, dequantise: bool) -> Any:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantise else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **how).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_transformers_opens_what_is_written(directory, tmp_path, name, capsys):
    out = tmp_path / name
    options = [f"--scheme={name}", "--format=compressed-tensors"]
    if name in SHARED and read_config(directory)[0].norm == "layer":
        assert main(["quantize", f"--model={directory}", f"--out={out}", *options]) == 2
        assert f"has one {name} for all of gpt_neox" in capsys.readouterr().err
        return
    assert main(["quantize", f"--model={directory}", f"--out={out}", *options]) == 0
    ours = moe_reduce.load(out)
    # version 0.20 gives packed zero points another shape, and MXFP4 to bf16 models only, unless it dequantises first
    dequantise = "affine" in name or name == "mxfp4"
    with torch.no_grad():
        expected = theirs(out, dequantise)(torch.tensor(TOKENS_BT)).logits.numpy()
    tolerance = 5e-3 if "affine" in name else 2e-5  # it dequantises in the dtype of scales, bf16
    np.testing.assert_allclose(ours(TOKENS_BT), expected, rtol=1e-4, atol=tolerance * np.abs(expected).max())


def arguments_of(name: str) -> Any:
    from moe_reduce.storage.compressed_tensors import _arguments

    return library.QuantizationArgs(**_arguments(parse(name)))


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-affine-g64", "int4-channel", "fp8", "fp8-tensor"])
def test_codes_and_values_are_those_of_the_library(name):
    """Bit for bit, with the same scales, but where a value is half a step from two codes in fp32."""
    from test_models_schemes import matrix_record, normal, rounded

    record = matrix_record(D=256, F=24)
    matrix = normal(record.shape)
    value, found = rounded(matrix, record, parse(name))
    arguments = arguments_of(name)
    scale = torch.tensor(np.array(value.grid.scales.T))
    scale = scale.reshape(1) if name == "fp8-tensor" else scale
    zeros = None if value.grid.zeros is None else torch.tensor(np.array(value.grid.zeros.T))
    kind = arguments.pytorch_dtype()
    given = torch.tensor(np.ascontiguousarray(matrix.T))
    codes = lifecycle.quantize(x=given, scale=scale, zero_point=zeros, args=arguments, dtype=kind)
    ours = np.asarray(value.unpacked().astype("float32")).T
    steps = given.double() / scale.double().repeat_interleave(256 // scale.shape[-1], -1)
    ties = np.abs(steps.numpy() % 1 - 0.5) < 1e-6
    np.testing.assert_array_equal(ours[~ties], codes.float().numpy()[~ties])
    assert ties.mean() < 0.01
    mine = torch.tensor(np.array(value.unpacked()).T.copy().view(np.uint8)).view(kind)
    again = lifecycle.dequantize(x_q=mine, scale=scale, zero_point=zeros, args=arguments)
    np.testing.assert_array_equal(np.asarray(found).T, again.numpy())


def test_micro_scaled_values_are_those_of_the_library():
    from test_models_schemes import matrix_record, normal, rounded

    record = matrix_record(D=256, F=24)
    value, found = rounded(normal(record.shape), record, parse("mxfp4"))
    packed = {
        "weight_packed": torch.tensor(np.array(value.codes.T)),
        "weight_scale": torch.tensor(np.array(value.scales.T)),
    }
    scheme = library.QuantizationScheme(targets=["Linear"], weights=arguments_of("mxfp4"))
    again = compressors.BaseCompressor.get_value_from_registry("mxfp4-pack-quantized").decompress(packed, scheme)[
        "weight"
    ]
    np.testing.assert_array_equal(np.asarray(found).T, again.float().numpy())


def test_a_model_of_the_library_is_read(tmp_path, tiny_dense):
    """W8A16 as llm-compressor writes it: pack-quantized with 8 bits, targets by class, and bf16 scales."""
    config = wide(tiny_dense)
    model = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig().resolve("cpu"))
    moe_reduce.save(model, tmp_path / "model")
    options = ["--scheme=int8", "--format=compressed-tensors"]
    assert main(["quantize", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", *options]) == 0
    files = TensorFiles(tmp_path / "out")
    tensors = {name: torch.tensor(files.read(name).copy()) for name in files.entries}
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        codes = tensors.pop(name)
        tensors[f"{name}_packed"] = compressors.pack_quantized.helpers.pack_to_int32(codes, 8)
        tensors[f"{name}_shape"] = torch.tensor(codes.shape)
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"].bfloat16()
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "out/model.safetensors")
    raw = json.loads((tmp_path / "out/config.json").read_text())
    (group,) = raw["quantization_config"]["config_groups"].values()
    group |= {"targets": ["Linear"], "format": "pack-quantized"}
    raw["quantization_config"] |= {"format": "pack-quantized", "ignore": ["lm_head"]}
    (tmp_path / "out/config.json").write_text(json.dumps(raw))
    found = moe_reduce.load(tmp_path / "out")
    up = found.params["layers"]["mlp"]["up"]
    assert (str(up.scheme), str(up.scales.dtype), str(up.codes.dtype)) == ("int8", "bfloat16", "int8")
    difference = np.abs(np.asarray(up.dequantised()) - np.asarray(model.params["layers"]["mlp"]["up"])).max()
    assert difference < 2e-3
    group["weights"] = {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    (tmp_path / "out/config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="weights of 3 int group 128 are not supported"):
        moe_reduce.load(tmp_path / "out")


MIXTURE = {
    "hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 61, "num_hidden_layers": 2,
}  # fmt: skip
FORMS = {
    "int8": ("pack-quantized", "int-quantized"),
    "int4-g32": ("pack-quantized",),
    "fp8": ("float-quantized",),
    "experts=int4-g64,attention=int8": ("pack-quantized", "int-quantized"),
    "experts=int8,attention=fp8": ("pack-quantized", "float-quantized"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMS)
def test_transformers_opens_mixtures(tmp_path, name):
    from transformers_models import written

    written(tmp_path / "model", "qwen3_moe", **MIXTURE)
    options = [f"--scheme={name}", "--format=compressed-tensors", f"--out={tmp_path / 'out'}"]
    assert main(["quantize", f"--model={tmp_path / 'model'}", *options]) == 0
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"].values()
    assert sorted(group["format"] for group in groups) == sorted(FORMS[name])
    ours, model = moe_reduce.load(tmp_path / "out"), theirs(tmp_path / "out", True)
    flat = {path: as_read(leaf) for path, leaf in trees.flatten(ours.params).items()}
    for number, layer in enumerate(model.model.layers):
        gate, up, down = (flat[f"layers/experts/{name}"][number].swapaxes(1, 2) for name in ("gate", "up", "down"))
        np.testing.assert_array_equal(
            np.concatenate([gate, up], axis=1), layer.mlp.experts.gate_up_proj.float().detach()
        )
        np.testing.assert_array_equal(down, layer.mlp.experts.down_proj.float().detach())
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS_BT)).logits.numpy()
    tolerance = 2e-2 if "int4" in name else 2e-5  # transformers multiplies such experts in bf16
    np.testing.assert_allclose(ours(TOKENS_BT), expected, rtol=1e-4, atol=tolerance * np.abs(expected).max())


def as_read(leaf: Any) -> Any:
    """Values as the package dequantises them: in the dtype of the scales, which is bf16 for groups."""
    return np.asarray(leaf.dequantised(leaf.scales.dtype), np.float32) if is_quantised(leaf) else leaf


def test_experts_that_transformers_does_not_open_are_refused(tmp_path, capsys):
    from transformers_models import written

    written(tmp_path / "model", "qwen3_moe", **MIXTURE)
    for name in ("int4-affine-g32", "fp8-block"):
        options = [f"--scheme={name}", "--format=compressed-tensors", f"--out={tmp_path / 'out'}"]
        assert main(["quantize", f"--model={tmp_path / 'model'}", *options]) == 2
        assert f"transformers opens no experts of {name}" in capsys.readouterr().err
