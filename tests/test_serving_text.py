"""Token ids to text one by one: whatever the tokenizer, as if all had been decoded at once."""

import time
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from serving.text import Delta, Detokenizer, token_text

CORPUS = (
    "the tool is in the house, then there is the end. ",
    "Straße, größer, naïve café; привет, мир; 你好 世界 你好 世界。こんにちは 🙂🙃👩‍👩‍👧 ",
)
LETTERS = "▁abcdefghijklmnopqrstuvwxyz.,;<>/_é"
WORDS = ("▁the", "▁tool", "th", "en", "ing", "▁▁", "▁", "你", "好", "▁end", "\n\n")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With two special tokens in front of one that is added but not special."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it; merges cross the borders of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return wrapped(tokenizer)


def pieces() -> list[str]:
    return ["<unk>", *BYTES, *LETTERS, *(word for word in WORDS if word not in LETTERS)]


def llama() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: byte tokens, and the first space of the text is stripped."""
    vocabulary = {piece: i for i, piece in enumerate(pieces())}
    merges = [("t", "h"), ("e", "n"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(tokenizer)


def gemma() -> PreTrainedTokenizerFast:
    """Byte tokens under a unigram model, and no space is stripped."""
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces())], 0, True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrapped(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """As T5 and XLNet have it: no byte tokens, spaces depend on the place in the text."""
    scores = [(piece, -float(i)) for i, piece in enumerate(pieces()) if piece not in BYTES]
    tokenizer = Tokenizer(models.Unigram(scores, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def suffixed() -> PreTrainedTokenizerFast:
    """As GPT-1 has it: a word's last token ends in </w>, a space unless it is the text's last."""
    words = ["<unk>", *(f"{word}</w>" for word in ("the", "end", "a")), "th", "en", *LETTERS]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>")
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return wrapped(tokenizer)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte": byte_tokenizer,
    "byte_level": byte_level,
    "llama": llama,
    "gemma": gemma,
    "metaspace": metaspace,
    "suffixed": suffixed,
}


@cache
def made(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def whole(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def deltas(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stop: Sequence[str] = ()
) -> list[Delta]:
    """What is sent, and nothing after a stop; no id is an end token."""
    detokenizer = Detokenizer(tokenizer, stop=stop, stop_ids=())
    sent: list[Delta] = []
    for token_id in ids:
        sent.append(detokenizer.push(token_id))
        if sent[-1].is_stopped:
            return sent
    return [*sent, detokenizer.finish()]


def text_of(sent: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in sent)


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the stop that is whole first; of those that end together, the longest."""
    found = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    return text[: min(found)[1]] if found else text


def has_whole_runs(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> bool:
    """Whether each run of byte tokens is UTF-8."""
    run = b""
    for token in [*tokenizer.convert_ids_to_tokens([i for i in ids if i < len(tokenizer)]), "end"]:
        if token in tokenizer.all_special_tokens:
            continue
        if token in BYTES:
            run += bytes([BYTES.index(token)])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return False
        run = b""
    return True


TEXT = (
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
    | st.sampled_from([*CORPUS, "  two  spaces ", "\n\n\n", "\ufffd\ufffd", "<s>the</s>", "▁"])
).filter(lambda text: "<0x" not in text)
"""No byte tokens as text: tokenizers take them for the bytes, which need not be UTF-8."""
STOPS = st.lists(
    st.sampled_from(["the", " the", "en", "th", "\n", "\n\n", "世", "🙂", "\ufffd", " ", "end."])
    | st.text("abthe ", min_size=1, max_size=4),
    max_size=4,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXT, stop=STOPS)
def test_the_text_of_an_answer_is_what_decoding_it_whole_gives(
    kind: str, text: str, stop: list[str]
) -> None:
    tokenizer = made(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text_of(deltas(tokenizer, ids)) == whole(tokenizer, ids)
    assert text_of(deltas(tokenizer, ids, stop)) == cut(whole(tokenizer, ids), stop)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data(), stop=STOPS)
def test_tokens_in_any_order_read_as_decoding_them_at_once_gives(
    kind: str, data: st.DataObject, stop: list[str]
) -> None:
    tokenizer = made(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=20))
    if kind in ("llama", "gemma") and not has_whole_runs(tokenizer, ids):
        assert "\ufffd" in text_of(deltas(tokenizer, ids))
        return
    assert text_of(deltas(tokenizer, ids)) == whole(tokenizer, ids)
    sent = deltas(tokenizer, ids, stop)
    assert text_of(sent) == cut(whole(tokenizer, ids), stop)
    assert sent[-1].is_stopped == any(word in whole(tokenizer, ids) for word in stop)


