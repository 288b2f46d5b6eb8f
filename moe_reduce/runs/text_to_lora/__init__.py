"""Runs of Text-to-LoRA (arXiv:2506.06105): oracle adapters, and hypernetworks that write adapters from descriptions.

objectives  the three tasks of the training loop: oracles, reconstruction, supervised
material    tasks, splits, embeddings and token rows of a run
run         one run, from its configuration to the files that it leaves
"""
