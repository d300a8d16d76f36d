"""Table 2 at the smallest scale, as a user runs it: every planned row leaves a sound record, and a report."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from planned import refused

from resnet_rs.studies import regularization_study

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = str(Path(sys.executable).parent / 'papermill')


def sound(folder, rows):
    "The records by row, each of a run that learned something."
    found = {record['row']: record for record in (json.loads(path.read_text()) for path in folder.glob('*.json'))}
    assert sorted(found) == sorted(rows)
    for row, record in found.items():
        m = record['metrics']
        assert record['status'] == 'done' and math.isfinite(m['loss']) and m['predicted_classes'] > 1, (row, m)
    assert len({record['weights_sha256'] for record in found.values()}) == len(rows), 'each row does something'
    return found


@pytest.mark.parametrize('wrong, told', [(dict(rows='r50_none'), "did you mean 'r50_none_"), (dict(scale='laptops'), "'laptop'"),
                                         (dict(seed=3), "unknown parameter 'seed'")])
def test_wrong_parameters_stop_before_any_training(wrong, told, tmp_path):
    refused('regularization', [told], tmp_path / 'results', **wrong)


@pytest.mark.slow
def test_every_row_at_the_smallest_scale(tmp_path):
    folder = tmp_path / 'results'
    command = [PAPERMILL, 'nbs/regularization.ipynb', tmp_path / 'out.ipynb', '-p', 'scale', 'smoke', '-p', 'seeds', '1',
               '-p', 'results_dir', folder]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = sound(folder, regularization_study().rows)
    decays = {row: record['config']['weight_decay'] for row, record in found.items()}
    assert decays == {row: float(row[-4:]) for row in decays}, 'as their names say'
    shown = (tmp_path / 'out.ipynb').read_text()
    assert 'C2 — inconclusive' in shown and 'C16 — inconclusive' in shown and 'ResNet-50, no regularizer, 4e-5' in shown
    for name in ('.csv', '_steps.png', '_norms.png'): assert (folder / f'regularization_smoke{name}').stat().st_size > 500
