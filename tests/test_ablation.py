"""The ablation as a user runs it: typed in a terminal, through a pipe, again, with other decay, and wrongly."""
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = str(Path(sys.executable).parent / 'papermill')
ROWS = ['baseline', 'cosine', 'epochs', 'ema', 'label_smoothing', 'stochastic_depth', 'randaugment', 'dropout', 'weight_decay',
        'se', 'resnet_d']


def papermill(*args, timeout=300):
    "Through pipes; the completed process, its two outputs joined."
    return subprocess.run([PAPERMILL, 'nbs/ablation.ipynb', *map(str, args)], cwd=ROOT, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)


def in_a_terminal(*args):
    "Exit status and screen of papermill under a pseudo-terminal."
    ours, theirs = pty.openpty()
    process = subprocess.Popen([PAPERMILL, 'nbs/ablation.ipynb', *map(str, args)], cwd=ROOT, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b''
    while True:
        try: part = os.read(ours, 65536)
        except OSError: break  # the last writer has gone
        if not part: break
        seen += part
    os.close(ours)
    return process.wait(), seen.decode(errors='replace')


def records(folder):
    "(row, seed) -> record"
    return {(r['row'], r['seed']): r for r in (json.loads(p.read_text()) for p in Path(folder).glob('*.json'))}


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    "The command as typed in a terminal, at the smallest scale: (status, screen, results folder)."
    folder = tmp_path_factory.mktemp('ablation') / 'results'
    said = in_a_terminal('-p', 'weight_decay', '4e-5', '-p', 'scale', 'smoke', '-p', 'seeds', 1, '-p', 'results_dir', folder)
    return *said, folder


def test_as_typed_in_a_terminal(first):
    status, screen, folder = first
    assert status == 0, screen[-3000:]
    output = re.findall(r'Output Notebook: +(runs/ablation-\S+\.ipynb)', screen)
    assert output and (ROOT / output[-1]).is_file(), screen[-1500:]
    assert 'about' in screen and ' left' in screen, 'an estimate before, time left during the runs'
    assert 'C1' in screen and str(folder) in screen
    for name in ('.csv', '_ladder.png', '_curves.png'): assert (folder / f'ablation_smoke{name}').stat().st_size > 500
    (ROOT / output[-1]).unlink()


def test_one_sound_record_a_run(first):
    found = records(first[2])
    assert sorted(found) == sorted((row, 0) for row in ROWS)
    for (row, _), record in found.items():
        m = record['metrics']
        assert record['status'] == 'done' and math.isfinite(m['loss']) and m['predicted_classes'] > 1, (row, m)
        assert re.fullmatch('[0-9a-f]{64}', record['weights_sha256'])
        averaged = record['effective']['ema_decay'] > 0
        assert averaged == (ROWS.index(row) >= ROWS.index('ema')) == (m['top1_ema'] is not None)
        assert m['top1'] == (m['top1_ema'] if averaged else m['top1_raw'])
    assert len({r['weights_sha256'] for r in found.values()}) == len(ROWS), 'each step of the ladder does something'


def test_the_executed_notebook_shows_table_figures_and_verdicts(first, tmp_path):
    "Through a pipe, to an explicit path: everything is finished and skipped, and all is shown again."
    out = tmp_path / 'out.ipynb'
    before = records(first[2])
    done = papermill(out, '-p', 'scale', 'smoke', '-p', 'seeds', 1, '-p', 'results_dir', first[2])
    assert done.returncode == 0, done.stdout[-3000:]
    assert str(out) in done.stdout
    text = out.read_text()
    assert '11 of 11 runs are finished already and are skipped' in text
    assert text.count('image/png') >= 2 and 'inconclusive' in text and '<table' in text
    assert records(first[2]) == before


def test_a_deleted_record_is_run_again_and_a_damaged_one_set_aside(first, tmp_path):
    folder, before = first[2], records(first[2])
    lost, hurt = (folder / f"{before[row, 0]['key']}.json" for row in ('cosine', 'dropout'))
    lost.unlink()
    hurt.write_text(hurt.read_text()[:500])
    done = papermill(tmp_path / 'again.ipynb', '-p', 'scale', 'smoke', '-p', 'seeds', 1, '-p', 'results_dir', folder,
                     '--log-output')
    assert done.returncode == 0, done.stdout[-3000:]
    assert '9 of 11 runs are finished already' in done.stdout
    assert hurt.name in done.stdout and 'damaged' in done.stdout, 'the damaged file is named'
    assert len(list(folder.glob('*.damaged'))) == 1
    after = records(folder)
    assert {k: r['weights_sha256'] for k, r in after.items()} == {k: r['weights_sha256'] for k, r in before.items()}


def test_the_parameter_does_something(first, tmp_path):
    done = papermill(tmp_path / 'o.ipynb', '-y', 'weight_decay: 1e-5', '-p', 'scale', 'smoke', '-p', 'seeds', '1',
                     '-p', 'results_dir', tmp_path / 'results')
    assert done.returncode == 0, done.stdout[-3000:]
    ours, theirs = records(first[2]), records(tmp_path / 'results')
    switch = ROWS.index('weight_decay')
    for i, row in enumerate(ROWS):
        a, b = ours[row, 0], theirs[row, 0]
        assert (a['weights_sha256'] == b['weights_sha256']) == (i < switch), row
        ratio = a['effective']['weight_decay'] / b['effective']['weight_decay']
        assert ratio == pytest.approx(4 if i >= switch else 1)


@pytest.mark.parametrize('args, says', [
    ('-p scale smok -p weight_decay -1.0 -p seeds 0 -p rows baseline,cosin -p depth fifty -p epochs zero '
     '-p wieght_decay 4e-5',
     ["unknown parameter 'wieght_decay'; did you mean 'weight_decay'?", "scale = 'smok' is not one of smoke, laptop, gpu, paper",
      'weight_decay = -1.0 is out of range: 0 <= weight_decay <= 1', 'seeds = 0 is out of range', "rows = 'cosin' is not one of",
      "did you mean 'cosine'?", "depth = 'fifty'", "epochs = 'zero' is not a number"]),
    ('-p scale smoke -p results_dir setup.py/results',
     ['ParameterError: results folder setup.py/results cannot be written to', 'setup.py is a file']),
    ('-p scale paper', ['ParameterError: imagenet2012 is not prepared in data_dir', 'python -c']),
], ids=['parameters', 'folder', 'data'])
def test_wrong_input_stops_before_training(args, says, tmp_path):
    done = papermill(tmp_path / 'out.ipynb', *args.split())
    assert done.returncode != 0
    for line in says: assert line in done.stdout, done.stdout[-2500:]
    assert 'runs to do' not in done.stdout and not list(tmp_path.glob('*.json'))
    for frame in ('PapermillExecutionError', 'experiment.py', 'Cell In['): assert frame not in done.stdout, 'only lines'


def test_the_training_methods_compile_once(tmp_path, caplog):
    "Nine rows on one network: one compilation of the training step, and none for another value of weight decay."
    import jax

    from resnet_rs.config import ladder, scaled
    from resnet_rs.experiment import Experiment, run
    rows = {row: scaled(c, 'smoke') for row, c in ladder().items() if row not in ('se', 'resnet_d')}
    rows['another'] = rows['weight_decay'].replace(weight_decay=3e-5)
    experiment = Experiment('once', rows, scale='smoke', seeds=1, results_dir=tmp_path)
    with jax.log_compiles(), caplog.at_level('WARNING', logger='jax'): found = run(experiment)
    compiled = [r for r in caplog.records if r.getMessage().startswith('Compiling jit(step)')]
    assert len(found) == 10 and {r['status'] for r in found} == {'done'}
    assert len(compiled) == 1, [r.getMessage()[:60] for r in caplog.records]
