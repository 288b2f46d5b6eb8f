"""Models of the Hugging Face hub in the place of directories, in the cache of huggingface_hub.

A name becomes the directory of a snapshot in the cache, where every file lies under the name that it has on the hub.
Small files are fetched at once; weights file by file, as they are opened.
"""

import re
from pathlib import Path

from moe_reduce.core.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME
CONFIG = "config.json"
# Further small files: those of the tokenizer, and settings of generation. A model need not have them.
SMALL = (
    "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "manifest.json",
)  # fmt: skip
SNAPSHOT = re.compile(r".*/models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)/(?P<file>[^/]+)")


def local(path: Path) -> Path:
    """The directory of a model: the path itself, or where the hub's model of this name lies in the cache.

    A path that exists is never looked up. UserError where the hub cannot be reached or does not give the model out.
    """
    name = str(path)
    if path.exists() or not NAME.fullmatch(name):
        return path
    directory = Path(_download(name, CONFIG, None)).parent
    for file in SMALL:
        fetch(directory / file)
    return directory


def fetch(file: Path) -> bool:
    """True if a file exists, or can be fetched from the hub into the snapshot that it belongs to."""
    if file.exists():
        return True
    found = SNAPSHOT.fullmatch(file.as_posix())
    if found is None:
        return False
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        _download(f"{found['owner']}/{found['name']}", found["file"], found["revision"])
    except UserError as error:
        absent = isinstance(error.__cause__, EntryNotFoundError)
        offline = isinstance(error.__cause__, LocalEntryNotFoundError)
        if absent and (not offline or file.name in SMALL):
            return False
        raise
    return True


def _download(name: str, file: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, file, revision=revision)
    except Exception as error:  # the hub's client raises many types, none of which is a defect of this package
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{name} is not a directory, and the Hugging Face hub does not give out its {file} ({reason}): give a "
            f"directory, or run hf download {name} where there is a connection"
        ) from error
