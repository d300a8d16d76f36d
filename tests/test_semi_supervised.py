"""Pseudo-labels exact on made cases; students that are killed, or lose their teacher, or must not see a label; the notebook."""
import json
import math
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planned import refused

from resnet_rs.config import ladder, scaled
from resnet_rs.dealing import limit_labels
from resnet_rs.effective import effective
from resnet_rs.experiment import Experiment, run
from resnet_rs.joint_training import ROWS, FewLabels, JointTraining, hold_back, joint_rows, joint_table, teacher_says
from resnet_rs.pseudo_labels import balanced, confident, mixed_batches, one_hot, pseudo_labels
from resnet_rs.run_data import Data, seeded_data
from resnet_rs.runs import Given, initial_model, train_run
from resnet_rs.steps import split

ROOT = Path(__file__).resolve().parent.parent
SMOKE = scaled(ladder()['resnet_d'], 'smoke', randaug_layers=0)   # without RandAugment there is less to compile


# --- pseudo-labels ---------------------------------------------------------------------------------------------------------

SAYS = np.array([[.5, .3, .2], [.1, .8, .1], [.2, .2, .6], [.9, .1, 0], [.4, .4, .2], [.6, .3, .1]])


@pytest.mark.parametrize('threshold, kept', [(0, [0, 1, 2, 3, 4, 5]), (.41, [0, 1, 2, 3, 5]), (.6, [1, 2, 3, 5]), (.61, [1, 3]),
                                             (.9, [3])])
def test_threshold(threshold, kept):
    assert confident(SAYS, threshold).tolist() == kept
    made = pseudo_labels(SAYS, threshold=threshold)
    assert made.index.tolist() == kept and np.allclose(made.targets, SAYS[kept]) and made.targets.dtype == np.float32
    hard = pseudo_labels(SAYS, threshold=threshold, soft=False).targets
    assert (hard == np.eye(3)[SAYS[kept].argmax(1)]).all(), 'of equal ones the first'


def test_balance():
    "Six images, three classes: two each. The most confident of class 0 (images 3 and 5 of 0, 3, 4, 5); 1 and 2 are alone."
    assert balanced(SAYS, np.arange(6)).tolist() == [3, 5, 1, 1, 2, 2]
    assert balanced(SAYS, [0, 4, 3, 5, 1]).tolist() == [3, 5, 1, 1], 'of five in two classes 2.5 each, to even; none of class 2'
    assert balanced(SAYS, [4, 0]).tolist() == [0, 4]
    made = pseudo_labels(SAYS, threshold=.6, balance=True, soft=False)
    assert made.index.tolist() == [3, 1, 2] and made.targets.tolist() == np.eye(3).tolist()
    many = np.random.default_rng(0).dirichlet(np.ones(7), 500)
    each = np.bincount(many.argmax(1)[balanced(many, np.arange(500))], minlength=7)
    assert set(each) == {71}, each


@pytest.mark.parametrize('wrong', [[[.5, .6]], [[1.5, -.5]], [[math.nan, 1]], [.5, .5], np.zeros((0, 3))])
def test_no_probabilities(wrong):
    with pytest.raises(ValueError, match='probabilities'): pseudo_labels(np.array(wrong))


def _numbered(first, n):
    "Pictures of one pixel, their number; the target says it again."
    return np.arange(first, first + n, dtype=np.uint8).reshape(n, 1, 1, 1), one_hot(np.arange(first, first + n), 256)


@pytest.mark.parametrize('share, rows', [(.25, 2), (.5, 4), (.9, 7), (1, 8)])
def test_mixed_batches(share, rows):
    few, many = _numbered(0, 7), _numbered(100, 13)

    def made(seed=0, start=0): return list(mixed_batches(few, many, 8, 91, seed, start, labelled_share=share))
    numbers = np.array([images.ravel() for images, _ in made()])
    assert all((images.ravel() == targets.argmax(1)).all() and targets.sum() == 8 for images, targets in made())
    assert ((numbers < 100).sum(1) == rows).all()
    for first, size in ((0, 7), (100, 13)):
        kind = [batch[(batch >= first) & (batch < first + size)] - first for batch in numbers]
        if not sum(map(len, kind)): continue   # a share of 1
        for upto in range(1, 92):
            seen = np.bincount(np.concatenate(kind[:upto]), minlength=size)
            assert np.ptp(seen) <= 1, 'none for the third time before all for the second, however batches and epochs lie'
    later = made(start=60)
    assert len(later) == 31 and all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(later, made()[60:]))
    assert any((a[0] != b[0]).any() for a, b in zip(made(1), made()))
    if rows < 8: assert len({tuple(b < 100) for b in numbers}) > 3, 'labelled ones are not always the first rows'


