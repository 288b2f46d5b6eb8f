"""Tokenizers laid out as Llama 2's fast one: a blank before each text, dropped again when text is decoded."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BLANK = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def write_tokenizer(place: Path, text: str, vocab_size: int, begins: bool) -> None:
    """Train one on a text, and save it as transformers does. begins: a begin-of-text token is put before each text."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    made.train_from_iterator([word + " " for word in text.split()] * 3 + [text[:200]], trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>" if begins else None, eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(place)  # fmt: skip
