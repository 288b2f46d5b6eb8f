"""Models by their name on the Hugging Face hub, from a local server that speaks as it does."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from families_cases import written

from moe_reduce.core import hub
from moe_reduce.core.errors import UserError

NAME, COMMIT = "someone/tiny-qwen2", "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def served(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """(address of the server, names of the files that it gave out so far)."""
    given: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            file = directory / self.path.rpartition("/")[2]
            known = self.path.startswith(f"/{NAME}/resolve/") and file.is_file()
            content = file.read_bytes() if known else b""
            self.send_response(200 if known else 404)
            if known:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            else:
                here = self.path.startswith(f"/{NAME}/")
                self.send_header("X-Error-Code", "EntryNotFound" if here else "RepoNotFound")
                if here:
                    self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
                given.append(file.name)

        do_HEAD = do_GET

        def log_message(self, format, *arguments):
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", given
    finally:
        server.shutdown()
        server.server_close()


def ran(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    given = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | environment
    command = [sys.executable, "-m", "moe_reduce", *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


def test_a_model_of_the_hub_is_fetched_file_by_file_and_kept(tmp_path: Path):
    written(tmp_path / "model", "qwen2", 0)
    with served(tmp_path / "model") as (address, given):
        planned = ran(tmp_path / "home", "plan", f"--model={NAME}", "--json", HF_ENDPOINT=address)
        assert planned.returncode == 0, planned.stderr
        assert "config.json" in given
        assert "model.safetensors" not in given  # a plan reads no weights
        found = ran(tmp_path / "home", "inspect", f"--model={NAME}", "--json", HF_ENDPOINT=address)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["model_type"] == "qwen2"
        assert given.count("model.safetensors") == 1
        unknown = ran(tmp_path / "home", "inspect", "--model=someone/else", HF_ENDPOINT=address)
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1
    assert "someone/else is not a directory, and the Hugging Face hub does not give out" in unknown.stderr
    offline = ran(tmp_path / "home", "inspect", f"--model={NAME}", "--json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    alone = ran(tmp_path / "other", "inspect", f"--model={NAME}", HF_HUB_OFFLINE="1")
    assert alone.returncode == 2
    assert alone.stderr.count("\n") == 1
    assert f"hf download {NAME} where there is a connection" in alone.stderr


def test_a_path_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_):
        raise UserError("looked up")

    monkeypatch.setattr(hub, "_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone/else").mkdir(parents=True)
    for path in ("someone/else", "nowhere", "a/b/c", "../x", str(tmp_path / "absent"), "model.gguf"):
        assert hub.local(Path(path)) == Path(path)
    assert not hub.fetch(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="looked up"):
        hub.local(Path("someone/other"))
