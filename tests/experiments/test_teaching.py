"""Phases with a teacher by configuration: distillation, interventions, and what does not fit."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from qtx import asymmetric, quant, symmetric
from qtx.errors import UserError
from qtx.experiments.config import changed, quantization
from qtx.experiments.from_config import policy_from
from qtx.experiments.plan import plan
from qtx.experiments.run import check_recipe, make_recipe, train_and_evaluate
from qtx.experiments.setup import setup
from qtx.experiments.teaching import losses_of, teacher_of
from qtx.export.packed import load_quantized
from qtx.methods.distillation import LOSS_SETS, Distillation
from qtx.methods.teacher_intervention import ACTIVATIONS, CLIP, PARTS, student_policy
from qtx.models import load, read_config, save
from tests.conftest import WORDS, make_tiny_config
from tests.methods.distilling import forward_of
from tests.models.hf import make_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint, tiny_data, tmp_path_factory):
    """The configuration of runs that start from a trained tiny model, which is their teacher."""
    workdir = tmp_path_factory.mktemp("teacher")
    config = make_tiny_config(tiny_checkpoint, tiny_data)
    config.phases.finetune.steps = 30
    train_and_evaluate(config, workdir)
    config.model.name, config.model.fresh_head = str(workdir / "model"), False
    config.quant.update(student="corrected", weight_scheme="ternary")
    return config


def file_config(argument):
    spec = importlib.util.spec_from_file_location("intervention", ROOT / "configs" / "teacher_intervention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def with_recipe(config, **changes):
    fields = {
        "recipe": ("intervene", "qat"),
        "phases.intervene.intervention": "gradual",
        "phases.intervene.losses": "teacher_intervention",
        "phases.intervene.steps": 2,
        "phases.qat.losses": "logits=1, hidden_states=0.5",
        "phases.qat.including": "intervene",
        "phases.qat.steps": 5,
    }
    return changed(config, fields | changes, "test")


def test_two_phases_share_the_steps_of_one(teacher, tmp_path):
    config = with_recipe(teacher)
    recipe, policy = make_recipe(setup(config))
    assert [(phase.name, phase.steps) for phase in recipe] == [("intervene", 2), ("qat", 3)]
    assert policy == student_policy() and recipe[1].prepare is None
    first, second = (phase.objective for phase in recipe)
    assert isinstance(first, Distillation) and first.intervene is not None and second.intervene is None
    assert second.losses == {"logits": 1.0, "hidden_states": 0.5}
    found = train_and_evaluate(config, tmp_path)
    assert set(found["metrics"]) == {"intervene", "qat"}
    assert json.loads((tmp_path / "result_qat.json").read_text())["step"] == 5
    packed = load_quantized(tmp_path / "quantized")
    assert packed.original == student_policy()
    table = np.asarray(packed.params["encoder"]["embeddings"]["word"]["table"])
    assert all(len(np.unique(np.abs(row[row != 0]))) <= 1 for row in table)  # three values in a row
    config.teacher.name = str(tmp_path / "quantized")
    with pytest.raises(UserError, match="teacher.name: .*quantized is a packed artifact; give .*model/"):
        make_recipe(setup(config))


def by_losses(losses):
    return {"phases.intervene.losses": losses, "phases.qat.losses": losses}


UNTAUGHT = {"recipe": ("qat",), "phases.qat.losses": "", "phases.qat.including": ""}


def lengths(config):
    """Steps of each phase, or epochs where those say it."""
    return {phase.name: phase.steps or phase.epochs for phase in make_recipe(setup(config))[0]}


def test_a_share_of_the_steps_has_its_share_of_the_first_ones(teacher):
    quarter = {"phases.intervene.share": 0.25, "phases.qat.share": 0.25}
    steps = {"phases.intervene.steps": 60, "phases.qat.steps": 234}  # of RTE, in three epochs
    assert lengths(with_recipe(teacher, **steps)) == {"intervene": 60, "qat": 174}
    assert lengths(with_recipe(teacher, **steps, **quarter)) == {"intervene": 15, "qat": 59 - 15}
    assert (
        lengths(with_recipe(teacher, **{"phases.intervene.steps": 30, "phases.intervene.share": 0.1}))["intervene"] == 3
    )
    epochs = {"phases.qat.steps": 0, "phases.qat.epochs": 2.0, "phases.qat.including": "", "recipe": ("qat",)}
    assert lengths(with_recipe(teacher, **epochs, **quarter)) == {"qat": 0.5}


@pytest.mark.parametrize("share", [0.0, -0.25, 1.5, float("nan")])
def test_no_share(teacher, share):
    with pytest.raises(UserError, match=f"phases.qat.share is {share}; .*above 0 and up to 1"):
        make_recipe(setup(with_recipe(teacher, **{"phases.qat.share": share})))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"phases.qat.losses": ""}, []),  # the labels alone: fine
        (
            {"recipe": ("qat",), "phases.qat.losses": "", "teacher.name": "/nowhere"},
            ["'/nowhere'", "phases.qat.losses"],
        ),
        ({"phases.intervene.intervention": "map+map"}, ["'map' twice"]),
        ({"phases.intervene.intervention": "map+gradual"}, ["'gradual' is a schedule"]),
        ({"phases.qat.losses": "logits=nan"}, ["weight nan", "'logits'", "no finite number"]),
        ({"phases.qat.losses": "logits=inf"}, ["weight inf", "no finite number"]),
        ({"teacher.temperature": float("inf")}, ["temperature inf", "finite"]),
        ({"phases.intervene.losses": ""}, ["'gradual'", "losses"]),
        ({**UNTAUGHT, "teacher.layers": "every"}, ["teacher.layers is 'every'", "no phase", "leave it at 'same'"]),
        ({**UNTAUGHT, "teacher.padding": "published"}, ["teacher.padding is 'published'", "no phase"]),
        ({**UNTAUGHT, "teacher.temperature": 2.0}, ["teacher.temperature is 2.0", "no phase"]),
        (
            {**by_losses("logits=1, maps=1"), "teacher.padding": "published"},
            ["losses logits, maps reads", "hidden_states"],
        ),
        ({**by_losses("maps=1, logits=0"), "teacher.temperature": 2.0}, ["teacher.temperature is 2.0", "losses maps"]),
        ({"teacher.relation_heads": 2}, ["teacher.relation_heads is 2", "value_relations"]),
        ({**by_losses("value_relations=1"), "teacher.relation_heads": -4}, ["relation_heads is -4"]),
        ({"teacher.layers": "((0,1),(1,3))"}, ["'((0,1),(1,3))'", "such as '0-1, 1-3'"]),
        ({"teacher.layers": "0-0, 1"}, ["'0-0, 1'", "such as '0-1, 1-3'"]),
        ({"teacher.layers": "0-5"}, ["no pair (0, 5)", "the teacher 1"]),
        ({"model.layers": (0,)}, ["keeps layers (0,) alone", "give teacher.name"]),
        ({"model.fresh_head": True, "model.pooler": False}, ["no pooler", "student_without='cls'"]),
        (
            {"model.fresh_head": True, "model.pooler": False, "quant.student_without": "emb,"},
            ["student_without='emb, cls'"],
        ),
        ({"phases.intervene.losses": "tinybert"}, ["'tinybert'", "ternarybert"]),
        ({"phases.qat.losses": "logits=high"}, ["'logits'", "'high'"]),
        ({"phases.qat.losses": "logit=1"}, ["'logit'", "logits"]),
        ({"phases.intervene.intervention": "mapp"}, ["'mapp'", "map"]),
        ({"phases.intervene.steps": 5}, ["'qat' has 5 steps", "'intervene'"]),
        ({"phases.qat.including": "finetune"}, ["'finetune'", "no earlier phase"]),
        ({"recipe": ("finetune", "qat"), "phases.qat.including": ""}, ["'qat'", "model.name"]),
        ({"teacher.layers": "evry"}, ["'evry'", "every"]),
        ({"teacher.temperature": 0.0}, ["temperature"]),
        ({"quant.student": "binary"}, ["'binary'", "'corrected'"]),
        ({"quant.weight_bits": 32, "quant.weight_scheme": "symmetric"}, ["quant.student", "weight_bits"]),
        ({"quant.pattern": "ALL"}, ["quant.student", "pattern"]),
        ({"quant.activation_scheme": "symmetric"}, ["quant.activation_scheme is 'symmetric'", "='fields'"]),
        ({"quant.activation_range": "dynamic"}, ["quant.activation_range is 'dynamic'", "='fields'"]),
        ({"quant.padding": "include"}, ["quant.padding", "='fields'"]),
        ({"quant.activation_bits": 64}, ["quant.activation_bits is 64", "2 to 16"]),
        ({"quant.setup": "FP_logits"}, ["quant.setup", "leave it at 'all'"]),
        ({"quant.scale_domain": "log"}, ["quant.scale_domain", "no", "range"]),
        ({"quant.student_activations": "own"}, ["'own'", "'fields'"]),
        ({"quant.student_without": "emb, ffn"}, ["'ffn'", "ffn_1"]),
        ({"quant.student": "layers", "quant.student_without": "emb"}, ["'layers' has no part 'emb'"]),
        ({"quant.student_without": "emb,qkv,ffn_1,ffn_2,cls"}, ["leaves nothing"]),
        ({"quant.student_clip": 0.0}, ["quant.student_clip", "positive", "0.0"]),
    ],
)
def test_what_does_not_fit(teacher, changes, named):
    config = with_recipe(teacher, **changes)
    if not named:
        assert not isinstance(make_recipe(setup(config))[0][1].objective, Distillation)
        return
    with pytest.raises(UserError) as caught:
        make_recipe(setup(config))
    assert all(word in str(caught.value) for word in named), caught.value


def test_a_teacher_of_its_own(teacher, tiny_checkpoint, tmp_path):
    config = with_recipe(teacher, **{"teacher.name": teacher.model.name})
    assert make_recipe(setup(config))[0][0].constants.keys() == {"params"}
    headless = Path(shutil.copytree(tiny_checkpoint, tmp_path / "headless"))
    tensors = safetensors.numpy.load_file(headless / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("classifier")}
    safetensors.numpy.save_file(kept, headless / "model.safetensors")
    config.teacher.name = str(headless)
    with pytest.raises(UserError, match="teacher.name.*fine-tune it first"):
        make_recipe(setup(config))


def test_labels_of_the_teacher(teacher, tmp_path):
    copy = Path(shutil.copytree(teacher.model.name, tmp_path / "model"))
    hf = json.loads((copy / "config.json").read_text())
    assert hf["id2label"] == {"0": "fresh", "1": "rotten"} and hf["label2id"] == {"fresh": 0, "rotten": 1}
    config = with_recipe(teacher, **{"teacher.name": str(copy)})
    experiment = setup(config)
    for labels in ({"0": "LABEL_0", "1": "LABEL_1"}, {"0": "0", "1": "1"}, {"1": "Rotten", "0": "FRESH"}):
        (copy / "config.json").write_text(json.dumps(hf | {"id2label": labels}))
        assert teacher_of(experiment).model.config.num_labels == 2


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A checkpoint of four layers, whose random head counts as trained."""
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "model", "bert", WORDS, num_layers=4, max_positions=32)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [("every", (1, 3)), ("first", (0, 1)), ("last", (2, 3)), ("0-0, 1 - 3", (0, 3))],
    ids=["every", "first", "last", "pairs"],
)
def test_a_student_of_some_of_the_layers(teacher, deep, tmp_path, rule, kept):
    changes = {
        "model.name": str(deep),
        "model.layers": kept,
        "teacher.name": str(deep),
        "teacher.layers": rule,
        "recipe": ("finetune",),
        "phases.finetune.losses": "teacher_intervention",
        "phases.finetune.steps": 1,
        "save_models": rule == "every",
    }
    config = changed(teacher, changes, "test")
    experiment = setup(config)
    whole = load(str(deep)).params["encoder"]
    for number, layer in enumerate(kept):
        mine = experiment.pretrained.params["encoder"][f"layer_{number}"]["ffn"]["up"]["kernel"]
        np.testing.assert_array_equal(mine, whole[f"layer_{layer}"]["ffn"]["up"]["kernel"])
    recipe, _ = make_recipe(experiment)
    assert recipe[0].objective.layers == ((0, kept[0]), (1, kept[1]))
    if rule == "every":
        found = train_and_evaluate(config, tmp_path)
        assert np.isfinite(found["metrics"]["finetune"]["score"])
        assert read_config(tmp_path / "model")[1].num_layers == 2


