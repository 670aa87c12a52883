"""Translation end to end: train, quantize, evaluate and translate by the entries that every task has."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qtx import models
from qtx.data.pair_batching import PairBatches
from qtx.data.parallel import FURTHER_TESTS
from qtx.data.tasks import CORPORA
from qtx.errors import UserError
from qtx.experiments.config import base
from qtx.experiments.run import (
    evaluate,
    make_recipe,
    policy_to_apply,
    post_training_quantization,
    quantize,
    train_and_evaluate,
)
from qtx.experiments.setup import setup
from qtx.experiments.translate import Translator, translate_file
from qtx.experiments.translation import TASKS, Translation
from qtx.methods import translation
from qtx.methods.translation import Decoding, TranslationLoss, translate_all
from qtx.train.logging import read_metrics
from tests.conftest import eight_devices
from tests.experiments.test_launch import get_config

ROOT = Path(__file__).parents[2]
NUMBERS = dict(zip("one two three four five six".split(), "eins zwei drei vier fünf sechs".split(), strict=True))
DECODING = Decoding(beam=2, limit=8, batch_size=8, buckets=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Numbers in English and German, word by word."""
    directory = tmp_path_factory.mktemp("numbers")
    rng = np.random.default_rng(0)
    for split, count in (("train", 400), ("validation", 12), ("test", 8)):
        lines = [" ".join(rng.choice(list(NUMBERS), rng.integers(2, 6))) for _ in range(count)]
        (directory / f"{split}.en").write_text("\n".join(lines) + "\n")
        german = [" ".join(NUMBERS[word] for word in line.split()) for line in lines]
        (directory / f"{split}.de").write_text("\n".join(german) + "\n")
    return directory


def make_config(corpus):
    """A tiny translator of numbers: full precision, then eight bits."""
    config = base()
    config.task = "parallel"
    config.data.pairs = {split: tuple(str(corpus / f"{split}.{la}") for la in ("en", "de")) for split in SPLITS}
    config.recipe = ("finetune", "qat")
    config.model.name = "encoder_decoder"
    config.model.sizes = dict(
        hidden_size=32, num_heads=2, num_layers=1, decoder_layers=1, intermediate_size=32, max_positions=32
    )
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.data.update(max_length=10, buckets=1, eval_buckets=1, eval_batch_size=8)
    config.translation.update(tokenizer="words", beam=2, limit=8, published_bleu=True)
    config.quant.update(pattern="all_linear", weight_granularity="channel", activation_bits=32)
    config.phases.qat.ranges = "updated"
    config.calibration.update(batches=1, batch_size=8)
    for phase, steps in ((config.phases.finetune, 300), (config.phases.qat, 10)):
        phase.update(batch_size=128, steps=steps)
        phase.optimizer.update(learning_rate=3e-3, weight_decay=0.0)
    return config


SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The configuration, the run directory and the metrics of a trained translator."""
    workdir = tmp_path_factory.mktemp("run")
    config = make_config(corpus)
    return config, workdir, train_and_evaluate(config, workdir)["metrics"]


def test_smoke(corpus, tmp_path):
    config = get_config("translation", "smoke")
    config.task, config.data.pairs = "parallel", make_config(corpus).data.pairs
    assert set(train_and_evaluate(config, tmp_path)["metrics"]) == set(config.recipe) == {"finetune", "qat"}
    assert (tmp_path / "quantized" / "model.qtx.safetensors").is_file()


def test_it_learns_and_stays_right_with_eight_bits(trained):
    _, workdir, metrics = trained
    for phase in ("finetune", "qat"):
        found = metrics[phase]
        assert found["bleu"] > 60 and found["test_bleu"] > 60 and found["chrf"] > 60 and found["loss"] < 1
        assert found["score"] == found["bleu"] / 100
        assert 0 < found["published_bleu"] <= 100
    assert "test_bleu" in (workdir / "report.md").read_text()


def test_quantize_and_evaluate(trained, tmp_path):
    config, workdir, metrics = trained
    after = make_config(Path(config.data.pairs.train[0]).parent)
    after.model.name = str(workdir / "model")
    after.model.sizes = {}
    after.quant.update(pattern="", weight_bits=8, activation_bits=8)
    found = quantize(after, tmp_path / "ptq")
    assert found["quantized"]["bleu"] > 0.8 * found["full_precision"]["bleu"]
    full = sum(file.stat().st_size for file in (workdir / "model").glob("*.safetensors"))
    assert found["weight_bytes"] < full / 2
    listed = (tmp_path / "ptq" / "sites.txt").read_text()
    for name in (
        "decoder/layer_0/cross_attention/probs",
        "decoder/layer_0/self_attention/key/kernel",
        "generator/output",
    ):
        assert name in listed
    after.model.name = str(workdir / "quantized")
    again = evaluate(after)
    assert again["bleu"] == pytest.approx(metrics["qat"]["bleu"], abs=5)


def test_evaluation_as_published_draws_for_every_token_and_drops_biases(trained):
    _, workdir, _ = trained
    config = make_config(Path(trained[0].data.pairs.train[0]).parent)
    config.model.name, config.model.sizes = str(workdir / "model"), {}
    config.quant.update(weight_scheme="magnitude_int8", weight_bits=2, weight_rounding="stochastic")
    config.quant.published_evaluation = True
    experiment = setup(config)
    model = make_recipe(experiment)[0][1].model
    found_ids = []
    for seed in (1, 2):
        experiment.config.seed = seed
        variables, drawn = experiment.published_form(model, experiment.variables)
        assert drawn == seed
        ids = translate_all(model, variables, experiment.encoded["test"].source, DECODING, experiment.mesh, drawn)
        found_ids.append(ids)
    assert (found_ids[0] != found_ids[1]).any()
    bias = variables["params"]["decoder"]["layer_0"]["self_attention"]["query"]["bias"]
    assert not np.any(bias) and np.any(variables["params"]["generator"]["bias"])
    found = experiment.evaluate(model, experiment.variables, ("test",))
    assert set(found) == {"test_bleu", "test_chrf", "test_loss", "test_published_bleu"}
    losses = [experiment.loss(model, variables, "test", seed) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    experiment.config.translation.beam = 1  # which the published measure has always
    greedy = experiment.evaluate(model, experiment.variables, ("test",))
    assert greedy["test_published_bleu"] == found["test_published_bleu"]


@pytest.mark.parametrize("kind", ["model", "quantized"])
def test_no_line_is_lost_or_out_of_order(trained, kind, tmp_path):
    _, workdir, _ = trained
    rng = np.random.default_rng(1)
    lines = [" ".join(rng.choice(list(NUMBERS), rng.integers(2, 6))) for _ in range(21)]
    lines[3] = lines[20] = ""
    lines[7] = "one " * 40  # cut
    lines[8] = "seven"  # unknown
    told = []
    translator = Translator.load(str(workdir / kind), "en-de")
    found = translator(lines, DECODING, max_length=10, warn=told.append)
    assert len(found) == 21 and found[3] == found[20] == ""
    right = [a == " ".join(NUMBERS.get(word, "") for word in b.split()) for a, b in zip(found, lines, strict=True)]
    assert sum(right) >= 14
    assert "cut after 10 tokens: 1 (lines 8)" in told[0]
    assert told[1].startswith("1 of ") and "not in the vocabulary" in told[1]
    # A sentence alone gives what it gave among others.
    assert translator(lines[:1], DECODING, max_length=10) == found[:1]
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines))
    translate_file(str(workdir / kind), str(tmp_path / "in.txt"), str(tmp_path / "out.txt"), None, DECODING, 10)
    assert (tmp_path / "out.txt").read_text() == "".join(f"{line}\n" for line in found)


def test_an_interrupted_translation_goes_on(trained, tmp_path, monkeypatch):
    _, workdir, _ = trained
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("".join(f"{' '.join(list(NUMBERS)[: n % 4 + 1])}\n" for n in range(21)))
    decoding = dataclasses.replace(DECODING, batch_size=4)

    def translation_into(path):
        translate_file(str(workdir / "model"), str(source), str(path), None, decoding, 10)
        return path.read_text()

    whole = translation_into(tmp_path / "whole.txt")
    real, left = translation.translate, [2]  # batches of the six until somebody interrupts

    def stopping(*arguments, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(translation, "translate", stopping)
    with pytest.raises(KeyboardInterrupt):
        translation_into(target)
    assert not target.exists() and len(list(tmp_path.glob("out.txt.parts_*/*.npy"))) == 2

    left[0], text = 6, source.read_text()
    source.write_text(text.replace("one", "six"))  # what is there is of other sentences
    assert translation_into(target) != whole and left == [0]

    left[0] = 4
    source.write_text(text)
    assert translation_into(target) == whole and left == [0]
    assert not list(tmp_path.glob("*.parts_*"))


def test_standard_input_and_bad_models(trained, tiny_checkpoint):
    _, workdir, _ = trained

    def command(model, *flags, text=b"two three\n\nfive six\n"):
        arguments = [f"--model={model}", "--beam=1", "--limit=8", "--max_length=10", "--batch_size=8", *flags]
        return subprocess.run(
            [sys.executable, "launch/translate.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            input=text,
            capture_output=True,
        )

    done = command(workdir / "model")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().split("\n")
    assert len(lines) == 4 and lines[1] == lines[3] == "" and lines[0]
    assert b"translate en-de: 3/3" in done.stderr
    for model, flag, said in (
        (tiny_checkpoint, "--limit=8", b"does not translate"),
        (workdir / "model", "--direction=de-en", b"translates en-de, not de-en"),
        (workdir, "--limit=8", b"directory of a run; give its model: " + str(workdir / "model").encode()),
    ):
        done = command(model, flag)
        assert done.returncode == 1 and said in done.stderr and b"Traceback" not in done.stderr


def test_a_vocabulary_of_another_model(trained, tmp_path):
    _, workdir, _ = trained
    copy = Path(shutil.copytree(workdir / "model", tmp_path / "model"))
    content = (copy / "pair_tokenizer.json").read_text()
    (copy / "pair_tokenizer.json").write_text(content.replace('"sechs"', '"sechs", "sieben"'))
    with pytest.raises(UserError, match="target vocabulary"):
        Translator.load(str(copy))


def test_what_a_translator_does_not_take(trained):
    translator = Translator.load(str(trained[1] / "model"))
    for arguments, said in (
        (("one two", DECODING, 10), "a list of texts"),
        ((["one two"], DECODING, 33), "max_length 33 exceeds the model's 32 positions"),
        ((["one two"], Decoding(limit=40), 10), "limit 40 exceeds the model's 32 positions"),
    ):
        with pytest.raises(UserError, match=said):
            translator(*arguments)


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("one\n")
    for output, said in ((tmp_path, "is a directory"), (tmp_path / "file" / "x", "is no directory")):
        with pytest.raises(UserError, match=said):
            translate_file("no model", str(tmp_path / "file"), str(output), None, DECODING, 10)


def trained_config(trained):
    """The configuration to go on with the trained model in full precision."""
    config = make_config(Path(trained[0].data.pairs.train[0]).parent)
    config.model.name, config.model.sizes = str(trained[1] / "model"), {}
    return config


def test_a_checkpoint_goes_on_with_another_divisor_of_scores(trained):
    config = trained_config(trained)
    before = setup(config)
    config.model.sizes = {"scores": "25d"}
    after = setup(config)
    assert (before.pretrained.config.scores, after.pretrained.config.scores) == ("sqrt", "25d")
    batch = before.first_batches(1, 4)[0]
    args = batch["source_ids"], batch["target_ids"]
    logits = [each.model.apply(before.variables, *args).logits for each in (before, after)]
    assert not np.allclose(*logits)
    for sizes, named in (
        ({"scores": "cube"}, "unknown scores 'cube'"),
        ({"num_layers": 2}, "num_layers 2, but the checkpoint"),
    ):
        config.model.sizes = sizes
        with pytest.raises(UserError, match=named):
            setup(config)
    config.model.name, config.model.sizes = str(trained[1] / "quantized"), {"scores": "25d"}
    with pytest.raises(UserError, match="scores '25d', but the checkpoint .* has 'sqrt'"):  # of which its ranges are
        setup(config)


def test_rows_that_start_from_full_precision():
    rows = {row["name"]: row for row in get_config("translation", "tuned").sweep.rows}
    assert all(row["start"] == "full_precision" for name, row in rows.items() if name != "full_precision")
    plain, scaled = (rows[name]["changes"] for name in ("binary_all", "binary_all scaled"))
    assert plain["model.sizes"] == {"scores": "25d"} and plain["quant.weight_scale"] == "one"
    assert "model.sizes" not in scaled and scaled["quant.weight_scale"] == "mean"
    assert rows["binary_all"]["published"] and not rows["binary_all scaled"]["published"]


def test_further_tests_are_evaluated_at_the_end_alone(trained, corpus, tmp_path, capsys):
    folder = tmp_path / "multi30k"
    folder.mkdir()
    files = {"train": "train", "val": "validation", "test_2016_flickr": "test", "test_2018_flickr": "test"}
    for name, split in files.items():
        for language in ("en", "de"):
            shutil.copy(corpus / f"{split}.{language}", folder / f"{name}.{language}")
    config = trained_config(trained)
    config.task, config.data.dir = "multi30k", str(tmp_path)
    experiment = setup(config)
    assert set(experiment.encoded) == set(SPLITS)
    assert set(FURTHER_TESTS) == {"test_2017_flickr", "test_2017_mscoco", "test_2018_flickr"}
    found = evaluate(config)
    assert found["test_2018_flickr_bleu"] == found["test_bleu"] > 60
    assert "test_2018_flickr_bleu" in capsys.readouterr().out  # a wide table cuts the names
    assert found["score"] == found["bleu"] / 100 and not any(name.startswith("test_2017") for name in found)


def test_what_is_left_out_is_told(corpus, tmp_path, capsys):
    config = make_config(corpus)
    assert setup(config) and not capsys.readouterr().out
    for language, word, more in (("en", "one", "\nsix\n"), ("de", "eins", "sechs\n\n")):
        long = f"{word} " * 11 + "\n"
        (tmp_path / f"train.{language}").write_text((corpus / f"train.{language}").read_text() + more + long)
        (tmp_path / f"validation.{language}").write_text(f"{word}\n{long}")
    config.data.pairs.train, config.data.pairs.validation = (
        tuple(str(tmp_path / f"{split}.{language}") for language in ("en", "de")) for split in ("train", "validation")
    )
    setup(config)
    assert capsys.readouterr().out.splitlines() == [
        "train: 3 of 403 pairs left out (1 longer than 10 tokens, 2 with an empty side)",
        "validation: 1 of 2 pairs cut after 10 tokens",
    ]


def test_one_batch_is_made_when_one_is_asked_for(corpus, monkeypatch):
    experiment, made = setup(make_config(corpus)), []
    assemble = PairBatches._assemble
    monkeypatch.setattr(PairBatches, "_assemble", lambda self, *args: made.append(args) or assemble(self, *args))
    assert len(experiment.first_batches(1, 8)) == len(made) == 1


def test_a_checkpoint_whose_languages_share_a_table_but_no_vocabulary(corpus, tmp_path):
    config = make_config(corpus)
    config.translation.update(tokenizer="subwords", vocabulary=262, joint=False)
    tokenizer = setup(config).tokenizer
    assert tokenizer.source_vocab_size == tokenizer.target_vocab_size == 262
    sizes = {**config.model.sizes, "source_vocab_size": 262, "target_vocab_size": 262, "tied": "all"}
    made = models.create("encoder_decoder", **sizes)
    models.save(tmp_path, made.family, made.config, made.params, tokenizer)
    config.model.name, config.model.sizes = str(tmp_path), {}
    for load in (lambda: setup(config), lambda: Translator.load(str(tmp_path))):
        with pytest.raises(UserError, match="one table for both languages"):
            load()


def kernel(params):
    return np.asarray(params["decoder"]["layer_0"]["ffn"]["up"]["kernel"])


def test_what_is_quantized_without_training_is_drawn_as_is_asked_for(trained, tmp_path):
    config = trained_config(trained)
    config.quant.update(weight_bits=3, weight_rounding="stochastic", evaluation_rounding="drawn")
    result = quantize(config, tmp_path)
    packed = trained_config(trained)
    packed.model.name = str(tmp_path / "quantized")
    assert evaluate(packed)["loss"] == pytest.approx(result["quantized"]["loss"], rel=1e-4)
    draws = []
    for seed in (config.seed, config.seed, 7):
        experiment = setup(config)
        config.seed = seed
        batches, policy = experiment.calibration_batches(), policy_to_apply(experiment)
        params = experiment.pretrained.params
        found = post_training_quantization(experiment, params, policy, batches)
        np.testing.assert_array_equal(kernel(found.params), kernel(found.variables["params"]))
        draws.append(kernel(found.params))
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()
    np.testing.assert_allclose(kernel(setup(packed).pretrained.params), draws[0], rtol=1e-6)
    config.quant.published_evaluation = True  # drawn in every call, so the weights are not on their grids yet
    found = post_training_quantization(experiment, params, policy, batches)
    assert found.model.policy == policy
    np.testing.assert_array_equal(kernel(found.variables["params"]), kernel(params))
    assert experiment.published_form(found.model, found.variables)[1] == 7


def test_the_objective_and_the_kind_of_experiment_follow_the_task(corpus):
    config = make_config(corpus)
    config.translation.update(label_smoothing=0.2, divisor="rows")
    experiment = setup(config)
    assert isinstance(experiment, Translation) and set(CORPORA) < set(TASKS)
    assert experiment.training()["objective"] == TranslationLoss(0.2, "rows", 1)
    batch = experiment.batches("train", 128, shuffle=True, epochs=None)[0]
    assert batch["source_ids"].shape[0] == len(batch["weights"]) and (batch["target_ids"][:, 0] == 2).any()
    assert len(experiment.calibration_batches()) == 1


def test_sharded_training_and_decoding(corpus, tmp_path):
    """Eight simulated devices train and translate as one does."""
    script = (
        "from tests.experiments.test_translation import make_config\n"
        "from qtx.experiments.run import train_and_evaluate\n"
        "from pathlib import Path\nimport jax, sys\n"
        "assert jax.device_count() == 8\n"
        f"config = make_config(Path({str(corpus)!r}))\n"
        "config.recipe = ('finetune',)\nconfig.phases.finetune.steps = 3\nconfig.log_every = 1\n"
        f"train_and_evaluate(config, {str(tmp_path / 'eight')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **eight_devices()}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = make_config(corpus)
    config.recipe, config.phases.finetune.steps, config.log_every = ("finetune",), 3, 1
    train_and_evaluate(config, tmp_path / "one")
    one, eight = (
        [r["finetune/loss"] for r in read_metrics(tmp_path / name) if "finetune/loss" in r] for name in ("one", "eight")
    )
    np.testing.assert_allclose(one, eight, rtol=1e-4)
