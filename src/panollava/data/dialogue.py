"""The prompt: queries and answers as tokens in the tokenizer's chat template."""

from collections.abc import Sequence
from itertools import takewhile

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from panollava.data.packing import Row
from panollava.errors import UserError

# Unlikely words that hold a place while the chat template is rendered.
_IMAGE, _QUERY, _ANSWER = "⟦image⟧", "⟦query⟧", "⟦answer⟧"
# Of templates that tell the date, as Llama's: a prompt that changed with the day would be another
# one when answers are asked for than it was in training.
_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
_PLAIN_TEMPLATE = f"USER: {_IMAGE}\n{_QUERY}\nASSISTANT: {_ANSWER}"


class Dialogue:
    """Turns queries and answers into tokens, in the words of one tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = 0,
        ends: Sequence[int] = (),
    ) -> None:
        """`ends`: the tokens with which the language model ends what it says, see
        `model.end_tokens`. A base model has learned to say the end of a text, and not the end of a
        turn that its tokenizer's chat template knows: frozen, it would never say that.

        Raises UserError if the chat template doesn't keep the text that it is given, or the
        tokenizer has no token that ends an answer."""
        self.tokenizer = tokenizer
        self.max_text_length = max_text_length
        self._known: dict[str, list[int]] = {}  # texts come again, and a tokenizer takes its time
        before, between, opening, closing = self._render()
        self.prefix = self._tokens(before)
        self._between, self._opening = between, opening
        stop = self._tokens(closing.strip()) if closing.strip() else []
        if not stop:
            if tokenizer.eos_token_id is None:
                raise UserError(
                    f"the tokenizer {tokenizer.name_or_path} has neither a chat template that "
                    "closes an answer nor an end-of-sequence token"
                )
            stop = [int(tokenizer.eos_token_id)]
        self.stop: int = stop[0] if stop[0] in ends or not ends else ends[0]
        self.ends = frozenset((self.stop, *ends))
        self.pad: int = int(
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop
        )

    def query(self, text: str) -> list[int]:
        """Tokens from the end of the image to where the answer begins."""
        return self._tokens(self._between + text + self._opening)

    def row(self, query: str, answer: str, place: str = "") -> Row:
        """Tokens of a row, the answer cut to `max_text_length` in all.

        Raises:
            UserError: nothing of the answer is left, or it has no token; `place` names the row.
        """
        asked, answered = self.query(query), self._tokens(answer)
        if not answered:
            raise UserError(f"{place}: the answer {answer!r} has no token; remove the row")
        room = self.max_text_length - len(asked)
        if room < 1:
            raise UserError(
                f"{place}: the query takes {len(asked)} tokens, so that max_text_length "
                f"{self.max_text_length} leaves nothing of the answer; "
                f"set the stage's max_text_length to {len(asked) + len(answered) + 1} or more"
            )
        return Row(asked, [*answered, self.stop][:room])

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer's tokens, up to the first that ends it."""
        tokens = list(takewhile(lambda token: token not in self.ends, tokens))
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(self._known[text])

    def _render(self) -> tuple[str, str, str, str]:
        """The template's text before the image, between image and query, between query and
        answer, and after the answer."""
        rendered = _PLAIN_TEMPLATE
        if self.tokenizer.chat_template:
            user = {"role": "user", "content": f"{_IMAGE}\n{_QUERY}"}
            assistant = {"role": "assistant", "content": _ANSWER}
            template = _DATE + self.tokenizer.get_chat_template()
            try:
                rendered = str(
                    self.tokenizer.apply_chat_template(
                        [user, assistant], chat_template=template, tokenize=False
                    )
                )
            except TemplateError as error:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} doesn't take a user's "
                    f"text and an answer: {error}; use a tokenizer whose template does"
                ) from None
        pieces = [rendered]
        for mark in (_IMAGE, _QUERY, _ANSWER):
            head, found, tail = pieces.pop().partition(mark)
            if not found or mark in tail:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} doesn't keep a user's "
                    "text and an answer once and in order; use a tokenizer whose template does"
                )
            pieces += [head, tail]
        before, between, opening, closing = pieces
        if not self.tokenizer.chat_template and self.tokenizer.bos_token:
            before = self.tokenizer.bos_token + before
        return before, between, opening, closing