@pytest.mark.parametrize("kind", ["byte", "byte_level"])
@settings(max_examples=300, deadline=None)
@given(text=TEXT, lost=st.sets(st.integers(0, 60)))
def test_broken_characters_read_as_decoding_them_at_once_gives(
    kind: str, text: str, lost: set[int]
) -> None:
    tokenizer = made(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [token_id for i, token_id in enumerate(ids) if i not in lost]
    assert text_of(deltas(tokenizer, ids)) == whole(tokenizer, ids)


def test_no_half_character_is_ever_sent() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a🙂é")["input_ids"]
    assert [delta.text for delta in deltas(tokenizer, ids)] == ["a", "", "", "", "🙂", "", "é", ""]


def test_a_character_that_never_becomes_whole_is_replaced_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a🙂")["input_ids"][:-1]
    assert [delta.text for delta in deltas(tokenizer, ids)] == ["a", "", "", "", "\ufffd"]


def test_byte_tokens_flow_though_a_later_one_may_break_their_run() -> None:
    tokenizer = made("llama")
    tokens = ["▁the", "<0x0A>", "<0xC3>", "<0xA9>", "<0xFF>", "a"]
    ids = [tokenizer.get_vocab()[token] for token in tokens]
    sent = [delta.text for delta in deltas(tokenizer, ids)]
    assert sent == ["the", "\n", "", "é", "\ufffd", "a", ""]
    assert whole(tokenizer, ids) == "the\ufffd\ufffd\ufffd\ufffda"


def test_a_stop_string_across_tokens_is_held_back_and_never_sent() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("one\n\nUser: two")["input_ids"]
    sent = deltas(tokenizer, ids, ["\n\nUser:"])
    assert text_of(sent) == "one"
    assert [delta.is_stopped for delta in sent] == [False] * 9 + [True]


def test_text_that_only_began_like_a_stop_string_is_sent_after_all() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a\n\nUs")["input_ids"]
    sent = deltas(tokenizer, ids, ["\n\nUser:"])
    assert [delta.text for delta in sent] == ["a", "", "", "", "", "\n\nUs"]
    assert not sent[-1].is_stopped
    ids = tokenizer("\n\n\nUser:")["input_ids"]
    assert [delta.text for delta in deltas(tokenizer, ids, ["\n\nUser:"])][:3] == ["", "", "\n"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["abcd", "c"], "xx ab"),
        (["cd", "abcd"], "xx "),
        (["zz", "d"], "xx abc"),
        (["xx abcd!"], ""),
    ],
)
def test_the_stop_that_is_whole_first_ends_the_answer(stop: list[str], expected: str) -> None:
    for kind in ("byte", "byte_level"):
        tokenizer = made(kind)
        ids = tokenizer("xx abcd! the end")["input_ids"]
        assert text_of(deltas(tokenizer, ids, stop)) == expected


def test_an_end_token_ends_the_answer_and_lets_go_of_what_was_held() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, stop=["\nUser:"], stop_ids={257})
    assert detokenizer.push(tokenizer("\n")["input_ids"][0]) == Delta(text="", is_stopped=False)
    assert detokenizer.push(257) == Delta(text="\n", is_stopped=True)
    with pytest.raises(AssertionError, match="over"):
        detokenizer.push(257)


def test_an_end_token_that_is_ordinary_text_is_no_part_of_the_answer() -> None:
    tokenizer = byte_tokenizer()
    a, dot = tokenizer("a.")["input_ids"]
    detokenizer = Detokenizer(tokenizer, stop_ids=[dot])
    assert [detokenizer.push(a).text, detokenizer.push(dot).text] == ["a", ""]


