"""On one accelerator, against the same computations on a CPU (`make test-gpu EXTRAS=cuda`). The tolerances are stated here."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.gpu
LOGITS = 1e-3  # largest difference of float32 logits, relative to their largest value, with products in full precision
LOSS = 0.1     # relative difference of the final training loss of a smoke run: the products are in the device's precision

FORWARD = """
import jax, numpy as np
from flax import nnx
from resnet_rs.registry import create_model
jax.config.update('jax_default_matmul_precision', 'highest')
model = create_model('resnet_rs_50', num_classes=10, width=0.25, rngs=nnx.Rngs(0)); model.eval()
images = np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype(np.float32)
print(jax.default_backend(), *np.asarray(nnx.jit(lambda m, x: m(x))(model, images)).ravel())
"""


def on(device, *command):
    "Run `command` with JAX on the 'cpu', or on what it finds first ('accelerator'); what is printed."
    env = {name: value for name, value in os.environ.items() if name != 'JAX_PLATFORMS'}
    if device == 'cpu': env['JAX_PLATFORMS'] = 'cpu'
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope='module', autouse=True)
def accelerator():
    found = on('accelerator', sys.executable, '-c', 'import jax; print(jax.default_backend())').strip()
    assert found != 'cpu', 'JAX finds no accelerator here'


def test_logits_agree_with_the_cpu():
    (cpu, *ours), (found, *theirs) = (on(device, sys.executable, '-c', FORWARD).split() for device in ('cpu', 'accelerator'))
    assert cpu == 'cpu' != found
    ours, theirs = ([float(value) for value in values] for values in (ours, theirs))
    assert len(ours) == 40 and max(abs(a - b) for a, b in zip(ours, theirs)) <= LOGITS * max(abs(a) for a in ours)


def test_a_smoke_run_agrees_with_the_cpu_and_repeats(tmp_path):
    "The same loss within LOSS; twice on the device within the same."
    records = {}
    for name in ('cpu', 'accelerator', 'again'):
        on(name, Path(sys.executable).with_name('papermill'), 'nbs/ablation.ipynb', tmp_path / 'o.ipynb', '-p', 'scale', 'smoke',
           '-p', 'rows', 'baseline,resnet_d', '-p', 'seeds', '1', '-p', 'results_dir', tmp_path / name)
        found = [json.loads(path.read_text()) for path in (tmp_path / name).glob('*.json')]
        records[name] = {record['row']: record for record in found}
    for row in ('baseline', 'resnet_d'):
        cpu, *others = (records[name][row] for name in ('cpu', 'accelerator', 'again'))
        for other in others:
            assert other['status'] == cpu['status'] == 'done' and other['key'] == cpu['key']
            assert other['device']['kind'] != cpu['device']['kind'] == 'cpu'
            assert other['metrics']['loss'] == pytest.approx(cpu['metrics']['loss'], rel=LOSS)
