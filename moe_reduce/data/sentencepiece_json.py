"""A SentencePiece BPE as a `tokenizers` tokenizer, for transformers and others that read tokenizer.json.

transformers converts a lone tokenizer.model too, but ranks merges by id: Llama 2's runs of spaces come out otherwise.
"""

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

META_SPACE = "▁"  # stands for a space inside a SentencePiece vocabulary
PROBE = "def  f(x):\n\treturn [x, 12345]\r\n\n  naïve ﬁ ① 漢字 🙂\u00a0 The end. \n"


def to_json_tokenizer(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer | None:
    """The same ids from the other library; None for models that it cannot copy (unigram, or a normalisation)."""
    pieces = [processor.id_to_piece(identity) for identity in range(processor.get_piece_size())]
    if len(set(pieces)) != len(pieces):
        return None
    model = models.BPE(
        vocab={piece: identity for identity, piece in enumerate(pieces)},
        merges=_merges(processor, pieces),
        unk_token=pieces[processor.unk_id()],
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", META_SPACE)
    steps = [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if begins_with_space(processor):
        spaces = normalizers.Sequence([normalizers.Prepend(META_SPACE), spaces])
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    if tokenizer.encode(PROBE).ids != processor.encode(PROBE):
        return None
    controls = [piece for identity, piece in enumerate(pieces) if processor.is_control(identity)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in controls])
    return tokenizer


def begins_with_space(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the model puts a space before each text (add_dummy_prefix)."""
    return processor.encode("a", out_type=str)[0].startswith(META_SPACE)


def _merges(processor: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order in which SentencePiece prefers the result."""
    known = {piece: identity for identity, piece in enumerate(pieces)}
    ranked = []
    for identity, piece in enumerate(pieces):
        if processor.is_control(identity) or processor.is_byte(identity) or processor.is_unknown(identity):
            continue
        halves = [(piece[:end], piece[end:]) for end in range(1, len(piece))]
        for left, right in halves:
            if left in known and right in known:
                ranked.append((-processor.get_score(identity), identity, known[left], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
