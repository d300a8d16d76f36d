"""Transfer: the contrastive loss and its views, the probe, what comes after what, and the notebook as a user runs it."""
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from planned import refused

from resnet_rs.checkpoint import Checkpoints, Stopped
from resnet_rs.config import Config, scaled
from resnet_rs.contrastive import contrastive_loss, in_pairs, views
from resnet_rs.datasets import image_set, open_source
from resnet_rs.experiment import Experiment, run
from resnet_rs.finetune import linear_probe
from resnet_rs.images import load
from resnet_rs.pretraining import METHODS, Contrastive, Probe, probing, target_study, transfer_row, transfer_rows
from resnet_rs.runs import train_run
from resnet_rs.steps import split

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = str(Path(sys.executable).parent / 'papermill')


def two_halves(hidden, temperature):
    "The loss of SimCLR's objective.py in NumPy: first views above, second views below; the sum of the means of both halves."
    hidden = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    first, second = np.split(hidden, 2)
    n, total = len(first), 0.0
    for ours, theirs in ((first, second), (second, first)):
        logits = np.concatenate([ours @ theirs.T, ours @ ours.T - 1e9 * temperature * np.eye(n)], 1) / temperature
        shifted = logits - logits.max(1, keepdims=True)
        log_share = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        total += -np.mean(log_share[np.arange(n), np.arange(n)])
    return total


@pytest.mark.parametrize('temperature', [0.1, 0.5, 1.0])
def test_the_loss_is_that_of_the_authors_code(temperature):
    hidden = np.random.default_rng(0).normal(size=(24, 7))
    theirs = two_halves(hidden, temperature)
    ours = contrastive_loss(temperature)(hidden.astype(np.float32), np.tile(np.arange(12), 2))
    assert ours.shape == (24,) and 2 * float(ours.mean()) == pytest.approx(theirs, rel=1e-5)


def test_three_views_and_a_view_that_is_alone():
    "Of three views each has two partners, and the mean over them counts; without a partner there is nothing to find."
    hidden = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    labels = np.array([3, 8, 3, 3, 5])
    found = np.asarray(contrastive_loss(0.5)(hidden, labels))
    z = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    s = np.exp(z @ z.T / 0.5)
    others = s.sum(1) - np.diag(s)
    assert found[0] == pytest.approx(-np.mean([np.log(s[0, j] / others[0]) for j in (2, 3)]), rel=1e-5)
    assert found[1] == found[4] == 0
    gradient = jax.grad(lambda h: contrastive_loss(0.5)(h, labels).sum())(hidden)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize('name', ['photographs', 'digits'])
def test_views_are_a_function_of_key_and_number(name):
    part = load(name, 'train', 32)
    augment = jax.jit(views(part.info, blur=0.5))
    images, key = in_pairs(part.images[:6])[0], jax.random.key(5)
    whole = np.asarray(augment(key, images, None, 0))
    shards = [augment(key, images[i:i + 4], None, i) for i in range(0, 12, 4)]
    np.testing.assert_allclose(np.concatenate(shards), whole, atol=1e-5)
    changed = images.copy()
    changed[0] = 255 - changed[0]
    np.testing.assert_allclose(augment(key, changed, None, 0)[1:], whole[1:], atol=1e-5, err_msg='neighbours have no part in it')
    assert np.abs(np.asarray(augment(jax.random.key(6), images, None, 0)) - whole).mean() > 0.05
    grey = np.ptp(whole * part.info.std + part.info.mean, axis=-1).max()
    assert (grey < 1e-4) == (name == 'digits'), 'a grey set stays grey'


def test_digits_are_never_mirrored():
    "A wedge that is bright on the left stays so in every view; in a set that may be mirrored about half turn round."
    wedge = np.repeat(np.linspace(255, 0, 32).astype(np.uint8)[None, :, None], 32, 0).repeat(3, -1)
    wedge = np.repeat(wedge[None], 40, 0)
    for name, share in (('digits', 0.0), ('photographs', 0.5)):
        seen = np.asarray(views(image_set(name), strength=0.0)(jax.random.key(0), wedge)).mean((1, 3))
        assert np.mean(seen[:, :16].mean(1) < seen[:, 16:].mean(1)) == pytest.approx(share, abs=0.2 if share else 0)


