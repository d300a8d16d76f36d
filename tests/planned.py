"""An experiment notebook up to its plan, in this process: a kernel costs ten seconds, and most wrong parameters need none."""
from pathlib import Path

import pytest

from resnet_rs.papermill import ParameterError
from resnet_rs.slices import code_cells, run_cells

NOTEBOOKS = Path(__file__).resolve().parent.parent / 'nbs'


def planned(notebook, **parameters):
    "The names of the notebook after the cell that checks its parameters, of which these are injected as papermill does it."
    path = NOTEBOOKS / f'{notebook}.ipynb'
    return run_cells(path, parameters, last=code_cells(path)[1] + 1)


def refused(notebook, says, folder, **wrong):
    "With these parameters the notebook stops before any training with a line for each of `says`, and leaves no folder."
    with pytest.raises(ParameterError) as caught: planned(notebook, **dict(results_dir=str(folder)) | wrong)
    lines = caught.value._render_traceback_()
    for words in says: assert any(words in line for line in lines), lines
    assert not folder.exists()
    return lines
