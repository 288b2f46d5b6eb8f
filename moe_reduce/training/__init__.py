"""Batches -> parameters: tasks (what is learned), one loop, sharding, checkpoints, metrics."""