def test_a_student_of_another_width(teacher, deep, tmp_path):
    whole = load(str(deep))
    wide = dataclasses.replace(whole.config, hidden_size=24, num_layers=4)
    params = whole.family.module(config=wide).init(jax.random.key(0), *whole.family.example_inputs())["params"]
    save(tmp_path, whole.family, wide, params, setup(teacher).tokenizer)
    changes = {"model.name": str(deep), "model.layers": (1, 3), "teacher.name": str(tmp_path), "recipe": ("qat",)}
    config = changed(teacher, changes | {"teacher.layers": "every", "phases.qat.losses": "ternarybert"}, "test")
    with pytest.raises(UserError, match="'hidden_states' does not fit.*16.*24.*no learned projection"):
        make_recipe(setup(config))
    config.phases.qat.losses = "logits=1, scores=1, maps=1, value_relations=1"
    assert make_recipe(setup(config))[0][0].objective.layers == ((0, 1), (1, 3))


def test_an_untrained_model_cannot_teach_itself(teacher, tiny_checkpoint):
    config = with_recipe(teacher, **{"model.name": str(tiny_checkpoint), "model.fresh_head": True})
    with pytest.raises(UserError, match="'intervene' learns from the model"):
        make_recipe(setup(config))


@pytest.mark.parametrize("losses", ["", "logits=1"])
@pytest.mark.parametrize(
    ("student", "without", "trained"),
    [("published", "", False), ("published", "emb", True), ("published", "cls", False), ("corrected", "", True)],
)
def test_published_students_do_not_train_the_row_of_padding_of_a_quantized_table(
    teacher, losses, student, without, trained
):
    fields = {**UNTAUGHT, "phases.qat.losses": losses, "quant.student": student, "quant.student_without": without}
    experiment = setup(with_recipe(teacher, **fields))
    (phase,), _ = make_recipe(experiment)
    batch = experiment.batches("train", 8, shuffle=False, epochs=1)[0]
    assert np.any(batch["input_ids"] == experiment.pad_id)
    batch = {**batch, "attention_mask": np.ones_like(batch["attention_mask"])}  # else nothing reaches the row here

    def loss(params):
        return phase.objective(forward_of(phase.model, params), batch, phase.constants)[0]

    table = jax.grad(loss)(experiment.pretrained.params)["encoder"]["embeddings"]["word"]["table"]
    assert np.any(table[experiment.pad_id]) == trained and np.any(table)


