import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from qtx.analysis.memory import range_memory, weight_memory
from qtx.errors import UserError
from qtx.export import packed_file
from qtx.export.packed import WEIGHTS_FILE, load_quantized, save_quantized
from qtx.export.policy_json import policy_from_json, policy_to_json
from qtx.methods.calibrate import calibrate, quantized_weights
from qtx.models import FAMILIES
from qtx.nn import BertClassifier, BertConfig, list_sites, policy
from qtx.quant import (
    MinMax,
    Search,
    Spec,
    absmean,
    asymmetric,
    binary,
    fake_quant,
    loss_aware,
    per_channel,
    per_embedding,
    per_group,
    per_tensor,
    per_token,
    symmetric,
    ternary,
)
from qtx.quant.policy import Policy
from qtx.quant.spec import Granularity

BERT = FAMILIES["bert"]
# Few distinct shapes: compiling them is what takes time here.
CONFIG = BertConfig(32, 16, 2, 2, 32, 16, pooling="mean", logit_range=(-3.0, 3.0))


def batch(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 32, (3, 9))
    mask = np.arange(9)[None] < rng.integers(3, 10, (3, 1))
    return tuple(jnp.asarray(value, jnp.int32) for value in (ids, mask, ids % 2))


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(BertClassifier(CONFIG).init, jax.random.key(0), *batch(0))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4 + 0.1, jnp.float32), shapes)


@pytest.fixture(scope="module")
def sites(params):
    return list_sites(BertClassifier(CONFIG), {"params": params}, *batch(0))


A8 = asymmetric(8)
POLICIES = {
    "8 bits": policy(symmetric(8), A8),
    "4 bits per channel": policy(symmetric(4, per_channel()), {"**": A8, "y": asymmetric(16), "s": None}),
    "odd widths": policy({"**": asymmetric(3, per_channel()), "FFN": asymmetric(12), "Et": symmetric(5)}, A8),
    "groups": policy(
        {"**/kernel": symmetric(6, per_group(4, axis=0))}, {"**": A8, "y": asymmetric(8, per_group(4, True))}
    ),
    "per embedding": policy({"Et": symmetric(2, per_embedding())}, {"h": asymmetric(8, per_embedding())}),
    "log": policy(symmetric(7, per_channel(), scale_domain="log"), asymmetric(8, scale_domain="log")),
    "softplus, learned": policy(asymmetric(4, scale_domain="softplus", range="learned"), A8),
    "dynamic": policy(asymmetric(4, range="dynamic"), symmetric(8, per_token(), range="dynamic")),
    "ternary": policy({"**/kernel": ternary(per_channel()), "Et": ternary(), "MHA": ternary(per_group(4, axis=0))}, A8),
    "binary, inputs": policy({"**/kernel": binary(per_channel()), "wC": binary()}, None, symmetric(8)),
    "clipped, loss-aware": policy(
        {
            "FFN": Spec(4, "narrow", per_channel(), range="dynamic", clip=(-0.5, 0.75)),
            "Et": ternary(per_channel(), clip=(-0.5, 0.5)),
            "MHA": loss_aware(2),
            "wP": loss_aware(3, per_channel()),
            "wC": Spec(4, "twn", range="dynamic"),
        },
        A8,
    ),
    "states": policy(
        {"FFN": absmean(5), "Et": absmean(2), "MHA": absmean(4, per_tensor()), "CLS": absmean(3)},
        None,
        absmean(5, per_token()),
    ),
    "nothing": policy(None, A8),
}


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path)), left, right
    )


@pytest.fixture(scope="module")
def ranges_of(params):
    @functools.cache
    def calibrated(name):
        # Op by op: policies share the small operations, while each would compile a program of its own.
        with jax.disable_jit():
            return calibrate(BertClassifier(CONFIG, policy=POLICIES[name]), params, [batch(1)])

    return calibrated


@pytest.mark.parametrize("name", POLICIES)
def test_round_trip(tmp_path, params, sites, ranges_of, name):
    ranges = ranges_of(name)
    count = save_quantized(tmp_path, BERT, CONFIG, POLICIES[name], params, ranges)
    loaded = load_quantized(tmp_path)

    assert loaded.config == CONFIG and loaded.family is BERT and loaded.directory == tmp_path
    assert loaded.original == POLICIES[name] and loaded.policy == dataclasses.replace(POLICIES[name], weights=())
    equal(loaded.params, quantized_weights(POLICIES[name], sites, params, ranges))
    flat, before = (traverse_util.flatten_dict(tree, sep="/") for tree in (loaded.ranges, ranges))
    weights = tuple(f"{site}/" for site, info in sites.items() if info.kind == "weight")
    equal(flat, {key: value for key, value in before.items() if not key.startswith(weights)})

    stored = safetensors.numpy.load_file(tmp_path / WEIGHTS_FILE)
    sizes = {item.name: item.stored for item in weight_memory(POLICIES[name], sites, params)}
    assert sizes == {
        key: sum(array.nbytes for held, array in stored.items() if held.partition(":")[0] == key) for key in sizes
    }
    total = sum(array.nbytes for key, array in stored.items() if not key.startswith("ranges/"))
    assert count == total == sum(sizes.values())
    held = sum(array.nbytes for key, array in stored.items() if key.startswith("ranges/"))
    assert held == sum(item.stored for item in range_memory(POLICIES[name], sites))


