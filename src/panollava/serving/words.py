"""The text of an answer word by word, as its tokens come."""

from panollava.data.dialogue import Dialogue


class Words:
    """Gives each piece of an answer's text once."""

    def __init__(self, dialogue: Dialogue) -> None:
        self.dialogue, self.given = dialogue, ""

    def of_tokens(self, tokens: list[int]) -> str:
        """What is new in the text of all tokens so far. Half a character at its end, or a space
        that ends the answer, waits for the next token: `decode` leaves them out."""
        return self.rest(self.dialogue.decode(tokens))

    def rest(self, text: str) -> str:
        """What is new in `text`; nothing if it changes what was given."""
        if not text.startswith(self.given):
            return ""
        new, self.given = text[len(self.given) :], text
        return new
