"""Experiments on texts with labels and a graph of them: BitTransGNN.

A run's `model/` is the encoder with its classifier, a checkpoint like any other: to evaluate it on its own is what BitTransGNN
calls direct separation. What the graph adds lies beside it, in `graph.safetensors`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from ml_collections import ConfigDict

from qtx import models
from qtx.data.corpus import Corpus, words_kind
from qtx.data.text_graph import TextGraph, build_graph, save_graph
from qtx.errors import UserError, near_misses
from qtx.experiments.classification import Classification, prepare
from qtx.experiments.experiment import LABELLED, load_model
from qtx.experiments.graph import GRAPH_FILE, corpus_from, graph_from, settings_from, track
from qtx.export.packed import policy_from_json, policy_to_json
from qtx.files import whole_file
from qtx.methods.bittransgnn import GraphDistillation, graph_loss, vote
from qtx.nn.graph import Graph, adjacency
from qtx.nn.sites import SiteInfo, list_sites
from qtx.nn.text_graph import GraphConfig, GraphOutputs, StudentAndTeacher, TextGraphClassifier
from qtx.quant.policy import KINDS, Policy, Rule, matches
from qtx.train.loop import predict

SPLITS: tuple[str, ...] = ("train", "validation", "test")
"""Of documents, in the order of their nodes."""
METHODS = ("dynamic", "static", "distillation", "online")
GRAPH_PART = "graph.safetensors"


@dataclasses.dataclass(frozen=True)
class GraphPart:
    """What a trained BitTransGNN has beside its encoder.

    Attributes:
      config: of the graph convolution.
      params: its parameters, nested, below `gcn`.
      features: of all nodes `[N, D]`, as they were when the model was evaluated.
      fingerprint: of the documents of its graph.
      policy: of its sites alone.
      task: whose texts the graph is of.
      words: kind of words of the graph, see `qtx.data.corpus.make_corpus`.
      tokenizer: likewise.
    """

    config: GraphConfig
    params: dict[str, Any]
    features: np.ndarray
    fingerprint: str
    policy: Policy = Policy()
    task: str = ""
    words: str = "basic"
    tokenizer: str = ""

    def save(self, directory: Path) -> None:
        """Writes it beside a model."""
        flat = traverse_util.flatten_dict(self.params, sep="/")
        tensors = {f"gcn/{name}": np.asarray(value) for name, value in flat.items()} | {"features": self.features}
        record = {
            "config": dataclasses.asdict(self.config),
            "fingerprint": self.fingerprint,
            "policy": policy_to_json(self.policy),
            "texts": [self.task, self.words, self.tokenizer],
        }
        with whole_file(directory / GRAPH_PART) as partial:
            safetensors.numpy.save_file(tensors, partial, metadata={"qtx": json.dumps(record)})

    @classmethod
    def load(cls, directory: Path) -> GraphPart:
        """Reads it; raises a `UserError` if it is missing or damaged."""
        path = directory / GRAPH_PART
        if not path.is_file():
            raise UserError(
                f"{directory} holds no {GRAPH_PART}: it is no trained BitTransGNN; train one and give its model/"
            )
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                record = json.loads((file.metadata() or {})["qtx"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            features = tensors.pop("features")
            gcn = {name.removeprefix("gcn/"): jnp.asarray(value) for name, value in tensors.items()}
            params = traverse_util.unflatten_dict(gcn, sep="/")
            policy = policy_from_json(record["policy"])
            config = GraphConfig(**record["config"])
            return cls(config, params, features, record["fingerprint"], policy, *record["texts"])
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); is the file truncated?") from None


@dataclasses.dataclass(frozen=True, eq=False)
class GraphClassification(Classification):
    """An experiment of `bittransgnn.method`; see `Classification` for the other attributes.

    Attributes:
      corpus: the documents; the data set's splits are theirs.
      graph: of them.
      votes: of the teacher for the training documents: logits `graph` and `text`, each `[N, C]`; empty without one.
      teacher_mix: the teacher's lambda.
    """

    corpus: Corpus
    graph: TextGraph
    votes: dict[str, jax.Array]
    teacher_mix: float

    @classmethod
    def make(cls, config: ConfigDict) -> GraphClassification:  # type: ignore[override]
        """Loads and checks everything that a run needs, cheapest first; builds the graph.

        Raises:
          UserError: on anything in the configuration, the data or the checkpoint that does not fit.
        """
        c = config.bittransgnn
        if c.method not in METHODS:
            raise UserError(f"unknown bittransgnn.method {c.method!r}{near_misses(c.method, METHODS)}")
        settings, graph_config = settings_from(config.graph), graph_config_from(c)
        GraphDistillation(0.5, c.alpha, c.temperature, c.target)  # checks its fields
        teacher = None
        if c.method == "distillation":
            if not c.teacher:
                raise UserError("bittransgnn.method 'distillation' needs a teacher: set bittransgnn.teacher")
            teacher = models.locate(c.teacher)
            part = GraphPart.load(teacher)
        corpus = corpus_from(config)
        base = prepare(config, corpus.dataset)
        if getattr(base.pretrained.config, "pooler", True):
            raise UserError(
                "BitTransGNN's classifier sees the encoder's features as they are: train or load it with model.pooler=False"
            )
        if c.graph:
            graph = graph_from(corpus, settings, Path(c.graph))
        else:
            graph = build_graph(corpus.texts, corpus.n_train, settings, track)
        fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        made = cls(**fields, corpus=corpus, graph=graph, votes={}, teacher_mix=0.0)
        if teacher is not None:
            return dataclasses.replace(made, votes=made._teacher_votes(teacher, part), teacher_mix=part.config.mix)
        return made._joined(graph_config)

    def _joined(self, config: GraphConfig) -> GraphClassification:
        """Returns the experiment with the joint model, whose graph convolution is new unless the checkpoint has one."""
        text, pretrained = self.model, self.pretrained
        found = part_of(pretrained.directory)
        policy = text.policy  # type: ignore[attr-defined]
        if found is not None and policy is not None:  # a packed model
            policy = with_rules(policy, found.policy)
        model = joint_model(self.config, pretrained.family, text.config, text.dtype, policy)  # type: ignore
        fresh = pretrained.fresh
        if found is None:
            gcn, fresh = _initial(self.config, pretrained), (*fresh, "gcn")
        else:
            if dataclasses.replace(found.config, mix=config.mix, dropout=config.dropout) != config:
                raise UserError(f"{pretrained.directory} has {found.config}, the configuration asks for {config}")
            gcn = found.params
        params = pretrained.params | {"gcn": gcn}
        if isinstance(model, StudentAndTeacher):  # which begin as the same encoder
            params = {"student": pretrained.params, "teacher": params}
        return dataclasses.replace(
            self, model=model, pretrained=dataclasses.replace(pretrained, params=params, fresh=fresh)
        )

    def _teacher_votes(self, directory: Path, part: GraphPart) -> dict[str, jax.Array]:
        """Returns what a trained model says of the training documents."""
        section = copy.deepcopy(self.config)
        section.model.update(name=str(directory), fresh_head=False)
        module, ranges, teacher = load_model(section, self.task.num_labels)
        if part.fingerprint != self.graph.fingerprint:
            raise UserError(f"bittransgnn.teacher: {directory} was trained on a graph of other documents than these")
        sizes: Any = teacher.config
        kind: Any = teacher.family.module
        policy = with_rules(module.policy, part.policy)  # type: ignore[attr-defined]
        joint = TextGraphClassifier(sizes, module.dtype, policy, kind, part.config)  # type: ignore[attr-defined]
        variables = {
            "params": teacher.params | {"gcn": part.params},
            "ranges": ranges,
            "bank": {"features": jnp.asarray(part.features)},
        }
        nodes = jnp.asarray(self.nodes("train"))
        found = vote(joint, variables, self.adjacency, nodes)
        return {"graph": found.graph, "text": found.text}

    @functools.cached_property
    def adjacency(self) -> Graph:
        """The normalised graph, for the device."""
        return adjacency(self.graph.normalised)

    def nodes(self, split: str) -> np.ndarray:
        """Returns the nodes of a split's documents, in their order; of training documents they are the `index`."""
        sizes = {name: len(self.encoded[name]) for name in SPLITS if name in self.encoded}
        start = sum(size for name, size in sizes.items() if SPLITS.index(name) < SPLITS.index(split))
        return self.graph.document_nodes[start : start + sizes[split]]

    def sites(self, *args: Any) -> dict[str, SiteInfo]:
        args = args or self.pretrained.family.example_inputs()
        if len(args) < len(self.model.inputs):  # type: ignore[attr-defined]
            args = (*args, jnp.zeros(args[0].shape[0], jnp.int32))
        return list_sites(self.model, {"params": self.pretrained.params}, *args)

    def check_packable(self) -> None:
        if self.config.bittransgnn.method != "distillation":
            raise UserError(
                "a model with a graph is quantized as it trains; for its encoder alone leave bittransgnn.method empty"
            )

    def adapted(self, policy: Policy) -> Policy:
        """Returns the policy, for both of a student and its teacher where there are two models."""
        if not isinstance(self.model, StudentAndTeacher):
            return policy

        def both(rules: Sequence[Rule]) -> tuple[Rule, ...]:
            parts = ("student", "teacher")
            return tuple(dataclasses.replace(r, pattern=f"{part}/{r.pattern}") for part in parts for r in rules)

        return mapped(policy, lambda kind, rules: both(rules))

    def training(self) -> dict[str, Any]:
        c = self.config.bittransgnn
        fields = c.alpha, c.temperature, c.target
        if c.method == "distillation":
            return {"objective": GraphDistillation(self.teacher_mix, *fields), "constants": self.votes}
        graph = {"adjacency": self.adjacency}
        found: dict[str, Any] = {
            "objective": graph_loss,
            "constants": graph,
            "memory": self.memory,
            "refresh": c.refresh,
        }
        if c.method == "static":
            return found | {"refresh": "never", "trainable": ("gcn/**",)}
        if c.method == "online":
            found |= {"objective": GraphDistillation(c.mix, *fields, online=True), "constants": {"teacher": graph}}
        return found

    def memory(self, model: nn.Module, variables: Mapping[str, Any], constants: Any) -> dict[str, Any]:
        """Returns the bank of a phase: features of all documents by the encoder as it is."""
        if isinstance(model, StudentAndTeacher):
            return {"bank": {"teacher": {"features": self.features(model, below(variables, "teacher"))}}}
        features = self.features(model, variables)
        if model.recompute:  # type: ignore[attr-defined]
            return {"bank": {"features": features}}
        everything = dict(variables) | {"graph": constants, "bank": {"features": features}}
        propagated = jax.jit(functools.partial(model.apply, method="propagated"))(everything)
        return {"bank": {"features": features, "propagated": propagated}}

    def text_model(self, model: nn.Module) -> nn.Module:
        """Returns the encoder with its classifier that is part of a model."""
        fields = {name: getattr(model, name) for name in ("config", "dtype", "policy")}
        return self.pretrained.family.module(**fields)

    def features(self, model: nn.Module, variables: Mapping[str, Any]) -> jax.Array:
        """Returns the bank `[N, D]`: what the encoder says of all documents of the graph without dropout; zero for words."""
        text = self.text_model(model)
        bank = np.zeros((self.graph.n_nodes, self.pretrained.config.hidden_size), np.float32)  # type: ignore
        for split in self.encoded:
            if self._in_graph(split):
                batches = self.batches(split, self.config.data.eval_batch_size, shuffle=False, epochs=1)
                plain = {name: variables[name] for name in ("params", "ranges") if name in variables}
                bank[self.nodes(split)] = predict(text, plain, batches, self.mesh, output="pooled")
        return jnp.asarray(bank)

    def _in_graph(self, split: str) -> bool:
        return split in SPLITS and not (self.graph.settings.inductive and split == "test")

    def logits(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str] = LABELLED
    ) -> dict[str, np.ndarray]:
        """Returns the log probabilities `[N, C]` of splits, or predictions of a regression `[N, 1]`; see `evaluate`."""
        if isinstance(model, StudentAndTeacher):
            model, variables = self.text_model(model), below(variables, "student")
        if not isinstance(model, TextGraphClassifier):
            return super().logits(model, variables, splits)
        if "bank" not in variables:
            variables = {**variables, "bank": {"features": self.features(model, variables)}}
        there = [split for split in splits if split in self.encoded and self._in_graph(split)]
        return {split: np.asarray(self.votes_of(model, variables, split).logits) for split in there}

    def votes_of(self, model: TextGraphClassifier, variables: Mapping[str, Any], split: str) -> GraphOutputs:
        """Returns what a graph model says of the documents of a split, from the bank or, without one, the encoder as it is."""
        bank = variables["bank"]["features"] if "bank" in variables else self.features(model, variables)
        plain = {name: value for name, value in variables.items() if name != "bank"} | {"bank": {"features": bank}}
        return vote(model, plain, self.adjacency, jnp.asarray(self.nodes(split)))

    def save(self, workdir: Path, trained: nn.Module, policy: Policy | None, variables: Mapping[str, Any]) -> None:
        """Writes the encoder with its classifier, and beside it what else a graph model has; see `Experiment.save`.

        Of a student and its teacher it is the student.
        """
        if isinstance(trained, StudentAndTeacher):
            variables = below(variables, "student")
        params = dict(variables["params"])
        gcn = params.pop("gcn", None)
        text = self.text_model(trained)
        sites = self.pretrained.family.sites(self.pretrained.config)
        own, chosen = (None if p is None else without_unmatched(p, sites) for p in (policy, text.policy))  # type: ignore
        alone = dataclasses.replace(self, model=text, pretrained=dataclasses.replace(self.pretrained, params=params))
        Classification.save(alone, workdir, text.clone(policy=chosen), own, {**variables, "params": params})
        if gcn is None:
            return
        bank = variables["bank"]["features"] if "bank" in variables else self.features(trained, variables)
        rest = {name: info for name, info in self.sites().items() if name.startswith("gcn/")}
        gcn_policy = without_unmatched(trained.policy or Policy(), rest)  # type: ignore[attr-defined]
        gcn_config = trained.graph  # type: ignore[attr-defined]
        section = self.config.graph
        words = words_kind(self.task, section.words)
        texts = (self.task.name, section.words, section.tokenizer if words == "basic" else "")
        part = GraphPart(gcn_config, gcn, np.asarray(bank), self.graph.fingerprint, gcn_policy, *texts)
        if not self.config.bittransgnn.graph:
            save_graph(self.graph, workdir / GRAPH_FILE)
        for name in ("model", "quantized"):
            if (workdir / name).is_dir():
                part.save(workdir / name)


