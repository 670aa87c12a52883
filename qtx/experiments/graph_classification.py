"""Experiments on texts with labels and a graph of them: BitTransGNN.

A run's `model/` is the encoder with its classifier, a checkpoint like any other: to evaluate it on its own is what BitTransGNN
calls direct separation. What the graph adds lies beside it, in `graph.safetensors`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCSR
from ml_collections import ConfigDict

from qtx import models
from qtx.data.corpus import Corpus, words_kind
from qtx.data.text_graph import TextGraph, save_graph
from qtx.errors import UserError, near_misses
from qtx.experiments.classification import Classification, prepare
from qtx.experiments.config import phases_of
from qtx.experiments.experiment import LABELLED, load_model
from qtx.experiments.graph import GRAPH_FILE, corpus_from, edges_into, give_graph, graph_of_run, settings_from
from qtx.experiments.graph_part import GraphPart, graph_config_from, joint_policy, part_of
from qtx.methods.bittransgnn import GraphDistillation, graph_loss, vote, vote_of_others
from qtx.nn.graph import Graph, adjacency
from qtx.nn.sites import SiteInfo, list_sites, names_by_kind
from qtx.nn.text_graph import GraphConfig, GraphOutputs, StudentAndTeacher, TextGraphClassifier
from qtx.quant.policy import Policy
from qtx.train.loop import predict

SPLITS: tuple[str, ...] = ("train", "validation", "test")
"""Of documents, in the order of their nodes."""
METHODS = ("dynamic", "static", "distillation", "online")


@dataclasses.dataclass(frozen=True, eq=False)
class GraphClassification(Classification):
    """An experiment of `bittransgnn.method`; see `Classification` for the other attributes.

    Attributes:
      corpus: the documents; the data set's splits are theirs.
      graph: of them.
      graph_file: where it is; None: nowhere yet.
      votes: of the teacher for the training documents: logits `graph` and `text`, each `[N, C]`; empty without one.
      teacher_mix: the teacher's lambda.
    """

    corpus: Corpus
    graph: TextGraph
    graph_file: Path | None
    votes: dict[str, jax.Array]
    teacher_mix: float

    @classmethod
    def make(cls, config: ConfigDict) -> GraphClassification:  # type: ignore[override]
        """Loads and checks everything that a run needs, cheapest first; builds the graph if there is none.

        Raises:
          UserError: on anything in the configuration, the data or the checkpoint that does not fit.
        """
        c = config.bittransgnn
        if c.method not in METHODS:
            raise UserError(f"unknown bittransgnn.method {c.method!r}{near_misses(c.method, METHODS)}")
        settings, graph_config = settings_from(config.graph), graph_config_from(c)
        GraphDistillation(0.5, c.alpha, c.temperature, c.target)  # checks its fields
        _check_phases(config)
        teacher = None
        if c.method == "distillation":
            if not c.teacher:
                raise UserError("bittransgnn.method 'distillation' needs a teacher: set bittransgnn.teacher")
            teacher = models.locate(c.teacher)
            part = GraphPart.load(teacher)
        elif c.teacher:
            raise UserError(
                f"bittransgnn.teacher {c.teacher!r} is for the method 'distillation', not {c.method!r}; leave it out"
            )
        corpus = corpus_from(config)
        base = prepare(config, corpus.dataset)
        if base.pretrained.fresh and not config.model.fresh_head:
            raise UserError(
                f"model.name: {config.model.name} has no classifier that was trained on {config.task}; train that of "
                f"configs/bittransgnn.py:{config.task.lower()}+encoder first and give its run's model/"
            )
        if getattr(base.pretrained.config, "pooler", True):
            raise UserError(
                "BitTransGNN's classifier sees the encoder's features as they are: train or load it with model.pooler=False"
            )
        graph, file = graph_of_run(corpus, settings, c.graph, (base.pretrained.directory, teacher))
        fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        made = cls(**fields, corpus=corpus, graph=graph, graph_file=file, votes={}, teacher_mix=0.0)
        if teacher is not None:
            return dataclasses.replace(made, votes=made._teacher_votes(teacher, part), teacher_mix=part.config.mix)
        return made._joined(graph_config)

    def _joined(self, config: GraphConfig) -> GraphClassification:
        """Returns the experiment with the joint model, whose graph convolution is new unless the checkpoint has one."""
        text, pretrained = self.model, self.pretrained
        found = part_of(pretrained.directory)
        policy = text.policy  # type: ignore[attr-defined]
        if found is not None and policy is not None:  # a packed model
            policy = joint_policy(policy, found)
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
        if part.graph != self.graph.identity:
            raise UserError(
                f"bittransgnn.teacher: {directory} was trained on a graph of other documents or settings than these"
            )
        sizes: Any = teacher.config
        kind: Any = teacher.family.module
        policy = joint_policy(module.policy, part)  # type: ignore[attr-defined]
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

    def alone(self) -> Classification:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Classification)}
        params = self.pretrained.params
        if isinstance(self.model, StudentAndTeacher):
            params = params["student"]
        pretrained = dataclasses.replace(
            self.pretrained, params={name: value for name, value in params.items() if name != "gcn"}
        )
        return Classification(**fields | {"model": self.text_model(self.model), "pretrained": pretrained})

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
        bank = np.zeros((self.graph.n_nodes, self.pretrained.config.hidden_size), np.float32)  # type: ignore
        for split in self.encoded:
            if self._in_graph(split):
                bank[self.nodes(split)] = self.pooled(model, variables, split)
        return jnp.asarray(bank)

    def _in_graph(self, split: str) -> bool:
        return split in SPLITS and not (self.graph.settings.inductive and split == "test")

    def logits(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str] = LABELLED
    ) -> dict[str, np.ndarray]:
        """Returns the log probabilities `[N, C]` of splits, or predictions of a regression `[N, 1]`; see `evaluate`.

        Test documents of an inductive graph, which they are no part of, are attached to it.
        """
        if isinstance(model, StudentAndTeacher):
            model, variables = self.text_model(model), below(variables, "student")
        if not isinstance(model, TextGraphClassifier):
            return super().logits(model, variables, splits)
        if "bank" not in variables:
            variables = {**variables, "bank": {"features": self.features(model, variables)}}
        there = [split for split in splits if split in self.encoded and split in SPLITS]
        return {split: np.asarray(self.votes_of(model, variables, split).logits) for split in there}

    def votes_of(self, model: TextGraphClassifier, variables: Mapping[str, Any], split: str) -> GraphOutputs:
        """Returns what a graph model says of the documents of a split, from the bank or, without one, the encoder as it is."""
        bank = variables["bank"]["features"] if "bank" in variables else self.features(model, variables)
        plain = {name: value for name, value in variables.items() if name != "bank"} | {"bank": {"features": bank}}
        if self._in_graph(split):
            return vote(model, plain, self.adjacency, jnp.asarray(self.nodes(split)))
        pooled = jnp.asarray(self.pooled(model, variables, split))
        return vote_of_others(model, plain, self.adjacency, pooled, self._edges_of_others)

    @functools.cached_property
    def _edges_of_others(self) -> BCSR:
        """Edges of the test documents into an inductive graph."""
        return edges_into(self.graph, self.corpus.texts[self.corpus.n_train :])

    def pooled(self, model: nn.Module, variables: Mapping[str, Any], split: str) -> np.ndarray:
        """Returns features `[N, D]` of a split's documents, without dropout."""
        batches = self.batches(split, self.config.data.eval_batch_size, shuffle=False, epochs=1)
        plain = {name: variables[name] for name in ("params", "ranges") if name in variables}
        return predict(self.text_model(model), plain, batches, self.mesh, output="pooled")

    def save(self, workdir: Path, trained: nn.Module, policy: Policy | None, variables: Mapping[str, Any]) -> None:
        """Writes the encoder with its classifier, and beside it what else a graph model has; see `Experiment.save`.

        Of a student and its teacher it is the student.
        """
        if isinstance(trained, StudentAndTeacher):
            variables = below(variables, "student")
        params = dict(variables["params"])
        gcn = params.pop("gcn", None)
        text = self.text_model(trained)
        names = names_by_kind(self.pretrained.family.sites(self.pretrained.config))
        own, chosen = (None if p is None else p.matching(names) for p in (policy, text.policy))  # type: ignore
        alone = dataclasses.replace(self, model=text, pretrained=dataclasses.replace(self.pretrained, params=params))
        Classification.save(alone, workdir, text.clone(policy=chosen), own, {**variables, "params": params})
        if gcn is None:
            return
        bank = variables["bank"]["features"] if "bank" in variables else self.features(trained, variables)
        rest = names_by_kind({name: info for name, info in self.sites().items() if name.startswith("gcn/")})
        gcn_policy = (trained.policy or Policy()).matching(rest)  # type: ignore[attr-defined]
        gcn_config = trained.graph  # type: ignore[attr-defined]
        section = self.config.graph
        words = words_kind(self.dataset, section.words)
        texts = (self.task.name, words, section.tokenizer if words == "basic" else "")
        part = GraphPart(gcn_config, gcn, np.asarray(bank), self.graph.identity, gcn_policy, *texts)
        if self.graph_file is None:
            save_graph(self.graph, workdir / GRAPH_FILE)
        else:
            give_graph(self.graph, self.graph_file, workdir / GRAPH_FILE)
        for name in ("model", "quantized"):
            if (workdir / name).is_dir():
                part.save(workdir / name)


