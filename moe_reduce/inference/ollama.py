"""Client of a local Ollama server, to compare its models with ours."""

import json
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from moe_reduce.core.errors import UserError

ADDRESS = "http://127.0.0.1:11434"
TIMEOUT = 600.0  # seconds
NANO = 1e9


class Description(NamedTuple):
    """A model as the server describes it."""

    name: str
    family: str
    parameters: str
    quantisation: str


def models(address: str = ADDRESS) -> list[Description]:
    """Describe all models of the server. UserError if no server answers."""
    return [describe(entry["name"], address) for entry in _ask(address, "/api/tags")["models"]]


def describe(name: str, address: str = ADDRESS) -> Description:
    """Describe one model of the server."""
    details = _ask(address, "/api/show", {"model": name})["details"]
    return Description(name, details["family"], details["parameter_size"], details["quantization_level"])


def generate(name: str, prompt: str, tokens: int, address: str = ADDRESS) -> tuple[str, float, float]:
    """Generate greedily: (text, prompt tokens per second, decoded tokens per second)."""
    options = {"num_predict": tokens, "temperature": 0}
    request = {"model": name, "prompt": prompt, "stream": False, "raw": True, "options": options}
    found = _ask(address, "/api/generate", request)
    rates = []
    for kind in ("prompt_eval", "eval"):  # a cached prompt is not read again, and has no rate
        seconds = found.get(f"{kind}_duration", 0) / NANO
        rates.append(found.get(f"{kind}_count", 0) / seconds if seconds else float("nan"))
    return found["response"], rates[0], rates[1]


def _ask(address: str, path: str, content: Any = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.loads(response.read())
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(
            f"no Ollama server answers at {address}{path} ({error}): start it with `ollama serve`"
        ) from error
