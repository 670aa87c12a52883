"""What a trained BitTransGNN has beside its encoder, as one file beside the encoder's checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from ml_collections import ConfigDict

from qtx.errors import UserError, warn
from qtx.export.policy_json import policy_from_json, policy_to_json
from qtx.files import whole_file
from qtx.nn.text_graph import GraphConfig
from qtx.quant.policy import KINDS, Policy

GRAPH_PART = "graph.safetensors"


@dataclasses.dataclass(frozen=True)
class GraphPart:
    """What a trained BitTransGNN has beside its encoder.

    Attributes:
      config: of the graph convolution.
      params: its parameters, nested, below `gcn`.
      features: of all nodes `[N, D]`, as they were when the model was evaluated.
      graph: identity of its graph, see `qtx.data.text_graph.TextGraph`.
      policy: of its sites alone.
      task: whose texts the graph is of.
      words: kind of words of the graph, see `qtx.data.corpus.words_kind`.
      tokenizer: of these words, see `qtx.data.corpus.make_corpus`.
    """

    config: GraphConfig
    params: dict[str, Any]
    features: np.ndarray
    graph: str
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
            "graph": self.graph,
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
            return cls(config, params, features, record["graph"], policy, *record["texts"])
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); is the file truncated?") from None


def graph_config_from(section: ConfigDict) -> GraphConfig:
    """Reads what the graph convolution is from the section `bittransgnn`; raises a `UserError` on a value out of range."""
    return GraphConfig(section.mix, section.hidden_size, section.num_layers, section.dropout, section.bias)


def warn_of_unused(section: ConfigDict, default: ConfigDict) -> None:
    """Checks the section `bittransgnn` of a run without a method, and says on standard error which of it does nothing.

    A line, not an error: rows of a sweep with and without a graph have the same section.

    Raises:
      UserError: a value out of range.
    """
    graph_config_from(section)
    if unused := [f"bittransgnn.{name}" for name, value in section.items() if value != default[name]]:
        warn(f"without bittransgnn.method there is no graph, and {', '.join(unused)} does nothing")


def part_of(directory: Path | None) -> GraphPart | None:
    """Returns what a checkpoint has beside its encoder, or None."""
    if directory is None or not (directory / GRAPH_PART).is_file():
        return None
    return GraphPart.load(directory)


def joint_policy(text: Policy | None, part: GraphPart) -> Policy | None:
    """Returns the policy of the whole model, given that of its encoder; None if nothing is quantized."""
    found = (text or Policy()).followed_by(part.policy)
    return found if any(found.rules(kind) for kind in KINDS) else None