def below(variables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns parameters and ranges of a part of a model."""
    return {kind: variables[kind].get(name, {}) for kind in ("params", "ranges") if kind in variables}


def _check_phases(config: ConfigDict) -> None:
    """Raises a `UserError` if a phase asks for losses of layers: what a graph method learns from is its own."""
    for name, section in phases_of(config):
        if section.losses or section.intervention:
            field = "losses" if section.losses else "intervention"
            raise UserError(
                f"phases.{name}.{field} {section[field]!r} is for encoders alone, and bittransgnn.method "
                f"{config.bittransgnn.method!r} has losses of its own; leave one of them empty"
            )


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


def graph_policy(config: ConfigDict, policy: Policy) -> Policy:
    """Returns the policy of an encoder for the module that `bittransgnn.method` trains: where there are two models, both."""
    if config.bittransgnn.method != "online":
        return policy
    return policy.map_rules(
        lambda _, rules: [
            dataclasses.replace(rule, pattern=f"{part}/{rule.pattern}")
            for part in ("student", "teacher")
            for rule in rules
        ]
    )


def _initial(config: ConfigDict, pretrained: models.Pretrained) -> dict[str, Any]:
    """Returns new parameters of the graph convolution."""
    sizes: Any = pretrained.config
    gcn = graph_config_from(config.bittransgnn).convolution(sizes.num_labels)
    nothing = jnp.zeros((1, sizes.hidden_size))
    return jax.jit(gcn.init)(jax.random.key(config.seed), None, nothing)["params"]
