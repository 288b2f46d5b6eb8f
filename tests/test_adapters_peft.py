"""PEFT's files: what adapter_config.json selects, what its other keys mean, experts and routers, and damage."""

import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from test_adapters import model_of
from transformers_models import tiny, written

import moe_reduce
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, merging, peft_config
from moe_reduce.adapters.peft_modules import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from moe_reduce.core import expressions
from moe_reduce.core.config import AdapterConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.storage.tensors import TensorFiles, write_file

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    # patterns that PEFT itself adds for fused experts
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}
SHAPES = {"q_proj": (32, 24), "v_proj": (16, 24), "o_proj": (24, 32), "down_proj": (24, 40)}  # of tiny("llama")
EXPERT = {"gate_proj": (20, 24), "up_proj": (20, 24), "down_proj": (24, 20)}  # of tiny("qwen3_moe")


def module_of(kind: str, layer: int) -> str:
    place = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{place}.{kind}"


def put(directory: Path, modules: dict[str, tuple[int, int]], config: dict, dtype=np.float32, ranks=None) -> Path:
    """Write an adapter of random values for modules of these shapes [O, I]. ranks: where not r."""
    directory.mkdir(parents=True, exist_ok=True)
    random, items = np.random.default_rng(0), []
    for module, (rows, columns) in modules.items():
        rank = (ranks or {}).get(module, (LORA | config)["r"])
        for suffix, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            array = (random.normal(size=shape) * 0.3).astype(dtype)
            items.append((f"{PREFIX}{module}.{suffix}.weight", shape, array.dtype, array))
    write_file(directory / WEIGHTS_FILE, items)
    (directory / CONFIG_FILE).write_text(json.dumps(LORA | config))
    return directory


def put_dense(directory: Path, kinds=("q_proj", "v_proj"), layers=(0, 1), **config) -> Path:
    modules = {module_of(kind, layer): SHAPES[kind] for kind in kinds for layer in layers}
    return put(directory, modules, {"target_modules": ["q_proj", "v_proj"]} | config)


def change(directory: Path, change) -> None:
    """Rewrite the tensors: change(name, array) -> array, or None to leave it out."""
    files = TensorFiles(directory, WEIGHTS_FILE)
    kept = {name: change(name, files.read(name).copy()) for name in files.entries}
    items = [(name, array.shape, array.dtype, array) for name, array in kept.items() if array is not None]
    write_file(directory / WEIGHTS_FILE, items)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    written(directory, "llama")
    return directory


