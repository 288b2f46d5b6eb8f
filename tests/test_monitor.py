"""The sampler around our models and an Ollama server (one that speaks its protocol here), its files, its mistakes."""

import csv
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import text
from transformers_models import written

from moe_reduce.__main__ import main
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.inference import generate as generation
from moe_reduce.inference import monitor as machine
from moe_reduce.inference import ollama

DETAILS = {"family": "llama", "parameter_size": "8.0B", "quantization_level": "Q4_K_M"}


class Server(BaseHTTPRequestHandler):
    """Ollama's three answers."""

    def do_GET(self):
        assert self.path == "/api/tags"
        self._answer({"models": [{"name": "a:8b"}, {"name": "b:8b"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/show":
            self._answer({"details": DETAILS})
            return
        assert self.path == "/api/generate"
        assert asked["options"]["num_predict"] == 7
        self._answer(
            {
                "response": f"{asked['model']} says", "prompt_eval_count": 10, "prompt_eval_duration": 5 * 10**8,
                "eval_count": 7, "eval_duration": 2 * 10**9,
            }
        )  # fmt: skip

    def _answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    written(place, "llama", vocab_size=300)
    train_tokenizer(iter([text(documents=40, seed=0)]), 300).save(place)
    return place


def rows(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def test_ours_and_ollamas_side_by_side(model, address, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [f"--model={model}", "--ollama=all", f"--address={address}", "--max-tokens=7", "--pause=0.01"]
    assert main(["monitor", *arguments, f"--out={out}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "monitor.csv")
    first, second, own = rows(out / "monitor.csv")
    assert (first["name"], second["name"], own["name"]) == ("a:8b", "b:8b", str(model))
    assert (first["family"], first["parameters"], first["quantisation"]) == ("llama", "8.0B", "Q4_K_M")
    assert (float(first["prompt_tokens_per_second"]), float(first["decode_tokens_per_second"])) == (20.0, 3.5)
    assert own["family"] == "llama"
    assert own["quantisation"] == "float32"
    assert float(own["decode_tokens_per_second"]) > 0
    assert (first["seconds_to_first_token"], 0 < float(own["seconds_to_first_token"]) < 60) == ("", True)
    assert 0 < float(own["peak_ram_percent"]) < 100
    looks = rows(out / "samples.csv")
    assert {look["name"] for look in looks} == {"a:8b", "b:8b", str(model)}
    assert (out / "monitor.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["monitor", *arguments, f"--out={out}"]) == 2  # it exists
    split, whole = [], generation.ready
    monkeypatch.setattr(generation, "ready", lambda *given: split.append(whole(*given)) or split[-1])
    assert main(["monitor", *arguments, "--tensor=2", f"--out={out}", "--overwrite"]) == 0
    assert {generation.mesh_of(made).shape["tensor"] for made in split} == {2}
    assert [row["name"] for row in rows(out / "monitor.csv")] == ["a:8b", "b:8b", str(model)]


def test_looks_come_at_their_pace_and_peaks_are_the_largest():
    with machine.Monitor(pause=0.05) as monitor:
        time.sleep(0.5)
    assert 5 <= len(monitor.samples) <= 12
    times = [sample.seconds for sample in monitor.samples]
    assert times == sorted(times)
    assert monitor.peak("ram_percent") == max(sample.ram_percent for sample in monitor.samples)


def test_cards_are_asked_through_nvidia_smi(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '50, 1000'\necho '70, 2000'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with machine.Monitor(pause=10.0) as monitor:
        pass
    assert (monitor.peak("gpu_percent"), monitor.peak("vram_mb")) == (60.0, 3000.0)
    tool.write_text("#!/bin/sh\necho '[N/A], [N/A]'\n")
    with machine.Monitor(pause=10.0) as monitor:
        pass
    assert monitor.peak("gpu_percent") is None


def test_no_server_is_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="no Ollama server answers"):
        ollama.models("http://127.0.0.1:1")
    assert main(["monitor", "--ollama=a", "--address=http://127.0.0.1:1", f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --model=DIR or --ollama=NAME"),
        (["--ollama=a", "--pause=0"], "--pause must be positive"),
        (["--ollama=a", "--tensor=0"], "--tensor must be"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capsys):
    assert main(["monitor", *arguments, f"--out={tmp_path / 'out'}"]) == 2
    assert words in capsys.readouterr().err
