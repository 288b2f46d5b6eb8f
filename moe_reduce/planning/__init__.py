"""Planning without weights: bytes, FLOPs, and whether a model or a training step fits a device."""
