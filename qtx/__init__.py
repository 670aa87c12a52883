"""qtx: quantized transformers in JAX and Flax.

    from qtx import nn, quant
    policy = nn.policy(weights=quant.symmetric(8), activations={"**": quant.asymmetric(8), "y": quant.asymmetric(16)})

`qtx.quant` is the numeric core, `qtx.nn` modules with sites, `qtx.models` families and checkpoints, `qtx.data` tasks and
batches, `qtx.train` the loop, `qtx.methods` what the papers add, `qtx.export` packed artifacts.
"""

from qtx.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]
