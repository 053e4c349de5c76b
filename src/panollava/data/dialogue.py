"""Prompts: queries and answers as tokens, formatted with the tokenizer's chat template."""

import codecs
import re
from collections.abc import Sequence
from itertools import takewhile

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from panollava.data.packing import Row
from panollava.errors import UserError

# Placeholders for rendering the chat template.
_IMAGE, _QUERY, _ANSWER = "⟦image⟧", "⟦query⟧", "⟦answer⟧"
# Some templates, such as Llama's, contain today's date. It is fixed, so that evaluation uses the
# same prompt as training.
_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
# The letters that stand for bytes in the vocabularies of byte-level tokenizers, as GPT-2's.
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
_PLAIN_TEMPLATE = f"USER: {_IMAGE}\n{_QUERY}\nASSISTANT: {_ANSWER}"


class Dialogue:
    """Tokenizes queries and answers in the chat template of one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = 0,
        ends: Sequence[int] = (),
        prompt: str = "{query}",
        cache: bool = True,
    ) -> None:
        """`ends`: the end-of-sequence tokens of the language model, see `model.end_tokens`. A
        frozen base model predicts the end of a text, but never the end of a turn in a chat
        template. So answers end with the template's token only if it is among `ends`.

        `prompt`: the text around each query, with one `{query}`. `cache`: remember the tokens of
        every text; a server must not.

        Raises:
            UserError: the chat template loses text, or the tokenizer has no end token.
        """
        self.tokenizer, self.prompt = tokenizer, prompt
        self.max_text_length = max_text_length
        self._cache: dict[str, list[int]] = {}  # texts repeat, and tokenizing is slow
        self._caches = cache
        self.before, between, opening, closing = self._render()
        self.text_prefix = self._tokens(self.before)
        # No str.format: braces in the prompt or in a query are plain text.
        before_query, after_query = prompt.split("{query}")
        self.between, self.opening = between + before_query, after_query + opening
        end_of_turn = self._tokens(closing.strip()) if closing.strip() else []
        stop = end_of_turn[0] if end_of_turn else tokenizer.eos_token_id
        if stop is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has neither a chat template with an "
                "end of turn nor an end-of-sequence token; use another tokenizer"
            )
        self.stop: int = stop if stop in ends or not ends else ends[0]
        self.ends = frozenset((self.stop, *ends))
        self.pad: int = self.stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def query(self, text: str) -> list[int]:
        """Tokens between the image and the answer."""
        return self._tokens(self.between + text + self.opening)

    def row(self, query: str, answer: str, place: str = "", truncate: bool = True) -> Row:
        """Tokens of a row. `truncate` the answer to `max_text_length` tokens in total, or to fewer
        if a character is cut.

        Raises:
            UserError: no token of the answer is left; `place` names the row in the message.
        """
        query_tokens, answer_tokens = self.query(query), self._tokens(answer)
        if not answer_tokens:
            raise UserError(f"{place}: the answer {answer!r} has no tokens; remove the row")
        if not truncate:
            return Row(query_tokens, [*answer_tokens, self.stop])
        room = max(self.max_text_length - len(query_tokens), 0)
        supervised = [*answer_tokens, self.stop][:room]
        if len(answer_tokens) > room:
            supervised = self.whole_characters(supervised)
        if not supervised:
            raise UserError(
                f"{place}: the {len(query_tokens)} tokens of the query with its prompt leave no "
                f"room for the answer in max_text_length {self.max_text_length}; set the stage's "
                f"max_text_length to at least {len(query_tokens) + len(answer_tokens) + 1}"
            )
        return Row(query_tokens, supervised)

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer's tokens, up to the first end token."""
        tokens = list(takewhile(lambda token: token not in self.ends, tokens))
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def whole_characters(self, tokens: list[int]) -> list[int]:
        """The tokens of a text that was cut, without those at its end that hold only some of the
        bytes of a character."""
        while str(self.tokenizer.decode(tokens)).endswith("\N{REPLACEMENT CHARACTER}"):
            reader = codecs.getincrementaldecoder("utf-8")("replace")
            pieces = self.tokenizer.convert_ids_to_tokens(tokens)  # None: not in the vocabulary
            reader.decode(b"".join(map(_bytes, filter(None, pieces))))
            unfinished, _ = reader.getstate()
            if not unfinished:  # the text itself ends in a replacement character
                break
            tokens = tokens[:-1]
        return tokens

    def _tokens(self, text: str) -> list[int]:
        if (tokens := self._cache.get(text)) is None:
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self._caches:
                self._cache[text] = tokens
        return list(tokens)

    def _render(self) -> tuple[str, str, str, str]:
        """The chat template's text before the image, between image and query, between query and
        answer, and after the answer."""
        rendered = _PLAIN_TEMPLATE
        if self.tokenizer.chat_template:
            user = {"role": "user", "content": f"{_IMAGE}\n{_QUERY}"}
            assistant = {"role": "assistant", "content": _ANSWER}
            template = _DATE + self.tokenizer.get_chat_template()
            render = self.tokenizer.apply_chat_template
            try:
                rendered = str(render([user, assistant], chat_template=template, tokenize=False))
            except TemplateError as error:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} does not accept a user's "
                    f"text and an answer: {error}; use a tokenizer whose template does"
                ) from None
        pieces = re.split(f"({_IMAGE}|{_QUERY}|{_ANSWER})", rendered)
        if pieces[1::2] != [_IMAGE, _QUERY, _ANSWER]:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} does not render a user's "
                "text and an answer once each and in order; use a tokenizer whose template does"
            )
        before, between, opening, closing = pieces[::2]
        if not self.tokenizer.chat_template and self.tokenizer.bos_token:
            before = self.tokenizer.bos_token + before
        return before, between, opening, closing


def _bytes(token: str) -> bytes:
    """UTF-8 of a token as its vocabulary spells it: in letters that stand for bytes, as "<0xE2>" or
    as text."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    if all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    return token.encode()
