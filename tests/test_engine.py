"""The engine on many devices and hosts, in parts of a batch, and through joblib: the same training each time."""
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import json, sys
from resnet_rs.config import ladder, scaled
from resnet_rs.experiment import Experiment, run
asked = json.loads(sys.argv[1])
config = scaled(ladder()['resnet_d'], 'smoke', **asked.get('config', {}))
experiment = Experiment('engine', {'all': config}, scale='smoke', seeds=asked.get('seeds', 1), results_dir=asked['results_dir'],
                        checkpoint_seconds=asked.get('checkpoint_seconds', 1000))
print('planned', experiment.runs[0].effective.steps, flush=True)
run(experiment)
"""
GHOSTS = dict(depth=14, batch_size=32, bn_group_size=4, train_examples=80, base_lr=0.01)   # four images a device; calm


def start(devices, results_dir, hosts='', **asked):
    "A process with that many CPU devices that trains the last row of Table 1 on made-up pictures."
    env = os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'RESNET_RS_HOSTS': hosts,
                        'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', WORK, json.dumps(asked | dict(results_dir=str(results_dir)))]
    pipes = dict.fromkeys(('stdout', 'stderr'), subprocess.PIPE)
    return subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, text=True, **pipes)


def record(results_dir):
    (path,) = Path(results_dir).glob('*.json')
    return json.loads(path.read_text())


def trained(devices, results_dir, **asked):
    out, errors = (process := start(devices, results_dir, **asked)).communicate(timeout=300)
    assert process.returncode == 0, f'{out[-1000:]}\n{errors[-3000:]}'
    return record(results_dir)


def two_hosts(results_dir, **asked):
    "Two processes with four devices each."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    return [start(4, results_dir, hosts=f'127.0.0.1:{port},2,{i}', **asked) for i in range(2)]


SEVERAL_WAYS = """
import json
import jax, numpy as np
jax.config.update('jax_enable_x64', True)
from resnet_rs.parallel import data_mesh
from resnet_rs.registry import create_model
from resnet_rs.runs import augmentation
from resnet_rs.steps import Hyper
from resnet_rs.training import fit
model = create_model('resnet_rs_26', 10, blocks=(1, 1, 1, 1), width=0.125, bn_group_size=GROUP, param_dtype='float64')
draw = np.random.default_rng(0)
batches = [(draw.integers(0, 256, (16, 32, 32, 3), np.uint8), draw.integers(0, 10, 16, np.int32)) for _ in range(4)]
hyper = Hyper(peak_lr=0.05, total_steps=4, weight_decay=1e-3, label_smoothing=0.1, ema_decay=0.9, bn_momentum=0.0,
              randaug_prob=1.0, randaug_magnitude=10.0, translate_px=12.0, cutout_px=5.0)
for name, how in WAYS.items():
    chance = {} if 'accumulate' in how or 'calm' in how else dict(dropout=0.25, drop_path=0.2)
    how = {key: value for key, value in how.items() if key != 'calm'}
    mesh = data_mesh(jax.devices()[:how.pop('devices')]) if 'devices' in how else None
    done = fit(model, batches, hyper._replace(**chance), augment=augmentation('imagenette', 2, 'paper'), mesh=mesh, **how)
    sums = {group: sum(float(np.abs(v).sum()) for v in getattr(done.state, group).values()) for group in ('params', 'ema_stats')}
    print('RESULT', json.dumps([name, done.losses.tolist(), sums]), flush=True)