def test_a_phase_in_full_precision_trains_the_row_of_padding(teacher):
    fields = {"recipe": ("finetune",), "phases.finetune.losses": "logits=1", "quant.student": "published"}
    (phase,), _ = make_recipe(setup(with_recipe(teacher, **fields)))
    assert phase.objective.collections == {}


def test_one_output_has_no_temperature(teacher):
    experiment = setup(with_recipe(teacher, **{"teacher.temperature": 2.0}))
    task = dataclasses.replace(experiment.task, labels=())
    experiment = dataclasses.replace(experiment, dataset=dataclasses.replace(experiment.dataset, task=task))
    with pytest.raises(UserError, match="teacher.temperature is 2.0, .*squared error; leave it at 1.0"):
        make_recipe(experiment)


def test_losses_by_name_and_by_weight():
    assert losses_of("ternarybert", "x") == LOSS_SETS["ternarybert"]
    assert losses_of("logits=1, scores=0.25", "x") == {"logits": 1.0, "scores": 0.25}


def student(**fields):
    section = quantization()
    section.update({"student": "corrected", "weight_scheme": "ternary"} | fields)
    return policy_from(section, 2)


def test_activations_of_a_student():
    assert student() == student_policy()
    four = dataclasses.replace(ACTIVATIONS, bits=4)
    assert student(activation_bits=4) == student_policy(activations=four)
    none = student(activation_bits=32)
    assert none == student_policy(activations=None) and not none.inputs and not none.activations and none.weights
    chosen = {"student_activations": "fields", "activation_scheme": "symmetric"}
    assert student(**chosen) == student_policy(activations=symmetric(8, clip=CLIP))
    chosen = {"student_activations": "fields", "activation_range": "dynamic", "activation_granularity": "token"}
    wanted = asymmetric(8, quant.per_token(), range="dynamic", clip=CLIP)
    assert student(**chosen) == student_policy(activations=wanted)
    assert student(student_activations="fields", activation_bits=32) == none


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_student(part):
    assert student(student_without=part) == student_policy(**{part: False}) != student_policy()
    published = student(student="published", student_without=f"{part},")
    assert published == student_policy(**{part: False}, published=True)


