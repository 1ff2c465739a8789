"""Pieces of text put together are the whole text, whatever the tokens and however they arrive."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, metaspace, sentencepiece, wrapped

from furiosa_llm.text.detokenizer import IncrementalDetokenizer
from furiosa_llm.text.fast_backend import FastBackend

BYTE_LEVEL, SENTENCEPIECE, METASPACE = (
    wrapped(make()) for make in (byte_level, sentencepiece, metaspace)
)
TOKENIZERS = {
    "byte level": BYTE_LEVEL,
    "sentencepiece": SENTENCEPIECE,
    "metaspace": METASPACE,
}


def detokenized(tokenizer, prompt, pieces, *, skip=True):
    """The text of `pieces`, each a list of ids, and what each of them released."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    released = [detokenizer.append(piece) for piece in pieces]
    return "".join(released) + detokenizer.flush(), released


def cut(ids, borders):
    borders = sorted({0, len(ids), *(b % (len(ids) + 1) for b in borders)})
    return [ids[a:b] for a, b in pairwise(borders)]


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


BYTE_LEVEL_IDS = st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 2), max_size=40)
BORDERS = st.lists(st.integers(0, 40), max_size=8)


@given(ids=BYTE_LEVEL_IDS, borders=BORDERS, skip=st.booleans())
@example(ids=[*BYTE_LEVEL.encode("é你👍"), 111, 111], borders=[1, 2, 3, 4, 5], skip=True)
def test_any_tokens_of_a_byte_level_vocabulary_in_any_pieces(ids, borders, skip):
    """Random bytes are seldom valid UTF-8: also the replacement characters are the same."""
    text, _ = detokenized(BYTE_LEVEL, [], cut(ids, borders), skip=skip)
    assert text == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(prompt=st.text(min_size=1), ids=BYTE_LEVEL_IDS, borders=BORDERS)
def test_a_byte_level_output_continues_its_prompt(prompt, ids, borders):
    prompt_ids = ids_of(BYTE_LEVEL, prompt)
    text, _ = detokenized(BYTE_LEVEL, prompt_ids, cut(ids, borders))
    assert prompt + text == BYTE_LEVEL.decode(prompt_ids + ids)


WORDS = ["▁", "▁▁", "▁the", "▁a", "cat", "s", "é", "你", "�", "▁.", "<s>", "</s>", "<tool>"]
CHARACTERS = ["é", "你", "👍", "\x00", "~"]


@st.composite
def valid_sentencepiece_ids(draw, tokenizer):
    """Words, specials and characters spelt in byte tokens."""
    ids = []
    for kind in draw(st.lists(st.sampled_from([*WORDS, *(f"={c}" for c in CHARACTERS)]))):
        names = [f"<0x{b:02X}>" for b in kind[1:].encode()] if kind[0] == "=" else [kind]
        ids += [tokenizer._backend.token_id(name) for name in names]
    return ids


@pytest.mark.parametrize("tokenizer", [SENTENCEPIECE, METASPACE], ids=["strip", "first token"])
@given(data=st.data(), borders=BORDERS, skip=st.booleans())
def test_valid_tokens_of_a_sentencepiece_vocabulary_in_any_pieces(tokenizer, data, borders, skip):
    prompt = data.draw(valid_sentencepiece_ids(tokenizer), label="prompt")
    ids = data.draw(valid_sentencepiece_ids(tokenizer), label="output")
    text, _ = detokenized(tokenizer, prompt, cut(ids, borders), skip=skip)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    assert tokenizer.decode(prompt, skip_special_tokens=skip) + text == whole


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(data=st.data(), borders=BORDERS)
def test_the_text_does_not_depend_on_how_the_tokens_arrive(tokenizer, data, borders):
    """Any tokens at all, also those that never become characters."""
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40)
    prompt, ids = data.draw(any_ids), data.draw(any_ids)
    text, _ = detokenized(tokenizer, prompt, cut(ids, borders))
    assert text == detokenized(tokenizer, prompt, [[id] for id in ids])[0]
    text.encode()  # no half characters


def test_characters_are_held_back_until_they_are_whole():
    ids = ids_of(BYTE_LEVEL, "👍é!")
    text, released = detokenized(BYTE_LEVEL, [], [[id] for id in ids])
    assert text == "👍é!"
    assert released == ["", "", "👍", "é", "!"]


def test_a_character_begun_by_the_prompt_is_ended_by_the_output():
    ids = ids_of(BYTE_LEVEL, "你")
    assert len(ids) == 3
    assert detokenized(BYTE_LEVEL, ids[:2], [ids[2:]])[0] == "你"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        pytest.param(["▁a"], " the cat", id="after a word the space stays"),
        pytest.param([], "the cat", id="at the very start it goes"),
        pytest.param(["<s>"], "the cat", id="after specials only it goes"),
    ],
)
@pytest.mark.parametrize("tokenizer", [SENTENCEPIECE, METASPACE], ids=["strip", "first token"])
def test_leading_space(tokenizer, prompt, text):
    ids = [tokenizer._backend.token_id(t) for t in ("▁the", "▁", "cat")]
    prompt_ids = [tokenizer._backend.token_id(t) for t in prompt]
    assert detokenized(tokenizer, prompt_ids, [[id] for id in ids])[0] == text


def test_an_invalid_byte_does_not_take_back_what_was_shown():
    names = ["<0xC3>", "<0xA9>", "<0xFF>", "s"]
    ids = [SENTENCEPIECE._backend.token_id(n) for n in names]
    assert detokenized(SENTENCEPIECE, [], [[id] for id in ids])[0] == "é\ufffds"


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_endless_invalid_bytes_neither_pile_up_nor_disappear(tokenizer):
    name = "<0xFF>" if tokenizer is not BYTE_LEVEL else "ÿ"
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    text = "".join(detokenizer.append([tokenizer._backend.token_id(name)]) for _ in range(500))
    assert len(text) > 490
    assert text + detokenizer.flush() == "\ufffd" * 500


def test_work_per_token_is_bounded_without_a_table(monkeypatch):
    """Counted in tokens decoded, not in seconds."""
    num_decoded = 0
    decode = FastBackend.decode

    def counting(self, token_ids, skip_special_tokens):
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return decode(self, token_ids, skip_special_tokens)

    monkeypatch.setattr(FastBackend, "decode", counting)
    ids = [METASPACE._backend.token_id(t) for t in ("▁the", "<0xE4>", "<0xBD>", "<0xA0>", "▁")]
    text, _ = detokenized(METASPACE, ids, [ids] * 200)
    assert text == " the你 " * 200
    assert num_decoded < 20 * len(ids) * 200
