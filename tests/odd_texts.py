"""Odd strings for tokenizers: the same ones every time."""

import random

PIECES = (
    "hello", "world", "The quick brown fox", "naïve", "façade", "e\u0301", "\ufb01ne", "\u2460", "漢字", "かな",
    "한국어", "привет", "שלום", "مرحبا", "🙂", "👩\u200d🚀", "🇩🇪", "\u00a0", "\u200b", "\ufeff", "\u2028", "\x85",
    "\x00", "\x0b", "\x7f", "▁", "▁▁", "Ġ", "##ing", "<0x0A>", "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>",
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<tool>", "<|a|", "|>", "12", "345678", "3.14", "1,000",
    "def f(x):", "return", "{'a': [1]}", "https://example.org/?q=1&r=%20", "don't", "WE'LL", "x" * 40, "ab" * 30,
    "\t", "\n", "\n\n", "\r\n", "\r", " ", "  ", "     ", "\u3000", ".", "...", "!?", "--", "\"'", "\\n", "\ue000",
    "\U0010ffff", "\u0300",
)  # fmt: skip


def odd_texts(count: int, seed: int = 0) -> list[str]:
    """Make `count` strings of pieces that tokenizers treat in special ways, and of random characters."""
    generator = random.Random(seed)

    def character() -> str:
        while True:
            code = generator.choice((0x80, 0x250, 0x3000, 0x10000, 0x110000))
            found = chr(generator.randrange(code))
            if not 0xD800 <= ord(found) < 0xE000:  # halves of surrogate pairs are no text
                return found

    def text() -> str:
        parts = []
        for _ in range(generator.randrange(1, 12)):
            parts.append(generator.choice(PIECES) if generator.random() < 0.8 else character())
            parts.append(" " if generator.random() < 0.4 else "")
        return "".join(parts)

    return ["", " ", "\n", *(text() for _ in range(count - 3))]
