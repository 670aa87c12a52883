"""Scores of translations: BLEU and chrF by sacrebleu, and the corpus BLEU of NLTK for comparison with papers that used it.

These are scores of whole sets, not means over sentences. `sacrebleu_scores` takes detokenized text and is what to report;
`nltk_bleu` takes token lists and is higher or lower by points depending on the tokens: compare it only with itself.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence, Sized

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

from qtx.errors import UserError, near_misses


@dataclasses.dataclass(frozen=True)
class TranslationScore:
    """A score of a whole set.

    Attributes:
      name: `BLEU` or `chrF2`.
      value: in percent, 0 to 100.
      signature: how it was computed, such as `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0`.
    """

    name: str
    value: float
    signature: str

    def __str__(self) -> str:
        return f"{self.name}|{self.signature} = {self.value:.2f}"


def sacrebleu_scores(
    hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a", lowercase: bool = False
) -> dict[str, TranslationScore]:
    """Computes BLEU (Papineni et al. 2002) and chrF (Popović 2015) as sacrebleu does (Post 2018).

    Args:
      hypotheses: translations as plain text, one for each sentence.
      references: one for each hypothesis, as published: detokenized, with its case.
      tokenize: sacrebleu's tokenizer for BLEU: `13a` is its default, `none` splits at blanks.
      lowercase: ignore case, in both scores.

    Returns:
      `bleu` and `chrf`.

    Raises:
      UserError: different numbers of hypotheses and references, none at all, or an unknown tokenizer.
    """
    _check(hypotheses, references)
    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"unknown tokenizer {tokenize!r} for BLEU{near_misses(tokenize, BLEU.TOKENIZERS)}")
    # `force` silences a guess, from lines that end in " .", that the text has been tokenized.
    metrics: dict[str, Metric] = {
        "bleu": BLEU(lowercase=lowercase, tokenize=tokenize, force=True),
        "chrf": CHRF(lowercase=lowercase),
    }
    scores = {}
    for name, metric in metrics.items():
        score = metric.corpus_score(list(hypotheses), [list(references)])
        scores[name] = TranslationScore(score.name, float(score.score), str(metric.get_signature()))
    return scores


def nltk_bleu(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Computes corpus BLEU with the defaults of NLTK's `corpus_bleu`, one reference for each hypothesis.

    It differs from sacrebleu's in two ways: a hypothesis shorter than n tokens still counts as one possible n-gram, and
    an order without a match has the precision 2.2e-308 (the score is practically 0) where sacrebleu smooths or gives 0.

    The published BLEU of "Compressed Transformers" (2020), times 100, is this with `<s>` and `</s>` in all token lists and
    with the references' rare words replaced by `<unk>`, as they are in hypotheses: all of it raises the score.

    Args:
      hypotheses: tokens of each translation, whatever counts as a token: ids serve as well as words.
      references: likewise.

    Returns:
      A fraction, 0 to 1; 0 if no token matches.

    Raises:
      UserError: different numbers of hypotheses and references, or none at all.
    """
    _check(hypotheses, references)
    orders = range(1, 5)
    matches, possible = dict.fromkeys(orders, 0), dict.fromkeys(orders, 0)
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for n in orders:
            matches[n] += (_ngrams(hypothesis, n) & _ngrams(reference, n)).total()
            possible[n] += max(1, len(hypothesis) - n + 1)
    if not matches[1]:
        return 0.0
    logs = [math.log(matches[n] / possible[n] if matches[n] else sys.float_info.min) / len(orders) for n in orders]
    ours, theirs = (sum(map(len, lists)) for lists in (hypotheses, references))
    return min(1.0, math.exp(1 - theirs / ours)) * math.exp(math.fsum(logs))


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _check(hypotheses: Sized, references: Sized) -> None:
    if len(hypotheses) != len(references):
        raise UserError(
            f"{len(hypotheses)} translations and {len(references)} references: give one reference for each translation"
        )
    if not len(references):
        raise UserError("no translations to score: the evaluation set is empty")