def refused(directory: Path, base: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        adapter_directory.load(directory, moe_reduce.load(base).config, None)
    for part in parts:
        assert part in str(caught.value)


def peft_logits(kind: str, directory: Path, **changes) -> np.ndarray:
    theirs = peft.PeftModel.from_pretrained(tiny(kind, **changes), str(directory)).eval()
    with torch.no_grad():
        return theirs(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


def assert_equals_peft(kind: str, base: Path, directory: Path, **changes) -> None:
    """Active and merged, the adapter gives PEFT's logits, which are not those of the base."""
    model, expected = moe_reduce.load(base), peft_logits(kind, directory, **changes)
    adapter = adapter_directory.load(directory, model.config, None)
    size = float(np.max(np.abs(expected)))
    assert np.max(np.abs(np.asarray(model(TOKENS)) - expected)) > 1e-2 * size
    for ours in (adapters.activate(model, adapter), merging.merge(model, adapter)):
        np.testing.assert_allclose(ours(TOKENS), expected, rtol=0, atol=1e-4 * size)


SELECTIONS = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "full names": {"target_modules": [module_of(k, n) for k in ("q_proj", "v_proj") for n in (0, 1)]},
    "regular expression": {"target_modules": r".*\.(q|v)_proj"},
    "all but some": {"target_modules": r".*_proj", "exclude_modules": ["k_proj", "o_proj", "mlp.gate_proj", "up_proj",
                                                                       "down_proj"]},
    "but an expression": {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": r".*\.o_proj"},
    "names that the model lacks": {"target_modules": ["q_proj", "v_proj", "qkv_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_that_fit_the_tensors_are_read_as_by_peft(tmp_path, base, name):
    assert_equals_peft("llama", base, put_dense(tmp_path / "adapter", **SELECTIONS[name]))


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": 1},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_layers_are_selected_as_by_peft(tmp_path, base, config):
    assert_equals_peft("llama", base, put_dense(tmp_path / "one", layers=(1,), **config))
    refused(put_dense(tmp_path / "both", **config), base, "layers.0.self_attn.q_proj", "does not cover")


def test_ranks_and_alphas_by_pattern_are_those_of_peft(tmp_path, base):
    modules = {module_of(kind, layer): SHAPES[kind] for kind in ("q_proj", "v_proj") for layer in (0, 1)}
    own = {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_rslora": True}
    own |= {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 9.5}}
    ranks = {module_of("q_proj", 0): 2} | {module_of("v_proj", layer): 3 for layer in (0, 1)}
    assert_equals_peft("llama", base, put(tmp_path / "adapter", modules, own, ranks=ranks))


@pytest.mark.parametrize(
    ("change_config", "parts"),
    [
        ({"target_modules": ["q_proj"]}, ("v_proj", "target_modules", "does not cover")),
        ({"exclude_modules": ["v_proj"]}, ("v_proj", "does not cover")),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, ("no tensor of model.layers.0.self_attn.o_proj",)),
        ({"target_modules": "all-linear"}, ("no tensor of", "target_modules")),
        ({"layers_to_transform": [0]}, ("layers.1.self_attn", "does not cover")),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [5]}, ("does not cover",)),
        ({"r": 3}, ("has rank 2", "says 3")),
        ({"rank_pattern": {"v_proj": 8}}, ("v_proj", "has rank 2", "says 8")),
        ({"target_modules": None}, ("target_modules is missing",)),
        ({"target_modules": 3}, ("target_modules must be",)),
        ({"target_modules": ["q_proj", 3]}, ("target_modules must be",)),
        ({"target_modules": "(q_proj"}, ("target_modules", "no regular expression")),
        ({"rank_pattern": {"(": 2}}, ("rank_pattern", "no regular expression")),
        ({"target_modules": "(" * 20_000 + ")" * 20_000}, ("target_modules", "no regular expression")),
        ({"target_modules": r"(?R)?.*"}, ("target_modules", "no regular expression")),
        ({"target_modules": "(a{100}){101}"}, ("target_modules", "repeats too often")),
        ({"alpha_pattern": ["q_proj"]}, ("alpha_pattern must be an object",)),
        ({"alpha_pattern": {"q_proj": "high"}}, ("alpha_pattern", "numbers")),
        ({"layers_to_transform": ["0"]}, ("layers_to_transform",)),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, ("layers_to_transform",)),
        ({"layers_pattern": "layers"}, ("layers_pattern needs layers_to_transform",)),
        ({"use_rslora": "no"}, ("use_rslora must be true or false",)),
        ({"use_dora": "false"}, ("use_dora must be true or false",)),
        ({"use_rslora": 1}, ("use_rslora must be true or false",)),
        ({"r": "2"}, ("r and rank_pattern must hold whole numbers",)),
        ({"r": True}, ("r and rank_pattern",)),
        ({"r": 0}, ("r and rank_pattern",)),
        ({"lora_alpha": float("nan")}, ("lora_alpha",)),
        ({"lora_alpha": -4}, ("lora_alpha",)),
        ({"task_type": "SEQ_CLS"}, ("task_type='SEQ_CLS' is not supported",)),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights='pissa' is not supported", "changes the base's weights")),
        ({"target_parameters": ["mlp.experts.down_proj"]}, ("target_parameters", "not supported")),
        ({"lora_bias": True}, ("lora_bias", "not supported")),
        ({"bias": "lora"}, ("bias='lora'", "only 'none', 'all', 'lora_only'")),
        ({"modules_to_save": "lm_head"}, ("modules_to_save must be a list",)),
        ({"modules_to_save": ["lm_head"]}, ("no base_model.model.lm_head.weight",)),
    ],
)
def test_keys_that_contradict_the_tensors_or_cannot_be_computed(tmp_path, base, change_config, parts):
    directory = put_dense(tmp_path / "adapter")
    raw = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps(raw | change_config))
    refused(directory, base, *parts)


ENDLESS = r"(\w|\w\w|\w\w\w|\.|\w\.|\w\w\.)+[!?]"  # each letter of a name doubles the time


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 2}},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS},
    ],
)
def test_expressions_that_take_for_ever_are_refused(tmp_path, base, monkeypatch, keys):
    monkeypatch.setattr(expressions, "SECONDS", 0.2)
    start = time.monotonic()
    refused(put_dense(tmp_path / "adapter", **keys), base, CONFIG_FILE, "takes more than", "list the modules")
    assert time.monotonic() - start < 20


