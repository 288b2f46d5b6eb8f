"""The package moe_reduce and its command, moe-reduce."""

from setuptools import find_packages, setup

EXPORT = ["flatbuffers>=25.0", "jax2onnx>=0.17", "onnx>=1.20", "onnxruntime>=1.24"]
CHAT = ["jinja2>=3.1.6"]
EVALUATE = ["lm-eval>=0.4.9", "rouge-score>=0.1.2"]
HYPERNETWORK = ["onnxruntime>=1.24", "pyyaml>=6.0"]
MONITOR = ["psutil>=5.9"]
NOTEBOOKS = ["ipykernel>=6.29", "nbclient>=0.10"]
TOOLS = ["basedpyright>=1.31", "pytest>=8.3", "pytest-xdist>=3.7", "ruff>=0.12"]
TEST_CORE = [*CHAT, *HYPERNETWORK, *MONITOR, *NOTEBOOKS, *EXPORT, *TOOLS]
PEERS = [
    *EVALUATE,
    "compressed-tensors>=0.15",
    "peft>=0.17",
    "torch==2.13.0",
]  # gigabytes: compared with, never built on

setup(
    name="moe_reduce",
    version="0.1.0",
    license="Apache-2.0",
    description="Make a language model smaller, and show what it cost: shared expert pools, REAP, SkeMA, in JAX",
    packages=find_packages(include=["moe_reduce", "moe_reduce.*", "configs"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "datasets>=4.0",
        "sentencepiece>=0.2.3",
        "numpy>=2.0",
        "ml-collections>=1.1",
        "grain>=0.2.12",
        "tokenizers>=0.22",
        "transformers>=5.24",  # reads the tokenizers of other people's models; needs no torch for that
        "safetensors>=0.6",
        "regex>=2025.10",  # expressions of other people's adapters, with a limit on time
        "huggingface-hub>=0.30",
        "gguf>=0.18",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "tensorboardX>=2.6",
        "zstandard>=0.23",
        "filelock>=3.13",
    ],
    extras_require={
        "chat": CHAT,
        "evaluate": EVALUATE,
        "hypernetwork": HYPERNETWORK,
        "monitor": MONITOR,
        "notebooks": NOTEBOOKS,
        "export": EXPORT,
        "tpu": ["libtpu>=0.0.40"],
        "test-core": TEST_CORE,
        "test": [*TEST_CORE, *PEERS],
    },
    entry_points={"console_scripts": ["moe-reduce=moe_reduce.__main__:main"]},
)
