"""The tokenizer of an exported model, whose chat template gives the text of the training."""

import copy
import json

from transformers import AddedToken, PreTrainedTokenizerBase

from panollava.data.dialogue import Dialogue
from panollava.errors import UserError

IMAGE = "<image>"


def exported_tokenizer(dialogue: Dialogue) -> PreTrainedTokenizerBase:
    """With an image token and the chat template of the training."""
    tokenizer = copy.deepcopy(dialogue.tokenizer)
    if IMAGE in tokenizer.get_vocab():
        raise UserError(f"the tokenizer has a token {IMAGE}; its language model cannot be exported")
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(dialogue.pad)
    tokenizer.chat_template = chat_template(dialogue)
    tokenizer.name_or_path = ""
    return tokenizer


def template_texts(dialogue: Dialogue) -> dict[str, str]:
    """The texts around an image, a question and an answer. `plain_opening`: without the prompt."""
    after_query = dialogue.prompt.split("{query}")[1]
    return {
        "before": dialogue.before,
        "between": dialogue.between,
        "opening": dialogue.opening,
        "plain_opening": dialogue.opening.removeprefix(after_query),
        "lead": dialogue.lead,
        "stop": str(dialogue.tokenizer.decode([dialogue.stop])),
    }


def chat_template(dialogue: Dialogue) -> str:
    """A Jinja template of one question, and of its answer if there is one.

    The parts of a message give the text of the training, with the prompt around the question. A
    message that is one string stands inside the chat template as it is, so that `Dialogue` finds
    the same texts in this template as in the tokenizer's first one."""
    texts = template_texts(dialogue) | {
        "image": IMAGE,
        "error": "expected one message of the user, with one panorama and one question, and at "
        "most one of the assistant after it: the model was trained on single questions",
    }
    lines = [f"{{%- set {name} = {_literal(text)} -%}}" for name, text in texts.items()]
    return "\n".join([*lines, _TEMPLATE])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_TEMPLATE = """\
{%- set roles = messages | map(attribute='role') | join(' ') -%}
{%- if roles not in ('user', 'user assistant') -%}{{- raise_exception(error) -}}{%- endif -%}
{%- set content = messages[0]['content'] -%}
{{- before -}}
{%- if content is string -%}{{- content -}}{{- plain_opening -}}{%- else -%}
{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}
{%- if images | length > 1 -%}{{- raise_exception(error) -}}{%- endif -%}
{%- if images -%}{{- image -}}{%- endif -%}
{{- between -}}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{{- opening -}}
{%- endif -%}
{%- if messages | length == 2 -%}
{%- set answer = messages[1]['content'] -%}
{{- lead -}}
{%- if answer is string -%}{{- answer -}}{%- else -%}
{%- for part in answer -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- stop -}}
{%- endif -%}"""
