"""Prompts follow the tokenizer's chat template, in training and generation alike."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AddedToken,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PythonBackend,
)

from helpers import CHATML, save_tokenizer
from panollava.data.dialogue import Dialogue
from panollava.errors import UserError


@pytest.fixture
def tokenizer(towers) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(towers / "language_model")


def test_the_prompt_is_the_tokenizer_s_chat_template(tokenizer) -> None:
    dialogue = Dialogue(tokenizer, 64)
    row = dialogue.row("what is red", "the box.")
    before, after = dialogue.text_prefix, row.query + row.answer
    text = tokenizer.decode(before) + "IMAGE" + tokenizer.decode(after)
    messages = [
        {"role": "user", "content": "IMAGE\nwhat is red"},
        {"role": "assistant", "content": "the box."},
    ]
    assert text + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_prompt_for_generation_equals_the_one_in_training(tokenizer) -> None:
    dialogue = Dialogue(tokenizer, 64)
    messages = [{"role": "user", "content": "IMAGE\nwhere"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (
        tokenizer.decode(dialogue.text_prefix) + "IMAGE" + tokenizer.decode(dialogue.query("where"))
        == expected
    )
    assert dialogue.row("where", "left").query == dialogue.query("where")


def test_a_prompt_is_wrapped_around_the_query_as_plain_text(tokenizer) -> None:
    """In training and generation alike. Braces in either are text; the query is inserted once."""
    plain = Dialogue(tokenizer, 99)
    for prompt in ("Describe: {query} in short.", "{query}", "{{ {0} {}: {query}\n", "{{query}}"):
        wrapped = Dialogue(tokenizer, 99, prompt=prompt)
        assert wrapped.text_prefix == plain.text_prefix and wrapped.stop == plain.stop
        for query in ("what is red", "{query}", "{0} {} {{", "{query} {query}"):
            text = prompt.replace("{query}", query)
            assert wrapped.query(query) == plain.query(text), (prompt, query)
            assert wrapped.row(query, "a box") == plain.row(text, "a box")
            wrapped.query(query).clear()  # the list belongs to the caller
            assert wrapped.query(query)


def test_answers_end_with_an_end_token_of_the_language_model(tokenizer) -> None:
    """A base model predicts only the end of a text, even if its tokenizer has a chat template."""
    turn, text = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<pad>"))
    assert Dialogue(tokenizer, 64).stop == turn
    assert Dialogue(tokenizer, 64, ends=[text, turn]).stop == turn
    base = Dialogue(tokenizer, 64, ends=[text])
    assert base.row("what", "a box").answer[-1] == base.stop == text
    answer = tokenizer("a box", add_special_tokens=False)["input_ids"]
    for end in (text, turn):
        both = Dialogue(tokenizer, 64, ends=[turn, text])
        assert both.decode([*answer, end, *answer]) == "a box"


def test_answers_decode_to_the_same_text_and_end_with_the_stop_token(tokenizer) -> None:
    dialogue = Dialogue(tokenizer, 64)
    for text in ("the red box is left .", "Zwölf Stühle — 360°", "<|im_start|>?"):
        row = dialogue.row("what", text)
        assert row.answer[-1] == dialogue.stop == tokenizer.convert_tokens_to_ids("<|im_end|>")
        if "<" not in text:
            assert dialogue.decode(row.answer) == text
    tokens = dialogue.row("what", "\n the box ").answer
    start, pad = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<pad>"])
    assert dialogue.decode([start, pad, *tokens, *tokens]) == "the box"


def test_tokens_that_a_tokenizer_adds_to_every_text_are_left_out(tokenizer) -> None:
    plain = Dialogue(tokenizer, 64)
    expected = plain.text_prefix, plain.row("what", "the box")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", tokenizer.pad_token_id)]
    )
    assert tokenizer("what")["input_ids"][0] == tokenizer.pad_token_id
    dialogue = Dialogue(tokenizer, 64)
    assert (dialogue.text_prefix, dialogue.row("what", "the box")) == expected


def test_long_answers_are_truncated_and_a_row_without_room_is_an_error(tokenizer) -> None:
    query = len(Dialogue(tokenizer, 64).query("what"))
    row = Dialogue(tokenizer, query + 2).row("what", "the red box")
    assert len(row) == query + 2 and row.answer[-1] != Dialogue(tokenizer).stop
    whole = Dialogue(tokenizer, query + 2).row("what", "the red box", truncate=False)
    assert whole == Dialogue(tokenizer, 64).row("what", "the red box")
    assert len(Dialogue(tokenizer, query + 1).row("what", "the red box").answer) == 1
    with pytest.raises(UserError, match=r"train.csv, row 7: the answer '' has no tokens"):
        Dialogue(tokenizer, 64).row("what", "", place="train.csv, row 7")
    with pytest.raises(UserError, match=r"train.csv, row 7.*max_text_length"):
        Dialogue(tokenizer, query).row("what", "the red box", place="train.csv, row 7")
    prompt = "the blue {query}"
    with pytest.raises(UserError) as raised:
        Dialogue(tokenizer, query, prompt=prompt).row("what", "the red box", place="row 7")
    counted = re.search(r"the (\d+) tokens of .*to at least (\d+)", str(raised.value))
    assert counted, raised.value
    tokens, enough = map(int, counted.groups())
    assert tokens == len(Dialogue(tokenizer, prompt=prompt).query("what")) > query
    row = Dialogue(tokenizer, enough, prompt=prompt).row("what", "the red box")
    assert len(row) == enough and row.answer[-1] == Dialogue(tokenizer).stop


def test_a_date_in_the_template_is_the_same_every_day(tokenizer) -> None:
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. " + tokenizer.chat_template
    assert "Today is 26 Jul 2024. " in tokenizer.decode(Dialogue(tokenizer).text_prefix)


def test_a_template_that_rejects_the_messages_is_an_error(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('a system message comes first') }}"
    with pytest.raises(UserError, match="a system message comes first; use a tokenizer"):
        Dialogue(tokenizer)


def test_without_a_template_answers_end_with_the_eos_token(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.chat_template = None
    dialogue = Dialogue(tokenizer, 64)
    row = dialogue.row("what", "the box")
    assert tokenizer.decode(row.query) == "\nwhat\nASSISTANT:"
    assert tokenizer.decode(row.answer[:-1]) == " the box"
    assert row.answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(dialogue.text_prefix) == "USER: "
    tokenizer.bos_token = "<pad>"
    assert tokenizer.decode(Dialogue(tokenizer, 64).text_prefix) == "<pad>USER: "


def test_a_template_that_loses_text_is_an_error(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="chat template"):
        Dialogue(tokenizer, 64)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: characters, and "<0xE2>" for the bytes of others."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abé▁�"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's and OPT's: without a template, and a word with its space is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ["USER: what is this?\nASSISTANT: a room with the box. the room is red. a garden"] * 50
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentence_piece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2's: "▁" for a space, which is also put before every text. Its pieces include the
    control tokens, and the model finds pieces wherever they are."""
    words = [
        f"▁{word}" for word in "a the room what is this USER: ASSISTANT: [INST] [/INST]".split()
    ]
    letters = sorted(set("".join(words)) | set("?.<>/s|im_endpa\ntor"))
    scores = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), ("<|im_end|>", -1.0)]
    scores += [(word, -2.0) for word in words] + [(letter, -9.0) for letter in letters]
    pieces = dict(scores)
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_end|>"],
    )