# --- tasks -----------------------------------------------------------------------------------------------------------------

def experiment(folder, cells=None, **options):
    "The rows of `joint_rows`, or those given."
    cells = cells or {row: cell for row, cell in joint_rows(SMOKE).items() if row in ('labelled', 'joint')}
    configs, tasks = ({row: cell[part] for row, cell in cells.items()} for part in (0, 1))
    return Experiment('joint', configs, tasks=tasks, scale='smoke', seeds=1, results_dir=folder, checkpoint_seconds=0, **options)


def test_all_rows_make_equally_many_steps_on_one_pool(tmp_path):
    cells = joint_rows(SMOKE, teacher=SMOKE.replace(depth=26))
    made = experiment(tmp_path, cells)
    assert [cell.row for cell in made.runs] == list(ROWS) == list(joint_table(cells).rows)
    assert len({(cell.effective.steps, cell.data, cell.examples) for cell in made.runs}) == 1
    assert len({cell.key for cell in made.runs}) == len(ROWS)
    for cell in made.runs[:-1]:
        pool = made.data(cell).train
        assert len(pool) == 40 and pool.labelled[1].sum(0).tolist() == [2] * 10 and len(pool.unlabelled) == 20


def test_a_key_is_of_all_that_decides(tmp_path):
    def key(seeds=(0,), teacher=SMOKE, name='labelled', known=2, **fields):
        rows = {name: teacher, 'student': SMOKE}
        tasks = {name: FewLabels(labels_a_class=known), 'student': JointTraining(name, **fields)}
        made = Experiment('keys', rows, tasks=tasks, scale='smoke', seeds=seeds, results_dir=tmp_path)
        return [cell.key for cell in made.runs]
    first = key()
    different = [key(seeds=(1,)), key(teacher=SMOKE.replace(weight_decay=1e-5)), key(known=1),
                 key(soft=False), key(threshold=.5), key(balanced=True), key(labelled_share=.25), key(labels_a_class=1)]
    assert len({keys[1] for keys in [first, *different]}) == 1 + len(different)
    assert all(keys[0] == first[0] for keys in different[3:]), 'the teacher is the same run'
    assert key(name='teacher') == first, 'how a row is called decides nothing'


def test_wrong_tasks_stop_at_once(tmp_path):
    wrong = {'the row of the teacher': {'joint': (SMOKE, JointTraining())},
             "row that joint comes after 'labelled'": {'joint': (SMOKE, JointTraining('labelled'))},
             'no label is left': joint_rows(SMOKE, labels_a_class=4), 'per_class = 5': joint_rows(SMOKE, labels_a_class=5),
             'should be in it': joint_rows(SMOKE, labelled_share=.01)}
    for says, cells in wrong.items():
        with pytest.raises(ValueError, match=says): experiment(tmp_path, cells)
    assert not list(tmp_path.glob('*.json'))


def teacher(seed=0, config=SMOKE):
    "What a network that learned nothing would hand on."
    groups = zip(('params', 'stats'), split(initial_model(config, seed))[1:])
    return Given({f'{group}.{name}': np.asarray(v) for group, arrays in groups for name, v in arrays.items()}, config)


def test_no_held_back_label_is_seen():
    "The weights are the same whatever the labels of the unlabelled images are; one known label, and they are not."
    task, whole = JointTraining('labelled'), seeded_data(SMOKE, 0)
    known, rest = limit_labels(whole.train.labels, 2, 0)

    def weights(change, known=known):
        labels = whole.train.labels.copy()
        labels[change] = (labels[change] + 1) % 10
        data = Data(hold_back(replace(whole.train, labels=labels), known), whole.held_out)
        return train_run(SMOKE, effective(SMOKE, 'smoke', 40), 0, data, task=task, given=teacher())[1]['weights_sha256']
    first = weights([])
    assert weights(rest) == first and weights(known[:1]) != first
    assert task.data(SMOKE, 0).fingerprint() == whole.fingerprint()


def test_a_teacher_may_be_of_another_size_but_not_of_another_set():
    pool = JointTraining('teacher').data(SMOKE, 0).train
    said = teacher_says(teacher(config=SMOKE.replace(width=0.25)), SMOKE, pool, 0)
    assert said.shape == (20, 10) and np.allclose(said.sum(1), 1, atol=1e-5)
    for wrong in (teacher()._replace(config=SMOKE.replace(dataset='digits')), teacher()._replace(config=None)):
        with pytest.raises(ValueError, match='should be trained on synthetic'): teacher_says(wrong, SMOKE, pool, 0)


