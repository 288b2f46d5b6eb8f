"""Routing, dispatch of tokens to experts, and the kernels of experts.

Letters beyond those of moe_reduce.models: I inputs and O outputs of a matrix, R rows of a chunk, tile or buffer.
"""
