"""Batches -> parameters: tasks (losses and what trains), the loop, sharding, checkpoints and metrics."""
