"""Where the published code of BitTransGNN keeps a run, for those who come from there or go back.

directory(Settings("kd", states=3, dataset="mr"), tree="logits")
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from qtx.errors import UserError, near_misses

Kind = Literal["bittransformer", "bittransgnn", "kd"]
Tree = Literal["model_ckpts", "results", "logits"]

STATES = {0: "full", 2: "binary", 3: "ternary", 4: "4_state", 5: "5_state"}
"""Names of weight grids, by the number of their values; 0: float."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the name of a directory depends on, under the names of the published configuration where they are readable.

    Attributes:
      kind: an encoder alone, an encoder with a graph, or a student that was taught by one.
      states: values of a weight: one of `STATES`.
      bits_act: of activations.
      quantize_bert: the linear layers of the encoder.
      quantize_embeddings: its embeddings.
      quantize_attention: queries, keys and values.
      quantize_gcn: the weights of the graph convolution.
      encoder: its name on the Hugging Face hub.
      dataset: its name.
      inference: a run that trains nothing.
      direct: of an encoder's inference: it was taken out of a model with a graph.
      adj_type: which edges the graph has.
      quant_type: `'QAT'`: the encoder was fine-tuned as quantized; `'PTQ'`: in full precision.
      joint_training: the encoder is trained with the graph convolution.
      inference_type: whether the graph holds the test documents.
    """

    kind: Kind = "bittransgnn"
    states: int = 2
    bits_act: float = 8.0
    quantize_bert: bool = True
    quantize_embeddings: bool = True
    quantize_attention: bool = True
    quantize_gcn: bool = False
    encoder: str = "bert-base-uncased"
    dataset: str = "20ng"
    inference: bool = False
    direct: bool = False
    adj_type: str = "full"
    quant_type: Literal["QAT", "PTQ"] = "QAT"
    joint_training: bool = True
    inference_type: Literal["transductive", "inductive"] = "transductive"

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise UserError(f"unknown kind of model {self.kind!r}{near_misses(self.kind, get_args(Kind))}")
        if self.states not in STATES:
            raise UserError(f"no weights with {self.states} states; choose from {', '.join(map(str, STATES))}")

    @property
    def model_type(self) -> str:
        """Which parts are quantized: `bittransgnn` (encoder), `transbitgnn` (graph), `bittransbitgnn`, `transgnn`."""
        return f"{'bit' * self.quantize_bert}trans{'bit' * self.quantize_gcn}gnn"


def directory(settings: Settings, tree: Tree = "model_ckpts") -> str:
    """Returns the directory of a run below `model_checkpoints`.

    Args:
      settings: of the run.
      tree: checkpoints, results or logits.

    Raises:
      UserError: another tree.
    """
    if tree not in get_args(Tree):
        raise UserError(f"unknown tree {tree!r}{near_misses(tree, get_args(Tree))}")
    return "/".join([tree, *_method(settings), *_quantized(settings), _name(settings)])


def starting_point(settings: Settings) -> str:
    """Returns the directory of the fine-tuned encoder that a model with a graph, or a student, starts from.

    With `'PTQ'` it was fine-tuned in full precision.
    """
    changes: dict = {"kind": "bittransformer", "inference": False, "direct": False}
    if settings.quant_type == "PTQ":
        off = dict.fromkeys(("quantize_bert", "quantize_embeddings", "quantize_attention"), False)
        changes |= off | {"bits_act": 32.0}
    return directory(dataclasses.replace(settings, **changes))


def _method(s: Settings) -> list[str]:
    run = "inference" if s.inference else "train"
    if s.kind == "bittransformer":
        return ["bitbert", run, "direct_induction", s.adj_type] if s.inference and s.direct else ["bitbert", run]
    method = [s.model_type, s.adj_type, run, s.inference_type]
    return ["distill", *method] if s.kind == "kd" else method


def _quantized(s: Settings) -> list[str]:
    if s.quantize_bert:
        parts = {
            (True, True): "full_quant",
            (True, False): "weight_emb_quant",
            (False, True): "weight_att_quant",
            (False, False): "lin_quant",
        }[s.quantize_embeddings, s.quantize_attention]
    else:
        parts = "embed_quant" if s.quantize_embeddings else "full_prec"
    return ["qat", parts] if s.kind == "bittransformer" and parts != "full_prec" else [parts]


def _name(s: Settings) -> str:
    parts = [s.encoder]
    if s.kind != "bittransformer":
        parts += [s.quant_type, "student"] if s.kind == "kd" else [s.quant_type]
        parts.append("dynamic" if s.joint_training else "static")
    if s.kind != "bittransformer" or _quantized(s) != ["full_prec"]:
        parts.append(STATES[s.states])
    suffix = "" if s.bits_act == 8 else "_full_act" if s.bits_act == 32 else "_quant_act"
    return "_".join([*parts, s.dataset]) + suffix
