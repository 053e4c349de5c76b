"""Scores agree with the published definitions, computed manually, and are never made up."""

import csv
import logging
import math
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pycocoevalcap
import pytest

from helpers import SHARED
from panollava.evaluation import captions
from panollava.evaluation.captions import tokenize


def score(predictions, references):
    return captions.score(predictions, references).values


MAT = {"mat": "The cat sat on the mat."}
MAT_REFERENCE = {"mat": ["The cat is on the mat."]}


def test_bleu_equals_its_definition() -> None:
    scores = score(MAT, MAT_REFERENCE)
    # Matches: 5 of 6 unigrams, 3 of 5 bigrams, 1 of 4 trigrams, 0 of 3 4-grams.
    assert scores["bleu_1"] == pytest.approx(5 / 6)
    assert scores["bleu_2"] == pytest.approx(math.sqrt(5 / 6 * 3 / 5))
    assert scores["bleu_3"] == pytest.approx(0.5)
    assert scores["bleu_4"] == pytest.approx(0, abs=1e-3)


def test_bleu_has_a_brevity_penalty_for_the_nearest_reference() -> None:
    references = {"mat": ["a cat on a big red mat", "the cat sat"]}
    scores = score({"mat": "the cat"}, references)
    assert scores["bleu_1"] == pytest.approx(math.exp(1 - 3 / 2))


def test_bleu_is_computed_over_the_corpus() -> None:
    scores = score({1: "a b c d", 2: "x"}, {1: ["a b c d"], 2: ["y"]})
    assert scores["bleu_1"] == pytest.approx(4 / 5)


def test_rouge_equals_its_definition() -> None:
    assert score(MAT, MAT_REFERENCE)["rouge_l"] == pytest.approx(5 / 6)
    # Precision 1, recall 1/3, beta 1.2.
    scores = score({"mat": "the cat"}, {"mat": ["the cat sat on the mat"]})
    assert scores["rouge_l"] == pytest.approx(2.44 * (1 / 3) / (1 / 3 + 1.44))


def test_cider_equals_its_definition() -> None:
    references = {1: ["a b c d"], 2: ["w x y z"]}
    assert score({1: "a b c d", 2: "w x y z"}, references)["cider_d"] == pytest.approx(10)
    assert score({1: "a b c d", 2: "a b c d"}, references)["cider_d"] == pytest.approx(5)
    # One extra word: cosines of 1- to 4-grams, and the length penalty.
    cosines = (4 / math.sqrt(5 * 4), 3 / math.sqrt(4 * 3), 2 / math.sqrt(3 * 2), 1 / math.sqrt(2))
    first = 10 * sum(cosines) / 4 * math.exp(-1 / (2 * 6**2))
    scores = score({1: "a b c d q", 2: "w x y z"}, references)
    assert scores["cider_d"] == pytest.approx((first + 10) / 2)


def test_every_reference_counts() -> None:
    references = {1: ["nothing of that", "a red box"], 2: ["x y"]}
    scores = score({1: "a red box", 2: "x y"}, references)
    assert scores["bleu_1"] == pytest.approx(1) and scores["rouge_l"] == pytest.approx(1)


def test_the_result_names_the_tokenizer_and_the_number_of_captions() -> None:
    scores = score(MAT, MAT_REFERENCE)
    assert scores["captions"] == 1
    assert str(scores["tokenizer"]).startswith("nltk 3.")


def test_case_and_punctuation_are_ignored() -> None:
    scores = score({1: "the box is RED"}, {1: ['"The box," is red!']})
    assert scores["bleu_4"] == pytest.approx(1) and scores["rouge_l"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("There is a lake. The lake's wide.", "there is a lake the lake 's wide"),
        ("It can't be (seen) at 3:30 p.m. here", "it ca n't be -lrb- seen -rrb- at 3:30 p.m. here"),
        ("Trees... and -- a road; two-way..", "trees and a road two-way"),
        ("line one\nline two.", "line one line two"),
        (" .,! ", ""),
        # As Stanford's tokenizer gives them.
        ("it’s a “red” ball — left…", "it 's a red ball left"),
        ("the ‘big’ room – wide", "the big room wide"),
    ],
)
def test_tokens(caption: str, tokens: str) -> None:
    assert tokenize(caption) == tokens.split()


