"""Pictures as PNG. Without pyplot, whose backend and open figures belong to who imports us: a notebook, a script."""

import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 5), sharey: bool = False):
    """(a figure, its axes as an array of rows × columns). size: inches."""
    figure = Figure(figsize=size)
    return figure, np.asarray(figure.subplots(rows, columns, squeeze=False, sharey=sharey))


def save(figure: Figure, file: Path) -> None:
    """Whole or not at all."""
    figure.tight_layout()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(file)
