import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from qtx.errors import UserError
from qtx.train.checkpoint import Checkpoints
from tests.conftest import eight_devices


class Moments(NamedTuple):
    mean: jax.Array
    nothing: None


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    rng: jax.Array
    extra: dict


def make_state(seed: int = 0) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (3, 4)), "bias": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45])},
        "half": jax.random.normal(keys[1], (5,), jnp.bfloat16),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), {"dense": True, "half": False}))
    return State(
        step=jnp.int32(seed),
        params=params,
        opt_state=tx.init(params),
        rng=jax.random.key(seed + 7),
        extra={
            "moments": Moments(jnp.full((2,), seed, jnp.float16), None),
            "codes": (jnp.array([-128, seed], jnp.int8), [jnp.array([-8, 7], jnp.int4)]),
            "mask": jnp.array([True, seed == 0]),
            "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
            "none": None,
            "empty": jnp.zeros((0, 3)),
            "a/b.c": np.arange(3.0) + seed,
            "scalar": np.float32(seed + 0.5),
            "python": (seed, seed + 0.25, seed == 0),
        },
    )


def bits(leaf) -> bytes:
    if jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y), path
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None), path
        assert np.shape(x) == np.shape(y) and bits(x) == bits(y), path


def small(value: float) -> dict:
    return {"w": jnp.full((4, 2), value, jnp.float32), "b": jnp.full((2,), value, jnp.float32)}


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state, meta = make_state(3), {"phase": 1, "data": {"epoch": 2, "position": [5, 6]}, "note": None}
    with Checkpoints(tmp_path / "ckpt") as checkpoints:
        checkpoints.save(10, state, meta)
        restored, restored_meta = checkpoints.restore(make_state(0))
    assert_identical(restored, state)
    assert restored_meta == meta


