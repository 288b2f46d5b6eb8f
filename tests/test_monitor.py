"""The sampler around our models and an Ollama server (one that speaks its protocol here), its files, its mistakes."""

import csv
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from conftest import text
from transformers_models import written

from moe_reduce.__main__ import main
from moe_reduce.commands import monitor as monitor_command
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.inference import generate as generation
from moe_reduce.inference import monitor as machine
from moe_reduce.inference import ollama
from moe_reduce.reports import style
from moe_reduce.reports.monitor_picture import picture

DETAILS = {"family": "llama", "parameter_size": "8.0B", "quantization_level": "Q4_K_M"}


class Server(BaseHTTPRequestHandler):
    """Ollama's answers, also for models that fail."""

    names = ("a:8b", "b:8b")
    shown: ClassVar[dict[str, dict]] = {}  # answers to /api/show that are not the usual one, by model
    generated: ClassVar[dict[str, tuple]] = {}  # (status, answer) to /api/generate instead of the usual ones, by model
    loaded = ()  # models of /api/ps

    def do_GET(self):
        assert self.path in ("/api/tags", "/api/ps")
        listed = [{"name": name} for name in self.names]
        self._answer({"models": listed if self.path == "/api/tags" else self.loaded})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/show":
            self._answer(self.shown.get(asked["model"], {"details": DETAILS}))
            return
        if asked["model"] in self.generated:
            status, content = self.generated[asked["model"]]
            self._answer(content, status)
            return
        assert self.path == "/api/generate"
        assert asked["options"]["num_predict"] == 7
        self._answer(
            {
                "response": f"{asked['model']} says", "prompt_eval_count": 10, "prompt_eval_duration": 5 * 10**8,
                "eval_count": 7, "eval_duration": 2 * 10**9,
            }
        )  # fmt: skip

    def _answer(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        for piece in content if isinstance(content, list) else [json.dumps(content).encode()]:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(0.05 if isinstance(content, list) else 0)

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


def monitored(address, tmp_path, *arguments):
    out = tmp_path / "out"
    limits = ["--max-tokens=7", "--pause=0.01"]
    status = main(["monitor", *arguments, f"--address={address}", *limits, f"--out={out}"])
    return status, rows(out / "monitor.csv") if status == 0 else []


def test_a_model_that_fails_is_a_row_and_the_others_go_on(model, address, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(Server, "names", ("full", "gone", "a:8b"))
    failing = {"full": (500, {"error": "out of\nmemory"}), "gone": (404, {"error": "model 'gone' not found"})}
    monkeypatch.setattr(Server, "generated", failing)
    status, found = monitored(address, tmp_path, "--ollama=all", f"--model={broken}", f"--model={model}")
    assert status == 0
    full, gone, good, damaged, own = found
    assert "with status 500 (out of memory): see the log of `ollama serve`" in full["failure"]
    assert "with status 404 (model 'gone' not found): pull it with `ollama pull gone`" in gone["failure"]
    assert str(broken) in damaged["failure"]
    assert [row["decode_tokens_per_second"] for row in (full, gone, damaged)] == ["", "", ""]
    assert [row["failure"] for row in (good, own)] == ["", ""]
    assert float(own["decode_tokens_per_second"]) > 0
    captured = capsys.readouterr()
    assert captured.out.count("failure=") == 3
    assert captured.err == ""
    assert (tmp_path / "out" / "monitor.png").read_bytes()[:4] == b"\x89PNG"


def test_where_every_model_fails_the_reason_is_one_line(address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Server, "generated", {"a:8b": (500, {"error": "out of memory"}), "b:8b": (400, {})})
    assert monitored(address, tmp_path, "--ollama=all") == (2, [])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "out of memory" in error
    assert "for b:8b with status 400 (Bad Request)" in error


@pytest.mark.parametrize(
    ("shown", "generated"),
    [
        ({"details": DETAILS, "capabilities": ["embedding"]}, (200, {"response": ""})),
        ({"details": DETAILS}, (400, {"error": '"b:8b" does not support generate'})),  # servers without capabilities
    ],
)
def test_embedding_models_are_named_and_left_out(address, tmp_path, monkeypatch, capsys, shown, generated):
    monkeypatch.setattr(Server, "shown", {"b:8b": shown, "a:8b": {"details": DETAILS, "capabilities": ["completion"]}})
    monkeypatch.setattr(Server, "generated", {"b:8b": generated})
    status, found = monitored(address, tmp_path, "--ollama=all")
    assert (status, [row["name"] for row in found]) == (0, ["a:8b"])
    assert "left out: b:8b generates no text" in capsys.readouterr().out


@pytest.mark.parametrize("nothing", [None, [], "", 3])
def test_what_the_server_does_not_say_is_unknown(address, tmp_path, monkeypatch, nothing):
    monkeypatch.setattr(Server, "names", ("a:8b",))
    monkeypatch.setattr(Server, "shown", {"a:8b": {"details": nothing, "capabilities": nothing}})
    names = ("response", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration")
    monkeypatch.setattr(Server, "generated", {"a:8b": (200, dict.fromkeys(names))})
    monkeypatch.setattr(Server, "loaded", nothing)
    status, [found] = monitored(address, tmp_path, "--ollama=all")
    assert (status, found["family"], found["share_on_gpu_percent"]) == (0, "", "")
    assert found["decode_tokens_per_second"] == "nan"


def test_a_server_without_models_is_one_line(address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Server, "names", ())
    assert monitored(address, tmp_path, "--ollama=all") == (2, [])
    assert "no model is left" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["[1]", '{"models": [', "\xff", "[" * 100_000])
def test_an_answer_that_is_no_object_is_named(address, monkeypatch, answer):
    content = [answer.encode("latin-1")]
    monkeypatch.setattr(Server, "do_GET", lambda self: self._answer(content))
    with pytest.raises(UserError, match="is it an Ollama server"):
        ollama.models(address)


def test_a_request_has_a_limit(address, monkeypatch):
    monkeypatch.setattr(ollama, "TIMEOUT", 0.2)
    monkeypatch.setattr(Server, "do_GET", lambda self: self._answer([b" "] * 20))
    with pytest.raises(UserError, match=r"gave no answer within 0\.2 seconds"):
        ollama.models(address)
    monkeypatch.setattr(Server, "do_GET", lambda _: time.sleep(0.6))
    with pytest.raises(UserError, match=r"gave no answer within 0\.2 seconds"):
        ollama.models(address)


def test_our_own_answers_have_a_limit(model, address, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_command, "LIMIT", 0.0)
    status, found = monitored(address, tmp_path, "--ollama=a:8b", f"--model={model}")
    assert status == 0
    assert "is not done after 0 seconds" in found[1]["failure"]


def test_the_share_on_the_gpu_is_told(model, address, tmp_path, monkeypatch):
    loaded = [{"name": "b:8b", "size": 4_000, "size_vram": 1_000}, {"name": "a:8b", "size": 800, "size_vram": 800}]
    monkeypatch.setattr(Server, "loaded", loaded)
    status, found = monitored(address, tmp_path, "--ollama=a:8b", "--ollama=b:8b", f"--model={model}")
    assert (status, [row["share_on_gpu_percent"] for row in found]) == (0, ["100.0", "25.0", "0.0"])


def test_the_picture_has_a_group_of_bars_for_each_model(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, _: drawn.append(figure))
    sample = machine.Sample(0.0, 10.0, 20.0, 30.0, 400.0)
    rates = {"peak_ram_percent": 20.0, "peak_cpu_percent": 10.0, "decode_tokens_per_second": 5.0}
    measured = [
        machine.Measured({"name": "a"} | rates | {"prompt_tokens_per_second": 50.0, "peak_vram_mb": 400.0}, [sample]),
        machine.Measured({"name": "b"} | rates | {"prompt_tokens_per_second": float("nan")}, [sample]),
        machine.Measured({"name": "c", "failure": "why"}, []),
    ]
    picture(measured, tmp_path / "monitor.png")
    panels = {axes.get_xlabel(): axes for axes in drawn[0].axes}
    assert [label.get_text() for label in panels["percent"].get_yticklabels()] == ["a", "b", "c (failed)"]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in panels["percent"].containers}
    assert {name: values[:2] for name, values in widths.items()} == {"peak CPU": [10.0, 10.0], "peak RAM": [20.0, 20.0]}
    assert len(panels["tokens per second"].containers) == 2
    assert len(panels["MB"].containers) == 1


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


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_that_is_nested_without_end(address, monkeypatch, status):
    monkeypatch.setitem(Server.generated, "a:8b", (status, [b"[" * 100_000]))
    with pytest.raises(UserError) as caught:
        ollama.generate("a:8b", "prompt", 7, address)
    assert "\n" not in str(caught.value)


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
