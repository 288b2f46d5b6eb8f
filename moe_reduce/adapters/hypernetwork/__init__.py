"""Hypernetworks: networks that write an adapter from the description of a task (Text-to-LoRA, arXiv:2506.06105).

    layout         places of a base's adapted matrices, and the rows that the network computes for them
    network        the Flax module: embedding of a description, layer and module -> values of the adapter's leaves
    hypernetwork   config, base and parameters as one value; a bank of adapters, or one Adapter, from embeddings
    encoders       text encoders behind one protocol, and a cache of their embeddings
    conditioning   embeddings by which a hypernetwork knows a task: of its descriptions, of its number, or both
    bert           a reader of BERT encoders in safetensors
    tasks          tasks in the format of Super-NaturalInstructions (arXiv:2204.07705), as prompts and completions
    rows           instances as token rows, and batches in which tasks take turns
    splits, leaks  training, validation and unseen tasks, without a data set or instances in common
    directory      a trained hypernetwork on disk, and the adapters that it wrote

Letters: Z descriptions (entries of a bank of adapters), W width of their embeddings, P pairs of a module and a layer,
Y rows of the network, N layers, E experts, I inputs, O outputs, R rank, K sketch width.
A *module* is a target of the adapter, such as the queries of all layers; its *side* is A (`in`) or B (`out`).
"""
