"""Table 6: clips as a task of the one training loop, its rows in the paper's settings, and its notebook."""
import json
import math
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import refused
from flax import nnx

from resnet_rs.checkpoint import Checkpoints, Stopped
from resnet_rs.clip_runs import VIDEO_LADDER, VIDEO_SCALES, Clips, video_rows
from resnet_rs.clips import average_views, clip_batches, clip_views
from resnet_rs.config import Config
from resnet_rs.effective import effective
from resnet_rs.experiment import Experiment, run
from resnet_rs.image_sets import ImageSet
from resnet_rs.images import Arrays
from resnet_rs.paper import table
from resnet_rs.registry import create_model, from_config
from resnet_rs.run_data import Data
from resnet_rs.runs import train_run
from resnet_rs.steps import initial_state, split
from resnet_rs.videos import MemoryVideos

ROOT = Path(__file__).resolve().parent.parent
ROWS = ['baseline', 'dropout', 'label_smoothing', 'stochastic_depth', 'ema', 'weight_decay', 'epochs', 'scale_jittering', 'se',
        'resnet_d']
SMALL = Config(network='resnet3d', depth=14, width=0.125, dataset='rendered_motion', image_size=16, batch_size=8, base_lr=0.2,
               schedule='cosine', epochs=200)
TASK = Clips(frames=4, stride=2, clips=3, crops=1)


def made_up(n=20, frames=12, height=18, width=24, seed=0, flip=False):
    "Clips of noise, wider than high, in memory."
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, frames, height, width, 3), dtype=np.uint8)
    info = ImageSet('rendered_motion', 8, 32, flip, (0.0,) * 3, (1.0,) * 3, dict(train=n), 'noise', 'none')
    labels = np.arange(n, dtype=np.int32) % 8
    return MemoryVideos(Arrays(images, labels, info.name, 'train', f'noise{seed}', info))


def made_up_data(**options): return Data(made_up(seed=0, **options), made_up(n=13, seed=1, **options))


def batches(task, config, data, steps=6, seed=0, start=0, shard=(0, 1)):
    return list(task.batches(config, data, steps, seed, start, shard))


# --- batches -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('jitter', [None, (0.08, 1.0), (0.49, 1.0)])
def test_a_batch_is_a_function_of_the_seed_and_its_number(jitter):
    data, task = made_up_data(), Clips(frames=4, stride=2, jitter=jitter)
    whole = batches(task, SMALL, data)
    assert len(whole) == 6 and whole[0][0].shape == (8, 4, 16, 16, 3) and whole[0][0].dtype == np.uint8
    for start in (1, 4):
        for (x, y), (a, b) in zip(batches(task, SMALL, data, start=start), whole[start:], strict=True):
            assert (x == a).all() and (y == b).all()
    other = batches(task, SMALL, data, seed=1)
    assert not (other[0][0] == whole[0][0]).all()
    shared = [batches(task, SMALL, data, shard=(host, 2)) for host in (0, 1)]
    for k, (x, y) in enumerate(whole):
        assert (np.concatenate([part[k][0] for part in shared]) == x).all()
        assert (np.concatenate([part[k][1] for part in shared]) == y).all()


def test_jitter_off_cuts_the_height_of_the_frame_and_on_cuts_boxes():
    data = made_up_data()
    off, on, milder = (batches(Clips(frames=4, stride=2, jitter=area), SMALL, data) for area in (None, (0.08, 1.0), (0.49, 1.0)))
    for k in range(6): assert (off[k][1] == on[k][1]).all() and (off[k][1] == milder[k][1]).all(), 'the same videos'
    assert not (on[0][0] == off[0][0]).all() and not (on[0][0] == milder[0][0]).all()
    plain = clip_batches(data.train, 4, 2, 16, 8, 6, 0, area=None)
    boxed = clip_batches(data.train, 4, 2, 16, 8, 6, 0, area=(0.08, 1.0), aspect=(0.5, 2.0))
    for made, theirs in ((off, plain), (on, boxed)):
        for (x, _), (a, _) in zip(made, theirs, strict=True): assert (x == a).all()