def test_every_key_of_peft_is_in_a_table():
    theirs = peft.LoraConfig().to_dict()
    tables = set(peft_config.USED) | set(peft_config.ACCEPTED) | peft_config.NEUTRAL
    switched_off = {key for key, value in theirs.items() if not value}
    assert set(theirs) <= tables | switched_off


def test_every_key_of_peft_changed_is_read_or_refused_by_name(tmp_path, base):
    changed = {bool: lambda v: not v, int: lambda v: v + 5, float: lambda v: v + 0.5, str: lambda v: f"{v}x",
               dict: lambda _: {"other": 3}, type(None): lambda _: ["other"]}  # fmt: skip
    put_dense(tmp_path / "adapter")
    config = moe_reduce.load(base).config
    for key, value in (peft.LoraConfig().to_dict() | LORA | {"init_lora_weights": "olora"}).items():
        raw = LORA | {"target_modules": ["q_proj", "v_proj"]} | {key: changed[type(value)](value)}
        (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(raw))
        if key in peft_config.NEUTRAL:
            adapter_directory.load(tmp_path / "adapter", config, None)
            continue
        if key in ("lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules"):
            continue  # read: compared with PEFT above
        with pytest.raises(UserError, match=key if key != "use_dora" else "lora_magnitude_vector"):
            adapter_directory.load(tmp_path / "adapter", config, None)


def bad_value(value):
    def change(name: str, array: np.ndarray) -> np.ndarray:
        if "layers.1.self_attn.q_proj.lora_A" in name:
            array[0, 0] = value
        return array

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_blamed_on_the_adapter(tmp_path, base, value):
    put_dense(tmp_path / "adapter")
    change(tmp_path / "adapter", bad_value(value))
    refused(tmp_path / "adapter", base, "layers.1.self_attn.q_proj.lora_A", WEIGHTS_FILE, "not finite")


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.bool_, ml_dtypes.float8_e4m3fn])
def test_tensors_of_integers_are_refused_by_name(tmp_path, base, dtype):
    put_dense(tmp_path / "adapter")
    change(tmp_path / "adapter", lambda name, x: x.astype(dtype) if "0.self_attn.v_proj.lora_B" in name else x)
    refused(tmp_path / "adapter", base, "layers.0.self_attn.v_proj.lora_B", str(np.dtype(dtype)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_by_peft(tmp_path, base, dtype):
    put_dense(tmp_path / "adapter")
    change(tmp_path / "adapter", lambda _, x: x.astype(dtype))
    model = moe_reduce.load(base)
    found = adapters.activate(model, adapter_directory.load(tmp_path / "adapter", model.config, None))(TOKENS)
    expected = peft_logits("llama", tmp_path / "adapter")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(np.max(np.abs(expected))))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda name, x: np.zeros(0, np.float32) if "layers.1" in name else x, ("layers.1.self_attn", "is empty")),
        (lambda name, x: None if "layers.1.self_attn.v_proj" in name else x, ("no tensor of", "layers.1", "v_proj")),
        (lambda name, x: None if "v_proj" in name else x, ("no tensor of", "v_proj")),
        (lambda name, x: x[0] if "layers.0.self_attn.q_proj.lora_A" in name else x, ("q_proj.lora_A", "needs (2, 24)")),
        (lambda name, x: x[:, :1] if "q_proj.lora_B" in name else x, ("q_proj.lora_B", "needs (32, 2)")),
        (lambda _, __: None, ("holds no tensor",)),
    ],
)
def test_damaged_tensors_are_refused_by_name(tmp_path, base, damage, parts):
    put_dense(tmp_path / "adapter")
    change(tmp_path / "adapter", damage)
    refused(tmp_path / "adapter", base, *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.embed_tokens.lora_embedding_A", ("a LoRA of the token embedding",)),
        ("model.embed_tokens.base_layer.weight", ("embed_tokens.base_layer.weight", "a whole matrix")),
        ("lm_head.modules_to_save.weight", ("lm_head", "a whole matrix")),
        ("lm_head.lora_A.weight", ("lm_head", "is not supported in an adapter")),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", ("a bias of lora_B",)),
        ("model.layers.7.self_attn.q_proj.lora_A.weight", ("layers.7", "does not have as a matrix")),
    ],
)
def test_what_peft_adapts_beside_matrices_is_named(tmp_path, base, name, parts):
    put_dense(tmp_path / "adapter")
    files = TensorFiles(tmp_path / "adapter", WEIGHTS_FILE)
    kept = [(one, entry.shape, entry.dtype, files.read(one).copy()) for one, entry in files.entries.items()]
    extra = np.ones((2, 24), np.float32)
    write_file(tmp_path / "adapter" / WEIGHTS_FILE, [*kept, (PREFIX + name, extra.shape, extra.dtype, extra)])
    refused(tmp_path / "adapter", base, *parts)


