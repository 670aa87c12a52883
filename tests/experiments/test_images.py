"""Experiments on images, end to end on tiny digits: training, a teacher's tensors, what is saved, what does not fit."""

import csv
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from qtx.errors import UserError
from qtx.experiments.analyze import analyze
from qtx.experiments.config import analysis, base, changed
from qtx.experiments.run import evaluate, make_recipe, quantize, train_and_evaluate
from qtx.experiments.setup import setup
from qtx.export.packed import load_quantized
from qtx.methods.distillation import Distillation
from qtx.models import read_config
from tests.conftest import FEWER_SITES
from tests.data.test_images import encode, flat, write_mnist
from tests.experiments.test_launch import get_config

SIZES = dict(
    image_size=6,
    patch_size=3,
    num_channels=1,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The configuration of a tiny ViT on 60 digits that any model can tell apart."""
    root = tmp_path_factory.mktemp("digits")
    write_mnist(root, 70)
    config = base()
    config.task, config.data.dir = "mnist", str(root)
    config.model.name, config.model.sizes = "vit", ConfigDict(SIZES)
    config.data.eval_batch_size = 20
    config.calibration.update(batches=2, batch_size=8)
    for phase in config.phases.values():
        phase.update(batch_size=20, steps=2)
    return config


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The configuration of runs that start from a trained tiny ViT, and what it reached."""
    workdir = tmp_path_factory.mktemp("trained")
    changes = {"phases.finetune.steps": 40, "phases.finetune.optimizer.learning_rate": 1e-2}
    found = train_and_evaluate(changed(tiny, changes, "test"), workdir)["metrics"]["finetune"]
    return changed(tiny, {"model.name": str(workdir / "model"), "model.fresh_head": False}, "test"), found


def test_smoke(tiny, tmp_path):
    config = get_config("vit", "smoke")
    config.data.dir = tiny.data.dir
    config.model.sizes.update(SIZES)
    config.phases.finetune.epochs = 1.0
    assert set(train_and_evaluate(config, tmp_path)["metrics"]) == set(config.recipe) == {"finetune", "qat"}
    assert (tmp_path / "quantized" / "model.qtx.safetensors").is_file()


def with_teacher(config, **changes):
    fields = {
        "recipe": ("intervene",),
        "quant.student": "layers",
        "quant.weight_scheme": "ternary",
        "phases.intervene.intervention": "gradual",
        "phases.intervene.losses": "logits=1, hidden_states=1, scores=1, maps=1",
    }
    return changed(config, fields | changes, "test")


def test_a_saved_model_is_evaluated_again(trained):
    config, reached = trained
    values = evaluate(config)
    assert values == pytest.approx(reached) and {"accuracy", "test_accuracy", "score"} == values.keys()
    assert values["accuracy"] > 0.2, "better than one digit in ten"


def test_two_steps_with_a_teacher(trained, tmp_path):
    config = with_teacher(trained[0])
    recipe, policy = make_recipe(setup(config))
    assert isinstance(recipe[0].objective, Distillation) and recipe[0].objective.intervene is not None
    rules = {rule.pattern for kind in (policy.weights, policy.activations, policy.inputs) for rule in kind}
    assert rules and all(pattern.startswith("encoder/layer_*/") for pattern in rules)
    found = train_and_evaluate(config, tmp_path)
    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    named = {name: value for line in losses for name, value in line.items() if "loss" in name}
    assert {"intervene/loss_scores", "intervene/loss_maps", "intervene/loss_hidden_states"} <= named.keys()
    assert np.isfinite(list(named.values())).all()
    packed = load_quantized(tmp_path / "quantized")
    kernel = np.asarray(packed.params["encoder"]["layer_0"]["ffn"]["up"]["kernel"])
    assert len(np.unique(kernel)) == 3
    assert read_config(tmp_path / "quantized")[1] == packed.config
    again = changed(trained[0], {"model.name": str(tmp_path / "quantized")}, "test")
    assert evaluate(again) == pytest.approx(found["metrics"]["intervene"])


@pytest.mark.parametrize("losses", ["teacher_intervention", "logits=1, attention_output=1"])
def test_the_norm_before_attention_is_not_its_output(trained, losses):
    config = with_teacher(trained[0], **{"phases.intervene.losses": losses})
    with pytest.raises(UserError, match="'attention_output' .*VitClassifier.*take 'self_output'"):
        make_recipe(setup(config))


def test_a_published_student_of_images(trained):
    fields = {"quant.student": "published", "phases.intervene.losses": "logits=1"}
    with pytest.raises(UserError, match="no word table and no pooler; set quant.student_without='emb, cls'"):
        make_recipe(setup(with_teacher(trained[0], **fields)))
    found = make_recipe(setup(with_teacher(trained[0], **fields, **{"quant.student_without": "emb, cls"})))[0]
    assert found[0].objective.collections == {}


def test_quantized_without_training(trained, tmp_path):
    config = changed(trained[0], {"quant.overrides": FEWER_SITES}, "test")
    found = quantize(config, tmp_path)
    assert found["full_precision"] == pytest.approx(trained[1])
    assert found["quantized"]["score"] > 0.2
    assert "encoder/embeddings/patch/kernel" in (tmp_path / "sites.txt").read_text()
    assert (tmp_path / "quantized" / "preprocessor_config.json").is_file()


def test_analyses_of_images(trained, tmp_path):
    config = changed(trained[0], {}, "test")
    with config.unlocked():
        config.analyses, config.analysis = ("weights", "memory"), analysis()
    config.analysis.memory.compiled = False
    assert "1 x 5 tokens" in analyze(config, tmp_path)
    config.analyses = ("outliers",)
    with pytest.raises(UserError, match="'outliers' tells of the tokens of texts"):
        analyze(config, tmp_path / "other")


def test_errors_of_layers_of_images(trained, tmp_path):
    config = changed(trained[0], {"quant.student": "layers", "quant.weight_scheme": "ternary"}, "test")
    with config.unlocked():
        config.analyses, config.analysis = ("layer_errors",), analysis()
    config.analysis.layer_errors.update(batches=1, batch_size=5)
    analyze(config, tmp_path)
    with open(tmp_path / "layer_errors.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert {"self_output", "hidden_states"} < row.keys() and "attention_output" not in row
    assert float(row["self_output"]) > 0 and float(row["hidden_states"]) > 0
    config.analysis.layer_errors.quantities = ("attention_output",)
    with pytest.raises(UserError, match="take 'self_output'"):
        analyze(config, tmp_path / "other")


def test_a_folder_of_images(tiny, tmp_path):
    for label, colour in (("dark", 10), ("light", 200)):
        (tmp_path / label).mkdir()
        for i in range(10):
            (tmp_path / label / f"{i}.png").write_bytes(encode(flat(colour, 5 + i % 2), "PNG"))
    config = changed(tiny, {"task": "image_folder", "data.train": str(tmp_path), "data.resize": True}, "test")
    found = setup(config)
    assert found.task.num_labels == found.pretrained.config.num_labels == 2
    assert found.batches("train", 4, shuffle=True, epochs=None)[0]["pixels"].shape == (4, 6, 6, 1)
    assert "test" not in found.encoded


def test_images_are_resized_and_drawn_in_training_alone(tiny):
    sizes = ConfigDict({**SIZES, "image_size": 9, "num_channels": 3})
    found = setup(changed(tiny, {"model.sizes": sizes, "data.resize": True, "data.crop": 2, "data.flip": True}, "test"))
    train = found.batches("train", 8, shuffle=True, epochs=None)
    assert train.crop == 2 and train.flip and train[0]["pixels"].shape == (8, 9, 9, 3)
    plain = found.batches("train", 8, shuffle=False, epochs=1)
    assert not plain.crop and not plain.flip
    first = found.first_batches(50, 16)
    assert [batch["weights"].all() for batch in first] == [True] * 3
    assert all((batch["pixels"] == batch["pixels"][:, :1, :1]).all() for batch in first), "they are as they were"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.sizes": ConfigDict({**SIZES, "image_size": 9})}, "6 pixels a side.*takes 9: set data.resize=True"),
        ({"model.sizes": ConfigDict({**SIZES, "patch_size": 4})}, "patches of 4 pixels do not divide images of 6"),
        ({"task": "film_reviews"}, "needs a model that classifies texts, unlike 'vit'"),
        ({"task": "mnists"}, "'mnists'; did you mean 'mnist'"),
        ({"model.amplify.sites": ("x",)}, "model.amplify"),
    ],
)
def test_what_does_not_fit(tiny, changes, named):
    with pytest.raises(UserError, match=named):
        setup(changed(tiny, changes, "test"))


def test_models_of_texts_read_no_images(tiny, tiny_checkpoint):
    config = changed(tiny, {"model.name": str(tiny_checkpoint)}, "test")
    config.model.sizes = ConfigDict()
    with pytest.raises(UserError, match="task 'mnist' has images.*configs/vit.py"):
        setup(config)


def test_teachers_that_see_other_images(trained, tmp_path):
    config, _ = trained
    assert make_recipe(setup(with_teacher(config, **{"teacher.name": config.model.name})))[0][0].constants is not None
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).write_bytes((setup(config).pretrained.directory / file).read_bytes())
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"image_mean": [0.1]}))
    with pytest.raises(UserError, match=r"teacher.name: .* has image_mean \(0.1,\)"):
        make_recipe(setup(with_teacher(config, **{"teacher.name": str(tmp_path)})))
    with pytest.raises(UserError, match="quant.student is 'layer'; choose from"):
        make_recipe(setup(with_teacher(config, **{"quant.student": "layer"})))