@pytest.mark.parametrize('flip', [False, True])
def test_clips_are_mirrored_only_where_the_set_allows_it(flip):
    "A ramp that rises from left to right."
    source = made_up(flip=flip)
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None] * 10, (20, 12, 18, 24, 3))
    source._arrays = Arrays(ramp, source.labels(), 'rendered_motion', 'train', 'ramp', source.info)
    seen = np.concatenate([x for x, _ in batches(TASK, SMALL, Data(source, source))])
    rises = seen[:, 0, 0, -1, 0] > seen[:, 0, 0, 0, 0]
    assert rises.all() if not flip else 0 < rises.mean() < 1


def test_clips_arrive_as_numbers_from_0_to_1():
    data = made_up_data()
    augment = TASK.options(SMALL, data)['augment']
    x = batches(TASK, SMALL, data)[0][0]
    assert np.allclose(augment(jax.random.key(0), x, None), x / 255., atol=1e-6)
    assert augment is Clips(jitter=(0.5, 1.0)).options(SMALL, data)['augment'], 'one compiled program'


# --- data --------------------------------------------------------------------------------------------------------------------

def test_the_seeds_subset_has_all_classes_and_grows():
    small, large, other = (TASK.data(SMALL.replace(train_examples=n), seed) for n, seed in ((40, 0), (80, 0), (40, 1)))
    assert np.bincount(small.train.labels()).tolist() == [5] * 8 and len(large.train) == 80
    assert len(small.held_out) == 1000 and small.held_out.fingerprint == other.held_out.fingerprint
    assert len({d.fingerprint() for d in (small, large, other)}) == 3
    first = [{data.train[i].key for i in range(len(data.train))} for data in (small, large, other)]
    assert first[0] < first[1] and first[0] != first[2]
    few = Clips(judged=64).data(SMALL.replace(train_examples=40), 0).held_out
    assert len(few) == 64 and np.bincount(few.labels()).tolist() == [8] * 8
    digits = TASK.data(SMALL.replace(dataset='rendered_digit', train_examples=40), 0)
    assert digits.train.info.classes == 10 and not digits.train.info.flip and not small.train.info.flip


@pytest.mark.parametrize('config, says', [
    (Config(dataset='rendered_motion'), "'resnet3d' does"), (SMALL.replace(randaug_prob=1), 'scale jitter'),
    (SMALL.replace(augmentation='autoaugment'), 'scale jitter'), (SMALL.replace(dataset='rendered_digits'), 'rendered_digit'),
    (SMALL.replace(dataset='kinetics400'), 'not prepared'), (SMALL.replace(dataset='folder:/no/such'), 'there is no folder')])
def test_what_is_no_task_of_clips_is_refused(config, says, tmp_path):
    with pytest.raises(ValueError, match=says): TASK.data(config, 0, str(tmp_path) if 'kinetics' in config.dataset else None)


def test_a_folder_of_videos(tmp_path):
    "Streamed: decoded when needed, by threads; the same batches again."
    av = pytest.importorskip('av')
    rng = np.random.default_rng(0)
    for split_name, n in (('train', 4), ('test', 2)):
        for name in ('left', 'right'):
            for i in range(n):
                path = tmp_path / split_name / name / f'{i}.mp4'
                path.parent.mkdir(parents=True, exist_ok=True)
                with av.open(str(path), 'w') as file:
                    stream = file.add_stream('mpeg4', rate=10)
                    stream.width, stream.height, stream.pix_fmt = 48, 32, 'yuv420p'
                    for frame in rng.integers(0, 255, (9, 32, 48, 3), dtype=np.uint8):
                        file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
                    file.mux(stream.encode())
    config = SMALL.replace(dataset=f'folder:{tmp_path}')
    data = TASK.data(config, 0)
    assert len(data.train) == 8 and len(data.held_out) == 4 and data.train.info.classes == 2
    again = batches(TASK, config, data, start=2)
    assert all((a[0] == b[0]).all() for a, b in zip(batches(TASK, config, data)[2:], again, strict=True))
    network, params, stats = split(TASK.model(config, 0, data, None))
    assert TASK.evaluator(config, False, data)(network, initial_state(params, stats))['raw']['examples'] == 4


# --- evaluation --------------------------------------------------------------------------------------------------------------