def test_a_pickle_is_not_opened(tmp_path, base):
    put_dense(tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS_FILE).rename(tmp_path / "adapter" / "adapter_model.bin")
    refused(tmp_path / "adapter", base, "adapter_model.bin", "pickle", "safetensors")


def expert_modules(layers=(0, 1), experts=range(6), kinds=EXPERT) -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}": EXPERT[kind]
        for layer in layers
        for expert in experts
        for kind in kinds
    }


def router_modules(layers=(0, 1)) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{layer}.mlp.gate": (6, 24) for layer in layers}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    written(directory, "qwen3_moe")
    return directory


@pytest.mark.parametrize("name", ["experts", "router", "both", "with attention"])
def test_experts_and_routers_under_the_names_of_transformers_4(tmp_path, mixture, name):
    modules = {
        "experts": expert_modules(), "router": router_modules(), "both": expert_modules() | router_modules(),
        "with attention": expert_modules() | {f"model.layers.{n}.self_attn.q_proj": (32, 24) for n in (0, 1)},
    }[name]  # fmt: skip
    words = sorted({module.rsplit(".", 1)[-1] for module in modules})
    directory = put(tmp_path / "adapter", modules, {"target_modules": words})
    assert_equals_peft("qwen3_moe", mixture, directory)


def test_some_experts_of_a_layer_with_scales_of_their_own(tmp_path, mixture):
    """W + α/r · B·A for each expert by itself, in float64; PEFT fuses experts and cannot give them different ranks."""
    modules = expert_modules((1,), (0, 3), ("down_proj",))
    first, second = modules
    config = {"target_modules": list(modules), "rank_pattern": {second: 3}, "alpha_pattern": {second: 9}}
    directory = put(tmp_path / "adapter", modules, config, ranks={second: 3})
    model = moe_reduce.load(mixture)
    merged = merging.merge(model, adapter_directory.load(directory, model.config, None))
    files = TensorFiles(directory, WEIGHTS_FILE)
    before, after = (np.asarray(one.params["layers"]["experts"]["down"], np.float64) for one in (model, merged))
    expected = before.copy()
    for module, expert, scale in ((first, 0, 4 / 2), (second, 3, 9 / 3)):
        a, b = (files.read(f"{PREFIX}{module}.lora_{side}.weight").astype(np.float64) for side in "AB")
        expected[1, expert] += scale * (b @ a).T
    np.testing.assert_allclose(after, expected, atol=1e-6)
    np.testing.assert_array_equal(after[0], before[0])


def test_all_linear_leaves_experts_and_routers_open(tmp_path, mixture):
    attention = {
        f"model.layers.{layer}.self_attn.{kind}_proj": shape
        for layer in (0, 1)
        for kind, shape in (("q", (32, 24)), ("k", (16, 24)), ("v", (16, 24)), ("o", (24, 32)))
    }
    config = moe_reduce.load(mixture).config
    for name, modules in (("fewer", attention), ("every", attention | expert_modules() | router_modules())):
        directory = put(tmp_path / name, modules, {"target_modules": "all-linear"})
        assert adapters.count(adapter_directory.load(directory, config, None)) > 0


def test_dora_of_experts_is_refused_by_its_key(tmp_path, mixture):
    directory = put(tmp_path / "adapter", expert_modules(), {"target_modules": sorted(EXPERT), "use_dora": True})
    refused(directory, mixture, "use_dora=true is not supported for experts")


def test_router_adapters_have_no_peft_files_and_come_back(tmp_path):
    model = model_of("layer")
    adapter = adapters.init(AdapterConfig(targets="router,q", rank=2), model)
    adapter_directory.save(adapter, model.config, Input("base", "0" * 64), tmp_path)
    assert not (tmp_path / WEIGHTS_FILE).exists()
    again = adapter_directory.load(tmp_path, model.config, None)
    assert merging.digest(again) == merging.digest(adapter)
