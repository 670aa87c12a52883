"""Kinds of cases of "Compressed Transformers": greedy and beam search, and corpus BLEU."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import sacrebleu

from qtx.nn.decoding import translate
from qtx.train.translation_metrics import nltk_bleu
from tests.conformance import compressed_models as models


def model_and_variables(case):
    p, given = case.entry["params"], models.inputs(case)
    ids = {f"{name}_token_id": p[name] for name in ("bos", "eos", "pad")}
    source = jnp.asarray(given["src"], jnp.int32)
    return models.model_of(p, **ids), {"params": models.params_of(p, given)}, source


def check_tokens(case, found, want):
    """Rows of the case end with -1 after their last token, and may be narrower than the limit."""
    rows = np.asarray(found.tokens)
    assert rows.shape[1] == case.entry["params"]["max_target_tokens"] + 1
    filled = np.where(np.arange(rows.shape[1]) < np.asarray(found.lengths)[:, None], rows, -1)
    width = want.shape[1]
    np.testing.assert_array_equal(filled[:, :width], want)
    assert (filled[:, width:] == -1).all()
    assert (rows[filled == -1] == case.entry["params"]["pad"]).all()


def greedy(case):
    want, p = case.values("outputs"), case.entry["params"]
    model, variables, source = model_and_variables(case)
    found = translate(model, variables, source, beam=1, limit=p["max_target_tokens"])
    check_tokens(case, found, want["tokens"])
    np.testing.assert_array_equal(found.lengths, want["lengths"])
    encoded = model.apply(variables, source, jnp.asarray(want["tokens"][:, :1], jnp.int32)).encoded
    np.testing.assert_allclose(encoded, want["encoder_output"], rtol=1e-4, atol=1e-5)


def beam(case):
    want, p, tolerance = case.values("outputs"), case.entry["params"], case.entry["tolerance"]
    model, variables, source = model_and_variables(case)
    limit, alpha = p["max_target_tokens"], p["alpha"]
    found = translate(model, variables, source, beam=p["beam_size"], limit=limit, alpha=alpha)
    check_tokens(case, found, want["tokens"])
    scores = np.stack([found.log_probs, found.scores], -1)
    expected = want["sum_log_prob_and_normalised_score"]
    np.testing.assert_allclose(scores, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])


def without_markers(lines):
    return [[token for token in line if token not in ("<s>", "</s>")] for line in lines]


def corpus_bleu(case):
    given, want, tolerance = case.values("inputs"), case.values("outputs"), case.entry["tolerance"]
    sides = given["hypotheses"], given["references"]
    bare = [without_markers(side) for side in sides]
    hypotheses, references = ([" ".join(line) for line in side] for side in bare)
    found = {
        "bleu_as_original": nltk_bleu(*sides),
        "bleu_without_bos_eos": nltk_bleu(*bare),
        "sacrebleu_without_bos_eos_no_smoothing": sacrebleu.corpus_bleu(
            hypotheses, [references], smooth_method="none", tokenize="none", force=True
        ).score
        / 100,
    }
    assert set(want) == set(found)
    for name, value in found.items():
        # Scores of practically 0 are compared as well: the absolute tolerance would take anything for them.
        np.testing.assert_allclose(value, want[name], rtol=tolerance["rtol"], atol=0, err_msg=name)


HANDLERS = {"greedy": greedy, "beam": beam, "corpus_bleu": corpus_bleu}
