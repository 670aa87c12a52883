"""The configuration of an experiment: one ConfigDict, read here and nowhere below.

`base()` has every field with its default. A config file changes some and returns it; `--config.field=value` changes more.
Below this module there are dataclasses only.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from qtx.errors import UserError, near_misses
from qtx.methods.adaround import AdaRound
from qtx.methods.agnews_study import input_policy
from qtx.methods.bit_transformer import bit_policy
from qtx.methods.efficient_quantization import Value, policy_of, with_value
from qtx.methods.outlier_suppression import OutlierSuppression, suppression_policy
from qtx.methods.patterns import pattern_policy
from qtx.methods.teacher_intervention import CLIP, student_policy
from qtx.nn.aliases import policy as make_policy
from qtx.quant import (
    Spec,
    estimator,
    ir_net,
    per_channel,
    per_embedding,
    per_group,
    per_position,
    per_tensor,
    per_token,
)
from qtx.quant.policy import Policy
from qtx.quant.spec import CODEBOOKS
from qtx.train.evaluation import Evaluation
from qtx.train.optimizer import OptimizerConfig

GRANULARITIES = {
    "tensor": per_tensor,
    "channel": per_channel,
    "embedding": per_embedding,
    "position": per_position,
    "token": per_token,
}


def base() -> ConfigDict:
    """Returns the default experiment: fine-tune MiniLM on film reviews, W8A8 when quantization is asked for."""
    return ConfigDict(
        {
            # A name from qtx.data.tasks; 'table', 'folder' or 'image_folder', or 'parallel' for translation, with the paths in
            # `data`.
            "task": "film_reviews",
            "seed": 1000,  # of the head, the order of the data and dropout
            "recipe": ("finetune",),  # names of sections in `phases`, in order
            "model": {
                "name": "all-MiniLM-L6-v2",  # directory, packaged model, Hugging Face id; 'text_classifier': from nothing
                "tokenizer": "all-MiniLM-L6-v2",  # of a model from nothing: a name likewise
                "sizes": ConfigDict(),  # of a model from nothing: fields of its configuration, such as `num_layers`
                "start": placeholder(
                    str
                ),  # of a model from nothing: a BERT checkpoint whose embeddings and attention it gets
                "layers": (),  # of a checkpoint: those that are kept, from 0, such as every second one; (): all
                "fresh_head": True,  # initialise pooler and classifier anew
                "pooling": "cls",  # of a fresh head: or 'mean'
                "pooler": True,  # of a fresh head: a dense layer before the classifier, where the family has one
                "hidden_dropout": placeholder(float),  # None: as in the checkpoint
                "attention_dropout": placeholder(float),
                "classifier_dropout": placeholder(float),
                "dtype": "float32",  # of the arithmetic: or 'bfloat16'; parameters are float32
                "amplify": {  # outliers made to order, the function unchanged: see qtx.analysis.amplify
                    "sites": (),  # such as ('x',)
                    "factor": 30.0,
                    "channels": 1,
                },
            },
            "data": {
                "dir": placeholder(str),  # None: the environment variable QTX_DATA_DIR
                "seed": 0,  # of splits that are drawn, and of limits
                "train": "",  # task 'table': file; tasks 'folder' and 'image_folder': directory
                "validation": "",  # task 'table'
                "text_columns": ("text",),  # task 'table'
                "label_column": "label",  # task 'table'
                "splits": "own",  # 'graph': as text graphs were published; of GLUE, validation examples are the test split
                "label_order": "",  # file with one class per line, in the order of the class ids; '': sorted, or the task's
                "augmented": "",  # training examples that launch/augment.py made (its workdir), in place of the task's
                "limit_train": 0,  # examples; 0: all. Of what is augmented, not of its copies
                "limit_eval": 0,
                "max_length": 128,  # tokens
                "padding": "bucket",  # or 'max'
                "buckets": 4,  # compiled lengths at most, in training
                "eval_buckets": 2,  # and in evaluation, where compiling again costs more than padding
                "eval_batch_size": 64,
                "direction": "en-de",  # of translation: source and target language
                "pairs": {  # task 'parallel': source and target file of each split; the test is optional
                    "train": ("", ""),
                    "validation": ("", ""),
                    "test": ("", ""),
                },
                "plan": "buckets",  # of batches of pairs; 'published': by cost, in pools
                "resize": False,  # images to the size of the model; else another size is an error
                "crop": 0,  # pixels that training images are shifted by at most
                "flip": False,  # half of the training images are mirrored, left and right
            },
            "graph": text_graph(),
            "bittransgnn": bittransgnn(),
            "translation": translation(),
            "teacher": {  # of phases with `losses`
                "name": "",  # a trained checkpoint of the same task; '': the model that is trained, as it begins
                "layers": "same",  # 'every', 'first', 'last': which of its layers a shallower model learns from
                "temperature": 1.0,  # of the logits
                "padding": "ignore",  # 'published': padding counts in squared errors
                "relation_heads": 0,  # of relations; 0: the model's heads
            },
            "phases": {
                "finetune": phase(),
                "intervene": phase(quantized=True, learning_rate=2e-5),
                "qat": phase(quantized=True, learning_rate=2e-5),
            },
            "quant": quantization(),
            "calibration": {
                "batches": 4,
                "batch_size": 32,
                "share_permutation": "",  # role whose channel groups its layer shares, such as 'ffn/down/output'
                "permutation": "full_precision",  # or 'published'
            },
            "adaround": dataclasses.asdict(AdaRound()) | {"examples": 1024},  # used where `quant.adaround` is on
            # Used where `quant.outlier_suppression` is on.
            "outlier_suppression": {
                field: value
                for field, value in dataclasses.asdict(OutlierSuppression()).items()
                if field not in ("method", "bits")
            },
            "evaluate_test": False,  # evaluations while training look at the test split, too; it never decides anything
            "checkpoint_every": 500,  # steps; 0: only after each phase
            "log_every": 20,
            "model_parallel": 1,  # devices per copy of the model
            "save_models": True,
        }
    )


def bittransgnn() -> ConfigDict:
    """Returns the section that describes models of text and graph; the graph itself is in the section `graph`."""
    return ConfigDict(
        {
            "method": "",  # 'dynamic', 'static'; 'distillation': of a trained one into the encoder; '': there is no graph
            "mix": 0.5,  # lambda, the graph's share of the vote
            "hidden_size": 256,
            "num_layers": 2,
            "dropout": 0.5,  # between graph convolutions
            "bias": True,  # of graph convolutions; quantized ones were published without
            "refresh": "before",  # features of all documents are made again before evaluations; 'after' as published
            "graph": "",  # a file of launch/build_graph.py, or where to save one; '': it is built for every run
            "teacher": "",  # of distillation: a trained BitTransGNN, `model/` or `quantized/` of its run
            "alpha": 0.5,  # share of distillation in the loss
            "temperature": 1.0,
            "target": "probabilities",  # or 'published'
        }
    )


def translation() -> ConfigDict:
    """Returns the section that describes how translators are trained and decoded."""
    return ConfigDict(
        {
            "tokenizer": "subwords",  # of a model from nothing: 'words' as published
            "vocabulary": 8000,  # subwords
            "joint": True,  # one vocabulary for both languages
            "label_smoothing": 0.1,
            "divisor": "tokens",  # of the loss; 'rows' as published: of padding, too
            "beam": 5,  # hypotheses of a sentence; 1: greedy. Evaluations while training are greedy
            "length_penalty": 0.6,  # exponent of the length factor
            "limit": 100,  # tokens of a translation
            "published_bleu": False,  # report the published variant as well: greedy, on tokens and markers
        }
    )


def text_graph() -> ConfigDict:
    """Returns the section that describes text graphs; see `qtx.data.text_graph.GraphSettings`."""
    return ConfigDict(
        {
            "adj_type": "full",  # 'no_doc', 'no_ww', 'doc_doc'
            "inference": "transductive",  # 'inductive': of training documents alone
            "window": 20,  # words
            "neighbours": 25,  # of each document
            "doc_doc_nodes": "fixed",  # 'as_published': neighbours of test documents lie on words
            "words": "published",  # 'basic': BERT's words; 'cleaned': as TextGCN's corpora are cleaned
            "tokenizer": "all-MiniLM-L6-v2",  # uncased; basic words that it has no pieces for are [UNK]; '': all are kept
        }
    )


def phase(quantized: bool = False, learning_rate: float = 5e-5) -> ConfigDict:
    """Returns the section of one phase."""
    optimizer = dataclasses.asdict(OptimizerConfig(learning_rate=learning_rate))
    optimizer["range_learning_rate"] = placeholder(float)
    return ConfigDict(
        {
            "epochs": 1.0,
            "steps": 0,  # overrides epochs if positive
            "batch_size": 32,  # examples; in translation, tokens of the longer side, padding included
            "accumulate": 1,  # parts that a batch is worked off in
            "trainable": ("**",),  # patterns over parameter names
            "quantized": quantized,  # with the policy of `quant`
            "ranges": "learned",  # of a quantized phase: 'learned', 'fixed' or 'updated'
            "weight_ranges": placeholder(str),  # of weights alone; None: as `ranges`
            # What is learned from a teacher: a set such as 'ternarybert' or 'teacher_intervention', or losses with their
            # weights, such as 'logits=1, scores=0.5' (`qtx.methods.distillation.LOSSES`); '': there is no teacher.
            "losses": "",
            # Of the teacher's tensors: 'gradual', 'inverted', 'stochastic', or kinds such as 'map' or 'context+output'.
            "intervention": "",
            "including": "",  # an earlier phase whose steps are part of this one's epochs or steps
            "evaluate_every": 0.0,  # epochs between evaluations while training; 0: only after the phase
            "keep_best": False,  # end with the model of the best evaluation (its score on validation), not the last one
            "patience": 0,  # stop after so many evaluations without a better one; 0: never
            "patience_start": placeholder(float),  # what the first must exceed to be one; None: nothing; published: 0
            "metric": "score",  # the one that evaluations are compared by
            "optimizer": optimizer,
        }
    )


def phases_of(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """Returns name and section of every phase of the recipe; raises a `UserError` on a phase that does not exist."""
    for name in config.recipe:
        if name not in config.phases:
            raise UserError(f"the recipe names an unknown phase {name!r}{near_misses(name, config.phases)}")
    return [(name, config.phases[name]) for name in config.recipe]


def quantization() -> ConfigDict:
    """Returns the section that describes a policy: W8A8, everything per tensor."""
    return ConfigDict(
        {
            "weight_bits": placeholder(int),  # None: 8, or what the scheme has; 32: full precision
            "weight_scheme": "symmetric",  # 'asymmetric', 'ternary', 'binary', 'ir_net', 'magnitude', ...: see `Spec`
            "weight_granularity": "tensor",  # 'channel'
            "weight_rounding": "nearest",  # 'stochastic', in training
            "weight_scale": "mean",  # of ternary and binary grids: 'shift' (a power of two) or 'one'; of magnitude: 'norm'
            "weight_gradient": "straight",  # of ternary and binary grids: 'clipped' (within [-1, 1]) or 'decay'
            # 'corrected' or 'published': which sites are quantized is as in teacher intervention (TernaryBERT), activations
            # with 8 bits, weights by the fields here, tables row by row; 'layers': likewise within the layers, and embeddings
            # and head stay in full precision, as for images; '': the fields here say all.
            "student": "",
            "bit": {  # BitTransformer: which sites are quantized, and how, see `qtx.methods.bit_transformer.bit_policy`
                "states": 0,  # of weights: 2 to 5; 0: the other fields here say all
                "activation_bits": 8.0,  # 1.0, 1.58, 2.0, 2.32, 8.0 or 32.0
                "embeddings": True,
                "attention": True,  # query, key and value
                "weight_scale": "row",  # 'tensor': the older code
                "low_bit_act_scale": "token",  # 'tensor': the older code
                "attention_act_32": "off",  # 'eight_bit', as published
            },
            "pattern": "",  # of layers whose weights are quantized, see `qtx.methods.patterns`; '': all weights
            "weight_estimator": "current_minmax",
            "weight_options": ConfigDict(convert_dict=True),  # fields of the estimator
            "activation_bits": 8,
            "activation_sites": "outputs",  # of layers, and between them; 'inputs': of linear layers but the last
            "activation_scheme": "asymmetric",  # 'symmetric', 'offset', or as published 'shifted'
            "activation_granularity": "tensor",  # 'embedding', 'token', 'position', or a number of groups: '6', '6p'
            "activation_estimator": "current_minmax",
            "activation_options": ConfigDict(convert_dict=True),
            "activation_range": "static",  # 'dynamic'
            "scale_domain": "linear",  # 'log', 'softplus'
            "range_gradient": "plain",  # 'lsq': gradients of learned ranges are scaled by 1 / sqrt(n q_max)
            "padding": "ignore",  # 'include': padding counts in the ranges, as published
            "setup": "all",  # 'FP_logits', 'MSE_logits'
            "overrides": "",  # of activations, Et, wP, wC: such as 'x=16, h=16, y=ngp6', 'Et=2, z1=fp32, C=cross_entropy'
            "adaround": False,  # learned rounding of the weights of linear layers, see the section `adaround`
            "evaluation_rounding": "nearest",  # of weights that training rounds at random; 'drawn': once, with the seed
            "published_evaluation": False,  # of two studies: drawn in every call, no biases in quantized layers
            # 'os', 'os+' or 'os+_as_published' of qtx.methods.outlier_suppression: says all but the bits, 8, 6 or 4, those of
            # activations and weights. Post-training quantization; of a phase it is the policy alone, for models that migrated.
            "outlier_suppression": "",
            "weight_overrides": "",  # by short name or pattern: such as 'FFN=4, **/position/table=8, wC=fp32'
        }
    )


def sweeping(**fields: Any) -> ConfigDict:
    """Returns the section `sweep` of a config file, with some fields changed; `qtx.experiments.plan` reads it."""
    section = ConfigDict(
        {
            "name": "sweep",  # of the study, in a storage that several sweeps share
            "entry": "train",  # of rows that name none: 'train', 'quantize', 'evaluate', 'compare' or 'baseline'
            "grid": (),  # axes: (field, values) or (name, {label: {field: value}}); the last one turns fastest
            "rows": (),  # dicts: see `plan.Row`
            "seeds": (1000,),
            "sampler": "grid",  # 'random' or 'tpe': draw `samples` points from `ranges` for every row
            "ranges": (),  # (field, low, high), (field, low, high, 'log') or (field, choices)
            "samples": 20,
            "maximize": True,  # the metric, in a search
            "metric": "score",  # what the table shows
            "columns": "",  # axis that runs along the top of the table
            "mean": "mean",  # name of the column with the mean over those columns
            "orderings": (),  # claims: (row, relation, row); '>', '~' (near), '>=' (above or near)
            "near": 0.01,  # of the metric: what orderings take for equal
            "heartbeat": 60,  # seconds between signs of life; five times as long without one and a trial is given away
            "keep_checkpoints": False,  # of trials that are done
        }
    )
    return changed(section, fields, "sweep")


def changed(config: ConfigDict, changes: Mapping[str, Any], what: str) -> ConfigDict:
    """Returns a copy of a configuration in which some fields have other values.

    Args:
      config: a whole configuration, or a section.
      changes: values by dotted name, such as `{"quant.weight_bits": 4}`; a mapping changes fields of a section.
      what: is changed, for errors: `row 'W4A8'`.

    Raises:
      UserError: on a field that does not exist, or a value of the wrong type.
    """
    found = copy.deepcopy(config)  # keeps the types of fields that have no value yet
    for name, value in changes.items():
        section = found
        *path, last = name.split(".")
        for part in path:
            section = section[part] if isinstance(section, ConfigDict) and part in section else None
        if not isinstance(section, ConfigDict) or last not in section:
            raise UserError(f"{what}: there is no field {name!r}{near_misses(name, _names(config))}")
        try:
            with section.unlocked():
                if isinstance(section[last], ConfigDict):
                    section[last].update(value)
                else:
                    section[last] = value
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{what}: {name} cannot be {value!r} ({reason})") from None
    return found


def _names(config: ConfigDict, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in config.items():
        found += [prefix + name] + (_names(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [])
    return found


def analysis() -> ConfigDict:
    """Returns the section that describes analyses of a trained model; see `qtx.experiments.analyze`."""
    return ConfigDict(
        {
            "sensitivity": {
                # 'name', 'layer', 'site', or groups of one's own: short names and patterns, joined by '+'
                "groups": ("name",),
                "tables": ("leave_out", "only"),
                "calibration": "full_precision",  # 'quantized'; 'variant' is the paper's
            },
            "outliers": {
                "sites": ("h", "y"),  # short names or patterns
                "k": 6.0,  # standard deviations
                "batches": 8,  # of calibration.batch_size training examples
            },
            "weights": {
                "bins": 100,  # of each histogram
            },
            # The versions of the model that the analyses below compare.
            "models": ("full_precision", "quantized"),
            "also": (),  # further checkpoints of the same sizes, quantized likewise: (name, directory), ...
            "curvature": {
                "split": "validation",
                "batches": 4,
                "batch_size": 1,  # one example each, as in the figure
                "norms": 0.0,  # of the sum of norms of all parameters in the loss; 0.01 as published
                "params": ("**",),  # patterns of the parameters that the Hessian is of
                "eigenvalues": 3,  # of greatest magnitude, of every batch for itself; 0: none
                "iterations": 30,  # of each at most, 100 as published
                "tolerance": 1e-3,  # relative: an eigenvalue or trace that changes by less is found
                "samples": 30,  # of the trace at most, 100 as published; 0: no trace
                "steps": 20,  # of Lanczos, each of which keeps a vector as long as the parameters; 0: no density
                "runs": 1,  # of Lanczos, whose mean is the density
            },
            "landscape": {
                "split": "train",
                "batches": 1,
                "batch_size": 32,
                "norms": 0.0,
                "directions": 2,  # 1: a curve, 2: contours
                "reach": 0.5,  # multiples of the directions go from -reach to reach
                "points": 11,  # on each axis; 21 are usual
                "shared_norms": "inputs",  # 'outputs': one norm for all weights of an output
                "still": (),  # patterns of parameters that do not move, such as the table of positions
                "together": 4,  # points that run side by side
            },
            "layer_errors": {  # against `teacher`, with its rules for layers and padding
                "split": "validation",
                "batches": 8,
                "batch_size": 32,
                "quantities": ("self_output", "attention_output", "hidden_states"),
            },
            "memory": {
                "batch_size": 1,  # of the activations
                "tokens": 128,
                "compiled": True,  # compile the model, four programs, and ask XLA
            },
            "features": {
                "methods": ("pca", "tsne"),  # or 'umap', which needs the extra of that name
                "split": "test",
                "limit": 2000,  # examples; 0: all
                "perplexity": 30.0,  # of t-SNE; at most a third of the examples
            },
            "efficiency": {
                "batch_size": 1,
                "tokens": 128,
                "rule": "corrected",  # or 'as_published': bytes and energy by the formulas of BitTransGNN, errors included
                "process": "7nm",  # of the energy table; or '45nm'
                "repeats": 20,  # measured forward passes
                "sequences": 1,  # texts that energy is given for
                "graph": {  # of a two-layer graph convolution beside the encoder; 0 nodes: there is none
                    "nodes": 0,
                    "entries": 0,  # of the adjacency: symmetric, with self loops (as_published: as stored, without)
                    "hidden": 256,
                    "bits": 32.0,  # of its weights
                    "input_bits": 32.0,
                    "passes": 1.0,  # over the whole graph, for all texts
                },
            },
        }
    )


def parse_overrides(text: str, field: str = "quant.overrides") -> dict[str, Value]:
    """Parses `'y=16, h=ngp6, C=fp32'`; raises a `UserError` that shows the broken part of a field."""
    found: dict[str, Value] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key or not value:
            raise UserError(f"{field}: {part!r} is not of the form name=value, such as y=16 or h=ngp6")
        found[key] = int(value) if value.isdigit() else value
    return found


def _granularity(name: str):
    groups = re.fullmatch(r"(\d+)(p?)", str(name))
    if groups:
        return per_group(int(groups[1]), permute=bool(groups[2]))
    if name not in GRANULARITIES:
        raise UserError(
            f"unknown granularity {name!r}{near_misses(name, GRANULARITIES)} (or a number of groups, '6' or '6p')"
        )
    return GRANULARITIES[name]()


def policy_from(section: ConfigDict, num_layers: int) -> Policy | None:
    """Builds the policy that a `quant` section describes; None if everything stays in full precision.

    Args:
      section: as made by `quantization`.
      num_layers: of the model.

    Raises:
      UserError: on unknown schemes, estimators, granularities, keys or values.
    """
    if section.bit.states:
        return _bit_policy(section)
    suppression = _suppression(section)
    if suppression is not None:
        return suppression_policy(suppression, num_layers)
    weights, activations = _weight_spec(section), _activation_spec(section)
    granularity = _granularity(section.activation_granularity)
    everywhere = None if granularity == per_tensor() else granularity
    if section.evaluation_rounding not in ("nearest", "drawn"):
        raise UserError(f"quant.evaluation_rounding is {section.evaluation_rounding!r}; choose from 'nearest', 'drawn'")
    overrides = parse_overrides(section.overrides)
    own = parse_overrides(section.weight_overrides, "quant.weight_overrides")
    if weights is None and activations is None:
        return None
    if own and weights is None:
        raise UserError("quant.weight_overrides is given, but quant.weight_bits is 32: give the other weights bits too")
    if section.student:
        return _student_policy(section, weights, overrides | own)
    if section.pattern or section.activation_sites == "inputs":
        return _pattern_policy(section, weights, activations, overrides | own)
    if section.activation_sites != "outputs":
        raise UserError(f"quant.activation_sites is {section.activation_sites!r}; choose from 'outputs', 'inputs'")
    if weights is None or not weights.is_codebook:
        found = policy_of(weights, activations, overrides, num_layers, section.setup, everywhere)
        rules: dict[str, Spec | None] = {}
        base = weights
    else:
        own = {key: overrides.pop(key) for key in ("Et", "wP", "wC") if key in overrides} | own
        found = policy_of(None, activations, overrides, num_layers, section.setup, everywhere)
        # Norm scales are not on a codebook: three values cannot hold them. What leaves the codebook has a uniform grid.
        rules = {"**": weights, "**/norm/scale": None}
        base = Spec(8, "symmetric", per_channel(), range="static")
    if base is not None:
        rules |= {key: with_value(base, value) for key, value in own.items()}
    return dataclasses.replace(found, weights=found.weights + make_policy(weights=rules).weights)


def _weight_spec(section: ConfigDict) -> Spec | None:
    scheme, bits = section.weight_scheme, section.weight_bits
    granularity = _granularity(section.weight_granularity)
    if scheme == "absmean":
        raise UserError("quant.weight_scheme 'absmean' has states, not bits: set quant.bit.states (2 to 5) instead")
    if scheme == "ir_net" or scheme in CODEBOOKS:
        least, most = CODEBOOKS.get(scheme, (1, 1))
        if bits is None:
            bits = min(most, 8)
        if not least <= bits <= most:
            has = f"{least} bit{'s' * (least > 1)}" if least == most else f"{least} to {most} bits"
            raise UserError(f"quant.weight_scheme {scheme!r} has {has}, not {bits}: leave quant.weight_bits out")
        if scheme == "ir_net":
            return ir_net(granularity)
        options = {}
        if scheme in ("ternary", "binary", "magnitude"):
            options = dict(scale=section.weight_scale, gradient=section.weight_gradient)
        return Spec(bits, scheme, granularity, range="dynamic", rounding=section.weight_rounding, **options)
    if bits == 32:
        return None
    return Spec(
        8 if bits is None else bits,
        scheme,
        granularity,
        estimator(section.weight_estimator, **section.weight_options),
        scale_domain=section.scale_domain,
        range_gradient=section.range_gradient,
        rounding="truncate" if scheme == "shifted" else section.weight_rounding,
    )


def _activation_spec(section: ConfigDict) -> Spec | None:
    if section.activation_bits == 32:
        return None
    return Spec(
        section.activation_bits,
        section.activation_scheme,
        estimator=estimator(section.activation_estimator, padding=section.padding, **section.activation_options),
        range=section.activation_range,
        scale_domain=section.scale_domain,
        range_gradient=section.range_gradient,
        rounding="truncate" if section.activation_scheme == "shifted" else "nearest",
    )


def _bit_policy(section: ConfigDict) -> Policy:
    """Returns the policy of a BitTransformer."""
    others = {name: section[name] for name in ("student", "pattern", "overrides", "weight_overrides") if section[name]}
    if others:
        raise UserError(f"quant.bit says which sites are quantized: leave quant.{next(iter(others))} empty")
    return bit_policy(**section.bit)


def _student_policy(section: ConfigDict, weights: Spec | None, overrides: dict[str, Value]) -> Policy:
    """Returns the policy of teacher intervention, with a grid for weights."""
    if section.student not in ("corrected", "published", "layers"):
        raise UserError(f"quant.student is {section.student!r}; choose from 'corrected', 'published', 'layers', ''")
    if overrides or section.pattern:
        raise UserError("quant.student says which sites are quantized: leave pattern and overrides empty")
    if weights is None:
        raise UserError(f"quant.student is {section.student!r}, but quant.weight_bits is 32: give the weights bits")
    weights = dataclasses.replace(weights, clip=CLIP)
    table = dataclasses.replace(weights, granularity=per_channel())
    around = section.student != "layers"
    return student_policy(weights, table, emb=around, cls=around, published=section.student == "published")


def _pattern_policy(
    section: ConfigDict, weights: Spec | None, activations: Spec | None, overrides: dict[str, Value]
) -> Policy:
    """Returns the policy of a pattern study: weights by pattern, activations at the inputs of linear layers."""
    if overrides:
        raise UserError(
            f"quant.pattern and activation_sites='inputs' do not go with overrides, such as {next(iter(overrides))!r}"
        )
    if section.pattern and weights is None:
        raise UserError(f"quant.pattern is {section.pattern!r}, but quant.weight_bits is 32: give the weights bits")
    found = make_policy() if weights is None else pattern_policy(section.pattern or "ALL", weights)
    if activations is not None and section.activation_sites != "inputs":
        raise UserError(
            "quant.pattern names weights: set quant.activation_bits=32, or quant.activation_sites='inputs' to quantize what "
            "linear layers see"
        )
    everywhere = _granularity(section.activation_granularity)
    inputs = activations and dataclasses.replace(activations, granularity=everywhere)
    return dataclasses.replace(found, inputs=input_policy(inputs).inputs if inputs is not None else ())


def rounding_from(quant: ConfigDict, adaround: ConfigDict) -> AdaRound | None:
    """Reads the section `adaround` if `quant` asks for it, else None; raises a `UserError` on a value that does not exist."""
    if not quant.adaround:
        return None
    fields = adaround.to_dict()
    fields.pop("examples")
    return AdaRound(**fields | {name: tuple(fields[name]) for name in ("layers", "annealing")})


def suppression_from(quant: ConfigDict, section: ConfigDict) -> OutlierSuppression | None:
    """Reads the section `outlier_suppression` if `quant` asks for it, else None; raises a `UserError` on what does not fit."""
    found = _suppression(quant)
    return None if found is None else dataclasses.replace(found, **section.to_dict())


def _suppression(quant: ConfigDict) -> OutlierSuppression | None:
    if not quant.outlier_suppression:
        return None
    given = quant.to_dict()
    for name, value in quantization().to_dict().items():
        if name not in ("outlier_suppression", "weight_bits", "activation_bits") and given[name] != value:
            raise UserError(
                f"quant.outlier_suppression says how everything is quantized: leave quant.{name} at {value!r}"
            )
    if quant.weight_bits not in (None, quant.activation_bits):
        raise UserError(
            f"outlier suppression has one number of bits: set quant.weight_bits to {quant.activation_bits}, as "
            f"quant.activation_bits, not {quant.weight_bits}"
        )
    return OutlierSuppression(quant.outlier_suppression, quant.activation_bits)


def evaluation_from(
    name: str, section: ConfigDict, run: Callable[[Any, Mapping[str, Any]], Mapping[str, float]]
) -> Evaluation | None:
    """Reads how a phase is evaluated while it trains; None: it is not.

    Args:
      name: of the phase, for errors.
      section: of the phase.
      run: does it: `(phase, variables) -> {metric: value}`.

    Raises:
      UserError: on a negative value, or on choosing among evaluations that there are none of.
    """
    if section.evaluate_every == 0:
        if section.keep_best or section.patience:
            raise UserError(
                f"phase {name!r}: keep_best and patience choose among evaluations while training; set evaluate_every "
                "(epochs) above 0"
            )
        return None
    start = -math.inf if section.patience_start is None else section.patience_start
    return Evaluation(run, section.evaluate_every, section.metric, section.keep_best, section.patience, start)


def optimizer_from(section: ConfigDict) -> OptimizerConfig:
    """Reads a phase's `optimizer` section."""
    return OptimizerConfig(**section.to_dict())
