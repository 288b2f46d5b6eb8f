"""Resumable jobs: train, reduce, adapt."""
