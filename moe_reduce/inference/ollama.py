"""Client of a local Ollama server, to compare its models with ours."""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from moe_reduce.core import json_files
from moe_reduce.core.errors import UserError

ADDRESS = "http://127.0.0.1:11434"
TIMEOUT = 300.0  # seconds for a request
NANO = 1e9
PIECE = 1 << 16  # bytes read at a time
NO_TEXT = "does not support generate"  # answer of the server for an embedding model


class GeneratesNoText(UserError):
    """A model that only makes embeddings."""


class Description(NamedTuple):
    """A model as the server describes it; empty strings for what it does not say."""

    name: str
    family: str
    parameters: str
    quantisation: str


def models(address: str = ADDRESS) -> list[str]:
    """Names of all models of the server. UserError if no server answers."""
    found = _ask(address, "/api/tags")
    return [entry["name"] for entry in _entries(found, "models") if isinstance(entry.get("name"), str)]


def describe(name: str, address: str = ADDRESS) -> Description:
    """Describe one model of the server. GeneratesNoText for an embedding model."""
    found = _ask(address, "/api/show", {"model": name})
    capabilities = found.get("capabilities")  # missing in answers of older servers
    if isinstance(capabilities, list) and capabilities and "completion" not in capabilities:
        raise GeneratesNoText(f"{name} generates no text: its capabilities are {', '.join(map(str, capabilities))}")
    details = found.get("details")
    details = details if isinstance(details, dict) else {}
    keys = ("family", "parameter_size", "quantization_level")
    return Description(name, *(str(details.get(key) or "") for key in keys))


def generate(name: str, prompt: str, tokens: int, address: str = ADDRESS) -> tuple[str, float, float]:
    """Generate greedily: (text, prompt tokens per second, decoded tokens per second), NaN for an unknown rate."""
    options = {"num_predict": tokens, "temperature": 0}
    request = {"model": name, "prompt": prompt, "stream": False, "raw": True, "options": options}
    found = _ask(address, "/api/generate", request)
    # the server does not read a cached prompt again, and gives no rate for it
    rates = [_rate(found.get(f"{kind}_count"), found.get(f"{kind}_duration")) for kind in ("prompt_eval", "eval")]
    return str(found.get("response") or ""), rates[0], rates[1]


def gpu_share(name: str, address: str = ADDRESS) -> float | None:
    """Share of a loaded model's bytes that lies in GPU memory, 0 to 1; None where the server does not say."""
    try:
        loaded = _entries(_ask(address, "/api/ps"), "models")
    except UserError:  # older servers have no such list
        return None
    for entry in loaded:
        size, on_gpu = (_number(entry.get(key)) for key in ("size", "size_vram"))
        if entry.get("name") in (name, f"{name}:latest") and size and on_gpu is not None:
            return on_gpu / size
    return None


def _rate(count: Any, nanoseconds: Any) -> float:
    tokens, duration = _number(count), _number(nanoseconds)
    return tokens / duration * NANO if tokens is not None and duration else float("nan")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _entries(found: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Objects of a list in an answer; none where the server writes null."""
    listed = found.get(key)
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _ask(address: str, path: str, content: Any = None) -> dict[str, Any]:
    """The answer to a request, a JSON object. UserError where there is none within `TIMEOUT`."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            found = json_files.parse(_body(response), f"the answer of {address}{path}", "is it an Ollama server?")
    except urllib.error.HTTPError as error:
        raise _refusal(error, address + path, content) from error
    except TimeoutError as error:
        raise UserError(_too_late(address + path)) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):  # URLError, of a connection that never opened
            raise UserError(_too_late(address + path)) from error
        raise UserError(
            f"no Ollama server answers at {address}{path} ({error}): start it with `ollama serve`"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{address}{path} answers with something else than an object: is it an Ollama server?")
    return found


def _body(response: Any) -> bytes:
    """The whole answer. The timeout of a socket is for one read, so one that drips could last for ever."""
    deadline, pieces = time.monotonic() + TIMEOUT, []
    while piece := response.read1(PIECE):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(pieces)


def _too_late(url: str) -> str:
    return f"{url} gave no answer within {TIMEOUT:g} seconds: try a smaller model, or fewer --max-tokens"


def _refusal(error: urllib.error.HTTPError, url: str, content: Any) -> UserError:
    """The error that a status of 400 or above stands for."""
    name = content["model"] if content else None
    try:
        said = json_files.parse(error.read(), url)["error"]
    except (OSError, UserError, TypeError, KeyError):
        said = error.reason
    said = " ".join(str(said).split())
    if NO_TEXT in said:
        return GeneratesNoText(f"{name} generates no text: {said}")
    remedy = "see the log of `ollama serve`"
    if error.code == http.client.NOT_FOUND:
        remedy = f"pull it with `ollama pull {name}`" if name else "is it an Ollama server?"
    about = f" for {name}" if name else ""
    return UserError(f"{url} answers{about} with status {error.code} ({said}): {remedy}")
