"""The experiment notebooks at the smallest scale, as a user runs them: every planned row leaves a sound record, and a report."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_rs.studies import regularization_study

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = str(Path(sys.executable).parent / 'papermill')
ROWS = {'regularization': list(regularization_study().rows)}   # rows of the plan of notebooks without tests of their own


def papermill(notebook, out, **parameters):
    "Through pipes; the completed process, its two outputs joined."
    given = [word for name, value in parameters.items() for word in ('-p', name, str(value))]
    return subprocess.run([PAPERMILL, f'nbs/{notebook}.ipynb', str(out), *given], cwd=ROOT, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)


def sound(folder, rows):
    "The records by row, each of a run that learned something."
    found = {record['row']: record for record in (json.loads(path.read_text()) for path in folder.glob('*.json'))}
    assert sorted(found) == sorted(rows)
    for row, record in found.items():
        m = record['metrics']
        assert record['status'] == 'done' and math.isfinite(m['loss']) and m['predicted_classes'] > 1, (row, m)
    assert len({record['weights_sha256'] for record in found.values()}) == len(rows), 'each row does something'
    return found


def test_two_rows_of_table_2_leave_records_and_a_report(tmp_path):
    rows, folder = ROWS['regularization'][:2], tmp_path / 'results'
    done = papermill('regularization', tmp_path / 'out.ipynb', scale='smoke', seeds=1, rows=','.join(rows), results_dir=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    found = sound(folder, rows)
    assert [found[row]['config']['weight_decay'] for row in rows] == [1e-4, 4e-5]
    shown = (tmp_path / 'out.ipynb').read_text()
    assert 'C2 — not run' in shown and 'C16 — not run' in shown and 'ResNet-50, no regularizer, 4e-5' in shown
    for name in ('.csv', '_steps.png', '_norms.png'): assert (folder / f'regularization_smoke{name}').stat().st_size > 500


@pytest.mark.parametrize('wrong, told', [(dict(rows='r50_none'), "did you mean 'r50_none_"), (dict(scale='laptops'), "'laptop'"),
                                         (dict(seed=3), "unknown parameter 'seed'")])
def test_wrong_parameters_stop_before_any_training(wrong, told, tmp_path):
    done = papermill('regularization', tmp_path / 'out.ipynb', results_dir=tmp_path / 'results', **wrong)
    assert done.returncode != 0 and told in done.stdout and not (tmp_path / 'results').exists(), done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize('notebook', ROWS)
def test_every_row_at_the_smallest_scale(notebook, tmp_path):
    done = papermill(notebook, tmp_path / 'out.ipynb', scale='smoke', seeds=1, results_dir=tmp_path / 'results')
    assert done.returncode == 0, done.stdout[-3000:]
    sound(tmp_path / 'results', ROWS[notebook])