def test_clip_of_a_student():
    found = student(student_clip=1.5, student="published")
    rules = (*found.weights, *found.activations, *found.inputs)
    assert {rule.spec.clip for rule in rules if rule.spec is not None} == {(-1.5, 1.5)}
    assert student(student_clip=2.5) == student_policy()


def test_several_parts_of_a_student():
    assert student(student_without="emb, cls") == student(student="layers") == student_policy(emb=False, cls=False)
    without = student(student="layers", student_without="ffn_1")
    assert without == student_policy(emb=False, cls=False, ffn_1=False)


def test_the_config_file():
    policies = {name: policy_from(file_config(name).quant, 6) for name in ("gradual", "published_map", "ternary")}
    assert policies["gradual"] == policies["ternary"] == student_policy()
    assert policies["published_map"] == student_policy(published=True)
    quarter, whole = file_config("gradual+quarter").phases, file_config("gradual").phases
    assert (quarter.qat.epochs, quarter.intervene.steps) == (whole.qat.epochs, whole.intervene.steps)
    assert quarter.qat.share == quarter.intervene.share == whole.qat.share / 4 == 0.25
    for name, word in (
        ("gradul", "unknown task or method 'gradul'.*tasks are rte, .*sst2.*methods .*gradual"),
        ("colla", "unknown task or method 'colla'.*cola"),
        ("cola+gradul", "'gradul'"),
        ("gradual+half", "choose 'quarter'"),
        ("full_precision+quarter", "full_precision does not go with 'quarter'"),
    ):
        with pytest.raises(UserError, match=word):
            file_config(name)
    check_recipe(file_config("cola+published_ternary"))
    assert file_config("cola+published_gradual").teacher.padding == "published"


