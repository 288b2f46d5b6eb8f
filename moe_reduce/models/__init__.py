"""Tokens -> logits: one decoder for dense, per-layer MoE and shared-pool models.

Letters, in names such as `x_BTD` and in einsum strings:
    B batch, T time, S = B·T tokens, D model width, N layers, H query heads, G key/value heads, C head width,
    F feed-forward or expert width, E experts, A active experts per token, M = S·A assignments, V vocabulary,
    K embedding factor, Z entries of a bank of adapters, J = E·Z groups (pairs of an expert and an entry),
    U width of the feed-forward block beside experts or before them; in latent attention L width of the latent vector,
    Q of that of queries, Y = L + rotary width, W width of a head's value, X = W + width of a key that is not rotated;
    in linear attention R value heads, C and W widths of a head's key and value, P inputs that the convolution reads,
    and U its channels, or the outputs of a matrix.
"""
