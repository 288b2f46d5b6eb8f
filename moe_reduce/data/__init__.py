"""Corpus -> tokens on disk -> batches.

Modules, in the order in which text flows through them:

    sources/            documents of data.source, one module per kind: python-stdlib, local files or hub:OWNER/NAME
    files               readers of txt, jsonl and parquet (text_files: decompressed and decoded)
    pieces              documents cut into bounded pieces, each assigned to training or validation
    tokenizers          one protocol for all, and the choice of a reader: library_reader for directories (transformers;
                        library_tokenizer, splitting), gguf_tokenizer for GGUF files, sentencepiece_tokenizer for what
                        is trained here (sentencepiece_json: SentencePiece -> tokenizer.json; tokenizer_training: a new
                        vocabulary)
    tokenizing          pieces -> token ids, in parallel processes
    shards              token ids in memory-mapped files with a manifest
    rows, completions   the same interface for token ids (.npy), and for prompts with completions
    prepare             all of the above, cached: `prepare(config, vocab_size) -> (tokens, tokenizer)`
    batches             `train_batches` and `validation_batches` from prepared tokens, through grain

Letters: B sequences per batch, T tokens per sequence. A user's mistake raises a UserError of one line.
"""
