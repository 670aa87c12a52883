"""Errors of every layer against what NumPy makes of the same captures."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from matplotlib import image

from qtx.analysis import layer_errors
from qtx.methods.distillation import Teacher
from qtx.nn import BertClassifier
from tests.methods.test_distillation import batch_of, other_params
from tests.nn import tiny

MODEL = BertClassifier(tiny.CONFIG)
STUDENT, TEACHER = (Teacher(MODEL, {"params": params}) for params in (other_params(), tiny.params()))
LENGTHS = ((6, 4, 2), (3, 5, 6))
BATCHES = [batch_of(LENGTHS[0]), batch_of(LENGTHS[1], seed=1, weights=[1, 1, 0])]


@jax.jit
def run(params, batch):
    args = [batch[name] for name in MODEL.inputs]
    outputs, found = MODEL.apply({"params": params}, *args, mutable=["captures"])
    captures = traverse_util.flatten_dict(found["captures"], sep="/")
    return outputs.hidden_states, [captures[f"encoder/layer_{i}/attention/norm/output"] for i in (0, 1)]


@pytest.mark.parametrize("padding", ["ignore", "published"])
def test_errors_are_means_over_the_tokens_of_every_example(padding):
    found = layer_errors.layer_errors(STUDENT, TEACHER, BATCHES, padding=padding)
    expected = {"hidden_states": [], "attention_output": []}
    for batch, lengths in zip(BATCHES, LENGTHS, strict=True):
        (states, outputs), (their_states, their_outputs) = (
            run(side.variables["params"], batch) for side in (STUDENT, TEACHER)
        )
        for row, length in enumerate(lengths):
            if batch["weights"][row]:
                until = length if padding == "ignore" else 6
                pairs = {
                    "hidden_states": zip(states[1:], their_states[1:], strict=True),
                    "attention_output": zip(outputs, their_outputs, strict=True),
                }
                for name, both in pairs.items():
                    errors = [np.mean((np.asarray(s) - np.asarray(t))[row, :until] ** 2) for s, t in both]
                    expected[name].append(errors)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], np.mean(values, 0), rtol=1e-4, err_msg=name)


def test_reports(tmp_path):
    found = {
        "ternary": {"attention_output": np.array([0.1, 0.2]), "hidden_states": np.array([0.3, 0.4])},
        "ours": {"attention_output": np.array([0.05, 0.1])},
    }
    rows = layer_errors.table(found).rows
    assert rows[1] == ["ternary", 1, 0.2, 0.4] and rows[2] == ["ours", 0, 0.05, None]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_errors, "save_figure", lambda figure, path: drawn.append(figure))
        layer_errors.plot(found | {"flat": {"hidden_states": np.full(2, 5.6e-2)}}, tmp_path / "none.png")
    highest = [axes.get_ylim()[1] for axes in drawn[0].axes]
    np.testing.assert_allclose(highest, [0.2 * 1.05, 0.4 * 1.05])  # no line on the frame
    layer_errors.plot(found, tmp_path / "errors.png")
    assert image.imread(tmp_path / "errors.png").std() > 0
