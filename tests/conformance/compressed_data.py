"""Kinds of cases of "Compressed Transformers" about data: vocabularies, batches by tokens, the shift and the masks."""

import numpy as np

from qtx.data.pair_batching import evaluation_batches, interleaved_key, shifted, token_batches, training_pools
from qtx.data.pair_tokenizer import SPECIALS, vocabulary


def lists(batches):
    return [batch.tolist() for batch in batches]


def check_token_batching(case):
    inputs, expected, params = case.values("inputs"), case.values("outputs"), case.entry["params"]
    lengths, budget = (inputs["src_lengths"], inputs["trg_lengths"]), params["batch_size"]
    order = np.arange(len(lengths[0]))
    assert interleaved_key(*lengths).tolist() == expected["sort_keys"]
    assert lists(evaluation_batches(*lengths, budget)) == expected["evaluation_batches"]
    pools = training_pools(order, *lengths, budget, params["pool_factor"])
    assert lists(batch for pool in pools for batch in pool) == expected["training_batches_before_batch_shuffle"]
    assert lists(token_batches(order, *lengths, 3 * budget)) == expected["plain_batches_of_triple_size"]


def check_sort_key(case):
    assert interleaved_key(*case.values("inputs")["pairs"].T).tolist() == case.values("outputs")["keys"]


def check_vocabulary(case):
    words = vocabulary(case.values("inputs")["corpus"], case.entry["params"]["min_freq"])
    expected = case.values("outputs")
    assert [*SPECIALS[:2], *words] == expected["source"]
    assert [*SPECIALS, *words] == expected["target"]


def check_masks(case):
    inputs, expected, pad = case.values("inputs"), case.values("outputs"), case.entry["params"]["pad"]
    target_input, labels = shifted(inputs["trg"])
    np.testing.assert_array_equal(target_input, expected["trg_input"])
    np.testing.assert_array_equal(labels.reshape(-1, 1), expected["trg_target"])
    source_mask, keys = inputs["src"] != pad, target_input != pad
    np.testing.assert_array_equal(source_mask[:, None, None], expected["src_mask"])
    steps = np.arange(keys.shape[1])
    np.testing.assert_array_equal(keys[:, None, None] & (steps <= steps[:, None]), expected["trg_mask"])
    assert source_mask.sum() == expected["src_tokens"] and keys.sum() == expected["trg_tokens"]


HANDLERS = {
    "token_batching": check_token_batching,
    "sort_key": check_sort_key,
    "vocabulary": check_vocabulary,
    "masks": check_masks,
}
