"""Kinds of cases of "Compressed Transformers" about data: vocabularies, batches by tokens, the shift and the masks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from qtx.data.pair_batching import evaluation_batches, interleaved_key, shifted, token_batches, training_pools
from qtx.data.pair_tokenizer import SPECIALS, vocabulary
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig


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
    words = int(max(inputs["src"].max(), inputs["trg"].max())) + 1
    config = EncoderDecoderConfig(
        words, words, hidden_size=4, num_layers=1, decoder_layers=1, num_heads=1, intermediate_size=4, pad_token_id=pad
    )
    model, ids = EncoderDecoder(config), (jnp.asarray(inputs["src"]), jnp.asarray(target_input))
    _, found = model.apply(model.init(jax.random.key(0), *ids), *ids, mutable=["captures"])
    seen = {
        path: value > 0 for path, value in flatten_dict(found["captures"], sep="/").items() if path.endswith("probs")
    }
    source, target = expected["src_mask"], expected["trg_mask"]
    masks = {
        "encoder/layer_0/attention": source,
        "decoder/layer_0/self_attention": target,
        "decoder/layer_0/cross_attention": source,
    }
    for module, mask in masks.items():
        attended = seen[f"{module}/probs"]
        np.testing.assert_array_equal(attended, np.broadcast_to(mask, attended.shape), err_msg=module)
    assert (inputs["src"] != pad).sum() == expected["src_tokens"]
    assert (target_input != pad).sum() == expected["trg_tokens"]


HANDLERS = {
    "token_batching": check_token_batching,
    "sort_key": check_sort_key,
    "vocabulary": check_vocabulary,
    "masks": check_masks,
}