def test_special_tokens_are_left_out_unless_they_are_to_be_seen() -> None:
    tokenizer = byte_tokenizer()
    ids = [256, *tokenizer("a")["input_ids"], 258, 257]
    assert text_of(deltas(tokenizer, ids)) == "a"
    detokenizer = Detokenizer(tokenizer, stop_ids=(), visible_ids={258})
    assert "".join(detokenizer.push(token_id).text for token_id in ids) == "a<|pad|>"


def test_ids_beyond_the_vocabulary_are_no_text() -> None:
    tokenizer = byte_tokenizer()
    assert text_of(deltas(tokenizer, [len(tokenizer), *tokenizer("a")["input_ids"], 99_999])) == "a"
    assert token_text(tokenizer, 99_999) == ("", None)


def test_characters_are_counted_where_the_next_token_begins() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, stop=["b🙂c"], stop_ids=())
    offsets = []
    for token_id in tokenizer("ab🙂d")["input_ids"]:
        offsets.append(detokenizer.num_chars)
        detokenizer.push(token_id)
    assert offsets == [0, 1, 2, 2, 2, 2, 3]


def test_an_empty_stop_string_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="empty"):
        Detokenizer(byte_tokenizer(), stop=["a", ""], stop_ids=())


@pytest.mark.parametrize(
    ("kind", "token", "expected"),
    [
        ("byte", "a", ("a", [97])),
        ("byte", "Ġ", (" ", [32])),
        ("byte", "ð", ("\ufffd", [0xF0])),
        ("byte", "<|im_end|>", ("<|im_end|>", list(b"<|im_end|>"))),
        ("byte_level", "<tool_call>", ("<tool_call>", list(b"<tool_call>"))),
        ("llama", "▁the", (" the", list(b" the"))),
        ("llama", "▁▁", ("  ", [32, 32])),
        ("llama", "<0xE4>", ("\ufffd", [0xE4])),
        ("llama", "<0x0A>", ("\n", [10])),
        ("llama", "<s>", ("<s>", list(b"<s>"))),
        ("gemma", "你", ("你", list("你".encode()))),
        ("metaspace", "▁the", (" the", list(b" the"))),
    ],
)
def test_one_token_has_the_text_and_bytes_that_it_has_within_an_answer(
    kind: str, token: str, expected: tuple[str, list[int]]
) -> None:
    tokenizer = made(kind)
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    assert token_text(tokenizer, token_id) == expected


def test_a_token_across_two_characters_has_its_bytes_and_replaced_text() -> None:
    tokenizer = made("byte_level")
    texts = [token_text(tokenizer, token_id) for token_id in range(len(tokenizer))]
    across = [
        (text, data) for text, data in texts if data and len(data) > 1 and 0x80 <= data[0] < 0xC0
    ]
    assert across
    for text, data in across:
        assert text == bytes(data).decode(errors="replace")
        assert text.startswith("\ufffd")


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_the_bytes_of_all_tokens_are_the_bytes_of_the_text(text: str) -> None:
    for kind in ("byte", "byte_level", "gemma"):
        tokenizer = made(kind)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        unknown = tokenizer.convert_tokens_to_ids("<unk>")
        if unknown not in ids and not set(ids) & set(tokenizer.all_special_ids):
            parts = [bytes(token_text(tokenizer, token_id)[1] or ()) for token_id in ids]
            assert b"".join(parts).decode() == whole(tokenizer, ids)


def test_the_thousandth_token_costs_no_more_than_the_first() -> None:
    tokenizer = made("llama")
    ids = tokenizer("the end. " * 4000)["input_ids"]
    detokenizer = Detokenizer(tokenizer, stop=["never"], stop_ids=())

    def seconds(some: Sequence[int]) -> float:
        start = time.process_time()
        for token_id in some:
            detokenizer.push(token_id)
        return time.process_time() - start

    parts = [seconds(ids[start : start + 2000]) for start in range(0, len(ids), 2000)]
    assert len(parts) > 8
    assert min(parts[-4:]) < 4 * min(parts[:4])