"""


def several_ways(group, **ways):
    "Losses and sums of a network in float64 that is trained in each of these ways, in one process with eight devices."
    env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu'}
    code = SEVERAL_WAYS.replace('WAYS', repr(ways)).replace('GROUP', str(group))
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line.removeprefix('RESULT ')) for line in done.stdout.splitlines() if line.startswith('RESULT')]
    return {name: (losses, sums) for name, losses, sums in found}


def same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)   # losses are kept as float32
    for name, value in theirs[1].items(): assert ours[1][name] == pytest.approx(value, rel=1e-9), name
    assert len(set(ours[0])) == len(ours[0])


def test_eight_devices_train_as_one_with_ghost_batch_norm():
    "Each device normalises its own two images, augments its own, and drops what one device would have dropped."
    found = several_ways(2, one={}, eight=dict(devices=8))
    same(found['eight'], found['one'])


@pytest.mark.slow
def test_batch_norm_over_all_devices_is_batch_norm_over_the_batch():
    found = several_ways(0, one={}, four=dict(devices=4))
    same(found['four'], found['one'])


@pytest.mark.slow
def test_a_batch_in_parts_is_the_batch():
    "Also over devices. Dropout and stochastic depth draw other numbers in parts, and are left out."
    found = several_ways(2, one=dict(calm=True), parts=dict(accumulate=4), both=dict(accumulate=2, devices=4))
    for name in ('parts', 'both'): same(found[name], found['one'])


def close(record, to):
    "The same curves: of the training loss, and at the end the weights and the held-out loss."
    assert record['status'] == to['status'] == 'done' and record['key'] == to['key']
    np.testing.assert_allclose(record['curve']['train_loss'], to['curve']['train_loss'], rtol=2e-3)
    for name in ('weight_norm', 'eval_loss'): assert record['metrics'][name] == pytest.approx(to['metrics'][name], rel=5e-3), name


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
    return trained(1, tmp_path_factory.mktemp('one'), config=GHOSTS)


@pytest.mark.slow
def test_two_hosts_train_as_one(one_device, tmp_path):
    processes = two_hosts(tmp_path, config=GHOSTS)
    ends = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends[0][1][-2000:] + ends[1][1][-2000:]
    close(record(tmp_path), one_device)
    assert 'top-1' in ends[0][0] and 'top-1' not in ends[1][0], 'the first host speaks for all'


KEEP = """
import sys
import jax, numpy as np
from resnet_rs.checkpoint import Checkpoints
from resnet_rs.parallel import any_host, first_host, lost_hosts, start
start()
jax.devices()   # the runtimes of all hosts begin together
with lost_hosts():
    if first_host(): assert Checkpoints(sys.argv[1]).save(3, dict(weights=np.arange(4.0)), dict(seconds=1.5))
    any_host(False)   # until it is there
    found = Checkpoints(sys.argv[1]).restore()
    print('RESULT', found.step, found.arrays['weights'].tolist(), found.notes, flush=True)
"""


def test_one_of_two_hosts_keeps_a_checkpoint_that_both_can_read(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    command, pipes = [sys.executable, '-c', KEEP, str(tmp_path)], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    envs = [os.environ | {'JAX_PLATFORMS': 'cpu', 'RESNET_RS_HOSTS': f'127.0.0.1:{port},2,{i}'} for i in range(2)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for env in envs]
    for out, errors in [process.communicate(timeout=100) for process in processes]:
        assert "RESULT 3 [0.0, 1.0, 2.0, 3.0] {'seconds': 1.5}" in out, errors[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_host_that_dies_ends_the_other_and_the_run_goes_on(victim, tmp_path):
    long = dict(config=GHOSTS | dict(epochs=10_000), checkpoint_seconds=0)
    processes = two_hosts(tmp_path, **long)
    checkpoints, end = tmp_path / 'checkpoints', time.monotonic() + 500
    while not list(checkpoints.glob('*/*/sizes.json')) and time.monotonic() < end: time.sleep(0.2)
    assert list(checkpoints.glob('*/*/sizes.json')), 'no checkpoint was made'
    processes[victim].kill()
    out, errors = processes[1 - victim].communicate(timeout=300)
    processes[victim].communicate()
    assert processes[1 - victim].returncode != 0 and not list(tmp_path.glob('*.json'))
    assert 'host' in errors.lower() or 'coordination service' in errors.lower(), errors[-3000:]
    kept = max(int(path.parent.name) for path in checkpoints.glob('*/*/sizes.json'))
    again = two_hosts(tmp_path, **long)
    line = ''
    while 'goes on from its checkpoint' not in line:
        line = again[0].stdout.readline()
        assert line, again[0].stderr.read()[-3000:]
    assert f'step {kept}' in line
    for process in again: process.kill(), process.communicate()


@pytest.mark.parametrize('config, message', [
    (dict(batch_size=12), 'batch_size = 12 does not divide into 1 parts (accumulate) for each of the 8 cpu devices'),
    (dict(batch_size=16, accumulate=4), 'accumulate = 4 parts of a batch of 16 cannot be had with bn_group_size = 0')])
def test_batches_that_do_not_divide_are_refused(config, message, tmp_path):
    process = start(8, tmp_path, config=config)
    _, errors = process.communicate(timeout=120)
    assert process.returncode and message in errors and not list(tmp_path.glob('*.json'))


@pytest.mark.slow
def test_joblib_makes_the_same_runs(tmp_path):
    from resnet_rs.config import ladder, scaled
    from resnet_rs.experiment import Experiment, run
    rows = {row: scaled(ladder()[row], 'smoke') for row in ('baseline', 'ema')}

    def grid(folder): return Experiment('engine', rows, scale='smoke', seeds=2, results_dir=tmp_path / folder)
    alone, shared = run(grid('alone')), run(grid('shared'), jobs=2)
    assert [r['weights_sha256'] for r in shared] == [r['weights_sha256'] for r in alone] and len(shared) == 4
    assert [r['key'] for r in shared] == [r['key'] for r in alone]
    assert run(grid('shared'), jobs=2, backend='threading') == shared, 'nothing was left to do'
