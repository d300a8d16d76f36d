"""An experiment notebook up to its plan, in this process: a kernel costs ten seconds, and most wrong parameters need none."""
import json
from pathlib import Path

import pytest

from resnet_rs.papermill import ParameterError

NOTEBOOKS = Path(__file__).resolve().parent.parent / 'nbs'


def code_cells(notebook):
    "The code cells, and the number of the one that holds the parameters."
    cells = [cell for cell in json.loads((NOTEBOOKS / f'{notebook}.ipynb').read_text())['cells'] if cell['cell_type'] == 'code']
    return cells, next(i for i, cell in enumerate(cells) if 'parameters' in cell['metadata'].get('tags', []))


def planned(notebook, **parameters):
    "The names of the notebook after the cell that checks its parameters, of which these are injected as papermill does it."
    names, (cells, tagged) = {'__name__': '__main__'}, code_cells(notebook)
    for i, cell in enumerate(cells[:tagged + 2]):
        exec(''.join(cell['source']), names)
        if i == tagged: names |= parameters    # the same dictionary
    return names


def refused(notebook, says, folder, **wrong):
    "With these parameters the notebook stops before any training with a line for each of `says`, and leaves no folder."
    with pytest.raises(ParameterError) as caught: planned(notebook, **dict(results_dir=str(folder)) | wrong)
    lines = caught.value._render_traceback_()
    for words in says: assert any(words in line for line in lines), lines
    assert not folder.exists()
    return lines