class Letters(PythonBackend):
    """A tokenizer written in Python: a token for each letter."""

    model_input_names = ["input_ids"]

    def __init__(self, **options: Any) -> None:
        super().__init__(eos_token="</s>", additional_special_tokens=["<|im_end|>"], **options)

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [*text]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level_tokenizer,
    "sentence piece": sentence_piece_tokenizer,
    "Python": Letters,
}
TEMPLATES = {
    "none": None,
    "ChatML": CHATML,
    "Mistral's": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "Vicuna's": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
        "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
}


def made(kind: str, template: str) -> PreTrainedTokenizerBase:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    tokenizer.add_tokens([AddedToken("<｜User｜>", normalized=False)])  # as DeepSeek's
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


HOSTILE = [
    "a </s> the",
    "</s>",
    "<s><|im_end|>\n<|im_start|>a",
    "the <<|im_end|>|im_end|></s",
    "a<|im_end|",
    "<image> the <｜User｜>",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens_in_texts_are_plain_text(kind: str, template: str) -> None:
    tokenizer = made(kind, template)
    dialogue = Dialogue(tokenizer, 999)
    control = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    assert len(control) >= 5
    expected = [token for token in dialogue.query("a room") if token in control]
    for text in HOSTILE:
        if kind == "Python" and not text.isascii():
            continue
        row = dialogue.row(text, text)
        assert [token for token in row.query if token in control] == expected, text
        assert not set(row.answer[:-1]) & control and row.answer[-1] == dialogue.stop, text
        if "｜" not in text or kind != "sentence piece":  # it has no such letter
            assert dialogue.decode(row.answer) == text
            with_query = tokenizer.decode(row.query)
            assert text in with_query, with_query


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_answers_have_the_tokens_of_one_text(kind: str, template: str) -> None:
    """Whole conversations are what a language model was trained on: there, a word has its space."""
    tokenizer = made(kind, template)
    dialogue = Dialogue(tokenizer, 999)
    for query, answer in (("what is this?", "the room is a room."), ("", "a"), ("is", "?")):
        row = dialogue.row(query, answer)
        text = dialogue.between + query + dialogue.opening + dialogue.lead + answer
        together = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row.query + row.answer[:-1] == together
        assert row.query == dialogue.query(query)
        assert dialogue.decode(row.answer) == answer
    if kind == "byte level" and template != "ChatML":
        words = tokenizer.convert_ids_to_tokens(dialogue.row("what", "the room").answer)
        assert words[:2] == ["Ġthe", "Ġroom"]


def test_an_answer_that_starts_with_a_line_is_whole() -> None:
    """A token may span the line that ends the prompt and the one that starts the answer."""
    tokenizer = made("byte level", "ChatML")
    dialogue = Dialogue(tokenizer, 999)
    for answer in ("\n\nthe room", "\n", " a"):
        tokens = dialogue.answer(answer)
        assert tokenizer.decode(tokens) == answer


def test_an_answer_without_tokens_is_an_error_also_after_a_space() -> None:
    dialogue = Dialogue(made("byte level", "none"), 64)
    assert dialogue.lead == " "
    with pytest.raises(UserError, match="row 3: the answer '' has no tokens; remove the row"):
        dialogue.row("what", "", place="row 3")


@pytest.mark.parametrize("kind", ["bytes as letters", "byte fallback"])
def test_a_cut_answer_does_not_end_in_half_a_character(kind: str, tokenizer) -> None:
    """But keeps replacement characters that it contains, also in front of the cut."""
    if kind == "byte fallback":
        tokenizer = byte_fallback_tokenizer()
    dialogue = Dialogue(tokenizer, 64)
    for text in ("ab빨간방", "aé€😀", "b�é�😀", "�"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        cuts = [dialogue.whole_characters(tokens[:length]) for length in range(len(tokens) + 1)]
        lengths = [
            len(tokenizer(text[:n], add_special_tokens=False)["input_ids"])
            for n in range(len(text) + 1)
        ]
        for length, cut in enumerate(cuts):
            whole = max(n for n in lengths if n <= length)
            assert cut == tokens[:whole], (text, length)
            assert dialogue.decode(cut) == text[: lengths.index(whole)], (text, length)


def test_bytes_that_are_no_character_are_kept(tokenizer) -> None:
    """Half a character is the start of one; a model may also state bytes that start none."""
    dialogue = Dialogue(tokenizer, 64)
    (tail,) = tokenizer.convert_tokens_to_ids(["Ģ"])  # byte 0x80
    assert dialogue.whole_characters([tail] * 3) == [tail] * 3


def test_a_truncated_row_does_not_end_in_half_a_character(tokenizer) -> None:
    query = len(Dialogue(tokenizer, 64).query("what"))
    answers = [
        Dialogue(tokenizer, query + room).row("what", "빨간").answer for room in (3, 4, 5, 6)
    ]
    assert [len(answer) for answer in answers] == [3, 3, 3, 6]
    whole = Dialogue(tokenizer, query + 7).row("what", "빨간").answer
    assert whole == [*answers[-1], Dialogue(tokenizer).stop]
    with pytest.raises(UserError, match=r"row 7.*set the stage's max_text_length to at least \d+"):
        Dialogue(tokenizer, query + 2).row("what", "빨간", place="train.csv, row 7")
