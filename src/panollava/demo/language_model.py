"""Pretraining of the demo's language model: Qwen2's architecture, trained to answer queries from
context tokens.

A small model that was pretrained on text only and is then frozen cannot use vision tokens: it has
to learn to read facts from embeddings before the text."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.demo.context import context_tokens
from panollava.demo.pretraining import TOWER, fit
from panollava.demo.questions import TEMPLATES, rows
from panollava.demo.scenes import COLORS, DIRECTIONS, KINDS, SHAPES, Scene, make_scene, roll_scene
from panollava.demo.settings import CONTEXT, DemoSettings, Lesson
from panollava.files import write_json
from panollava.model.generate import answer
from panollava.model.network import Network

log = logging.getLogger(__name__)

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TOKENIZER_SCENES = 300  # whose rows the tokenizer is trained on: they contain every word
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_language_model(
    settings: DemoSettings, folder: Path = Path("towers/language_model")
) -> None:
    """Pretrain the language model, and save it and its tokenizer in `from_pretrained` format with a
    report of its loss and its accuracy."""
    parameters = settings.language_model
    torch.set_num_threads(parameters.threads)
    torch.manual_seed(settings.seed)
    tokenizer = make_tokenizer()
    model = with_context(_build_model(tokenizer))
    dialogue = Dialogue(tokenizer, 128)
    first_step = 0
    for lesson in parameters.lessons:
        loss = _train(model, dialogue, lesson, first_step, settings)
        first_step += lesson.steps
    report = {
        "loss": round(loss, 4),
        "right": accuracy(model, dialogue, settings, rolled=False),
        "right_turned": accuracy(model, dialogue, settings, rolled=True),
    }
    log.info("given the true context: %s", report)
    model.language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "report.json", report)


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-pair tokenizer trained on the demo's sentences, with the ChatML template. It has
    Qwen2's class, because `AutoTokenizer` loads that class for every Qwen2 model."""
    sentences = [
        text
        for index in range(_TOKENIZER_SCENES)
        for query, reference in rows(make_scene(0, index), TEMPLATES, index)
        for text in (f"user\n{query}", f"assistant\n{reference}")
    ]
    words = [f" {word}" for word in (*KINDS, *COLORS, *SHAPES, *DIRECTIONS, "largest")]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [*sentences, *words], vocab_size=2000, new_special_tokens=_SPECIAL_TOKENS
    )
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    tokenizer.chat_template = _CHATML
    return tokenizer


def _build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        **TOWER,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def with_context(language_model: PreTrainedModel) -> Network:
    """The language model in a Network that takes context tokens as its vision tokens."""
    return Network(nn.Identity(), nn.Identity(), nn.Identity(), language_model)


def _train(
    model: Network, dialogue: Dialogue, lesson: Lesson, first_step: int, settings: DemoSettings
) -> float:
    """Returns the last step's loss. `first_step`: number of steps of earlier lessons, so that no
    lesson repeats their scenes."""
    parameters = settings.language_model
    stream, size = settings.stream("language_model"), parameters.batch_size
    rolled = int(lesson.turned * size)

    def loss_of_step(step: int) -> Tensor:
        random = np.random.default_rng((stream, step))
        scenes = [make_scene(stream, step * size + i) for i in range(size)]
        scenes[:rolled] = [roll_scene(scene, random.uniform(0, 360)) for scene in scenes[:rolled]]
        context = context_tokens(model, dialogue, scenes, parameters.noise, lesson.places, random)
        return _loss(model, dialogue, scenes, context, random)

    steps = range(first_step, first_step + lesson.steps)
    return fit(model, loss_of_step, steps, parameters.lr, 0.98, "language model")


def _loss(
    model: Network,
    dialogue: Dialogue,
    scenes: list[Scene],
    context: Tensor,
    random: np.random.Generator,
) -> Tensor:
    tokens = [
        [dialogue.row(query, text) for query, text in rows(scene, 1, int(seed))]
        for scene, seed in zip(scenes, random.integers(1 << 31, size=len(scenes)), strict=True)
    ]
    packed = pack(dialogue.text_prefix, CONTEXT, tokens, dialogue.pad)
    return model.loss_sum(context, packed, len(dialogue.text_prefix)) / len(packed.labels)


def accuracy(
    model: Network, dialogue: Dialogue, settings: DemoSettings, rolled: bool, count: int = 50
) -> float:
    """Share of generated answers that equal a reference, given the true context of `count` scenes.
    `rolled`: scenes rolled by any angle, and only the queries that have an answer there."""
    parameters = settings.language_model
    random = np.random.default_rng(settings.stream("probe"))
    scenes = [make_scene(settings.stream("probe"), index) for index in range(count)]
    if rolled:
        scenes = [roll_scene(scene, random.uniform(0, 360)) for scene in scenes]
    model.eval()
    with torch.no_grad():
        per_object = parameters.lessons[-1].places
        context = context_tokens(model, dialogue, scenes, parameters.noise, per_object, random)
    references = [rows(scene, TEMPLATES, 0) for scene in scenes]
    queries = [list(dict.fromkeys(query for query, _ in pairs)) for pairs in references]
    answers = answer(model, dialogue, context, queries, max_new_tokens=48)
    correct = [
        (query, text) in pairs
        for pairs, scene_queries, answered in zip(references, queries, answers, strict=True)
        for query, (text, _) in zip(scene_queries, answered, strict=True)
    ]
    return round(sum(correct) / len(correct), 4)
