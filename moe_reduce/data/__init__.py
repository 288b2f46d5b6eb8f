"""Corpus -> tokens on disk -> batches.

The room in the order in which text flows through it:

    sources     what data.source names: python-stdlib, local files, hub:OWNER/NAME, or rows of token ids (.npy)
    files       the readers of txt, jsonl and parquet, compressed or not
    pieces      documents cut into bounded pieces, each assigned to training or validation
    tokenizers  SentencePiece models and tokenizer.json behind one protocol (byte_level reads the GPT-2 style files)
    tokenizing  pieces -> token ids, in parallel processes
    shards      token ids in memory-mapped files under a manifest; rows: the same interface over a .npy
    prepare     all of the above once, cached: `prepare(config, vocab_size) -> (store, tokenizer)`
    batches     `train_batches` and `validation_batches` over a prepared store, through grain

Letters: B sequences a batch, T tokens a sequence. Every mistake of a user is a UserError of one line.
"""
