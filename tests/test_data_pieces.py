"""Cutting documents and dividing them between training and validation."""

import pytest

from moe_reduce.data.pieces import PIECE_CHARACTERS, TRAIN, VALIDATION, cut, pieces, split_pieces

LINES = "".join(f"line {number} of some words\n" for number in range(20_000))


def characters(found, split):
    return sum(len(piece.text) for piece in found if piece.split == split)


@pytest.mark.parametrize("text", [LINES, LINES.replace("\n", " "), LINES.replace("\n", "").replace(" ", ""), "", "x"])
def test_pieces_are_bounded_and_join_to_the_text(text):
    fragments = [text[start : start + 777] for start in range(0, len(text), 777)]
    found = list(cut(fragments, 1000))
    assert "".join(found) == text
    assert all(0 < len(piece) <= 1000 for piece in found)
    if "\n" in text:
        assert all(piece.endswith("\n") for piece in found)


def test_only_the_last_piece_of_a_document_ends_it():
    found = list(pieces([["a\nb\nc"], [], ["", ""], ["d"]], limit=2))
    assert [(piece.document, piece.text, piece.last) for piece in found] == [
        (0, "a\n", False),
        (0, "b\n", False),
        (0, "c", True),
        (3, "d", True),
    ]


def test_about_the_fraction_is_held_out_the_same_each_time():
    corpus = [[f"document {number}"] for number in range(4000)]
    found = list(split_pieces(corpus, 0.1))
    assert found == list(split_pieces(corpus, 0.1))
    assert [piece.text for piece in found] == [document[0] for document in corpus]
    assert 300 < sum(piece.split == VALIDATION for piece in found) < 500


@pytest.mark.parametrize(
    "corpus", [[[LINES[:3000]]], [["first\n"], [LINES[:3000]]], [[LINES[: PIECE_CHARACTERS * 2]]], [["ab"]]]
)
def test_a_small_corpus_holds_out_its_end(corpus):
    found = list(split_pieces(corpus, 0.01))
    assert "".join(piece.text for piece in found) == "".join(document[0] for document in corpus)
    assert characters(found, VALIDATION) > 0
    assert characters(found, TRAIN) > characters(found, VALIDATION) or len(corpus[0][0]) == 2
    assert found[-1].split == VALIDATION
    assert found[-1].last
    assert sum(piece.last for piece in found) == len(corpus)


def test_nothing_is_held_out_when_the_fraction_is_zero():
    assert all(piece.split == TRAIN for piece in split_pieces([["a"], ["b"]], 0.0))


def test_a_large_corpus_streams_instead_of_being_collected():
    taken = 0

    def corpus():
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield ["word " * 4000]

    next(split_pieces(corpus(), 1e-12))  # so small that nothing is ever chosen: the held-back tail must stay bounded
    assert taken < 10
