"""Every library notebook runs from top to bottom, each in a process of its own; a few that compile for minutes are slow."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
HEAVY = (   # long to compile; what they show is tested elsewhere, too
    '11_blocks', '12_resnet', '13_efficientnet', '14_resnet3d', '15_scaling_rules', '16_weights', '17_registry',
    '20_image_ops', '21_randaugment', '26_rendered_clips', '33_steps', '34_training', '35_profile', '37_costs', '41_finetune',
    '42_contrastive', '48_runs', '49_clip_runs', '49_joint_training', '49_pretraining')
SLOW_CELLS = [n for n in NOTEBOOKS if '#| slow' in n.read_text('utf-8')]


def nbdev_test(notebook, *flags):
    "Run the cells of `notebook`; the output of the failing one is the message."
    command = [str(Path(sys.executable).parent / 'nbdev_test'), '--path', str(notebook), '--n_workers', '1', *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f'{notebook.name}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'


@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.stem not in HEAVY], ids=lambda path: path.stem)
def test_runs(notebook): nbdev_test(notebook)


@pytest.mark.slow
@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n in SLOW_CELLS or n.stem in HEAVY], ids=lambda path: path.stem)
def test_runs_with_slow_cells(notebook): nbdev_test(notebook, '--flags', 'slow')


def test_a_broken_notebook_fails(tmp_path):
    broken = tmp_path / '99_broken.ipynb'
    text = (ROOT / 'nbs' / '03_provenance.ipynb').read_text(encoding='utf-8')
    assert text.count('"import json') or text.count('import json')
    broken.write_text(text.replace('import json', 'import no_such_module'), encoding='utf-8')
    with pytest.raises(AssertionError, match='no_such_module'): nbdev_test(broken)
