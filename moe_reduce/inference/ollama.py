"""A local Ollama server, to put its models beside ours."""

import json
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from moe_reduce.core.errors import UserError

ADDRESS = "http://127.0.0.1:11434"
SECONDS = 600.0  # that an answer may take
NANO = 1e9


class Described(NamedTuple):
    """What the server says of a model."""

    name: str
    family: str
    parameters: str
    quantisation: str


def models(address: str = ADDRESS) -> list[Described]:
    """The models that the server has; raises UserError when none answers."""
    return [describe(entry["name"], address) for entry in _ask(address, "/api/tags")["models"]]


def describe(name: str, address: str = ADDRESS) -> Described:
    """One model of the server."""
    details = _ask(address, "/api/show", {"model": name})["details"]
    return Described(name, details["family"], details["parameter_size"], details["quantization_level"])


def generate(name: str, prompt: str, tokens: int, address: str = ADDRESS) -> tuple[str, float, float]:
    """(text, prompt tokens a second, decoded tokens a second) of a greedy answer."""
    options = {"num_predict": tokens, "temperature": 0}
    request = {"model": name, "prompt": prompt, "stream": False, "raw": True, "options": options}
    found = _ask(address, "/api/generate", request)
    rates = []
    for kind in ("prompt_eval", "eval"):  # a prompt that the server still knows is not read again
        seconds = found.get(f"{kind}_duration", 0) / NANO
        rates.append(found.get(f"{kind}_count", 0) / seconds if seconds else float("nan"))
    return found["response"], rates[0], rates[1]


def _ask(address: str, path: str, content: Any = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read())
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(
            f"no Ollama server answers at {address}{path} ({error}): start it with `ollama serve`"
        ) from error