def test_some_classes_of_a_set():
    low, high, whole = (open_source(name, 'test') for name in ('digits:0-4', 'digits:5-9', 'digits'))
    assert len(low) + len(high) == len(whole) and low.fingerprint != high.fingerprint
    assert set(low.labels()) == set(high.labels()) == set(range(5)) and image_set('digits:5-9').class_names == tuple('56789')
    loaded = load('digits:5-9', 'test', 16)
    of_all = load('digits', 'test', 16)
    assert (loaded.images == of_all.images[of_all.labels >= 5]).all() and loaded.info is image_set('digits:5-9')
    with pytest.raises(ValueError, match="'5-12' should be two or more of the classes 0 to 9"): image_set('digits:5-12')


def test_the_probe_sees_no_test_labels():
    config = scaled(Config(), 'smoke', schedule='cosine', dataset='digits:0-4')
    data = Probe().data(config, 0)
    assert data.train.info is data.held_out.info
    lying = data._replace(held_out=replace(data.held_out, labels=(data.held_out.labels + 1) % 5))
    network, params, stats = split(Probe().model(config, 0, data, None))
    state = type('State', (), dict(params=params, stats=stats))
    honest, lied = (probing(config, False, d)(network, state)['raw'] for d in (data, lying))
    assert (honest['train_loss'], honest['strength']) == (lied['train_loss'], lied['strength'])
    assert honest['predicted_classes'] == lied['predicted_classes'] > 1 and honest['loss'] != lied['loss']
    assert honest['examples'] == len(data.held_out)


def test_the_strength_is_chosen_on_training_examples():
    "Where noise drowns the classes strong regularization is chosen, whatever the test set looks like."
    random = np.random.default_rng(0)
    labels = np.arange(80) % 2
    noisy, clean = random.normal(size=(80, 60)), random.normal(size=(80, 60)) + 8 * labels[:, None]
    assert linear_probe(noisy, labels, clean, labels)['strength'] < linear_probe(clean, labels, noisy, labels)['strength']


CONTRASTIVE = scaled(Config(), 'smoke', schedule='cosine', epochs=250)


def test_a_killed_contrastive_run_resumes_to_the_same_bits(tmp_path):
    task = Contrastive(projection=8)
    values, data = task.effective(CONTRASTIVE, 'smoke', 40), task.data(CONTRASTIVE, 0)
    _, whole = train_run(CONTRASTIVE, values, 0, data, task=task)
    checkpoints, asked = Checkpoints(tmp_path), iter([False] * 4 + [True])
    with pytest.raises(Stopped):
        train_run(CONTRASTIVE, values, 0, data, task=task, checkpoints=checkpoints, stop=lambda: next(asked))
    start = checkpoints.restore()
    assert 0 < start.step < values.steps
    _, resumed = train_run(CONTRASTIVE, values, 0, data, task=task, checkpoints=checkpoints, start=start)
    for name in ('weights_sha256', 'metrics', 'curve'): assert resumed[name] == whole[name], name


def small_study(**changes):
    configs, tasks = transfer_rows('smoke', targets=['synthetic:5-9'], **changes)
    return configs, tasks


def keys(tmp_path, configs, tasks):
    return {r.row: r.key for r in Experiment('t', configs, tasks=tasks, scale='smoke', seeds=1, results_dir=tmp_path).runs}


def test_keys_know_the_pretraining(tmp_path):
    base = keys(tmp_path, *small_study())
    assert len(set(base.values())) == len(base) == 3 + 2 * len(METHODS), 'each run is of its own'
    longer = keys(tmp_path, *small_study(epochs=300))
    same = {row for row in base if base[row] == longer[row]}
    untouched = ('scratch', 'supervised')
    assert same == {'supervised'} | {row for row in base if row.endswith('5-9') and row.startswith(untouched)}
    configs, tasks = small_study()
    warmer = keys(tmp_path, configs, tasks | dict(simclr=replace(tasks['simclr'], temperature=1.0)))
    assert {row for row in base if base[row] != warmer[row]} == {row for row in base if row.startswith('simclr')}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Pretraining without labels, and what comes after, at the smallest scale: (experiment, records by row)."
    configs, tasks = small_study()
    rows = ['simclr', *(transfer_row(m, way, 'synthetic:5-9') for m in ('scratch', 'simclr') for way in ('tune', 'probe'))]
    experiment = Experiment('transfer', {row: configs[row] for row in rows}, tasks={r: t for r, t in tasks.items() if r in rows},
                            scale='smoke', seeds=1, results_dir=tmp_path_factory.mktemp('transfer'), keep_weights=True)
    return experiment, {record['row']: record for record in run(experiment)}


