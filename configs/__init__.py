"""Configurations of the experiments, one a file; `--config=NAME` finds them wherever the package is installed."""
