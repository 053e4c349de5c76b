"""Prompts: queries and answers as tokens, formatted with the tokenizer's chat template.

Control tokens, such as <|im_end|>, come from the template only: in a query or an answer they are
plain text. A space before the answer belongs to the answer's first token, as in the texts that the
model was trained on."""

import codecs
import re
from collections.abc import Collection, Sequence
from itertools import pairwise, takewhile

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
_CACHED = 50_000  # texts whose tokens are remembered
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
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
        the last texts; a server must not.

        Raises:
            UserError: the chat template loses text, or the tokenizer has no end token.
        """
        self.tokenizer, self.prompt = tokenizer, prompt
        self.max_text_length = max_text_length
        self._cache: dict[tuple, list[int]] = {}  # texts repeat, and tokenizing is slow
        self._caches = cache
        self._control = control_tokens(tokenizer)
        self.before, between, opening, closing = self._render()
        self.text_prefix = self._tokens(self.before)
        # No str.format: braces in the prompt or in a query are plain text.
        before_query, after_query = prompt.split("{query}")
        opening = after_query + opening
        # Of a lone space, the model would have to predict a word that starts without one.
        self.between, self.opening = between + before_query, opening.rstrip(" ")
        self.lead = opening[len(self.opening) :]  # spaces before the answer
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
        return self._tokens(text, self.between, self.opening)

    def answer(self, text: str) -> list[int]:
        """Tokens of an answer after its prompt, without the end."""
        opening = self._tokens(self.opening)
        tokens = self._tokens(self.lead + text, self.opening)
        follows = tokens[: len(opening)] == opening  # not if a token spans both
        return tokens[len(opening) :] if follows else self._tokens(self.lead + text)

    def row(self, query: str, answer: str, place: str = "", truncate: bool = True) -> Row:
        """Tokens of a row. `truncate` the answer to `max_text_length` tokens in total, or to fewer
        if a character is cut.

        Raises:
            UserError: no token of the answer is left; `place` names the row in the message.
        """
        query_tokens, answer_tokens = self.query(query), self.answer(answer)
        if answer_tokens == self.answer(""):
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
        """The text of an answer's tokens, up to the first end token, without
        incomplete characters."""
        tokens = list(takewhile(lambda token: token not in self.ends, tokens))
        tokens = self.whole_characters(tokens)
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        if _REPLACEMENT in text and _REPLACEMENT.encode() not in self._bytes(tokens):
            text = text.replace(_REPLACEMENT, "")
        return text.strip()

    def whole_characters(self, tokens: list[int]) -> list[int]:
        """The tokens of a text that was cut, without those at its end that hold only some of the
        bytes of a character."""
        while str(self.tokenizer.decode(tokens)).endswith(_REPLACEMENT):
            reader = codecs.getincrementaldecoder("utf-8")("replace")
            reader.decode(self._bytes(tokens))
            unfinished, _ = reader.getstate()
            if not unfinished:  # the text itself ends in a replacement character
                break
            tokens = tokens[:-1]
        return tokens

    def _bytes(self, tokens: list[int]) -> bytes:
        pieces = self.tokenizer.convert_ids_to_tokens(tokens)  # None: not in the vocabulary
        return b"".join(map(_bytes, filter(None, pieces)))

    def _tokens(self, text: str, before: str | None = None, after: str = "") -> list[int]:
        """Tokens of `text` between the template's texts `before` and `after`, these included.
        Without `before`, `text` itself is the template's."""
        key = (text, before, after)
        if (tokens := self._cache.get(key)) is None:
            if len(self._cache) == _CACHED:
                self._cache.clear()
            control = () if before is None else self._control
            tokens = plain_tokens(self.tokenizer, control, before or "", text, after)
            if self._caches:
                self._cache[key] = tokens
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


# These two functions have a copy in `hf/processing_panollava.py`, which can import nothing.
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as one token before it looks at words, in lower case: such
    as end-of-text marks, but not added words. <image> is one of an exported model."""
    added = tokenizer.added_tokens_decoder.values()
    names = [token.content for token in added if token.special or not token.normalized]
    return [name.lower() for name in ("<image>", *names) if len(name.strip()) > 1]


def plain_tokens(
    tokenizer: PreTrainedTokenizerBase,
    control: Collection[str],
    before: str,
    text: str,
    after: str,
) -> list[int]:
    """Tokens of `before + text + after`. `control` tokens in `text` are tokenized in two parts,
    their first character and the rest, so that they are plain text."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def continued(piece: str) -> list[int]:  # some tokenizers put a space before a text
        start, tokens = encode("\n"), encode("\n" + piece)
        return tokens[len(start) :] if tokens[: len(start)] == start else encode(piece)

    joined, start, end = before + text + after, len(before), len(before) + len(text)
    cuts = {
        max(found.start() + 1, start)
        for name in control
        if name in joined.lower()
        for found in re.finditer(f"(?={re.escape(name)})", joined, re.IGNORECASE)
        if found.start() < end and found.start() + len(name) > start
    }
    first, *others = (joined[a:b] for a, b in pairwise([0, *sorted(cuts), len(joined)]))
    return encode(first) + [token for piece in others for token in continued(piece)]


def _bytes(token: str) -> bytes:
    """UTF-8 of a token as its vocabulary spells it: in letters that stand for bytes, as "<0xE2>" or
    as text."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    if all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    return token.encode()
