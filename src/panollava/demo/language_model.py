"""The demo's language model: Qwen2's architecture, pretrained to answer from what stands before.

Where the panorama's tokens will be, it reads context tokens: sums of word embeddings that state
the scene's facts, in any order, repeated, and among tokens that say nothing of them. A model
that has learned from text alone and is then frozen can't use such a prefix."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.demo.questions import QUERIES, TEMPLATES, answer, has_answer, rows, spell
from panollava.demo.scenes import (
    CLEAR,
    COLORS,
    DIRECTIONS,
    KINDS,
    SHAPES,
    WITHIN,
    Object,
    Scene,
    apart,
    make_scene,
    turn,
)
from panollava.demo.settings import DemoSettings, Lesson
from panollava.errors import UserError
from panollava.model.generate import answer as generate
from panollava.model.panollava import PanoLLaVA

log = logging.getLogger(__name__)

CONTEXT = 128  # tokens of a panorama: eight views of 4 x 4
_SILENT = CONTEXT // 4  # of them at most tell nothing
PLACES = (CONTEXT - _SILENT) // len(DIRECTIONS)  # that an object of a full scene can have
_WIDTH = 128
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_SENTENCES = 300  # scenes whose rows the tokenizer learns from: they hold every word
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_language_model(settings: DemoSettings, folder: Path) -> None:
    """Pretrain the language model, and save it and its tokenizer as `from_pretrained` reads
    them, with how often it is right given the true context. Raises UserError for lessons that
    can't be given."""
    _check_lessons(settings.language_model.lessons)
    torch.set_num_threads(settings.language_model.threads)
    torch.manual_seed(settings.seed)
    tokenizer = make_tokenizer()
    own = settings.language_model
    model = with_context(_model(len(tokenizer), tokenizer))
    dialogue = Dialogue(tokenizer, 128)
    first = 0
    for lesson in own.lessons:
        loss = _teach(model, dialogue, lesson, first, settings)
        first += lesson.steps
    report = {
        "loss": round(loss, 4),
        "right": _right(model, dialogue, settings),
        "right_turned": _right(model, dialogue, settings, turned=True),
    }
    log.info("given the true context: %s", report)
    model.language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _check_lessons(lessons: list[Lesson]) -> None:
    if not lessons:
        raise UserError("language_model.lessons: expected at least one lesson, found none")
    for number, lesson in enumerate(lessons):
        if not 1 <= lesson.places <= PLACES:
            raise UserError(
                f"language_model.lessons: lesson {number + 1} has places: {lesson.places}; "
                f"expected 1 to {PLACES}, so that {len(DIRECTIONS)} objects fit in the context"
            )


