"""Bytes, FLOPs, and whether a model or a training step fits a device."""
