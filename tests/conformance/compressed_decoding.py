"""Kinds of cases of the encoder-decoder study: greedy and beam search, and corpus BLEU."""

from __future__ import annotations

import numpy as np
import sacrebleu

from qtx.train.translation_metrics import nltk_bleu


def plain(tokens):
    """Token lists without `<s>` and `</s>`."""
    return [[token for token in line if token not in ("<s>", "</s>")] for line in tokens]


def corpus_bleu(case):
    given, want, tolerance = case.values("inputs"), case.values("outputs"), case.entry["tolerance"]
    hypotheses, references = given["hypotheses"], given["references"]
    lines = [[" ".join(line) for line in plain(side)] for side in (hypotheses, references)]
    found = {
        "bleu_as_original": nltk_bleu(hypotheses, references),
        "bleu_without_bos_eos": nltk_bleu(plain(hypotheses), plain(references)),
        "sacrebleu_without_bos_eos_no_smoothing": sacrebleu.corpus_bleu(
            lines[0], lines[1:], smooth_method="none", tokenize="none", force=True
        ).score
        / 100,
    }
    assert set(want) == set(found)
    for name, value in found.items():
        # Scores of practically 0 are compared as well: the absolute tolerance would take anything for them.
        np.testing.assert_allclose(value, want[name], rtol=tolerance["rtol"], atol=0, err_msg=name)
