"""An experiment in slices on a machine that has neither papermill nor Grain nor TFDS: the records are those of the notebook."""
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from resnet_rs.papermill import STOPPED, _heeds
from resnet_rs.small_sets import draw_synthetic

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ('papermill', 'grain', 'tensorflow_datasets', 'array_record', 'simplejpeg', 'IPython', 'nbdev', 'nbformat', 'sklearn')


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "A start of Python after which the absent packages cannot be imported, nor found."
    folder = tmp_path_factory.mktemp('bare')
    (folder / 'sitecustomize.py').write_text(textwrap.dedent(f'''
        import importlib.abc, importlib.machinery, sys
        class Absent(importlib.machinery.PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name.partition('.')[0] in {ABSENT!r}: return None
                return super().find_spec(name, path, target)
        sys.meta_path = [Absent if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
    '''))
    return os.environ | {'PYTHONPATH': f'{folder}:{ROOT}'}


def command(*arguments, notebook='nbs/ablation.ipynb'):
    return [sys.executable, '-m', 'resnet_rs.slices', str(ROOT / notebook), *map(str, arguments)]


def sliced(env, *arguments, cwd=ROOT, **which):
    return subprocess.run(command(*arguments, **which), env=env, cwd=cwd, capture_output=True, text=True, timeout=400)


def test_the_packages_are_absent_there(bare):
    for name in ABSENT:
        done = subprocess.run([sys.executable, '-c', f'import {name}'], env=bare, capture_output=True, text=True)
        assert f"No module named '{name}'" in done.stderr, done.stderr


def test_a_wrong_parameter_is_one_line(bare, tmp_path):
    done = sliced(bare, '-p', 'scale', 'phone', '-p', 'results_dir', tmp_path / 'results')
    assert done.returncode == 1 and not (tmp_path / 'results').exists()
    assert done.stderr.splitlines() == ["ParameterError: scale = 'phone' is not one of smoke, laptop, gpu, paper"]
    for wrong, says in ((['--minutes', '0'], '--minutes 0 should be more than 0'), (['-q'], 'unrecognized arguments: -q')):
        done = sliced(bare, *wrong)
        assert done.returncode == 2 and says in done.stderr
    done = sliced(bare, notebook='nbs/nothing.ipynb')
    assert done.returncode == 2 and 'there is no notebook' in done.stderr


@pytest.mark.slow
def test_slices_of_an_experiment_on_a_file_of_arrays(bare, tmp_path):
    """Stopped twice, outside of training and in it; all runs end in records, and the report is printed."""
    parts = {}
    for split in ('train', 'test'): parts[f'{split}_images'], parts[f'{split}_labels'] = draw_synthetic(split)
    np.savez(tmp_path / 'made_up.npz', **parts, flip=False)
    given = dict(scale='smoke', rows='epochs,ema', seeds=1, epochs=9000, dataset='npz:made_up.npz', results_dir='results')
    asked = [part for item in given.items() for part in ('-p', *item)]
    done = sliced(bare, *asked, '--minutes', 0.005, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (STOPPED, 'Stopped: outside of training; the same command goes on\n')

    process = subprocess.Popen(command(*asked), env=bare, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not _heeds(process.pid): time.sleep(0.1)   # until it trains
    process.send_signal(signal.SIGALRM)              # the alarm clock's own signal: the time is up
    last = process.communicate(timeout=100)[0].splitlines()[-1]
    assert process.returncode == STOPPED, last
    assert re.fullmatch(r'Stopped: \w+, seed 0, after step .*; the same command goes on', last), last

    done = sliced(bare, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / 'results').glob('*.json')]
    assert {record['row']: record['status'] for record in records} == dict(epochs='done', ema='done')
    assert {record['data']['name'] for record in records} == {'npz:made_up.npz'}
    assert any(record.get('resumed') for record in records)
    assert (tmp_path / 'results' / 'ablation_smoke.csv').is_file() and 'records, table and figures are in' in done.stdout
