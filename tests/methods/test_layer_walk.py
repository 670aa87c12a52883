"""In which order layers run, and which of them share an input."""

from flax import traverse_util

from qtx.methods.layer_walk import make_stages, trace
from qtx.nn import BertClassifier
from tests.nn import tiny

PARAMS = tiny.params()
MODEL = BertClassifier(tiny.CONFIG)


def test_stages_follow_the_data():
    kernels = {
        name.rpartition("/")[0] for name in traverse_util.flatten_dict(PARAMS, sep="/") if name.endswith("kernel")
    }
    calls, blocks = trace(MODEL, PARAMS, tiny.inputs(), kernels)
    assert len(blocks) == 2 and blocks[0].rest == blocks[1].rest and blocks[0].module == blocks[1].module
    stages = make_stages(calls)
    layer = [["query", "key", "value"], ["out"], ["up"], ["down"]]
    assert [[c.path.rpartition("/")[2] for c in s.calls] for s in stages] == [*layer, *layer, ["dense"], ["classifier"]]
    assert [(s.calls[0].block, s.calls[0].inside) for s in stages] == [(1, True)] * 4 + [(2, True)] * 4 + [
        (2, False)
    ] * 2