@pytest.mark.parametrize("name", ["8 bits", "groups", "log", "ternary", "binary, inputs", "clipped, loss-aware"])
def test_logits_are_those_of_the_model_in_memory(tmp_path, params, ranges_of, name):
    ranges = ranges_of(name)
    save_quantized(tmp_path, BERT, CONFIG, POLICIES[name], params, ranges)
    loaded = load_quantized(tmp_path)
    # Not compiled as a whole: compilers may fuse the fake quantization of weights into sums and round them otherwise.
    want = BertClassifier(CONFIG, policy=POLICIES[name]).apply({"params": params, "ranges": ranges}, *batch(3))
    got = loaded.model.apply(loaded.variables, *batch(3))
    np.testing.assert_array_equal(got.logits, want.logits)
    assert np.ptp(want.logits) > 0


def test_ternary_takes_eight_fifths_of_a_bit(sites, params):
    sizes = {item.name: item.stored for item in weight_memory(POLICIES["ternary"], sites, params)}
    assert sizes["encoder/embeddings/word/table"] == -(-32 * 16 // 5) + 4
    assert sizes["encoder/layer_0/ffn/up/kernel"] == -(-16 * 32 // 5) + 4 * 32
    assert sizes["encoder/layer_0/ffn/up/bias"] == 4 * 32
    sizes = {item.name: item.stored for item in weight_memory(POLICIES["clipped, loss-aware"], sites, params)}
    assert sizes["encoder/embeddings/word/table"] == -(-32 * 16 // 5) + 4 * 32
    assert sizes["encoder/layer_0/attention/query/kernel"] == -(-16 * 16 // 5) + 4


@pytest.mark.parametrize("states", [2, 3, 4, 5])
def test_states_are_packed_exactly_also_the_sign_of_a_mean(states):
    spec = absmean(states, per_channel(-1))
    weight = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    for constant in (False, True):
        weight[:, 2] = 0.5 if constant else weight[:, 2]
        entry, tensors = packed_file.pack_weight(spec, "w", jnp.asarray(weight), {})
        want = jax.jit(fake_quant, static_argnums=0)(spec, jnp.asarray(weight))
        np.testing.assert_array_equal(packed_file.unpack_weight("w", entry, tensors), want)
        signs = "trits" if states == 3 or constant else "signs"
        assert entry["packing"] == (signs if states < 4 else "bits")
    assert entry["bits"] == (1, 2, 2, 3)[states - 2]


def test_grid_values_give_the_same_file(tmp_path, params, sites, ranges_of):
    name = "4 bits per channel"
    baked = quantized_weights(POLICIES[name], sites, params, ranges_of(name))
    save_quantized(tmp_path / "a", BERT, CONFIG, POLICIES[name], params, ranges_of(name))
    save_quantized(tmp_path / "b", BERT, CONFIG, POLICIES[name], baked, ranges_of(name))
    first, second = ((tmp_path / name / WEIGHTS_FILE).read_bytes() for name in "ab")
    assert first == second


def test_one_sided_weights_are_unsigned(tmp_path, params):
    positive = jax.tree.map(jnp.abs, params)
    ranges = calibrate(BertClassifier(CONFIG, policy=policy({"wC": symmetric(8)})), positive, [batch(1)])
    save_quantized(tmp_path, BERT, CONFIG, policy({"wC": symmetric(8)}), positive, ranges)
    with safetensors.safe_open(tmp_path / WEIGHTS_FILE, "numpy") as file:
        entry = json.loads(file.metadata()["qtx"])["quantized"]["classifier/kernel"]
    assert entry == {
        "shape": [16, 2],
        "bits": 8,
        "scheme": "symmetric",
        "granularity": {"axis": None, "groups": None, "permute": False},
        "packing": "bits",
        "minimum": 0,
        "signed": False,
    }


# --- Policies ---

SPECS = [
    Spec(),
    asymmetric(16, Granularity((0, 2)), estimator=MinMax("running", 0.95, 0.1, "lower", "include"), eps=1e-5),
    symmetric(3, per_group(6, True), estimator=Search("mse", "brent", 30, 0.1, True, "tensor", "include")),
    asymmetric(4, per_token(), range="dynamic", scale_domain="log"),
    symmetric(4, per_channel(), range="learned", scale_domain="softplus"),
    ternary(per_channel()),
    binary(),
    None,
]


def test_policy_round_trip():
    rules = {f"**/layer_{i}/**": spec for i, spec in enumerate(SPECS)}
    for given in (Policy(), policy(rules, rules, rules, "last"), policy({"Et": SPECS[1]}, {"y3": SPECS[2], "C": None})):
        back = policy_from_json(json.loads(json.dumps(policy_to_json(given))))
        assert back == given and hash(back) == hash(given)


def test_policy_errors():
    good = policy_to_json(policy(symmetric(8)))

    def changed(**fields):
        data = json.loads(json.dumps(good))
        data["weights"][0]["spec"] |= fields
        return data

    with pytest.raises(UserError, match="Spec has no field 'bitz'; did you mean 'bits'"):
        policy_from_json(changed(bitz=8))
    with pytest.raises(UserError, match="estimator 'Magic'"):
        policy_from_json(changed(estimator={"kind": "Magic"}))
    with pytest.raises(UserError, match="40 bits"):
        policy_from_json(changed(bits=40))
    with pytest.raises(UserError, match="Rule: .*pattern"):
        policy_from_json({"weights": [{"spec": None}]})


# --- What can go wrong ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory, params, ranges_of):
    directory = tmp_path_factory.mktemp("saved")
    save_quantized(directory, BERT, CONFIG, POLICIES["8 bits"], params, ranges_of("8 bits"))
    return directory


def copied(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / WEIGHTS_FILE, tmp_path / "config.json"


def rewrite(path, tensors=None, **fields):
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["qtx"]) | fields
    tensors = safetensors.numpy.load_file(path) | (tensors or {})
    safetensors.numpy.save_file(tensors, path, {"qtx": json.dumps(header)})


def test_truncated_altered_or_foreign_weights(tmp_path, saved):
    weights, _ = copied(saved, tmp_path)
    whole = weights.read_bytes()

    def refuses(match):
        with pytest.raises(UserError, match=match) as error:
            load_quantized(tmp_path)
        assert str(weights) in str(error.value) and "\n" not in str(error.value)

    for size in (0, 5, 1000, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refuses("truncated")
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    weights.write_bytes(flipped)
    refuses("checksum")
    weights.write_bytes(whole.replace(b'\\"bits\\": 8', b'\\"bits\\": 4', 1))
    refuses("checksum")
    weights.write_bytes(whole)
    rewrite(weights, version=99)
    refuses("format version 99, this qtx reads 1")
    weights.write_bytes(whole)
    rewrite(weights, quantized=[])
    refuses("checksum")
    weights.write_bytes(whole)
    rewrite(weights, {"extra": np.zeros(2, np.float32)})
    refuses("checksum")
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, weights, {"qtx": "[]"})
    refuses("broken header")
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, weights)
    refuses("no packed qtx model")
    weights.unlink()
    refuses("does not exist")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"model_type": "gpt2"}, "family 'gpt2', but .* 'bert'"),
        ({"num_hidden_layers": 3}, "num_layers 3, but .* packed with 2"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        (None, "cannot be read"),
    ],
)
def test_config_of_another_model(tmp_path, saved, change, match):
    _, config = copied(saved, tmp_path)
    config.write_text(
        config.read_text()[:50] if change is None else json.dumps(json.loads(config.read_text()) | change)
    )
    with pytest.raises(UserError, match=match) as error:
        load_quantized(tmp_path)
    assert str(config) in str(error.value)


