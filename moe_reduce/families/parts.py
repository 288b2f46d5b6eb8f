"""Parts of an architecture, by which a reader tells families apart."""

from moe_reduce.families.family import Family

# part -> end of the path of a parameter that only architectures with this part have
PARTS = {
    "latent attention": "attention/latent",
    "linear attention": "linear_attention/output",
    "q/k norm": "key_norm/scale",
    "sinks": "attention/sinks",
    "attention biases": "attention/key_bias",
    "selection bias": "layers/router_bias",
    "shared expert": "shared_expert/down",
    "biased experts": "experts/down_bias",
    "dense first layers": "dense_layers/mlp/down",
}


def parts_of(family: Family) -> list[str]:
    """The parts that models of a family have, or may have."""
    return [part for part, end in PARTS.items() if any(path.endswith(end) for path in family.tensors)]


def is_mixture(family: Family) -> bool:
    """True if the models of a family are mixtures of experts."""
    return any("experts/" in path for path in family.tensors)
