"""The configuration of an experiment: one ConfigDict.

`base()` has every field with its default. A config file changes some and returns it; `--config.field=value` changes more.
`qtx.experiments.from_config` makes of it what lower floors take: below, there are dataclasses only.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from qtx.errors import UserError, near_misses
from qtx.methods.layer_rounding import AdaRound
from qtx.methods.outlier_suppression import OutlierSuppression
from qtx.train.optimizer import OptimizerConfig


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
                "limit_train": 0,  # examples; 0: all. launch/augment.py: those that are augmented, without their copies
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
                # Which of its layers a shallower model learns from: 'every', 'first', 'last', or pairs of the model's and the
                # teacher's layers, from 0: '0-1, 1-3'.
                "layers": "same",
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
                "ranges": "",  # directory of a packed model, whose ranges of activations training begins with
            },
            "adaround": dataclasses.asdict(AdaRound()) | {"examples": 1024},  # used where `quant.adaround` is on
            # Used where `quant.outlier_suppression` is on.
            "outlier_suppression": {
                field: value
                for field, value in dataclasses.asdict(OutlierSuppression()).items()
                if field not in ("method", "bits")
            },
            "evaluate_test": False,  # evaluations while training look at the test split, too; it never decides anything
            "checkpoint_every": 500,  # steps; 0: at evaluations and after each phase alone
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
            # A file of launch/build_graph.py, or where to save one; without .npz a directory of such files, named by contents.
            # '': that of the model or teacher that the run begins with, if it is the same graph, else a new one.
            "graph": "",
            "teacher": "",  # of 'distillation' alone: a trained BitTransGNN, `model/` or `quantized/` of its run
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
            "share": 1.0,  # of these epochs or steps, which the phase trains for: 0.25 is a quarter of them
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
            # 'corrected' or 'published': which sites are quantized is as in teacher intervention (TernaryBERT), weights by the
            # fields here, tables row by row; 'layers': likewise within the layers, and embeddings and head stay in full
            # precision, as for images; '': the fields here say all.
            "student": "",
            # Of `student`: 'published': symmetric, a range from each tensor itself, and `activation_bits`; 'fields': as all the
            # activation fields here say.
            "student_activations": "published",
            "student_clip": 2.5,  # of `student`: weights and activations are clipped to it and its negative first
            # Of `student`: parts that stay in full precision, such as 'emb, cls'; of emb (word table), qkv (linear layers of
            # attention), ffn_1, ffn_2 (of the perceptron) and cls (pooler).
            "student_without": "",
            "bit": {  # BitTransformer: which sites are quantized, and how, see `qtx.methods.bit_transformer.bit_policy`
                "states": 0,  # of the encoder's weights: 2 to 5; 0: in full precision, or as the other fields here say
                "activation_bits": 8.0,  # 1.0, 1.58, 2.0, 2.32, 8.0 or 32.0
                "embeddings": True,
                "attention": True,  # query, key and value
                "weight_scale": "row",  # 'tensor': the older code
                "low_bit_act_scale": "token",  # 'tensor': the older code
                "attention_act_32": "off",  # 'eight_bit', as published
                "linear_bias": True,  # False: the older code, in which biases of quantized layers are never added
                "gcn_states": 0,  # of the weights of graph convolutions beside the encoder; 0: in full precision
                "gcn_activation_bits": 8.0,  # of what enters them
            },
            "pattern": "",  # of layers whose weights are quantized, see `qtx.methods.patterns`; '': all weights
            # Of a model from nothing: layers whose kernels are quantized begin anew, as two studies had it: 'uniform' (their
            # quantized layers), 'normal' (their binary ones); '': as the model in full precision begins.
            "replaced_layers": "",
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
            "comparable": True,  # published scores with ours: False leaves out their difference, and the tables say so
            "orderings": (),  # claims: (row, relation, row); '>', '~' (near), '>=' (above or near)
            "near": 0.01,  # of the metric: what orderings take for equal
            "heartbeat": 60,  # seconds between signs of life; five times as long without one and a trial is given away
            "keep_checkpoints": False,  # of trials that are done
        }
    )
    return changed(section, fields, "sweep")


def without_teacher() -> dict[str, Any]:
    """Returns the changes of a row that has no teacher, whatever teacher the sweep is given for the others."""
    return {f"teacher.{name}": value for name, value in base().teacher.items()}


def defaults_of(config: ConfigDict) -> ConfigDict:
    """Returns the default of every field of a configuration, also of phases that its file has added: what older runs had."""
    found = base()
    found.phases.update({name: phase() for name in config.phases if name not in found.phases})
    return found


def field_of(config: ConfigDict | Mapping[str, Any], name: str) -> Any:
    """Returns the value of a field, or a section, by its dotted name."""
    return functools.reduce(operator.getitem, name.split("."), config)


def changed(config: ConfigDict, changes: Mapping[str, Any], what: str) -> ConfigDict:
    """Returns a copy of a configuration in which some fields have other values.

    Args:
      config: a whole configuration, or a section.
      changes: values by dotted name, such as `{"quant.weight_bits": 4}`; a mapping changes fields of a section, and an empty
        one takes all options out of a section of options, such as `quant.weight_options`.
      what: is changed, for errors: `row 'W4A8'`.

    Raises:
      UserError: on a field that does not exist, or a value of the wrong type.
    """
    found = copy.deepcopy(config)  # keeps the types of fields that have no value yet
    for name, value in changes.items():
        if problem := unknown_field(config, name):
            raise UserError(f"{what}: {problem}")
        *path, last = name.split(".")
        section = functools.reduce(operator.getitem, path, found)
        try:
            with section.unlocked():
                if isinstance(section[last], ConfigDict) and value:
                    section[last].update(value)
                elif isinstance(section[last], ConfigDict):
                    if not _holds_options(name):
                        raise ValueError("only a section of options can be empty")
                    section[last] = ConfigDict(convert_dict=True)
                else:
                    section[last] = value
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{what}: {name} cannot be {value!r} ({reason})") from None
    return found


def _holds_options(name: str) -> bool:
    """Returns whether a section has no fields of its own, but those of what it describes."""
    whole = base()
    return not unknown_field(whole, name) and not len(field_of(whole, name))


def unknown_field(config: ConfigDict, name: str) -> str:
    """Returns what is to be said of a dotted name that is no field of a configuration; '' if it is one."""
    section: Any = config
    for number, part in enumerate(name.split(".")):
        if isinstance(section, ConfigDict) and part in section:
            section = section[part]
            continue
        if isinstance(section, ConfigDict) and not len(section):  # options, whose names are those of what they are for
            whole, rest = ".".join(name.split(".")[:number]), ".".join(name.split(".")[number:])
            return f"{whole} takes all its options at once: {whole}=\"{{'{rest}': ...}}\""
        whole = ".".join(name.split(".")[:number])
        if number and _holds_options(whole):  # the flags know no others, and a mapping would not reach them
            return f"{whole} has {', '.join(section)} here, and gets no other option but in the config file or by a row"
        if not number and part in _ADDED:
            return f"this configuration has no {part!r}; {_ADDED[part]} has, with everything that {part!r} goes with"
        return f"there is no field {name!r}{near_misses(name, _names(config))}"
    return ""


# Sections that some configurations have, and one that does.
_ADDED = {
    "analyses": "configs/analyze.py",
    "analysis": "configs/analyze.py",
    "sweep": "configs/results.py:rte",
    "rows": "configs/quickstart.py",
}


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
                # (): self_output, attention_output (where norms stand behind sub-layers) and hidden_states; there are scores,
                # maps and context, too.
                "quantities": (),
            },
            "memory": {
                "batch_size": 1,  # of the activations
                "tokens": 128,
                "bits": (32, 8, 4, 2, 1),  # widths of the table
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
                "sequences": 0,  # texts that energy is given for; 0: the documents of the graph, without one 1
                "graph": {  # of a two-layer graph convolution beside the encoder; 0 nodes: the model's, if it has one
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
