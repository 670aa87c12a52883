"""Quantizers, quantized layers, graph convolutions and encoders of BitTransGNN."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import traverse_util

from qtx import quant
from qtx.errors import UserError
from qtx.methods.bit_transformer import WIDTHS, activation_spec, bit_policy, weight_spec, without_linear_bias
from qtx.models import bert as bert_family
from qtx.nn import bert, policy, roberta
from qtx.nn.graph import GCN, adjacency, propagate
from qtx.nn.layers import Dense, Embed


def close(case, got, want, name: str = "", rows: Any = ...):
    limit = case.entry["tolerance"]
    got, want = np.asarray(got)[rows], np.asarray(want)[rows]
    np.testing.assert_allclose(got, want, rtol=limit["rtol"], atol=limit["atol"], err_msg=f"{case.id} {name}")


def width(name: str) -> float:
    """Reads `1p58`."""
    return float(name.replace("p", "."))


def on_grid(spec: quant.Spec, x: np.ndarray) -> jax.Array:
    params = None if spec.is_codebook else quant.estimate(spec, x)
    return quant.fake_quant(spec, jnp.asarray(x), params)


# --- Quantizers ---


def weight_quant(case):
    scale = "tensor" if "tensor" in case.kind else "row"
    w = case.values("inputs")["w"]
    for name, want in case.values("outputs").items():
        spec = weight_spec(int(name.removeprefix("q")), scale).at(-1, w.ndim)
        close(case, on_grid(spec, w.T).T, want, name)
        integers, step, zero = quant.quantize(spec, w.T)
        np.testing.assert_array_equal(quant.dequantize(integers, step, zero), on_grid(spec, w.T))
        assert len(np.unique(integers)) <= spec.states + (spec.states == 2)  # the sign of the mean is 0


def activation_quant(case):
    scale = "tensor" if "tensor" in case.kind else "token"
    x = case.values("inputs")["x"]
    for name, want in case.values("outputs").items():
        bits = width(name.removeprefix("q"))
        if bits not in (*WIDTHS, 8):  # published: another width is taken for 8
            with pytest.raises(UserError):
                activation_spec(bits)
            bits = 8
        close(case, on_grid(activation_spec(bits, scale).at(-1, x.ndim), x), want, name)


# --- Layers ---


def rules(states: int, bits: float, scale="row"):
    """Every kernel and what enters it, as `bit_policy` has it for the modules that it names."""
    return policy(weights={"**kernel": weight_spec(states, scale)}, inputs={"**input": activation_spec(bits)})


def bitlinear(case):
    given = {name: jnp.asarray(value) for name, value in case.values("inputs").items()}
    want = case.values("outputs")
    tags = sorted({name.partition("/")[0] for name in want if "/" in name})
    assert tags
    for tag in tags:
        states, bits = re.fullmatch(r"s(\d)_a(\w+)", tag).groups()
        layer = Dense(len(given["weight"]), policy=rules(int(states), width(bits)))

        def run(x, weight, bias, layer=layer):
            return layer.apply({"params": {"kernel": weight.T, "bias": bias}}, x)

        y, back = jax.vjp(run, given["x"], given["weight"], given["bias"])
        gradients = dict(zip(("dx", "dw", "dbias"), back(given["g"]), strict=True))
        for name in ("y_eval", "y_train"):
            close(case, y, want[f"{tag}/{name}"], f"{tag}/{name}")
        for name in ("dx", "dw"):
            close(case, gradients[name], want[f"{tag}/{name}"], f"{tag}/{name}")
        close(case, gradients["dbias"], want["dbias"], "dbias")


def bitlinear_old_no_bias(case):
    given, p = case.values("inputs"), case.entry["parameters"]
    own = rules(p["num_states"], p["num_bits_act"], "tensor")
    stored = {"kernel": jnp.asarray(given["weight"].T), "bias": jnp.asarray(given["bias"])}
    params, trainable = without_linear_bias({"layer": stored}, own)
    assert trainable == ("layer/kernel",)
    y = Dense(len(given["weight"]), policy=own).apply({"params": params["layer"]}, given["x"])
    close(case, y, case.values("outputs")["y"])


def bit_embedding(case):
    given, want = case.values("inputs"), case.values("outputs")
    ids = jnp.asarray(given["ids"], jnp.int32)
    for name in (name for name in want if name.endswith("/y")):
        states = int(name.partition("/")[0].removeprefix("s"))
        layer = Embed(*given["weight"].shape, policy=policy(weights=weight_spec(states)))
        y, back = jax.vjp(
            lambda t, layer=layer: layer.apply({"params": {"table": t}}, ids), jnp.asarray(given["weight"])
        )
        close(case, y, want[name], name)
        close(case, back(jnp.asarray(given["g"]))[0], want["dweight"], "dweight")


# --- Graph convolutions ---


def graphs(matrix: np.ndarray):
    return [adjacency(scipy.sparse.csr_array(matrix), layout) for layout in ("csr", "buckets", "edges")]


def gcn(case):
    given, want = case.values("inputs"), case.values("outputs")
    layers = sorted(int(found[1]) for n in given if (found := re.fullmatch(r"param/gcnconv(\d+)\.bias", n)))
    stored = {
        f"layer_{i - 1}": {
            "kernel": jnp.asarray(given[f"param/gcnconv{i}.lin.weight"].T),
            "bias": jnp.asarray(given[f"param/gcnconv{i}.bias"]),
        }
        for i in layers
    }
    hidden, labels = (len(given[f"param/gcnconv{i}.bias"]) for i in (layers[0], layers[-1]))
    model = GCN(labels, len(layers), hidden)
    for graph in graphs(given["adj_norm"]):
        y, back = jax.vjp(
            lambda params, x, graph=graph: model.apply({"params": params}, graph, x), stored, jnp.asarray(given["x"])
        )
        close(case, y, want["y"], "y")
        gradients, dx = back(jnp.asarray(given["g"]))
        close(case, dx, want["dx"], "dx")
        for i in layers:
            own = gradients[f"layer_{i - 1}"]
            close(case, own["kernel"].T, want[f"grad/gcnconv{i}.lin.weight"], f"kernel {i}")
            close(case, own["bias"], want[f"grad/gcnconv{i}.bias"], f"bias {i}")
    once = model.apply({"params": stored}, graph, given["x"], method="propagated")
    close(case, once, propagate(graph, jnp.asarray(given["x"])), "propagated")
    close(case, model.apply({"params": stored}, graph, once, is_propagated=True), want["y"], "y, propagated once")


def gcn_quantized(case):
    given, p = case.values("inputs"), case.entry["parameters"]
    want = case.values("outputs")["y"]
    kernels = [given[name] for name in sorted(given) if re.fullmatch(r"w\d+", name)]
    stored = {f"layer_{i}": {"kernel": jnp.asarray(w.T)} for i, w in enumerate(kernels)}
    model = GCN(
        len(kernels[-1]),
        len(kernels),
        len(kernels[0]),
        use_bias=False,
        policy=rules(p["num_states"], p["num_bits_act"]),
    )
    for graph in graphs(given["adj_norm"]):
        close(case, model.apply({"params": stored}, graph, given["x"]), want)
    once = model.apply({"params": stored}, graph, given["x"], method="propagated")
    close(case, model.apply({"params": stored}, graph, once, is_propagated=True), want, "propagated once")


# --- Encoders ---


class Features(bert.Block):
    """An encoder with a linear classifier on its first token."""

    encoder_type: Any = bert.Encoder

    def setup(self):
        self.encoder = self.part(self.encoder_type, "encoder")
        self.classifier = self.dense(self.config.num_labels, "classifier")

    def __call__(self, input_ids, attention_mask, token_type_ids):
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)[-1]
        return hidden, self.classifier(hidden[:, 0])


def tag_policy(tag: str):
    """Reads `s3_a8_full`, `s3_a8_linear_only`, `s3_a32_no_attn_act` and `fp`."""
    if tag == "fp":
        return None
    states, bits, what = re.fullmatch(r"s(\d)_a([\dp]+)_(\w+)", tag).groups()
    options = {"full": {}, "linear_only": dict(embeddings=False, attention=False), "no_attn_act": dict(attention=False)}
    return bit_policy(int(states), width(bits), **options[what])


def encoder(case):
    given, want, p = case.values("inputs"), case.values("outputs"), case.entry["parameters"]
    is_roberta = case.kind == "encoder_roberta"
    sizes = dict(
        vocab_size=p["vocab"],
        hidden_size=p["hidden"],
        num_layers=p["layers"],
        num_heads=p["heads"],
        intermediate_size=p["ffn"],
        type_vocab_size=len(given["param/embeddings.token_type_embeddings.weight"]),
        layer_norm_eps=p["layer_norm_eps"],
        pad_token_id=p["pad_id"],
        num_labels=p["num_classes"],
    )
    if is_roberta:
        config = roberta.RobertaConfig(**sizes, max_positions=p["max_pos"] - p["pad_id"] - 1)
    else:
        config = bert.BertConfig(**sizes, max_positions=p["max_pos"])
    modules = {theirs.removeprefix("bert."): ours for theirs, ours in bert_family.modules(config).items()}
    flat = {}
    for name, value in given.items():
        if name.startswith("param/") and not name.startswith("param/pooler"):
            module, _, leaf = name.removeprefix("param/").rpartition(".")
            if leaf == "weight":
                leaf = "table" if module.endswith("embeddings") else "scale" if value.ndim == 1 else "kernel"
            flat[f"{modules[module]}/{leaf}"] = jnp.asarray(value.T if leaf == "kernel" else value)
    variables = {"params": traverse_util.unflatten_dict(flat, sep="/")}
    batch = [jnp.asarray(given[name], jnp.int32) for name in ("input_ids", "attention_mask", "token_type_ids")]
    tokens = given["attention_mask"] > 0
    tags = sorted({name.partition("/")[0] for name in want})
    for tag in tags:
        model = Features(config, policy=tag_policy(tag), encoder_type=roberta.Encoder if is_roberta else bert.Encoder)
        hidden, logits = model.apply(variables, *batch)
        close(case, hidden, want[f"{tag}/hidden"], f"{tag}/hidden", tokens)
        close(case, logits, want[f"{tag}/cls_logit"], f"{tag}/cls_logit")


HANDLERS = {
    "weight_quant_rows": weight_quant,
    "weight_quant_tensor": weight_quant,
    "weight_quant_edges": weight_quant,
    "activation_quant_tokens": activation_quant,
    "activation_quant_tensor": activation_quant,
    "activation_quant_edges": activation_quant,
    "bitlinear": bitlinear,
    "bitlinear_old_no_bias": bitlinear_old_no_bias,
    "bit_embedding": bit_embedding,
    "gcn_two_layer": gcn,
    **{f"gcn_quantized_s{states}": gcn_quantized for states in (2, 3, 4, 5)},
    "encoder_bert": encoder,
    "encoder_roberta": encoder,
}
