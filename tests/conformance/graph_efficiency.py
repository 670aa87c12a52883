"""Kinds of cases of BitTransGNN: what it costs, metrics, when training stops, names of directories, class profiles."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from qtx.analysis import efficiency, profiles
from qtx.analysis import efficiency_as_published as published
from qtx.methods.bittransgnn_paths import Settings, directory
from qtx.models import get_family
from qtx.nn import BertConfig, list_sites
from qtx.train import metrics as task_metrics
from qtx.train.evaluation import PUBLISHED_STARTS, Evaluation, published_choice
from qtx.train.optimizer import OptimizerConfig, learning_rate, rate_factor

DTYPES, PROCESSES = ("float32", "int32", "int8"), ("7nm", "45nm")


def close(case, got, want, name=""):
    tolerance = case.entry["tolerance"]
    np.testing.assert_allclose(got, want, rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=name)


def table(case):
    return case.values("inputs")["table"]


def model_bytes(case):
    p, found = case.entry["parameters"], []
    for roberta, large, embedding_bits, bits, classifier, with_graph, graph_bits in table(case):
        encoder = published.Encoder(bool(roberta), bool(large))
        of_graph = published.gcn_bytes(encoder.width, p["dg"], p["do"], graph_bits) if with_graph else 0
        found.append(encoder.bytes(bits, embedding_bits, bool(classifier)) + of_graph)
    close(case, found, case.values("outputs")["bytes"])


def encoder_ops(case):
    found = [published.Encoder(large=bool(large)).operations(bits).times(n or 1) for large, bits, n in table(case)]
    close(case, found, case.values("outputs")["add_mult"])


def graph_operations(case, bits, dynamic, width):
    p = case.entry["parameters"]
    passes = p["num_sequences"] / p["batch_size"] if dynamic else 1
    return published.gcn_operations(p["num_nodes"], p["num_edges"], width, p["dg"], p["do"], bits, passes)


def gnn_ops(case):
    found = [graph_operations(case, bits, dynamic, case.entry["parameters"]["dh"]) for bits, dynamic in table(case)]
    close(case, found, case.values("outputs")["add_mult"])


def energy_per_op(case):
    found = [efficiency.energy_per_operation(DTYPES[int(t)], PROCESSES[int(n)]) for t, n in table(case)]
    close(case, found, case.values("outputs")["add_mult"])


def total_energy(case):
    p, found = case.entry["parameters"], []
    encoder = published.Encoder()
    for bits, number, graph in table(case):
        dtype = DTYPES[int(number)]
        joule = encoder.operations(bits).times(p["num_sequences"]).energy(dtype)
        if graph:
            joule += graph_operations(case, p["gnn_bits"], graph == 2, encoder.width).energy(dtype)
        found.append(joule)
    close(case, found, case.values("outputs")["joule"])


def mac_counts(case):
    """Of the sites of a model of these sizes, whose classifier is left out."""
    batch, tokens, heads, layers, inner, width = map(int, case.values("inputs")["shape"])
    config = BertConfig(
        hidden_size=heads * width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        max_positions=max(tokens, 512),
    )
    model = get_family("bert").module(config=config)
    ids = [jax.ShapeDtypeStruct((batch, tokens), jnp.int32)] * 3
    params = jax.eval_shape(model.init, jax.random.key(0), *ids)["params"]
    found = efficiency.products(None, list_sites(model, {"params": params}, *ids))
    macs = efficiency.macs(product for product in found if product.name != "classifier")
    want = case.values("outputs")
    assert macs == {"linear": want["macs_linear"], "scores": want["macs_qk"], "context": want["macs_pv"]}
    assert any(product.name == "classifier" for product in found)


def metrics(case):
    given, want = case.values("inputs"), case.values("outputs")
    found = {
        **task_metrics.compute(["accuracy", "weighted_f1"], given["y_pred"], given["y_true"]),
        **task_metrics.compute(["f1", "matthews"], given["y_pred_binary"], given["y_true_binary"]),
        **task_metrics.compute(["pearson", "spearman"], given["r_pred"], given["r_true"]),
    }
    assert set(found) == set(want)
    for name, value in found.items():
        close(case, 100 * value, want[name], name)


def early_stopping(case):
    given, want = case.values("inputs"), case.values("outputs")
    checked = 0
    for name, row in want.items():
        sequence, _, start = name.partition("/start")
        values = list(map(float, given[sequence]))
        patience = int(given[sequence.replace("seq", "patience")])
        assert float(start) in PUBLISHED_STARTS.values()
        stop, kept, best = published_choice(values, patience, float(start))
        close(case, [-1 if i is None else i for i in (stop, kept)] + [best], row, name)
        # What a phase does with the same counting.
        evaluation = Evaluation(print, patience=patience, start=0.0)
        history = [{"step": i, "epoch": i, "score": value} for i, value in enumerate(values)]
        over = [i for i in range(len(values)) if evaluation.is_over(history[: i + 1])]
        assert (over[0] if over else None) == stop
        checked += 1
    assert checked


def lr_schedule(case):
    epochs, batches = int(case.values("inputs")["nb_epochs"]), 7
    config = OptimizerConfig(1e-3, rate_factors=(("encoder/**", 0.01),), warmup=0.0, schedule="milestones")
    with jax.enable_x64(True):
        schedule = learning_rate(config, epochs * batches, batches)
        factors = [rate_factor(config, f"params/{name}/kernel") for name in ("encoder", "gcn")]
        for step in (0, batches - 1):  # the first of an epoch, and the last
            rates = [float(schedule(epoch * batches + step)) * config.learning_rate for epoch in range(epochs)]
            close(case, np.outer(rates, factors), case.values("outputs")["lr"])


def checkpoint_paths(case):
    rows = json.loads(str(case.values("outputs")["table"]))
    names = {"num_states": "states", "num_bits_act": "bits_act"}
    for row in rows:
        path = row.pop("path")
        settings = Settings(**{names.get(name, name): value for name, value in row.items()})
        assert directory(settings) == path
        assert directory(settings, "logits") == path.replace("model_ckpts/", "logits/")
    assert rows


def class_profiles(case):
    given, want = case.values("inputs"), case.values("outputs")
    for kind in ("mean", "rsa"):
        found = profiles.class_profiles(given["cls_logits"], given["gcn_logits"], kind)
        close(case, found, want[kind], kind)
        close(case, np.abs(profiles.embed(found, "pca")), want[f"pca_{kind}_abs"], f"PCA of {kind}")


def timing_summary(case):
    given, want = case.values("inputs"), case.values("outputs")
    found = efficiency.summary(given["seconds"])
    close(case, found[:5], want["stats"])
    assert found.n == len(given["seconds"])
    close(case, efficiency.power(given["sample_time"], given["sample_watt"]), want["energy"])


HANDLERS = {
    "bytes": model_bytes,
    "encoder_ops": encoder_ops,
    "gnn_ops": gnn_ops,
    "energy_per_op": energy_per_op,
    "total_energy": total_energy,
    "mac_counts": mac_counts,
    "metrics": metrics,
    "early_stopping": early_stopping,
    "lr_schedule": lr_schedule,
    "checkpoint_paths": checkpoint_paths,
    "class_profiles": class_profiles,
    "timing_summary": timing_summary,
}