KILLED = """
import os, signal, sys
sys.path.insert(0, 'tests')
from resnet_rs.checkpoint import Checkpoints, Pace
from resnet_rs.experiment import run
from test_semi_supervised import experiment

made = experiment(sys.argv[1])
save = Checkpoints.save
def save_and_die(self, step, *args, **kwargs):
    done = save(self, step, *args, **kwargs)
    if made.runs[1].key in str(self.folder) and step >= 5: os.kill(os.getpid(), signal.SIGKILL)
    return done
Pace.due, Checkpoints.save = lambda self: True, save_and_die
run(made)
"""


def test_a_killed_student_ends_with_the_same_bits(tmp_path):
    whole = {r['row']: r for r in run(experiment(tmp_path / 'whole'))}
    died = subprocess.run([sys.executable, '-c', textwrap.dedent(KILLED), tmp_path / 'killed'], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    left = experiment(tmp_path / 'killed')
    assert died.returncode == -9 and [r.row for r in left.pending()] == ['joint'], died.stderr[-2000:]
    records = {r['row']: r for r in run(left)}
    assert records['joint']['resumed'] == 1 and records['joint']['initial'] == records['labelled']['key']
    for row, record in records.items():
        assert record['status'] == 'done' and math.isfinite(record['metrics']['loss'])
        assert all(record[name] == whole[row][name] for name in ('key', 'metrics', 'curve', 'weights_sha256', 'task')), row
    assert whole['joint']['task'] == dict(kind='JointTraining', after=None, labels_a_class=2, soft=True, threshold=0.0,
                                          balanced=False, labelled_share=0.5)
    assert whole['joint']['weights_sha256'] != whole['labelled']['weights_sha256']


def test_a_teacher_that_diverged_has_no_students(tmp_path):
    cells = joint_rows(SMOKE, teacher=SMOKE.replace(base_lr=100, weight_decay=1.0))
    records = {r['row']: r for r in run(experiment(tmp_path, {row: cells[row] for row in ('teacher', 'joint')}))}
    assert records['teacher']['status'] == 'diverged' and records['joint']['status'] == 'failed'
    assert records['joint']['error'] == 'LookupError: teacher, which it comes after, is diverged'


# --- the notebook ----------------------------------------------------------------------------------------------------------

def papermill(*args):
    "Through a pipe."
    command = [Path(sys.executable).parent / 'papermill', 'nbs/semi_supervised.ipynb', *map(str, args), '-p', 'scale', 'smoke',
               '-p', 'seeds', '1', '--log-output']
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=400)


def test_the_notebook(tmp_path):
    "Every planned row leaves a sound record; a second time all are skipped and shown again."
    results, out = tmp_path / 'results', tmp_path / 'out.ipynb'
    done = papermill(out, '-p', 'results_dir', results)
    assert done.returncode == 0, done.stdout[-3000:]
    found = {r['row']: r for r in (json.loads(p.read_text()) for p in results.glob('*.json'))}
    assert set(found) == set(ROWS) - {'teacher'} and len({r['data']['fingerprint'] for r in found.values()}) == 1
    for row, record in found.items():
        m = record['metrics']
        assert record['status'] == 'done' and math.isfinite(m['loss']) and m['predicted_classes'] > 1, (row, record['error'])
        assert (record['initial'] == found['labelled']['key']) == row.startswith('joint')
    assert len({r['weights_sha256'] for r in found.values()}) == len(found), 'each row does something'
    assert 'C11' in done.stdout and 'inconclusive' in done.stdout and str(results) in done.stdout
    for name in ('.csv', '.png'): assert (results / f'semi_supervised_smoke{name}').stat().st_size > 300
    again = papermill(out, '-p', 'results_dir', results)
    assert again.returncode == 0 and '6 of 6 runs are finished already and are skipped' in again.stdout
    assert 'image/png' in out.read_text() and '<table' in out.read_text()


@pytest.mark.parametrize('wrong, says', [
    (dict(labels_a_class=0, labelled_share=1.0, rows='labeled', treshold=0.5),
     ['labels_a_class = 0 is out of range', 'labelled_share = 1.0 is out of range', "did you mean 'labelled'?",
      "did you mean 'threshold'?"]),
    (dict(labels_a_class=4), ['no label is left to hold back']),
    (dict(rows='joint'), ["row that joint comes after 'labelled'"])], ids=['parameters', 'labels', 'rows'])
def test_wrong_input_stops_before_training(wrong, says, tmp_path):
    refused('semi_supervised', says, tmp_path / 'results', scale='smoke', **wrong)
