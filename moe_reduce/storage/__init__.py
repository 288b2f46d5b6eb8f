"""Models on disk: safetensors under Hugging Face names, manifests with hashes, and export to other runtimes."""
