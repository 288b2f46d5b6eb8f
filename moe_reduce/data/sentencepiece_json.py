"""Conversion of a SentencePiece BPE into a tokenizer.json, which transformers and other programs read.

transformers can convert a tokenizer.model too, but it ranks merges by id, which tokenizes runs of spaces differently
from Llama 2's own tokenizer.
"""

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from moe_reduce.data.splitting import META_SPACE

PROBE = "def  f(x):\n\treturn [x, 12345]\r\n\n  naïve ﬁ ① 漢字 🙂\u00a0 The end. \n"


def to_json_tokenizer(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer | None:
    """Convert to a tokenizer that gives the same ids; None for models that cannot be converted.

    Unigram models and models that normalise text cannot.
    """
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
    """Tell whether the model puts a space before each text (add_dummy_prefix)."""
    return processor.encode("a", out_type=str)[0].startswith(META_SPACE)


def _merges(processor: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
    """List every pair of pieces that joins into a third, in the order in which SentencePiece prefers the result."""
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