def test_evaluation_is_a_loop_over_videos_and_views_by_hand():
    "Raw and averaged weights differ; frames are wider than high, so that the three squares differ."
    data, task = made_up_data(), Clips(frames=4, stride=2, clips=3, crops=3, eval_size=18)
    network, params, stats = split(task.model(SMALL, 0, data, None))
    _, others, _ = split(task.model(SMALL, 1, data, None))
    state = initial_state(params, stats)._replace(ema_params=others)
    found = task.evaluator(SMALL, True, data)(network, state)
    for kind, arrays in (('raw', params), ('ema', others)):
        model = network.rebuild(arrays, stats)
        model.eval()
        graph = nnx.split(model)
        view_by_view = jax.jit(lambda clip, graph=graph: nnx.merge(*graph)(clip[None] / jnp.float32(255))[0])
        top1 = top5 = loss = 0
        for i in range(len(data.held_out)):
            video = data.held_out[i]
            views = clip_views(video, 4, 2, 18, (3, 3))
            assert views.shape == (9, 4, 18, 18, 3) and not (views[0] == views[3]).all()
            logits = np.stack([view_by_view(view) for view in views]).astype(float)
            shares = np.exp(logits - logits.max(1, keepdims=True))
            mean = (shares / shares.sum(1, keepdims=True)).mean(0)
            assert np.allclose(mean, average_views(jnp.asarray(logits, jnp.float32), 9)[0], atol=1e-6)
            rank = int((mean > mean[video.label]).sum())
            top1, top5, loss = top1 + (rank < 1), top5 + (rank < 5), loss - math.log(mean[video.label])
        assert (found[kind]['top1'], found[kind]['top5']) == (pytest.approx(100 * top1 / 13), pytest.approx(100 * top5 / 13))
        assert found[kind]['loss'] == pytest.approx(loss / 13, rel=1e-4) and found[kind]['examples'] == 13
    assert found['raw']['loss'] != found['ema']['loss']
    assert task.evaluator(SMALL, False, data)(network, state)['ema'] is None


def test_the_mean_of_probabilities_is_not_that_of_logits():
    logits = jnp.array([[9.0, 0, 0], [0, 1, 0], [0, 1, 0]])
    assert average_views(logits, 3)[0].argmax() == logits.mean(0).argmax() == 0
    assert np.allclose(average_views(logits, 3)[0], jax.nn.softmax(logits).mean(0))
    assert not np.allclose(average_views(logits, 3)[0], jax.nn.softmax(logits.mean(0)), atol=0.1)


# --- rows --------------------------------------------------------------------------------------------------------------------

def test_rows_are_those_of_table_6_in_order():
    assert list(VIDEO_LADDER) == ROWS == [row.row for row in table('table6')]
    for scale in VIDEO_SCALES:
        cells = video_rows(scale)
        assert list(cells) == ROWS and len(set(cells.values())) == 10, 'each step changes something'
        assert {config.randaug_prob for config, _ in cells.values()} == {0.0}
        assert [task.jitter is not None for _, task in cells.values()] == [row in ROWS[-3:] for row in ROWS]


def test_the_last_row_is_the_released_run():
    "k400_resnet3drs_50_tpu.yaml, value by value; what no source has is the first row's 200 epochs and decay of 1e-4."
    config, task = video_rows('paper')['resnet_d']
    assert (config.depth, config.width, config.image_size, config.batch_size, config.epochs) == (50, 1.0, 224, 1024, 350)
    assert (config.base_lr, config.schedule, config.momentum, config.weight_decay) == (0.2, 'cosine', 0.9, 4e-5)
    assert (config.dropout, config.label_smoothing, config.drop_path, config.ema_decay) == (0.5, 0.1, 0.1, 0.9999)
    assert (config.bn_momentum, config.se_ratio) == (0, 0.25)
    assert (config.stem, config.stem_pool, config.shortcut) == ('deep', 'max', 'conv')
    assert (task.frames, task.stride, task.clips, task.crops, task.eval_size) == (32, 2, 10, 3, 256)
    assert task.jitter == (0.08, 1.0) and task.aspect == (0.5, 2.0)
    values = effective(config, 'paper', 215_572)   # 210.5 updates of 1,024 clips an epoch
    assert (values.steps, values.warmup_steps, values.peak_lr) == (73_682, 1_050, pytest.approx(0.8))
    assert values.ema_decay == pytest.approx(0.9999) and values.weight_decay == pytest.approx(4e-5)
    first, _ = video_rows('paper')['baseline']
    assert (first.epochs, first.weight_decay, first.ema_decay, first.bn_momentum, first.stem) == (200, 1e-4, 0, 0.9, 'plain')


