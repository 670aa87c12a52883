"""Two hosts, simulated by two processes that join through `jax.distributed`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.conftest import FEWER_SITES

ROOT = Path(__file__).parents[2]
# Not the key's bias: its gradient is rounding alone, which Adam scales up and a quantized key then shows.
TRAINABLE = "('**/kernel', '**/table', '**/norm/*', '**/query/bias', '**/value/bias', '**/out/bias', '**/ffn/*/bias')"


def command(config, workdir, *more):
    fields = {
        "task": "table",
        "model.name": config.model.name,
        "model.hidden_dropout": 0.0,
        "model.attention_dropout": 0.0,
        "data.train": config.data.train,
        "data.validation": config.data.validation,
        "data.max_length": 16,
        "data.buckets": 1,
        "data.eval_buckets": 1,
        "calibration.batch_size": 8,
        "calibration.batches": 1,
        "checkpoint_every": 2,
        "log_every": 1,
        "quant.overrides": FEWER_SITES,
    }
    for phase in ("finetune", "qat"):
        fields |= {f"phases.{phase}.batch_size": 8, f"phases.{phase}.steps": 3, f"phases.{phase}.trainable": TRAINABLE}
    fields |= {"phases.finetune.evaluate_every": 0.1, "phases.finetune.keep_best": True}
    changes = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "launch/train.py", "--config=configs/qat.py:w8a8", f"--workdir={workdir}", *changes, *more]


def test_two_hosts_train_quantize_and_evaluate_as_one(tiny_config, tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    options = dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    join = ["--multihost", f"--coordinator={address}", "--num_hosts=2"]
    hosts = [
        subprocess.Popen([*command(tiny_config, tmp_path / "two"), *join, f"--host={i}"], **options) for i in range(2)
    ]
    told = [host.communicate(timeout=300) for host in hosts]
    for host, (_, errors) in zip(hosts, told, strict=True):
        assert host.returncode == 0, errors[-3000:]
    assert "accuracy" in told[0][0] and "accuracy" not in told[1][0]

    one = subprocess.run(command(tiny_config, tmp_path / "one"), **options)
    assert one.returncode == 0, one.stderr[-3000:]
    for file in ("result_finetune.json", "result_qat.json"):
        results = [json.loads((tmp_path / run / file).read_text()) for run in ("one", "two")]
        assert results[0] == results[1]
    for file in ("model/model.safetensors", "quantized/model.qtx.safetensors"):
        a, b = (safetensors.numpy.load_file(tmp_path / run / file) for run in ("one", "two"))
        assert a.keys() == b.keys()
        for name in a:
            if np.issubdtype(a[name].dtype, np.floating):
                np.testing.assert_allclose(b[name], a[name], atol=3e-5, rtol=1e-3, err_msg=name)
