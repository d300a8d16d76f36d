"""The front page: made of nbs/index.ipynb, runs from top to bottom, and its links lead somewhere."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')] + sorted((ROOT / 'docs').glob('*.md'))


@pytest.mark.slow
def test_index_runs_and_says_what_is_saved(tmp_path):
    "The tables of the page are computed: run again, they must be those that are committed."
    import nbformat
    made = tmp_path / 'index.ipynb'
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', str(ROOT / 'nbs' / 'index.ipynb'), str(made)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    def words(path):
        cells = nbformat.read(path, 4).cells
        return [o['data'].get('text/markdown') for c in cells for o in c.get('outputs', []) if 'data' in o]
    assert words(made) == words(ROOT / 'nbs' / 'index.ipynb'), 'nbs/index.ipynb is stale: run it again, then `make readme`'


def test_readme_is_made_of_the_index():
    readme, index = ((ROOT / name).read_text(encoding='utf-8') for name in ('README.md', 'nbs/index.ipynb'))
    for cell in json.loads(index)['cells']:
        texts = [''.join(cell['source'])] if cell['cell_type'] == 'markdown' else [
            ''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.get('outputs', [])]
        for text in texts: assert text.strip() in readme, f'README.md is stale, say `make readme`: {text[:80]!r}'


def test_readme_begins_with_the_two_commands():
    commands = re.findall(r'(?ms)^```sh\n(.*?)^```', (ROOT / 'README.md').read_text(encoding='utf-8'))
    assert commands[0].startswith('git clone URL resnet_rs && cd resnet_rs && make run') and commands[1].strip() == 'make test'


def test_scoreboard_has_every_claim_with_a_verdict():
    "And those of Table 1 have been run; the paper map says of them, and of no others, that they are tested."
    from resnet_rs.paper import CLAIMS, table
    readme, claims_map = ((ROOT / name).read_text(encoding='utf-8') for name in ('README.md', 'docs/paper_map.md'))
    words = 'agrees|disagrees|inconclusive|not run|cannot be seen at this scale'
    found = dict(re.findall(rf'(?m)^\| (C\d+) \| ({words}) \| .* \|$', readme))
    assert list(found) == [claim.id for claim in table('claims')]
    tested = [claim for claim, verdict in found.items() if verdict in ('agrees', 'disagrees', 'inconclusive')]
    assert set(tested) >= set(CLAIMS)
    for claim in tested: assert f'**{claim} — {found[claim]}.**' in readme
    assert re.findall(r'(?m)^\| (C\d+) \|.*\*\*done\*\*.*\|$', claims_map) == tested
    assert re.findall(r'(?m)^\| (C\d+) \|', claims_map) == list(found)


def saved(cells):
    "The texts that the cells show, and the number of their figures."
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    texts = [''.join(o.get('text') or o['data'].get('text/html') or o['data'].get('text/markdown') or '') for o in outputs]
    return texts, sum('image/png' in o.get('data', {}) for o in outputs)


RECORDED = [path.stem for path in (ROOT / 'results').glob('*.jsonl') if (ROOT / 'nbs' / f'{path.stem}.ipynb').exists()]


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name != 'ablation')) for name in RECORDED])
def test_experiment_shows_the_committed_runs(name):
    "What is saved in its notebook is what its defaults give with the records in results/."
    spec = importlib.util.spec_from_file_location('outputs', ROOT / 'docs' / 'outputs.py')
    outputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outputs)
    path = ROOT / 'nbs' / f'{name}.ipynb'
    texts, figures = saved(json.loads(path.read_text(encoding='utf-8'))['cells'])
    assert (texts, figures) == saved(outputs.executed(path).cells), f'nbs/{path.name} is stale, say `python docs/outputs.py`'
    assert figures >= 1 and not any(word in text for text in texts for word in ('/tmp', 'Traceback'))


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding='utf-8')
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'https?:|#', link)]
    dead = [link for link in links if not (page.parent / link.partition('#')[0]).exists()]
    assert not dead, f'{page.name}: {dead}'