def test_an_abstract_target_is_enough(tmp_path):
    state = {"x": jnp.arange(6.0).reshape(2, 3), "rng": jax.random.key(5), "empty": jnp.zeros((0, 2), jnp.int8)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_identical(restored, state)


def test_the_newest_are_kept_and_any_kept_step_can_be_read(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (2, 5, 11):
            checkpoints.save(step, small(step), {"step": step})
        assert checkpoints.latest_step() == 11
        assert checkpoints.steps() == [5, 11]
        state, meta = checkpoints.restore(small(0), step=5)
        assert_identical(state, small(5))
        assert meta == {"step": 5}
        with pytest.raises(UserError, match=r"step 2 .*\[5, 11\]"):
            checkpoints.restore(small(0), step=2)


def test_a_donated_or_changed_state_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    host = np.ones((512, 512))
    with Checkpoints(tmp_path) as checkpoints:
        state = {"device": jnp.ones((512, 512)), "host": host}
        checkpoints.save(1, state, {})
        state["device"] = step(state["device"])
        host[:] = -1
        restored, _ = checkpoints.restore(state)
    assert (np.asarray(restored["device"]) == 1).all() and (restored["host"] == 1).all()


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "absent") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(UserError, match="no checkpoint in .*absent"):
            checkpoints.restore(small(0))
    assert not (tmp_path / "absent").exists()


def test_a_saved_step_is_not_overwritten(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, small(4), {})
        for step in (3, 4):
            with pytest.raises(UserError, match=f"cannot save step {step}: .* already has step 4"):
                checkpoints.save(step, small(0), {})
        assert_identical(checkpoints.restore(small(0))[0], small(4))


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, small(0), {"position": np.arange(3)})
        with pytest.raises(TypeError, match="'name' .* str"):
            checkpoints.save(1, {"name": "bert"}, {})
        with pytest.raises(UserError, match="both called 'a/b'"):
            checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {})
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize(
    "target, message",
    [
        ({**small(0), "w": jnp.zeros((4, 3))}, r"'w' is float32\[4, 2\] in the checkpoint and float32\[4, 3\] here"),
        ({**small(0), "w": jnp.zeros((4, 2), jnp.bfloat16)}, r"'w' is float32.* and bfloat16\[4, 2\] here"),
        ({**small(0), "scale": jnp.zeros(3)}, r"'scale' is absent in the checkpoint and float32\[3\] here"),
        ({"w": jnp.zeros((4, 2))}, r"'b' is float32\[2\] in the checkpoint and absent here"),
        ({"w": jnp.zeros((4, 2)), "b": None}, r"'b' is float32\[2\] in the checkpoint and absent here"),
    ],
)
def test_a_state_that_does_not_fit_is_explained(tmp_path, target, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        with pytest.raises(UserError, match=message) as caught:
            checkpoints.restore(target)
    assert "another workdir" in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
@pytest.mark.parametrize("part", ["meta/metadata", "state/manifest.ocdbt", "largest"])
def test_damage_is_noticed(tmp_path, part, damage):
    state = {"x": jax.random.normal(jax.random.key(0), (200, 100))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    path = max(files, key=lambda file: file.stat().st_size) if part == "largest" else tmp_path / "2" / part
    data, middle = path.read_bytes(), path.stat().st_size // 2
    rest = b"" if damage == "truncate" else bytes([data[middle] ^ 255]) + data[middle + 1 :]
    path.write_bytes(data[:middle] + rest)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="truncated or corrupted") as caught:
            checkpoints.restore(state)
        assert str(tmp_path / "2") in str(caught.value) and "resume from step 1" in str(caught.value)
        assert_identical(checkpoints.restore(state, step=1)[0], state)


def test_debris_of_a_killed_write_is_neither_read_nor_in_the_way(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
    incomplete, temporary = tmp_path / "2" / "state", tmp_path / "3.orbax-checkpoint-tmp-1"
    incomplete.mkdir(parents=True)
    (incomplete / "_METADATA").write_text("{")
    temporary.mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert_identical(checkpoints.restore(small(0))[0], small(1))
        assert incomplete.exists() and temporary.exists(), "reading must not delete: another process may be writing"
        checkpoints.save(2, small(2), {})
        checkpoints.save(3, small(3), {})
        assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def run_python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_killed_while_writing_leaves_a_readable_checkpoint(tmp_path):
    child = run_python(
        f"""
        import jax.numpy as jnp
        from qtx.train.checkpoint import Checkpoints
        checkpoints = Checkpoints({str(tmp_path)!r}, keep=1)
        for step in range(1, 10_000):
            checkpoints.save(step, {{"x": jnp.full((2000, 1000), step, jnp.float32)}}, {{"step": step}})
            print(step, flush=True)
        """
    )
    for line in child.stdout:
        if int(line) == 3:  # its write has begun, and those before it have ended
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with Checkpoints(tmp_path) as checkpoints:
        latest = checkpoints.latest_step()
        assert latest is not None and latest >= 2
        state, meta = checkpoints.restore({"x": jnp.zeros((2000, 1000))})
        assert meta == {"step": latest} and (np.asarray(state["x"]) == latest).all()
        checkpoints.save(latest + 1, state, meta)
        assert checkpoints.latest_step() == latest + 1


def test_shardings_are_those_of_the_target(tmp_path):
    child = run_python(
        f"""
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from qtx.train.checkpoint import Checkpoints
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
        state = {{
            "kernel": place(jnp.arange(64.0).reshape(8, 8), "data", "model"),
            "bias": place(jnp.arange(8, dtype=jnp.bfloat16)),
            "keys": place(jax.random.split(jax.random.key(1), 8), "data"),
        }}
        target = dict(state, kernel=place(jnp.zeros((8, 8)), "model"))
        with Checkpoints({str(tmp_path)!r}) as checkpoints:
            checkpoints.save(1, state, {{}})
            restored, _ = checkpoints.restore(target)
        for name in state:
            assert restored[name].sharding == target[name].sharding, name
        np.testing.assert_array_equal(restored["kernel"], state["kernel"])
        np.testing.assert_array_equal(jax.random.key_data(restored["keys"]), jax.random.key_data(state["keys"]))
        """,
        **eight_devices(),
    )
    _, stderr = child.communicate()
    assert child.returncode == 0, stderr


def test_rewind_forgets_what_came_later(tmp_path):
    with Checkpoints(tmp_path / "run", keep=3) as checkpoints:
        checkpoints.rewind(0)
        assert not (tmp_path / "run").exists()
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.float32(step)}, {"note": step})
        checkpoints.rewind(1)
        assert checkpoints.steps() == [1] and checkpoints.meta() == checkpoints.meta(1) == {"note": 1}
        checkpoints.save(2, {"x": jnp.float32(20)}, {"note": 20})
        state, meta = checkpoints.restore({"x": jnp.float32(0)})
    assert (float(state["x"]), meta) == (20.0, {"note": 20})
    with Checkpoints(tmp_path / "run", keep=3) as checkpoints:
        checkpoints.rewind(2)
        assert checkpoints.steps() == [1, 2]
        with pytest.raises(UserError, match="no checkpoint of step 7"):
            checkpoints.meta(7)
