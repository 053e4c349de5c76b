import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import save_tokenizer
from panollava.data.dialogue import Dialogue
from panollava.data.packing import IGNORED, attention_mask, pack
from panollava.errors import UserError


@pytest.fixture
def tokenizer(towers) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(towers / "language_model")


def test_the_prompt_is_the_tokenizer_s_own_chat_template(tokenizer) -> None:
    dialogue = Dialogue(tokenizer, 64)
    row = dialogue.row("what is red", "the box.")
    text = tokenizer.decode(dialogue.prefix) + "IMAGE" + tokenizer.decode(row.query + row.answer)
    messages = [
        {"role": "user", "content": "IMAGE\nwhat is red"},
        {"role": "assistant", "content": "the box."},
    ]
    assert text + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)


def test_generation_is_asked_exactly_as_training_asked(tokenizer) -> None:
    dialogue = Dialogue(tokenizer, 64)
    messages = [{"role": "user", "content": "IMAGE\nwhere"}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (
        tokenizer.decode(dialogue.prefix) + "IMAGE" + tokenizer.decode(dialogue.query("where"))
        == wanted
    )
    assert dialogue.row("where", "left").query == dialogue.query("where")


def test_an_answer_ends_as_the_language_model_ends_what_it_says(tokenizer) -> None:
    """A base model knows the end of a text alone, whatever its tokenizer's chat template says."""
    turn, text = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<pad>"))
    assert Dialogue(tokenizer, 64).stop == turn
    assert Dialogue(tokenizer, 64, ends=[text, turn]).stop == turn
    base = Dialogue(tokenizer, 64, ends=[text])
    assert base.row("what", "a box").answer[-1] == base.stop == text
    said = tokenizer("a box", add_special_tokens=False)["input_ids"]
    for end in (text, turn):
        both = Dialogue(tokenizer, 64, ends=[turn, text])
        assert both.decode([*said, end, *said]) == "a box"


def test_answers_survive_the_round_trip_and_end_with_the_stop_token(tokenizer) -> None:
    dialogue = Dialogue(tokenizer, 64)
    for text in ("the red box is left .", "Zwölf Stühle — 360°", "<|im_start|>?"):
        row = dialogue.row("what", text)
        assert row.answer[-1] == dialogue.stop == tokenizer.convert_tokens_to_ids("<|im_end|>")
        if "<" not in text:
            assert dialogue.decode(row.answer) == text


def test_long_answers_are_cut_and_answers_cut_to_nothing_are_errors(tokenizer) -> None:
    query = len(Dialogue(tokenizer, 64).query("what"))
    row = Dialogue(tokenizer, query + 2).row("what", "the red box")
    assert len(row) == query + 2 and row.answer[-1] != Dialogue(tokenizer).stop
    with pytest.raises(UserError, match=r"train.csv, row 7.*max_text_length"):
        Dialogue(tokenizer, query).row("what", "the red box", place="train.csv, row 7")


def test_a_template_that_tells_the_date_tells_the_same_on_every_day(tokenizer) -> None:
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. " + tokenizer.chat_template
    assert "Today is 26 Jul 2024. " in tokenizer.decode(Dialogue(tokenizer).prefix)


def test_a_template_that_refuses_the_messages_is_an_error(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('a system message comes first') }}"
    with pytest.raises(UserError, match="a system message comes first; use a tokenizer"):
        Dialogue(tokenizer)


def test_a_tokenizer_without_a_template_ends_answers_with_its_eos(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.chat_template = None
    dialogue = Dialogue(tokenizer, 64)
    row = dialogue.row("what", "the box")
    assert tokenizer.decode(row.query) == "\nwhat\nASSISTANT: "
    assert row.answer[-1] == tokenizer.eos_token_id


def test_a_template_that_loses_text_is_an_error(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="chat template"):
        Dialogue(tokenizer, 64)


def test_a_row_sees_the_prefix_and_itself_alone(tokenizer) -> None:
    dialogue = Dialogue(tokenizer, 64)
    rows = [dialogue.row("what", "the red box"), dialogue.row("where", "left")]
    packed = pack(dialogue.prefix, 5, [rows, rows[:1]], dialogue.pad)
    mask = attention_mask(packed.segments)[:, 0]
    start = len(dialogue.prefix) + 5
    for sequence in range(2):
        for i in range(mask.shape[1]):
            own = packed.segments[sequence, i]
            for j in range(mask.shape[2]):
                other = packed.segments[sequence, j]
                expected = j <= i and other != IGNORED and other in (0, own)
                assert mask[sequence, i, j] == (expected or i == j)
    assert (packed.segments[1] == IGNORED).any()
    second = packed.positions[0][packed.segments[0] == 2]
    assert second.tolist() == list(range(start, start + len(rows[1])))


def test_supervised_tokens_are_the_answers_alone(tokenizer) -> None:
    dialogue = Dialogue(tokenizer, 64)
    rows = [dialogue.row("what", "the red box"), dialogue.row("where", "left")]
    packed = pack(dialogue.prefix, 5, [rows], dialogue.pad)
    assert packed.labels.tolist() == rows[0].answer + rows[1].answer
    following = packed.tokens.flatten()[packed.predicts + 1]
    assert torch.equal(following, packed.labels)
