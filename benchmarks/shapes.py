"""The shapes that the parts of QuIC-360's rows are padded to, and the tokens that this adds.

    python benchmarks/shapes.py data/quic360/train.csv

Tokens are counted without the real tokenizer: a word has one for each eight letters, and each run
of punctuation one."""

import argparse
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import real_size
from panollava.config import load_settings
from panollava.data.epoch_plan import Step, divide, group_rows, plan_epoch
from panollava.data.packing import Row, packed_size
from panollava.data.shapes import Shape, choose_shapes, describe, fit
from panollava.model.resampler import Pooling


def part_sizes(rows: pd.DataFrame, stage: str, tokens: str) -> list[Shape]:
    """Of all parts of a stage of the real profile. `tokens`: model.tokens."""
    settings = load_settings(real_size.PROFILE, changes={"model.tokens": tokens})
    of_stage = getattr(settings.stage, stage)
    panoramas = rows["url"].factorize()[0]
    groups = group_rows(np.unique(panoramas) if stage == "vision" else panoramas)
    shards = np.array([0, len(groups.panoramas)])
    texts = [
        _row(*texts, limit=of_stage.max_text_length)
        for texts in zip(rows["query"], rows["annotation"], strict=True)
    ]
    prefix = real_size.PREFIX + math.prod(Pooling(settings.model, settings.views, 16).shape)

    def size(part: Step) -> Shape:
        if stage == "vision":
            return Shape(len(part))
        return packed_size(prefix, [[texts[index] for index in indices] for _, indices in part])

    return [
        size(part)
        for epoch in range(of_stage.epochs)
        for step in plan_epoch(groups, of_stage.batch_size, settings.seed, epoch, shards)
        for part in divide(step, of_stage.accumulate)
    ]


def padding(sizes: list[Shape], shapes: list[Shape]) -> float:
    """Tokens in relation to those of parts that are padded to their longest sequence."""
    return sum(fit(size, shapes).tokens for size in sizes) / sum(size.tokens for size in sizes)


def _row(query: str, annotation: str, limit: int) -> Row:
    asked = [0] * (real_size.QUERY - 1 + _count(query))
    return Row(asked, [0] * min(_count(annotation) + 1, limit - len(asked)))


def _count(text: str) -> int:
    return sum(-(-len(word) // 8) for word in re.findall(r"\w+|[^\w\s]+", text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    rows = pd.read_csv(parser.parse_args().rows).dropna()
    for stage in ("vision", "resampler", "finetune"):
        for tokens in ("views", "sphere"):
            sizes = part_sizes(rows, stage, tokens)
            shapes = choose_shapes(sizes)
            sys.stdout.write(f"{stage}, {tokens}: {describe(shapes, sizes)}\n\n")


if __name__ == "__main__":
    main()