def below(variables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns parameters and ranges of a part of a model."""
    return {kind: variables[kind].get(name, {}) for kind in ("params", "ranges") if kind in variables}


def without_unmatched(policy: Policy, sites: Mapping[str, SiteInfo]) -> Policy:
    """Returns a policy without the rules that match none of these sites."""

    def kept(kind: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
        names = [name for name, info in sites.items() if info.kind == kind]
        return tuple(rule for rule in rules if any(matches(rule.pattern, name) for name in names))

    return mapped(policy, kept)


def with_rules(policy: Policy | None, further: Policy) -> Policy | None:
    """Returns a policy with the rules of another one behind its own; without any, None."""
    found = mapped(policy or Policy(), lambda kind, rules: (*rules, *further.rules(kind)))
    return found if any(found.rules(kind) for kind in KINDS) else None


def mapped(policy: Policy, change: Callable[[Any, Sequence[Rule]], tuple[Rule, ...]]) -> Policy:
    """Returns a policy with `change(kind, rules)` in place of the rules of every kind."""
    weights, activations, inputs = (change(kind, policy.rules(kind)) for kind in ("weight", "activation", "input"))
    return dataclasses.replace(policy, weights=weights, activations=activations, inputs=inputs)


def graph_config_from(section: ConfigDict) -> GraphConfig:
    """Reads what the graph convolution is from the section `bittransgnn`; raises a `UserError` on a value out of range."""
    return GraphConfig(section.mix, section.hidden_size, section.num_layers, section.dropout, section.bias)


def part_of(directory: Path | None) -> GraphPart | None:
    """Returns what a checkpoint has beside its encoder, or None."""
    if directory is None or not (directory / GRAPH_PART).is_file():
        return None
    return GraphPart.load(directory)


def joint_model(
    config: ConfigDict, family: models.Family, sizes: Any, dtype: Any = jnp.float32, policy: Policy | None = None
) -> nn.Module:
    """Returns the module that `bittransgnn.method` trains."""
    method, kind = config.bittransgnn.method, family.module
    if method == "distillation":
        return kind(sizes, dtype, policy)  # type: ignore[call-arg]
    fields: Any = dict(config=sizes, dtype=dtype, policy=policy, classifier_type=kind)
    graph = graph_config_from(config.bittransgnn)
    if method == "online":
        return StudentAndTeacher(graph=graph, **fields)
    return TextGraphClassifier(graph=graph, recompute=method == "dynamic", **fields)


def graph_sites(config: ConfigDict, family: models.Family, sizes: Any) -> dict[str, SiteInfo]:
    """Returns the sites of the module that `bittransgnn.method` trains; nothing is computed."""
    model = joint_model(config, family, sizes)
    args = (*family.example_inputs(), jnp.zeros(1, jnp.int32))[: len(model.inputs)]  # type: ignore[attr-defined]
    return list_sites(model, jax.eval_shape(model.init, jax.random.key(0), *args), *args)


def _initial(config: ConfigDict, pretrained: models.Pretrained) -> dict[str, Any]:
    """Returns new parameters of the graph convolution."""
    sizes: Any = pretrained.config
    gcn = graph_config_from(config.bittransgnn).convolution(sizes.num_labels)
    nothing = jnp.zeros((1, sizes.hidden_size))
    return jax.jit(gcn.init)(jax.random.key(config.seed), None, nothing)["params"]