def test_settings_of_the_table_are_used():
    read = {row.item: row.value for row in table('table6_settings')}
    config, task = video_rows('paper')['resnet_d']
    for item, value in {'batch size': config.batch_size, 'label smoothing': config.label_smoothing, 'dropout': config.dropout,
                        'stochastic depth': config.drop_path, 'EMA decay': config.ema_decay, 'weight decay': config.weight_decay,
                        'epochs': config.epochs}.items():
        assert float(read[f'{item}, last row']) == value, item
    assert read['frames x stride, last row'] == f'{task.frames} x {task.stride}'


def test_the_window_of_the_average_keeps_its_share_of_the_run():
    "10,000 of 73,682 updates, which is not ImageNet's share."
    config, _ = video_rows('laptop')['resnet_d']
    values = effective(config, 'laptop', config.train_examples)
    assert 1 / (1 - values.ema_decay) / values.steps == pytest.approx(10_000 / 73_682, rel=1e-6)


def test_the_network_of_a_configuration():
    def structure(make): return jax.tree.map(lambda v: (v.shape, v.dtype), nnx.state(nnx.eval_shape(make)))
    cells = video_rows('paper')
    plain, last = cells['baseline'][0], cells['resnet_d'][0]
    assert structure(lambda: from_config(plain, 400, nnx.Rngs(0))) == structure(lambda: create_model('resnet3d_50'))
    assert structure(lambda: from_config(last, 400, nnx.Rngs(0))) == structure(
        lambda: create_model('resnet3d_rs_50', self_gating=False))
    with pytest.raises(ValueError, match='does not go with network'): plain.replace(depth_factor=1.0)
    with pytest.raises(ValueError, match='depth'): plain.replace(depth=None)


@pytest.mark.parametrize('wrong', [dict(scale='laptp'), dict(scale='laptop', framse=4), dict(scale='laptop', weight_decay=-1.0),
                                   dict(scale='laptop', depth=51)])
def test_wrong_rows_are_refused(wrong):
    with pytest.raises(ValueError): video_rows(**wrong)


# --- runs --------------------------------------------------------------------------------------------------------------------

@cache
def trained():
    "A run of 6 steps with everything on, never interrupted."
    config, task, data = averaged_row()
    return train_run(config, effective(config, 'smoke', 30), 0, data, task=task)


def averaged_row():
    config, task = video_rows('smoke', image_size=16, frames=4, batch_size=8, epochs=100)['resnet_d']
    return config, task, Data(made_up(30, seed=0), made_up(13, seed=1))


