"""Names of the files that a tokenizer's directory may hold."""

SENTENCEPIECE_FILE, JSON_FILE, SETTINGS_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
EXTRA_FILES = ("special_tokens_map.json", "added_tokens.json", VOCABULARY_FILE)  # of transformers, never written here
MODEL_FILE = "config.json"  # its model_type decides how transformers reads the tokenizer beside it
READ_AS = "tokenizer_model_type"  # key of config.json: model_type of the model that a tokenizer was made for
