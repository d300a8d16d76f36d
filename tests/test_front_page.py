"""The front page: made of nbs/index.ipynb, runs from top to bottom, and its links lead somewhere."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')] + sorted((ROOT / 'docs').glob('*.md'))


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
    import json
    for cell in json.loads(index)['cells']:
        texts = [''.join(cell['source'])] if cell['cell_type'] == 'markdown' else [
            ''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.get('outputs', [])]
        for text in texts: assert text.strip() in readme, f'README.md is stale, say `make readme`: {text[:80]!r}'


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding='utf-8')
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'https?:|#', link)]
    dead = [link for link in links if not (page.parent / link.partition('#')[0]).exists()]
    assert not dead, f'{page.name}: {dead}'