UNSPACED = {
    "Chinese": ("一只红色的球，在左边。", "一 只 红 色 的 球 在 左 边"),
    "Chinese with quotes": ("“红色”的球——左边……", "红 色 的 球 左 边"),
    "Chinese outside the basic plane": ("𠮷野家", "𠮷 野 家"),
    "Japanese": ("左に3つの（赤い）ボックス、々。", "左 に 3 つ の 赤 い ボ ッ ク ス 々"),
    "Japanese in half width": ("ｶﾞｲﾄ｡", "ｶ ﾞ ｲ ト".replace("ト", "ﾄ")),
    "Thai": ("มีโต๊ะ 12 ตัว", "ม ี โ ต ๊ ะ 12 ต ั ว"),
    "Thai with word breaks": ("มี\u200bโต๊ะ", "ม ี โ ต ๊ ะ"),
    "Lao": ("ມີໂຕະ", "ມ ີ ໂ ຕ ະ"),
    "Khmer": ("នៅឆ្វេង។", "ន ៅ ឆ ្ វ េ ង"),
    "Burmese": ("ဘယ်မှာ။", "ဘ ယ ် မ ှ ာ"),
    "English between": ("the RED 球, it's", "the red 球 it 's"),
}


@pytest.mark.parametrize("language", UNSPACED)
def test_scripts_without_spaces_are_tokenized_by_character(language: str) -> None:
    caption, tokens = UNSPACED[language]
    assert tokenize(caption) == tokens.split()


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("كرة حمراء على اليسار؟ نعم،", "كرة حمراء على اليسار نعم"),
        ("बाईं ओर एक लाल गेंद है।", "बाईं ओर एक लाल गेंद है"),
        ("왼쪽에 빨간 공이 있다.", "왼쪽에 빨간 공이 있다"),
        ("красный шар слева", "красный шар слева"),
        ("བོད་སྐད།", "བོད སྐད"),
    ],
)
def test_scripts_with_spaces_keep_their_words(caption: str, tokens: str) -> None:
    assert tokenize(caption) == tokens.split()
    assert tokenize(unicodedata.normalize("NFD", caption)) == tokenize(caption)


def test_nearly_right_answers_in_scripts_without_spaces_score() -> None:
    answers = {1: "一只红色的球在左边", 2: "ห้องนี้มีโต๊ะสีแดง", 3: "左に赤い球があります。"}
    references = {1: ["一只红色的球在右边。"], 2: ["ห้องนี้มีโต๊ะสีเขียว"], 3: ["左に赤い球がある"]}
    scores = captions.score(answers, references)
    assert all(0.7 < value < 1 for value in scores.each["rouge_l"].values())
    assert scores.values["bleu_4"] > 0.5 and scores.values["cider_d"] > 5
    assert all(
        value > 0.7
        for value in captions.agreement(
            answers, {key: texts[0] for key, texts in references.items()}
        )
        .each["rouge_l"]
        .values()
    )
    assert "by character" in scores.values["tokenizer"]


def test_cider_of_one_caption_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    scores = score(MAT, MAT_REFERENCE)
    assert "cider_d" not in scores and "rouge_l" in scores
    assert "skipping cider_d" in caplog.text


def test_cider_of_captions_with_the_same_references_is_skipped() -> None:
    references = {1: ["a box", "a ball"], 2: ["a ball", "a box"]}
    assert "cider_d" not in score({1: "a box", 2: "a ball"}, references)