@pytest.mark.parametrize("task", ["rte", "cola", "sst2"])
def test_a_method_on_a_task_is_what_its_sweep_runs(task):
    trials = {trial.row.name.replace(" ", "_"): trial.config for trial in plan(file_config(task))}
    assert len(trials) == 12
    for name, config in trials.items():
        assert file_config(f"{task}+{name}").to_dict() == config.to_dict() | {"seed": 1000}, name
    assert file_config("rte+gradual").to_dict() == file_config("gradual").to_dict()
    c = file_config("cola+gradual")
    assert (c.task, c.data.max_length, c.phases.qat.batch_size, c.phases.intervene.steps) == ("cola", 64, 16, 120)


def test_rows_without_a_teacher_do_not_read_the_fields_of_one():
    config = file_config("rte")
    config.teacher.update(temperature=2.0, layers="every", name="x")
    for trial in plan(config):
        check_recipe(trial.config)


def test_smoke_needs_no_trained_model(tiny_config):
    config = file_config("smoke")
    assert (config.recipe, config.model.fresh_head) == (("finetune", "qat"), True)
    full, gradual = (trial.config for trial in plan(file_config("smoke+sweep")))
    assert (full.recipe, full.model.fresh_head) == (("finetune",), True)
    assert (gradual.recipe, gradual.model.fresh_head) == (("intervene", "qat"), False)
    for each in (config, full):  # on what tests have
        each.task, each.model.name, each.calibration.batch_size = "table", tiny_config.model.name, 8
        each.data.update(train=tiny_config.data.train, validation=tiny_config.data.validation, max_length=16)
        assert [phase.name for phase in make_recipe(setup(each))[0]] == list(each.recipe)
