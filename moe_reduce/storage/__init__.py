"""Params <-> disk: safetensors in the layout of Hugging Face, and a manifest of what each file is."""
