"""Save in a notebook what its defaults show: in an experiment's for the committed records and all their seeds, in which all its
runs must be, or, where it keeps weights, which are not committed, for runs made now; and in results.ipynb what all of them say.

    python docs/outputs.py [nbs/train.ipynb ...]     without names: every experiment that has records in results/, and results"""
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

from resnet_rs.records import Records, read_packed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'nbs' / 'results.ipynb'
UNTIMED = 'rounds = 0'   # what networks cost is committed, too, and of the machine that measured it
SEEDS = 'seeds = {}'
UNTRAINED = "assert not experiment.pending(), f'{len(experiment.pending())} runs are not committed: make run && make record'"


def executed(path):
    "The notebook at `path`, run in a folder of its own: runs/results has all committed records (one may serve two), as results/."
    book = nbformat.read(path, 4)
    plans, trains = (any(words in cell.source for cell in book.cells) for words in ('Experiment(', 'keep_weights=True'))
    check = 1 + [n for n, cell in enumerate(book.cells) if 'parameters' in cell.metadata.get('tags', [])][0]
    records = [] if trains else read_packed(ROOT / 'results')
    seeds = Counter(record['row'] for record in records if plans and record['experiment'] == path.stem)
    given = [UNTIMED] if 'rounds:' in book.cells[check - 1].source else []
    if seeds: given.append(SEEDS.format(min(seeds.values())))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / 'results', Path(folder, 'results'))
        store = Records(Path(folder, 'runs', 'results'))
        if (costs := ROOT / 'results' / 'costs').is_dir(): shutil.copytree(costs, store.folder / 'costs')
        for record in records: store.write(record)
        for _ in range(1 + trains):   # the second time shows finished runs, without the lines of their progress
            book.cells.insert(check + 1, nbformat.v4.new_code_cell(UNTRAINED if plans and not trains else ''))
            book.cells.insert(check, nbformat.v4.new_code_cell('\n'.join(given)))
            client = NotebookClient(book, timeout=1800, resources={'metadata': {'path': folder}})
            client.execute(env=os.environ | {'RESNET_RS_ROOT': folder})
            del book.cells[check + 2], book.cells[check]
        for output in (output for cell in book.cells for output in cell.get('outputs', []) if 'text' in output):
            for name in (os.path.realpath(folder), folder): output.text = output.text.replace(name + os.sep, '')
    return book


if __name__ == '__main__':
    paths = [Path(name) for name in sys.argv[1:]] or [path for packed in sorted((ROOT / 'results').glob('*.jsonl'))
                                                     if (path := ROOT / 'nbs' / f'{packed.stem}.ipynb').exists()] + [RESULTS]
    for path in paths:
        nbformat.write(executed(path), path)
        nbdev_clean(str(path))
        print(f'{path.name}: outputs saved')
