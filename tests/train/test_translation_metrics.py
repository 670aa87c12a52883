import math
import sys

import pytest
import sacrebleu

from qtx.errors import UserError
from qtx.train.translation_metrics import nltk_bleu, sacrebleu_scores

REFERENCES = ["Two young, White males are outside near many bushes.", "A little girl climbing into a wooden playhouse."]
HYPOTHESES = ["Two young white men are outside near many bushes.", "A little girl climbs into a wooden house ."]


def test_scores_are_those_of_sacrebleu_with_their_signatures(capsys):
    scores = sacrebleu_scores(HYPOTHESES, REFERENCES)
    assert scores["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES], force=True).score)
    assert scores["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score)
    assert 0 < scores["bleu"].value < scores["chrf"].value < 100
    assert "tok:13a" in scores["bleu"].signature and f"version:{sacrebleu.__version__}" in scores["bleu"].signature
    assert str(scores["chrf"]).startswith("chrF2|nrefs:1|case:mixed") and str(scores["chrf"])[-5:-3].isdigit()
    assert capsys.readouterr() == ("", "")


def test_case_and_tokenizer_are_in_the_signature():
    lower = sacrebleu_scores(HYPOTHESES, REFERENCES, lowercase=True)
    assert lower["bleu"].value > sacrebleu_scores(HYPOTHESES, REFERENCES)["bleu"].value
    assert all("case:lc" in score.signature for score in lower.values())
    assert "tok:none" in sacrebleu_scores(HYPOTHESES, REFERENCES, tokenize="none")["bleu"].signature


def test_the_same_text_scores_100():
    scores = sacrebleu_scores(REFERENCES, REFERENCES)
    assert [score.value for score in scores.values()] == pytest.approx([100, 100])


def test_an_empty_translation_is_scored():
    assert 0 < sacrebleu_scores(["", REFERENCES[1]], REFERENCES)["bleu"].value < 60


def test_nltk_bleu_by_hand():
    hypothesis, reference = "a b c d e x".split(), "a b c d e f g".split()
    # Precisions 5/6, 4/5, 3/4, 2/3; one token short.
    want = math.exp(1 - 7 / 6) * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert nltk_bleu([hypothesis], [reference]) == pytest.approx(want, rel=1e-12)


def test_nltk_bleu_is_of_the_set_and_clips_counts():
    hypotheses, references = ["a a a a a".split(), "b c d e".split()], ["a a a x y".split(), "b c d e".split()]
    want = (7 / 9 * 5 / 7 * 3 / 5 * 1 / 3) ** 0.25
    assert nltk_bleu(hypotheses, references) == pytest.approx(want, rel=1e-12)
    assert nltk_bleu([[1, 1, 1, 1, 1], [2, 3, 4, 5]], [[1, 1, 1, 8, 9], [2, 3, 4, 5]]) == pytest.approx(want, rel=1e-12)


def test_nltk_bleu_counts_one_ngram_in_a_sentence_too_short_for_any():
    long = "a b c d e".split()
    assert nltk_bleu([long, ["f"]], [long, ["f"]]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3) ** 0.25, rel=1e-12)


def test_nltk_bleu_without_a_match_of_some_order():
    tiny = sys.float_info.min
    found = nltk_bleu(["a b x".split()], ["a b c".split()])
    assert found == pytest.approx((2 / 3 * 1 / 2 * tiny**2) ** 0.25, rel=1e-9) and 0 < found < 1e-150
    assert nltk_bleu([["x"]], [["y"]]) == nltk_bleu([[]], [["y"]]) == 0.0


def test_a_longer_hypothesis_has_no_penalty():
    hypothesis, reference = "a b c d e f".split(), "a b c d e".split()
    assert nltk_bleu([hypothesis], [reference]) == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25, rel=1e-12)


@pytest.mark.parametrize("score", [sacrebleu_scores, nltk_bleu])
def test_sets_that_cannot_be_scored(score):
    with pytest.raises(UserError, match="2 translations and 1 references"):
        score(["a", "b"], ["a"])
    with pytest.raises(UserError, match="empty"):
        score([], [])


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(UserError, match="unknown tokenizer '13b' for BLEU; did you mean '13a'"):
        sacrebleu_scores(["a"], ["a"], tokenize="13b")