@pytest.mark.parametrize("predictions", [{}, {1: "", 2: " ..."}])
def test_without_a_word_in_any_prediction_there_is_no_score(
    predictions: dict[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    scores = score(predictions, {key: ["a box"] for key in predictions})
    assert scores.keys() == {"captions", "tokenizer"}
    assert scores["captions"] == len(predictions)
    assert "no score can be computed" in caplog.text


def test_an_empty_prediction_scores_0_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = score({1: "a b c d", 2: ""}, {1: ["a b c d"], 2: ["w x y z"]})
    assert scores["rouge_l"] == pytest.approx(0.5) and scores["cider_d"] == pytest.approx(5)
    assert "1 of 2 predictions" in caplog.text


def test_bleu_of_an_order_that_no_prediction_reaches_is_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = score({1: "two boxes", 2: "red"}, {1: ["two boxes"], 2: ["blue"]})
    assert {"bleu_1", "bleu_2"} <= scores.keys() and not {"bleu_3", "bleu_4"} & scores.keys()
    assert "skipping bleu_3" in caplog.text and "skipping bleu_4" in caplog.text


def test_references_without_words_are_skipped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = score({1: "", 2: "a box"}, {1: ["..."], 2: ["!", "a box"]})
    assert scores["captions"] == 1 and scores["rouge_l"] == pytest.approx(1)
    assert "skipping 1 captions" in caplog.text


def test_a_caption_without_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="'ball'"):
        score({"ball": "a ball", **MAT}, MAT_REFERENCE)
    with pytest.raises(ValueError, match="'ball'"):
        score(MAT, {"ball": ["a ball"], **MAT_REFERENCE})


def test_nothing_is_printed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    score({1: "a b c d", 2: "w x y z"}, {1: ["a b c d"], 2: ["w x y z"]})
    assert capsys.readouterr() == ("", "") and caplog.text == ""


def test_neither_java_nor_downloaded_data_is_needed(tmp_path: Path) -> None:
    source = Path(captions.__file__).parents[1]
    program = "from panollava.evaluation.captions import score; print(score({1: 'a b', 2: 'c'}, "
    program += "{1: ['a b'], 2: ['c']}).values['cider_d'])"
    bare = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(source), "NLTK_DATA": ""}
    keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=bare | keep
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer needs Java")
@pytest.mark.skipif(not (SHARED / "quic360_full").is_dir(), reason="needs QuIC-360's rows")
def test_tokens_equal_stanfords_on_real_annotations(tmp_path: Path) -> None:
    with (SHARED / "quic360_full" / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [" ".join(row["annotation"].split()) for row in csv.DictReader(file)]
    texts = [text for text in texts if text]
    (tmp_path / "captions.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    [folder] = pycocoevalcap.__path__
    [jar] = (Path(folder) / "tokenizer").glob("stanford-corenlp-*.jar")
    main = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), *main, "captions.txt"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    lines = output.decode("utf-8").splitlines()
    punctuation = captions._PUNCTUATION - {".."}
    theirs = [[token for token in line.split() if token not in punctuation] for line in lines]
    assert len(theirs) == len(texts) == 6243
    same = sum(a == tokenize(text) for a, text in zip(theirs, texts, strict=True))
    assert same / len(texts) > 0.995


def test_scores_per_caption_average_to_the_mean() -> None:
    references = {1: ["a b c d"], 2: ["w x y z"], 3: ["..."]}
    scores = captions.score({1: "a b c d", 2: "a b c d", 3: "a"}, references)
    assert scores.each["rouge_l"] == {1: 1, 2: 0} and scores.values["rouge_l"] == 0.5
    assert scores.each["cider_d"] == pytest.approx({1: 10, 2: 0})
    result = captions.agreement({1: "a b", 2: "a", 3: ""}, {1: "a b", 2: "b", 3: "b"})
    assert result.each == {"identical": {1: 1, 2: 0, 3: 0}, "rouge_l": {1: 1, 2: 0}}
    assert result.values == {"identical": pytest.approx(1 / 3), "rouge_l": 0.5}


def test_agreement_weighs_what_is_missing_as_rouge_does() -> None:
    """ROUGE-L of unequal lengths is not symmetric; the second answers are its references."""
    answers, others = {1: "a red ball", 2: "a"}, {1: "a", 2: "a red ball"}
    expected = captions.score(answers, {key: [text] for key, text in others.items()})
    result = captions.agreement(answers, others)
    assert result.each["rouge_l"] == expected.each["rouge_l"]
    assert result.each["rouge_l"][1] > result.each["rouge_l"][2]