def test_records_are_like_all_others(small):
    for row, record in small[1].items():
        assert record['status'] == 'done', (row, record['error'])
        m = record['metrics']
        assert math.isfinite(m['loss']) and m['predicted_classes'] > 1 and 0 <= m['top1'] <= m['top5'] <= 100, (row, m)
        assert record['curve']['eval_step'] and len(record['weights_sha256']) == 64
        assert (record['steps'] == 0) == ('probe' in row)


def test_fine_tuning_starts_at_the_trunk_and_a_probe_stays_there(small):
    experiment, _ = small
    runs = {r.row: r for r in experiment.runs}
    tune, probe, scratch = (runs[transfer_row(m, way, 'synthetic:5-9')]
                            for m, way in (('simclr', 'tune'), ('simclr', 'probe'), ('scratch', 'tune')))
    given = experiment.given(tune)
    assert given.config == runs['simclr'].config and experiment.given(scratch) is None
    started, random = (split(r.task.model(r.config, r.seed, experiment.data(r), experiment.given(r)))[1] for r in (tune, scratch))
    trunk = [name for name in started if not name.startswith('head.')]
    assert all((started[name] == given.weights[f'params.{name}']).all() for name in trunk)
    assert any((started[name] != random[name]).any() for name in trunk)
    assert (started['head.kernel'] == random['head.kernel']).all()
    fitted, _ = train_run(probe.config, probe.effective, probe.seed, experiment.data(probe), task=probe.task, given=given)
    assert all((fitted.state.params[name] == given.weights[f'params.{name}']).all() for name in trunk)
    fitted, _ = train_run(tune.config, tune.effective, tune.seed, experiment.data(tune), task=tune.task, given=given)
    moved = [name for name in trunk if (fitted.state.params[name] != given.weights[f'params.{name}']).any()]
    assert len(moved) > len(trunk) / 2, 'fine-tuning trains all of the network'


def test_the_claim_is_about_rows_that_are_run():
    configs, _ = transfer_rows('laptop')
    for target in ('digits:5-9', 'photographs'):
        study = target_study(target)
        assert set(study.rows) <= set(configs) and [claim.id for claim in study.claims] == ['C12']
        for contrast in study.claims[0].contrasts: assert {configs[row].dataset for row in contrast.rows} == {target}


def papermill(folder, *args):
    "The notebook into `folder`; the completed process, its two outputs joined."
    return subprocess.run([PAPERMILL, 'nbs/transfer.ipynb', folder / 'out.ipynb', *args, '-p', 'results_dir', folder / 'results'],
                          cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=500)


@pytest.mark.slow
def test_the_notebook_at_the_smallest_scale(tmp_path):
    done = papermill(tmp_path, '-p', 'scale', 'smoke', '-p', 'seeds', '1', '--log-output')
    assert done.returncode == 0, done.stdout[-3000:]
    found = [json.loads(path.read_text()) for path in (tmp_path / 'results').glob('*.json')]
    assert {r['row'] for r in found} == set(transfer_rows('smoke')[0]) and {r['status'] for r in found} == {'done'}
    for r in found: assert math.isfinite(r['metrics']['loss']) and r['metrics']['predicted_classes'] > 1, r['row']
    assert {r['data']['name'] for r in found} == {'synthetic:0-4', 'synthetic:5-9', 'photographs'}
    text = (tmp_path / 'out.ipynb').read_text()
    for words in ('C12', 'image/png', 'Pascal VOC detection', 'no value read', 'not run'): assert words in text
    names = {path.name for path in (tmp_path / 'results').iterdir()}
    assert {'transfer_smoke_target1.png', 'transfer_smoke_target2.png', 'transfer_smoke_0.csv'} <= names


@pytest.mark.parametrize('wrong, says', [
    (dict(source='digits:0-12'), "'0-12' should be two or more of the classes 0 to 9"),
    (dict(targets='cifar'), "unknown image set 'cifar'; did you mean 'cifar10'?"),
    (dict(tune_lr=-1), 'tune_lr = -1.0 is out of range'),
])
def test_wrong_input_stops_before_training(wrong, says, tmp_path):
    refused('transfer', [says], tmp_path / 'results', scale='smoke', **wrong)
