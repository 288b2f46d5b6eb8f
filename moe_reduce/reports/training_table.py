"""The comparison that `train` prints: one column for each model, one row for each metric."""

from collections.abc import Sequence

import numpy as np

from moe_reduce.reports import tables
from moe_reduce.reports.summaries import Summary, baseline, entropy


def table(summaries: Sequence[Summary]) -> str:
    """Aligned text; gaps and shares are relative to the baseline."""
    first = baseline(summaries)
    components = sorted({name for summary in summaries for name in summary["by_component"]})
    named = first["name"] or "model"
    names = ["", "parameters", *(f"  {component}" for component in components), f"share of {named}"]
    names += ["bytes (fp32)", "training FLOPs a token", "tokens", "validation loss (nats)", "validation perplexity"]
    names += ["next-token accuracy", f"gap to {named}", "tokens/s", "MFU", "compile seconds", "expert use"]
    columns = [_column(summary, first, components) for summary in summaries]
    return tables.aligned(tables.transposed([names, *columns]))


def _column(run: Summary, first: Summary, components: Sequence[str]) -> list[str]:
    validation = run["validation"]
    return [
        run["name"] or "model",
        f"{run['parameters']:,}",
        *(f"{run['by_component'].get(component, 0):,}" for component in components),
        f"{run['parameters'] / first['parameters']:.1%}",
        f"{run['bytes'] / 1e6:,.2f} MB",
        f"{run['train_flops_per_token'] / 1e6:,.2f} M",
        f"{run['tokens']:,}",
        f"{validation['loss']:.4f}",
        f"{validation['perplexity']:.2f}",
        f"{validation['accuracy']:.2%}",
        f"{validation['loss'] - first['validation']['loss']:+.4f}",
        _or_dash(run["tokens_per_second"], ",.0f"),
        _or_dash(run["mfu"], ".1%"),
        f"{run['compile_seconds']:.1f}",
        _expert_use(run["expert_use"]),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _expert_use(shares: list[list[float]] | None) -> str:
    """Normalised entropy of expert use over all layers and in one layer, and the number of unused experts."""
    if shares is None:
        return "-"
    pooled = np.mean(shares, axis=0)
    unused = int(np.sum(pooled < 0.1 / len(pooled)))  # under a tenth of the mean share
    by_layer = float(np.mean([entropy(layer) for layer in shares]))
    return f"entropy {entropy(pooled):.2f}, a layer {by_layer:.2f}, unused {unused}"
