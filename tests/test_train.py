"""One model by name, as a user trains it: once, again, fine-tuned from its own weights, and wrongly."""
import ast
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from planned import planned

from resnet_rs.papermill import ParameterError

ROOT = Path(__file__).resolve().parent.parent
CELLS = [cell for cell in json.loads((ROOT / 'nbs' / 'train.ipynb').read_text('utf-8'))['cells'] if cell['cell_type'] == 'code']


def papermill(folder, name, **parameters):
    "At smoke scale, through pipes; the completed process, and the executed notebook's text."
    given = dict(scale='smoke', results_dir=folder / 'results') | parameters
    out = folder / f'{name}.ipynb'
    done = command([out, *(part for item in given.items() for part in ('-p', *item))])
    return done, out.read_text() if out.exists() else ''


def command(arguments):
    "papermill nbs/train.ipynb `arguments`, its lines shown as they come."
    program = Path(sys.executable).parent / 'papermill'
    return subprocess.run([program, 'nbs/train.ipynb', *map(str, arguments), '--stdout-file', '-', '--no-progress-bar'], cwd=ROOT,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)


def records(folder): return [json.loads(path.read_text()) for path in sorted((folder / 'results').glob('*.json'))]


def test_wrong_input_is_one_line_before_any_training(tmp_path):
    "In this process: what the guard and the experiment refuse, and in which words."
    here = dict(scale='smoke', results_dir=str(tmp_path / 'results'))
    for wrong, says in [
            (dict(model='resnet_rs_51'), "model = 'resnet_rs_51' is not one of resnet_rs_50, .*did you mean 'resnet_rs_50'"),
            (dict(model='resnet_rs_152'), 'resnet_rs_152 was released at 192, 224, 256 pixels: say which image_size'),
            (dict(model='resnet_rs_152', image_size=288), r'unknown image_size of resnet_rs_152 288.* Choices: 192, 224, 256'),
            (dict(model='efficientnet_b0', scale='paper'), 'imagenet2012 is not prepared in data_dir'),
            (dict(weights=str(tmp_path / 'nowhere')), 'nowhere holds no checkpoint of a trained network'),
            (dict(dataset='digit'), r"unknown image set 'digit'; did you mean 'digits'\?"),
            (dict(scale='paper'), 'imagenet2012 is not prepared in data_dir'),
            (dict(epochs=0), r'epochs = 0\.0 is out of range'), (dict(base_lr='fast'), "base_lr = 'fast' is not a number"),
            (dict(weight_decy=1e-5), "unknown parameter 'weight_decy'; did you mean 'weight_decay'")]:
        with pytest.raises(ParameterError, match=says) as caught: planned('train', **here | wrong)
        assert len(caught.value._render_traceback_()) == 1 and '\n' not in str(caught.value), wrong
    assert not list((tmp_path / 'results').glob('*.json'))


def test_the_configuration_is_the_released_one_carried_to_the_scale(tmp_path):
    given = dict(scale='smoke', image_size=None, epochs=10, weight_decay='1e-5', base_lr=0.2, results_dir=str(tmp_path))
    names = planned('train', **given)
    released, config, run = names['released'], names['config'], names['experiment'].runs[0]
    assert config.depth == released.depth == 50 and run.row == 'resnet_rs_50@160'
    assert (config.epochs, config.weight_decay, config.base_lr, config.precision) == (10, 1e-5, 0.2, 'float32')
    assert all(getattr(config, name) == getattr(released, name) for name in ('stem', 'se_ratio', 'dropout', 'ema_decay'))
    assert config.image_size == 32 and released.image_size == 160


@pytest.mark.slow
def test_an_efficientnet_in_the_real_command(tmp_path):
    done, _ = papermill(tmp_path, 'out', model='efficientnet_b0')
    assert done.returncode == 0, done.stdout[-2000:]
    (made,) = records(tmp_path)
    assert made['status'] == 'done' and made['effective']['optimizer'] == 'rmsprop'
    assert made['config']['network'] == 'efficientnet'


def test_the_saved_outputs_are_of_a_finished_run_and_name_no_machine():
    shown = ''.join(json.dumps(cell['outputs']) for cell in CELLS)
    assert '1 of 1 runs are finished already and are skipped' in shown and shown.count('image/png') == 2
    assert 'as recorded' in shown and 'weights of seed 0: runs/results/weights/' in shown


def test_the_notebook_holds_no_training_code():
    trees = [ast.parse(''.join(cell['source'])) for cell in CELLS]
    defined = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert all(node.end_lineno - node.lineno <= 3 for node in defined) and len(CELLS) <= 16


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A quarter of the recipe's epochs, so that it is short: (folder, what was printed, the executed notebook)."
    folder = tmp_path_factory.mktemp('train')
    done, text = papermill(folder, 'first', epochs=90)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, done.stdout, text


@pytest.mark.slow
def test_trains_one_model_and_keeps_its_weights(trained):
    folder, said, text = trained
    [record] = records(folder)
    assert (record['experiment'], record['row'], record['status']) == ('train', 'resnet_rs_50@160', 'done')
    assert math.isfinite(record['metrics']['loss']) and record['config']['depth'] == 50 and record['initial'] is None
    weights, checkpoints = (folder / 'results' / kind / record['key'] for kind in ('weights', 'checkpoints'))
    assert weights.is_dir() and not checkpoints.exists()
    assert f"{record['metrics']['top1']:.1f}% of 256 held-out pictures, as recorded" in said
    assert 'about' in said and '1/1 resnet_rs_50@160, seed 0: top-1' in said and '1 of 1 runs finished' in said
    assert text.count('image/png') >= 2 and 'Table 7' in text and '78.8' in text and 'two do not compare' in text
    for end in ('.csv', '.png'): assert (folder / 'results' / f'train_smoke_resnet_rs_50_160{end}').stat().st_size > 200
    assert f"weights of seed 0: {weights}" in said


@pytest.mark.slow
def test_the_printed_commands_do_what_they_say(trained):
    "The one for going on skips what is finished; the one for fine-tuning starts from the kept weights, under another key."
    folder, said, _ = trained
    [first] = records(folder)
    on, tune = re.findall(r'(?m)^  papermill (nbs/train\.ipynb .*)$', said)
    for line, name in ((on, 'on'), (tune, 'tune')):
        done = command([folder / f'{name}.ipynb', *shlex.split(line)[1:]])
        assert done.returncode == 0, done.stdout[-4000:]
        if name == 'on': assert '1 of 1 runs are finished already and are skipped' in done.stdout and records(folder) == [first]
    tuned = next(r for r in records(folder) if r['key'] != first['key'])
    assert len(records(folder)) == 2 and re.fullmatch('[0-9a-f]{64}', tuned['initial']) and tuned['row'] == first['row']
    assert tuned['config']['base_lr'] == pytest.approx(first['config']['base_lr'] / 10)
    assert tuned['weights_sha256'] != first['weights_sha256'] and f"kept weights (digest {tuned['initial'][:12]})" in done.stdout
    assert (folder / 'results' / 'weights' / tuned['key']).is_dir()
