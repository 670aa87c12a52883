"""The sizes that `launch/benchmark.py` measures: MiniLM on a batch of 32 x 64, its embedding table, and a small translator.

    python launch/benchmark.py --config.batch=8 --config.tokens=128

Expected: every bar holds (the table in README.md). `--only=train-fixed` measures one pair.

`smoke` shrinks everything: the same rows in seconds, whose times mean nothing.
"""

from ml_collections import ConfigDict

from qtx.errors import UserError


def get_config(arg: str = "full"):
    """Returns the configuration; `smoke` shrinks it."""
    if arg not in ("full", "smoke"):
        raise UserError(f"configs/benchmark.py: unknown argument {arg!r}; choose from 'full', 'smoke'")
    config = ConfigDict()
    config.seed = 0
    config.rounds = 15
    config.search_rounds = 5
    config.batch = 32
    config.tokens = 64
    config.candidates = 100
    config.rounding_iterations = 10_000
    config.rounding_rounds = config.calibration_rounds = 1  # a minute each
    config.calibration_searched = "**"  # activations whose ranges are searched; of the others, minimum and maximum
    config.model = ConfigDict(
        dict(vocab_size=30522, hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536, max_positions=512)
    )
    config.decode = ConfigDict(dict(batch=32, tokens=24, limit=40, beam=5, rounds=3, vocabulary=8000))
    config.decode.prefix_multiple = 40  # of the loop without a cache; the limit: it is compiled once
    config.decode.model = ConfigDict(
        dict(hidden_size=128, num_layers=4, decoder_layers=4, num_heads=4, intermediate_size=256)
    )
    # As large as R8's graph: 15,362 nodes, about 3.5 million entries.
    config.graph = ConfigDict(dict(nodes=15362, pairs=1_880_000, features=256, classes=8, rounds=5))
    # A fifth of R8's words: the plain loop takes seconds.
    config.graph.corpus = ConfigDict(dict(documents=1500, words=66, vocabulary=7000, window=20, rounds=3))
    if arg == "smoke":
        config.graph.update(nodes=40, pairs=200, features=8, rounds=1)
        config.graph.corpus.update(documents=5, words=8, vocabulary=20, window=4, rounds=1)
        config.rounds = 2
        config.search_rounds = 2
        config.batch = 2
        config.tokens = 8
        config.candidates = 5
        config.rounding_iterations = 20
        config.calibration_searched = "z"  # every search is compiled by itself
        config.decode.update(batch=2, tokens=6, limit=6, prefix_multiple=4, beam=2, rounds=1, vocabulary=40)
        config.decode.model.update(hidden_size=16, num_layers=1, decoder_layers=1, num_heads=2, intermediate_size=32)
        config.model.update(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
    return config