def _teach(
    model: PanoLLaVA, dialogue: Dialogue, lesson: Lesson, first: int, settings: DemoSettings
) -> float:
    """The last step's loss. `first`: the steps of the lessons before, whose scenes were others."""
    own = settings.language_model
    stream = settings.stream("language_model")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=own.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, own.lr, total_steps=lesson.steps, pct_start=0.1
    )
    turned = int(lesson.turned * own.batch_size)
    bar = tqdm(range(first, first + lesson.steps), desc="language model")
    for step in bar:
        random = np.random.default_rng((stream, step))
        scenes = [make_scene(stream, step * own.batch_size + i) for i in range(own.batch_size)]
        # Their objects may lie between two directions: they are to be told as well.
        scenes[:turned] = [turn(scene, random.uniform(0, 360)) for scene in scenes[:turned]]
        context = context_tokens(model, dialogue, scenes, own.noise, lesson.places, random)
        loss = _loss(model, dialogue, scenes, context, random)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen2's tokenizer, its byte pairs learned from the demo's sentences, with ChatML's template.

    It is of Qwen2's own class, because `AutoTokenizer` takes that class for a Qwen2 model whatever
    the folder says."""
    said = [
        text
        for index in range(_SENTENCES)
        for _, query, answer in rows(make_scene(0, index), "", TEMPLATES, index)
        for text in (f"user\n{query}", f"assistant\n{answer}")
    ]
    facts = [f" {word}" for word in (*KINDS, *COLORS, *SHAPES, *DIRECTIONS, "largest")]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [*said, *facts], vocab_size=2000, new_special_tokens=_SPECIAL
    )
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _model(vocabulary_size: int, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=_WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def with_context(language_model: PreTrainedModel) -> PanoLLaVA:
    """The language model behind parts that pass context tokens on as they are."""
    return PanoLLaVA(nn.Identity(), nn.Identity(), nn.Identity(), language_model, pool=1)


def _loss(
    model: PanoLLaVA,
    dialogue: Dialogue,
    scenes: list[Scene],
    context: Tensor,
    random: np.random.Generator,
) -> Tensor:
    asked = [
        [dialogue.row(query, text) for _, query, text in rows(scene, "", 1, int(seed))]
        for scene, seed in zip(scenes, random.integers(1 << 31, size=len(scenes)), strict=True)
    ]
    packed = pack(dialogue.text_prefix, CONTEXT, asked, dialogue.pad)
    return model.loss_sum(context, packed, len(dialogue.text_prefix)) / len(packed.labels)


def context_tokens(
    model: PanoLLaVA,
    dialogue: Dialogue,
    scenes: list[Scene],
    noise: float,
    places: int,
    random: np.random.Generator,
) -> Tensor:
    """(scenes, CONTEXT, width): each object stands at one to `places` places, as one is seen by
    several tokens of a panorama, the kind of scene at most others, and the rest is noise."""
    facts = [_place_facts(scene, places, random) for scene in scenes]
    ids = dialogue.tokenizer.get_vocab()
    longest = max(len(words) for own in facts for words in own)
    index = torch.tensor(
        [
            # A word after a space is one token.
            [
                [ids[f"Ġ{w}"] for w in words] + [dialogue.pad] * (longest - len(words))
                for words in own
            ]
            for own in facts
        ]
    )
    known = (index != dialogue.pad).unsqueeze(-1)
    summed = (model.embed(index) * known).sum(dim=2)
    norm = summed.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    normed = summed / norm * _WIDTH**0.5
    noises = torch.from_numpy(random.standard_normal(normed.shape).astype(np.float32))
    return normed + noise * noises


def _place_facts(scene: Scene, places: int, random: np.random.Generator) -> list[list[str]]:
    """The words of each context token."""
    tokens: list[list[str]] = [[scene.kind] for _ in range(CONTEXT)]
    silent = random.integers(0, _SILENT + 1)
    order = random.permutation(CONTEXT)
    for at in order[:silent]:
        tokens[at] = []
    at = silent
    for item in scene.objects:
        words = [item.color, item.shape, *_directions(item)]
        if item is scene.largest:
            words.append("largest")
        for _ in range(random.integers(1, places + 1)):
            tokens[order[at]] = words
            at += 1
    return tokens


def _directions(item: Object) -> list[str]:
    """The direction that it is in, or the two that it is between."""
    off = {name: apart(item.yaw, name) for name in DIRECTIONS}
    return [name for name in DIRECTIONS if off[name] <= WITHIN] or [
        name for name in DIRECTIONS if off[name] < CLEAR
    ]


def _right(
    model: PanoLLaVA,
    dialogue: Dialogue,
    settings: DemoSettings,
    count: int = 50,
    turned: bool = False,
) -> float:
    """The share of answers that are one of the true ones, word by word. `turned`: about scenes
    that are turned by any angle, of queries that have an answer there."""
    random = np.random.default_rng(settings.stream("probe"))
    scenes = [make_scene(settings.stream("probe"), index) for index in range(count)]
    if turned:
        scenes = [turn(scene, random.uniform(0, 360)) for scene in scenes]
    model.eval()
    with torch.no_grad():
        own = settings.language_model
        places = own.lessons[-1].places
        context = context_tokens(model, dialogue, scenes, own.noise, places, random)
    topics = [[topic for topic in QUERIES if has_answer(scene, topic)] for scene in scenes]
    queries = [[spell(QUERIES[topic]) for topic in asked] for asked in topics]
    said = generate(model, dialogue, context, queries, max_new_tokens=48)
    right = [
        text in {spell(answer(scene, topic, template)) for template in range(TEMPLATES)}
        for scene, asked, texts in zip(scenes, topics, said, strict=True)
        for topic, text in zip(asked, texts, strict=True)
    ]
    return round(sum(right) / len(right), 4)
