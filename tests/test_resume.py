"""Killed, stopped, disks that fail: the same command goes on and ends with the same bits.

The real program on a real notebook: papermill and its kernel are killed with SIGKILL in the middle of a row.
"""
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import psutil
import pytest

from resnet_rs.papermill import STOPPED
from resnet_rs.runs import initial_weights

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = dict(scale='laptop', seeds=1, rows='epochs,ema,randaugment', epochs=500)   # a row lasts a few checkpoints


def papermill(results, **changes):
    """The ablation, with rows long enough to be caught in the middle; its output goes to a file."""
    results.mkdir(parents=True, exist_ok=True)
    arguments = [part for item in {**ARGUMENTS, **changes, 'results_dir': results}.items() for part in ('-p', *map(str, item))]
    command = [Path(sys.executable).parent / 'papermill', ROOT / 'nbs/ablation.ipynb', results / 'executed.ipynb',
               '--stdout-file', '-', '--no-progress-bar', *arguments]
    shown = (results / 'shown.txt').open('w')
    process = subprocess.Popen(command, stdout=shown, stderr=subprocess.STDOUT, cwd=ROOT)
    process.shown = lambda: Path(shown.name).read_text()
    return process


def wait_for(condition, process, seconds=240):
    """Until `condition()` is true; what it returned."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < end, process.shown()
        time.sleep(0.05)
    return found


def checkpoint(results, after=frozenset()):
    """The names of whole checkpoints, key/step, that are new since `after`."""
    return {f'{path.parent.name}/{path.name}' for path in results.glob('checkpoints/*/[0-9]*') if path.name.isdecimal()} - after


def outcome(results):
    """All that a run decides, by key: not when and how fast it ran."""
    records = [json.loads(path.read_text()) for path in results.glob('*.json')]
    names = ('row', 'status', 'metrics', 'curve', 'weights_sha256', 'steps')
    return {r['key']: {name: r[name] for name in names} for r in records}


def table(results): return (results / 'ablation_laptop.csv').read_text()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The same command, never interrupted."""
    results = tmp_path_factory.mktemp('whole')
    process = papermill(results)
    assert process.wait(400) == 0, process.shown()
    return results