def test_what_cannot_be_saved(tmp_path, params, ranges_of):
    ranges = ranges_of("8 bits")
    with pytest.raises(UserError, match="'encoder/layer_2/.*': missing in the params"):
        save_quantized(tmp_path, BERT, dataclasses.replace(CONFIG, num_layers=3), POLICIES["8 bits"], params, ranges)
    without = {key: value for key, value in ranges.items() if key != "classifier"}
    with pytest.raises(UserError, match="'classifier/output' has no range yet"):
        save_quantized(tmp_path, BERT, CONFIG, POLICIES["8 bits"], params, without)
    with pytest.raises(UserError, match="'classifier/kernel' has no range yet"):
        save_quantized(tmp_path, BERT, CONFIG, policy(symmetric(8)), params, without)
    with pytest.raises(UserError, match="matches no site"):
        save_quantized(tmp_path, BERT, CONFIG, policy({"encoder/nowhere": symmetric(8)}), params, ranges)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, params, saved, ranges_of, monkeypatch):
    weights, _ = copied(saved, tmp_path)
    before = weights.read_bytes()

    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(packed_file.safetensors.numpy, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(tmp_path, BERT, CONFIG, POLICIES["8 bits"], params, ranges_of("8 bits"))
    assert weights.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS_FILE]


def test_tokenizer_is_saved_beside_the_weights(tmp_path, params):
    class Tokenizer:
        def save_pretrained(self, directory):
            (directory / "vocab.txt").write_text("[PAD]\n")

    save_quantized(tmp_path, BERT, CONFIG, Policy(), params, {}, Tokenizer())
    assert (load_quantized(tmp_path).directory / "vocab.txt").read_text() == "[PAD]\n"
