import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from qtx.errors import UserError
from qtx.train import sharding


def test_one_device_is_a_mesh_of_one():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "model": 1}
    with pytest.raises(UserError, match="model_parallel=3"):
        sharding.make_mesh(3)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder/layer_3/attention/query/kernel", (8, 8), PartitionSpec(None, "model")),
        ("encoder/layer_3/attention/out/kernel", (8, 8), PartitionSpec("model", None)),
        ("encoder/layer_3/ffn/up/kernel", (8, 16), PartitionSpec(None, "model")),
        ("encoder/layer_3/ffn/down/kernel", (16, 8), PartitionSpec("model", None)),
        ("encoder/layer_3/ffn_0/down/kernel", (16, 8), PartitionSpec("model", None)),
        ("encoder/embeddings/word/table", (30, 8), PartitionSpec("model", None)),
        ("encoder/embeddings/word/table", (31, 8), PartitionSpec()),  # does not divide
        ("encoder/layer_3/ffn/up/bias", (16,), PartitionSpec()),
    ],
)
def test_where_parameters_lie(name, shape, expected):
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    assert sharding.partition(name, shape, mesh) == expected


def test_a_batch_that_does_not_split_over_the_devices():
    mesh = AbstractMesh((3, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(UserError, match="batch of 4 rows.*3 devices"):
        sharding.shard_batch({"x": np.zeros((4, 2))}, mesh)
