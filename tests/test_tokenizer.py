"""Loading, encoding and decoding, and what the files beside tokenizer.json add."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers_for_tests import byte_level, metaspace, saved, sentencepiece, wrapped

from furiosa_llm.errors import ArtifactError, InvalidRequestError
from furiosa_llm.text.tokenizer import Tokenizer


def test_encodes_and_decodes_as_the_library_does(tmp_path):
    library = byte_level()
    tokenizer = Tokenizer.from_directory(saved(tmp_path, library))
    text = "the thé <think>👍<|eos|>"
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.encode(text)[0] == library.token_to_id("<|bos|>")
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)[1:]
    assert tokenizer.decode(tokenizer.encode(text)) == "the thé <think>👍"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == "<|bos|>" + text
    assert tokenizer.decode([10**6, *tokenizer.encode("a")]) == "a"
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert tokenizer.special_ids == {library.token_to_id(t) for t in ("<|bos|>", "<|eos|>")}


@pytest.mark.parametrize(
    ("make", "token", "text"),
    [
        (byte_level, "Ġthe", " the"),
        (byte_level, "Ã", "\ufffd"),
        (byte_level, "<|eos|>", "<|eos|>"),
        (byte_level, "a 你", "a 你"),
        (sentencepiece, "▁the", " the"),
        (sentencepiece, "<0x41>", "A"),
        (sentencepiece, "<s>", "<s>"),
        (metaspace, "cat", "cat"),
    ],
)
def test_text_of_one_token(make, token, text):
    tokenizer = wrapped(make())
    assert tokenizer.token_text(tokenizer._backend.token_id(token)) == text


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path):
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=8)
    tokenizer = Tokenizer.from_directory(saved(tmp_path, library))
    assert len(tokenizer.encode("x" * 100, add_special_tokens=False)) == 100
    assert len(tokenizer.encode("x", add_special_tokens=False)) == 1


@pytest.mark.parametrize(
    ("files", "names", "ids"),
    [
        pytest.param({}, [], [], id="nothing said"),
        pytest.param({"tokenizer_config": {"eos_token": "<|eos|>"}}, ["<|eos|>"], [], id="token"),
        pytest.param(
            {"special_tokens_map": {"eos_token": {"content": "<|eos|>"}}}, ["<|eos|>"], [], id="map"
        ),
        pytest.param({"tokenizer_config": {"eos_token": "<nil>"}}, [], [], id="unknown token"),
        pytest.param({"generation_config": {"eos_token_id": [7, 3]}}, [], [3, 7], id="a list"),
        pytest.param(
            {"generation_config": {"eos_token_id": 5}, "config": {"eos_token_id": 6}}, [], [5],
            id="generation_config first",
        ),
        pytest.param({"config": {"eos_token_id": 6}}, [], [6], id="config"),
        pytest.param({"generation_config": {"eos_token_id": [True, -1, "x"]}}, [], [], id="junk"),
    ],
)  # fmt: skip
def test_eos_token_ids(tmp_path, files, names, ids):
    library = byte_level()
    tokenizer = Tokenizer.from_directory(saved(tmp_path, library, **files))
    assert tokenizer.eos_token_ids == tuple(sorted([*map(library.token_to_id, names), *ids]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("ab\ud800c", "lone surrogate (U+D800) at character 2", id="surrogate"),
        pytest.param(None, "NoneType, not a str", id="none"),
        pytest.param(b"ab", "bytes, not a str", id="bytes"),
    ],
)
def test_text_that_is_none(text, reason):
    with pytest.raises(InvalidRequestError) as error:
        wrapped(byte_level()).encode(text)
    assert reason in str(error.value)
    assert error.value.param == "prompt"


def test_odd_text_passes():
    tokenizer = wrapped(byte_level())
    for text in ("", "\x00", "\ufffe\uffff", "e\u0301", "👩‍👩‍👧"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_directories_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(ArtifactError, match="is no directory"):
        Tokenizer.from_directory(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["[", "[]", "[" * 100_000, "\udcff"])
def test_damaged_files_beside_it(tmp_path, content):
    directory = saved(tmp_path, byte_level())
    (directory / "tokenizer_config.json").write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(ArtifactError, match="tokenizer_config"):
        Tokenizer.from_directory(directory)


def test_unknown_mode(tmp_path):
    with pytest.raises(InvalidRequestError, match="allowed are auto and slow"):
        Tokenizer.from_directory(tmp_path, mode="SLOW")


@pytest.mark.slow  # imports transformers
@pytest.mark.filterwarnings("ignore")
def test_slow_mode(tmp_path):
    """BERTweet's is one of the tokenizers that still exist in Python only."""
    directory = tmp_path / "slow"
    directory.mkdir()
    config = {"tokenizer_class": "BertweetTokenizer", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "vocab.txt").write_text("hel@@ 5\nlo 4\n")
    (directory / "bpe.codes").write_text("h e 9\nhe l 8\nl o</w> 7\n")
    tokenizer = Tokenizer.from_directory(directory, mode="slow")
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert len(ids) == 2
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.pieces is None
    assert tokenizer.eos_token_ids == (tokenizer._backend.token_id("</s>"),)

    fast = saved(
        tmp_path / "fast", byte_level(), tokenizer_config={"tokenizer_class": "PreTrainedTokenizer"}
    )
    with pytest.raises(InvalidRequestError, match="use --tokenizer-mode auto"):
        Tokenizer.from_directory(fast, mode="slow")
    with pytest.raises(ArtifactError, match="no usable tokenizer"):
        Tokenizer.from_directory(tmp_path, mode="slow")


def test_many_threads_get_the_same():
    tokenizer = wrapped(byte_level())
    texts = [f"the {n} é👍" * 50 for n in range(64)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(t) for t in texts]
        ids = range(tokenizer.vocab_size)
        fresh = wrapped(byte_level())
        assert list(pool.map(fresh.token_text, ids)) == [tokenizer.token_text(i) for i in ids]
