"""Causal attention and its kernels."""
