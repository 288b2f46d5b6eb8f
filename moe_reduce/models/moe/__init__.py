"""Routing, dispatch of tokens to experts, and the kernels of experts."""