@pytest.mark.slow
def test_killed_papermill_killed_kernel_and_sigterm(tmp_path, whole):
    """Each interruption hits a row after its first checkpoint; the fourth command finishes what is left."""
    results, seen = tmp_path / 'results', set()

    process = papermill(results)
    kernel = wait_for(lambda: checkpoint(results) and psutil.Process(process.pid).children(), process)[0]
    process.kill()
    process.wait(10)
    kernel.wait(30)                                # orphaned, it ends by itself
    seen |= checkpoint(results)
    assert seen and len(outcome(results)) < 3

    process = papermill(results)
    kernel = wait_for(lambda: checkpoint(results, seen) and psutil.Process(process.pid).children(), process)[0]
    kernel.kill()
    assert process.wait(60) not in (0, STOPPED) and 'goes on from its checkpoint of step' in process.shown()
    seen |= checkpoint(results)

    process = papermill(results)
    wait_for(lambda: checkpoint(results, seen), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == STOPPED, process.shown()
    told = re.search(r'Stopped: (\w+), seed 0, after step (\d+) of \d+, checkpoint of step (\d+); the same command goes on',
                     process.shown())
    assert told and told[2] == told[3], process.shown()
    assert any(name.endswith(f'/{told[2]}') for name in checkpoint(results)), 'it was saved when asked to stop, not when due'

    process = papermill(results)
    assert process.wait(400) == 0, process.shown()
    assert f'goes on from its checkpoint of step {told[2]}' in process.shown()
    assert outcome(results) == outcome(whole) and table(results) == table(whole)
    assert not checkpoint(results), 'those of finished runs are gone'
    resumed = [json.loads(path.read_text()).get('resumed') or 0 for path in results.glob('*.json')]
    assert sum(resumed) == 3, resumed

    process = papermill(results)
    assert process.wait(100) == 0 and '3 of 3 runs are finished already' in process.shown() and table(results) == table(whole)


@pytest.mark.slow
def test_two_processes_divide_the_runs(tmp_path, whole):
    """Started at once on one folder: each row is trained once, by one of them, and both show the whole table."""
    first, second = papermill(tmp_path / 'results'), papermill(tmp_path / 'results')
    assert first.wait(400) == 0 and second.wait(400) == 0, first.shown() + second.shown()
    assert outcome(tmp_path / 'results') == outcome(whole)


def script(code, **popen):
    """`code` in a process of its own, after the names it needs; its output."""
    head = '''
        import sys, warnings
        from pathlib import Path
        from resnet_rs.config import ladder, scaled
        from resnet_rs.checkpoint import Checkpoints
        from resnet_rs.experiment import Experiment, run
        warnings.simplefilter('always')
        folder = Path(sys.argv[1])
        rows = {row: scaled(config, 'smoke') for row, config in ladder().items() if row in ('baseline', 'epochs')}
        def grid(**more): return Experiment('demo', rows, scale='smoke', seeds=1, results_dir=folder, **more)
    '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(head) + textwrap.dedent(code), popen.pop('folder')], text=True,
                          capture_output=True, timeout=200, **popen)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def digests(tmp_path_factory):
    """Weight digests of the two small rows, undisturbed."""
    shown = script("print('DIGESTS', *(r['weights_sha256'] for r in run(grid())))", folder=str(tmp_path_factory.mktemp('calm')))
    return re.search(r'DIGESTS (.*)', shown)[1]


@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoints_and_not_the_run(tmp_path, digests):
    """A limit on the size of files stops what is larger than a record, as a disk does that is nearly full."""
    shown = script('''
        import resource, signal
        experiment = grid(checkpoint_seconds=0)
        import resnet_rs.checkpoint as room
        room.Pace.took = lambda self, seconds, saved: None      # at every step
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        print('DIGESTS', *(r['weights_sha256'] for r in run(experiment)))
        left = [path for path in folder.rglob('*') if 'checkpoints' in path.parts and path.is_file()]
        assert not left, left
    ''', folder=str(tmp_path))
    assert re.search(r'DIGESTS (.*)', shown)[1] == digests
    assert 'CheckpointWarning: no checkpoint of step 1 in' in shown and 'training goes on without it' in shown, shown
    assert 'Traceback' not in shown, shown


def without_privilege():
    """Root may write anywhere; not so without this capability (CAP_DAC_OVERRIDE, dropped from the bounding set)."""
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0) != 0: raise OSError('cannot drop privilege')


@pytest.mark.slow
def test_a_folder_that_turns_read_only(tmp_path, digests):
    """Checkpoints cannot be written: a warning. Records cannot be written: an error, at once, before any training."""
    script('grid()', folder=str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints').chmod(0o555)
    shown = script('''
        experiment = grid(checkpoint_seconds=0)
        print('DIGESTS', *(r['weights_sha256'] for r in run(experiment)))
    ''', folder=str(tmp_path), preexec_fn=without_privilege)
    assert re.search(r'DIGESTS (.*)', shown)[1] == digests and 'CheckpointWarning: no checkpoint of step' in shown
    tmp_path.chmod(0o555)
    shown = script('''
        try: grid()
        except OSError as error: print('REFUSED', error)
        else: raise SystemExit('it should have been refused')
    ''', folder=str(tmp_path), preexec_fn=without_privilege)
    assert re.search(r'REFUSED .*cannot be written to: Permission denied', shown), shown


@pytest.mark.slow
def test_a_truncated_newest_checkpoint(tmp_path, digests):
    """The one before it is used, and it is said; so is a start from nothing when all are damaged."""
    shown = script('''
        import os, signal
        import resnet_rs.checkpoint as room
        from resnet_rs.checkpoint import Stopped
        from resnet_rs.experiment import Progress
        room.Pace.took = lambda self, seconds, saved: None

        def interrupted(at):
            "Run until step `at` of the row epochs; the step of each checkpoint that is left."
            shown, Progress.step = Progress.step, lambda self, step, total, loss: (
                signal.raise_signal(signal.SIGTERM) if self.run.row == 'epochs' and step == at else None)
            try: run(grid(checkpoint_seconds=0))
            except Stopped: pass
            else: raise SystemExit('it should have stopped')
            Progress.step = shown
            return Checkpoints(folder / 'checkpoints' / grid().pending()[0].key)

        def truncate(checkpoints, step):
            for path in Path(checkpoints.folder, str(step)).rglob('*'):
                if path.is_file() and path.parent.name == 'd': os.truncate(path, path.stat().st_size // 2)

        kept = interrupted(6)
        assert kept.steps() == [6, 7], kept.steps()
        truncate(kept, 7)
        kept = interrupted(10)
        for step in kept.steps(): truncate(kept, step)
        print('DIGESTS', *(r['weights_sha256'] for r in run(grid())))
    ''', folder=str(tmp_path))
    assert re.search(r'DIGESTS (.*)', shown)[1] == digests
    assert re.search(r'checkpoint of step 7 in .* is damaged .*going back to the one before', shown), shown
    assert 'goes on from its checkpoint of step 6' in shown and re.search('step 10 in .* is damaged', shown), shown
    assert shown.count('goes on from') == 1 and 'Traceback' not in shown, shown


def test_a_diverged_run_names_its_last_good_checkpoint(tmp_path):
    """The record says diverged, at which step and rate, and which checkpoint is sound; the grid goes on."""
    shown = script('''
        import json
        import resnet_rs.checkpoint as room
        room.Pace.took = lambda self, seconds, saved: None
        rows['wild'] = rows['epochs'].replace(weight_decay=1.0, base_lr=0.8)
        rows['after'] = rows['baseline'].replace(label_smoothing=0.1)
        records = {r['row']: r for r in run(grid(checkpoint_seconds=0))}
        assert records['after']['status'] == 'done', records['after']
        wild = records['wild']
        assert wild['status'] == 'diverged', wild
        good = Checkpoints((folder / wild['divergence']['checkpoint']).parent)
        found = good.restore()
        assert found.step < wild['divergence']['step'] == wild['steps']
        assert all((array == array).all() for array in found.arrays.values()), 'no NaN in it'
        print(wild['error'], wild['divergence'])
    ''', folder=str(tmp_path))
    told = r'the loss is not finite at step \d+ \(learning rate [\d.]+\); the last good checkpoint is that of step \d+'
    assert re.search(told, shown), shown


def test_a_run_that_ends_with_weights_that_are_not_finite(tmp_path):
    """Every loss was finite, the last step was not: diverged, and the grid goes on."""
    shown = script('''
        rows['wild'] = rows['baseline'].replace(base_lr=100, weight_decay=1.0, epochs=30, warmup_epochs=0)
        rows['after'] = rows['baseline'].replace(label_smoothing=0.1)
        for _ in range(2): print(*(f"{r['row']}={r['status']}" for r in run(grid())))
    ''', folder=str(tmp_path))
    assert shown.count('baseline=done epochs=done wild=diverged after=done') == 2, shown


def test_equal_rows_are_one_run(tmp_path):
    """And what keeps it from ending is told, not what follows from that."""
    shown = script('''
        import resnet_rs.experiment as room
        rows['twin'] = rows['baseline']
        print(*(r['weights_sha256'][:8] for r in run(grid())))
        rows['other'] = rows['third'] = rows['baseline'].replace(label_smoothing=0.1)
        def broken(*_, **__): raise RuntimeError('the true reason')
        room.train_run = broken
        print(*{r['error'] for r in run(grid()) if r['row'] in ('other', 'third')})
    ''', folder=str(tmp_path))
    assert '2/2' in shown and re.search('1/1 (other|third), seed 0: failed: RuntimeError: the true reason', shown), shown
    assert 'KeyError' not in shown


def test_looking_for_weights_deletes_nothing(tmp_path):
    """A folder with numbered subfolders is not always one of checkpoints."""
    for name in ('0', '1', '7'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'picture.png').write_bytes(b'mine')
    with pytest.raises(ValueError, match='holds no checkpoint of a trained network'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        initial_weights(tmp_path)
    assert len(list(tmp_path.glob('*/picture.png'))) == 3


def test_a_run_of_two_commits_counts_as_uncommitted(tmp_path):
    """What was begun by other code must not become evidence of this one."""
    shown = script('''
        import signal
        import resnet_rs.experiment as room
        from resnet_rs.checkpoint import Stopped
        from resnet_rs.experiment import Progress
        origin = room.provenance()
        def commit(name): return lambda: origin | {'git': {'commit': name, 'dirty': False}}
        shown, Progress.step = Progress.step, lambda self, step, total, loss: step == 2 and signal.raise_signal(signal.SIGTERM)
        room.provenance = commit('a' * 40)
        try: run(grid())
        except Stopped: Progress.step = shown
        room.provenance = commit('b' * 40)
        print('DIRTY', [r['git']['dirty'] for r in run(grid())])
    ''', folder=str(tmp_path))
    assert 'DIRTY [True, False]' in shown, shown