@pytest.mark.parametrize('at', [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, at):
    config, task, data = averaged_row()
    values = effective(config, 'smoke', 30)
    assert values.steps == 6
    asked = iter(range(1, 100))
    with pytest.raises(Stopped):
        train_run(config, values, 0, data, task=task, checkpoints=Checkpoints(tmp_path), stop=lambda: next(asked) == at)
    start = Checkpoints(tmp_path).restore()
    assert start.step == at
    fitted, outcome = train_run(config, values, 0, data, task=task, checkpoints=Checkpoints(tmp_path), start=start)
    whole, theirs = trained()
    assert fitted.weights_sha256() == whole.weights_sha256() and outcome['resumed'] == 1
    assert outcome['metrics'] == theirs['metrics'] and outcome['curve'] == theirs['curve']


@pytest.mark.slow
def test_a_process_killed_in_the_middle_goes_on_to_the_same_bits(tmp_path):
    "SIGKILL, and the same experiment again in a process of its own: the record of a run never interrupted."
    code = '''
import sys
from resnet_rs.clip_runs import video_rows
from resnet_rs.experiment import Experiment, run
cells = {'all': video_rows('smoke', epochs=1000)['resnet_d']}
rows, tasks = ({row: cell[part] for row, cell in cells.items()} for part in (0, 1))
e = Experiment('video', rows, tasks=tasks, scale='smoke', seeds=1, results_dir=sys.argv[1], checkpoint_seconds=0)
if sys.argv[2] == 'kill':
    import os, signal
    from resnet_rs import training
    save = training.save_checkpoint
    def saving(checkpoints, fitted): save(checkpoints, fitted); os.kill(os.getpid(), signal.SIGKILL)
    training.save_checkpoint = saving
record, = run(e)
print(record['status'], record['weights_sha256'], record['resumed'], record['task']['kind'], record['metrics'])
'''
    def made(folder, how):
        done = subprocess.run([sys.executable, '-c', code, str(tmp_path / folder), how], cwd=ROOT, capture_output=True, text=True,
                              timeout=280)
        return done.returncode, done.stdout.strip().splitlines()[-1:], done.stderr[-2000:]
    assert made('a', 'kill')[0] == -9 and not list((tmp_path / 'a').glob('*.json'))
    status, again, error = made('a', 'on')
    assert status == 0, error
    _, whole, _ = made('b', 'on')
    assert again[0].split(' ')[:2] == whole[0].split(' ')[:2] and again[0].split(' ')[0] == 'done'
    assert again[0].split(' ')[2] == '1' and whole[0].split(' ')[2] == 'None'
    assert again[0].split(' ', 3)[3] == whole[0].split(' ', 3)[3]


def test_a_task_is_part_of_the_key_and_travels_to_other_processes(tmp_path):
    cells = video_rows('smoke')
    rows = {'plain': cells['epochs'], 'jitter': cells['scale_jittering'], 'views': video_rows('smoke', clips=3)['epochs']}
    rows, tasks = ({row: cell[part] for row, cell in rows.items()} for part in (0, 1))
    assert rows['plain'] == rows['jitter'] == rows['views']
    experiment = Experiment('video', rows, tasks=tasks, scale='smoke', seeds=1, results_dir=tmp_path)
    assert len({run.key for run in experiment.runs}) == 3, 'another task, another run'
    assert [r.task for r in pickle.loads(pickle.dumps(experiment)).runs] == list(tasks.values())


def test_a_network_learns_its_clips(tmp_path):
    "Long enough, the loss falls; the record says what was learned from."
    config, task = video_rows('smoke')['baseline']
    config = config.replace(epochs=2000)
    experiment = Experiment('video', {'baseline': config}, tasks={'baseline': task}, scale='smoke', seeds=1, results_dir=tmp_path)
    record, = run(experiment)
    assert record['status'] == 'done' and record['task']['kind'] == 'Clips' and record['task']['frames'] == task.frames
    assert record['data']['name'] == 'rendered_motion' and 'RENDERED' in record['data']['source']
    losses = record['curve']['train_loss']
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


# --- the notebook ------------------------------------------------------------------------------------------------------------

def papermill(*args):
    command = [str(Path(sys.executable).parent / 'papermill'), 'nbs/video.ipynb', *map(str, args)]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=400)


@pytest.mark.slow
def test_the_notebook_runs_leaves_sound_records_and_says_what_it_saw(tmp_path):
    folder, out = tmp_path / 'results', tmp_path / 'out.ipynb'
    done = papermill(out, '-p', 'scale', 'smoke', '-p', 'seeds', 1, '-p', 'results_dir', folder)
    assert done.returncode == 0, done.stdout[-3000:]
    found = {r['row']: r for r in (json.loads(path.read_text()) for path in folder.glob('*.json'))}
    assert sorted(found) == sorted(ROWS)
    for row, record in found.items():
        m = record['metrics']
        assert record['status'] == 'done' and math.isfinite(m['loss']) and m['predicted_classes'] > 1, (row, m)
        assert (m['top1_ema'] is not None) == (ROWS.index(row) >= ROWS.index('ema'))
        assert (record['task']['jitter'] is not None) == (row in ROWS[-3:]) and record['config']['network'] == 'resnet3d'
    assert len({r['weights_sha256'] for r in found.values()}) == len(ROWS), 'each step of the ladder does something'
    text = out.read_text()
    for said in ('C13', 'rendered', 'inconclusive', '<table'): assert said in text
    assert text.count('image/png') >= 2
    for name in ('.csv', '_ladder.png', '_curves.png'): assert (folder / f'video_smoke{name}').stat().st_size > 500
    again = papermill(tmp_path / 'again.ipynb', '-p', 'scale', 'smoke', '-p', 'seeds', 1, '-p', 'results_dir', folder)
    assert '10 of 10 runs are finished already' in (tmp_path / 'again.ipynb').read_text(), again.stdout[-2000:]


def test_wrong_parameters_stop_before_training(tmp_path):
    wrong = dict(scale='smok', rows='baseline,jitter', smallest_area=1.5, frames=0, framse=3)
    says = ("scale = 'smok' is not one of smoke, laptop, gpu, paper", "rows = 'jitter' is not one of", 'smallest_area = 1.5',
            'frames = 0', "unknown parameter 'framse'; did you mean 'frames'?")
    refused('video', says, tmp_path / 'results', **wrong)
