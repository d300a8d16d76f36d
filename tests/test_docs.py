"""The site: built once of the project as it is, looked at page by page; and small projects with a fault, which must not pass."""
import configparser
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
WRITTEN = sorted((ROOT / 'docs').glob('*.md')) + [ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md']
pytestmark = pytest.mark.slow


def page_name(source):
    "nbs/01_config.ipynb -> config.html"
    return re.sub(r'^\d+_', '', source.stem).lower() + '.html'


def build(project, output):
    command = [sys.executable, str(ROOT / 'docs' / 'build.py'), str(project), str(output)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)


class Page(HTMLParser):
    "The links, what is loaded with it, pictures, ids, headings, sidebar and visible text of a page."

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.images, self.ids, self.sidebar, self.words, self.inside = [], [], [], set(), [], [], []
        self.tags, self.text = [], text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag != 'a':
            self.loads += [attrs[key] for key in ('href', 'src', 'poster', 'data', 'action') if attrs.get(key)]
            self.loads += [part.split()[0] for part in (attrs.get('srcset') or '').split(',') if part.strip()]
        self.links += [attrs[key] for key in ('href', 'src') if not (attrs.get(key) or 'data:').startswith('data:')]
        if tag == 'img': self.images.append(attrs['src'])
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag in ('nav', 'script'): self.inside.append(attrs.get('id', tag))
        if 'quarto-sidebar' in self.inside and 'sidebar-link' in attrs.get('class', '') and attrs.get('href'):
            self.sidebar.append(attrs['href'])

    def handle_endtag(self, tag):
        if tag in ('nav', 'script') and self.inside: self.inside.pop()

    def handle_data(self, data):
        if not self.inside: self.words.append(data)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The pages of the project's site by file name."
    output = tmp_path_factory.mktemp('site') / '_docs'
    before = {path.name for path in (ROOT / 'nbs').iterdir()}
    done = build(ROOT, output)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert {path.name for path in (ROOT / 'nbs').iterdir()} == before and not (ROOT / '_proc').exists(), 'left something behind'
    return {path.name: Page(path.read_text(encoding='utf-8')) for path in output.rglob('*.html')} | {'': output}


@pytest.fixture
def small(tmp_path):
    "A project of two notebooks and a page, with our settings."
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    for name, lines in {'nbs/index.ipynb': '# Front\n\n[one](nbs/10_one.ipynb), [page](docs/page.md#part)',
                        'nbs/10_one.ipynb': '# One\n\n[page](../docs/page.md), [settings](../settings.ini)',
                        'docs/page.md': '# Page\n\n## Part\n\n[front](../README.md), [one](../nbs/10_one.ipynb)'}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == '.ipynb':
            cells = [{'cell_type': 'markdown', 'id': 'a', 'metadata': {}, 'source': lines.splitlines(True)}]
            lines = json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5})
        path.write_text(lines)
    return tmp_path


def test_every_source_has_its_page(site):
    assert {page_name(path) for path in NOTEBOOKS + WRITTEN} == site.keys() - {''}


def test_sidebar_is_in_reading_order(site):
    library = [path for path in NOTEBOOKS if path.stem[0].isdigit()]
    studies = [path for path in NOTEBOOKS if not path.stem[0].isdigit() and path.stem != 'index']
    for page in ('index.html', 'config.html', 'scales.html'):
        assert site[page].sidebar == ['index.html', *map(page_name, library + studies + WRITTEN)], page


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_outputs_are_shown(site, notebook):
    "Every saved figure, as it was saved, is a picture of the page, and every saved line of text can be read there."
    page, figures, lines = site[page_name(notebook)], [], []
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        if re.search(r'^#\| (hide$|export|output: false|include: false)', ''.join(cell['source']), re.M): continue
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if 'image/png' in data and 'text/html' not in data: figures.append(''.join(data['image/png']).strip())
            if output['output_type'] == 'stream': lines += ''.join(output['text']).splitlines()
    assert [src.partition(',')[2] for src in page.images if src.startswith('data:image/png')] == figures
    words = ''.join(page.words)
    assert [line for line in lines if line.strip() not in words] == []


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_all_prose_is_there(site, notebook):
    "Words of all Markdown cells, in order (nbdev drops what follows title and summary in the first cell)."
    said = iter(re.findall(r'[a-z]{4,}', ''.join(site[page_name(notebook)].words)))
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    texts = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    plain = re.sub(r'\$+[^$]+\$+|\]\([^)]*\)|```\w*|`?<[^>]*>`?|&\w+;', ' ', '\n\n'.join(texts))  # of formulas, see below
    lost = [word for word in re.findall(r'[a-z]{4,}', plain) if word not in said]
    assert not lost[:5]


@pytest.mark.parametrize('page, figures', [('index.html', 1), ('report.html', 1), ('curves.html', 1), ('ablation.html', 2)])
def test_figures_of_the_ladder_are_there(site, page, figures):
    "The report draws made-up runs, the front page and the experiment the committed ones."
    assert len([src for src in site[page].images if src.startswith('data:image/png;base64,')]) >= figures


def test_experiments_can_be_opened_in_colab(site):
    for name in (path.name for path in NOTEBOOKS if not path.stem[0].isdigit() and path.stem not in ('index', 'results')):
        links = site[name.replace('.ipynb', '.html')].links
        assert [link for link in links if link.startswith('https://colab.') and link.endswith(f'/nbs/{name}')], name


def test_every_page_has_its_title(site):
    for name, page in site.items():
        if not name: continue
        title = re.search(r'<title>(.+?)</title>', page.text, re.S)
        assert title and page.tags.count('h1') == 1 and page.tags.count('main') == 1, name


# --- without a network -----------------------------------------------------------------------------------------------------

REMOTE = re.compile(r'(?:[a-z][a-z0-9+.-]*:)?//', re.I)


def test_nothing_is_fetched_from_elsewhere(site):
    "All that pages load (scripts, styles, pictures, icons) lies in the site, and so does all that styles load (fonts, styles)."
    output, wrong = site[''], []
    loads = [(output / name, link) for name, page in site.items() if name for link in page.loads]
    for path in (path for path in output.rglob('*') if path.suffix in ('.css', '.html', '.svg')):
        text = re.sub(r'(?s)<(script|pre|code)\b.*?</\1>', '', path.read_text(encoding='utf-8'))  # code is shown, not run
        loads += [(path, link) for link in re.findall(r'(?:@import\s+|url\()\s*["\']?([^"\')\s;]+)', text) if link[0] != '#']
    assert len(loads) > 10 * len(NOTEBOOKS) and any(link.endswith('.woff2') or '.woff2?' in link for _, link in loads)
    for path, link in loads:
        if link.startswith('data:'): continue
        file = (path.parent / unquote(re.split('[?#]', link)[0])).resolve()
        if REMOTE.match(link) or not file.is_relative_to(output.resolve()) or not file.is_file(): wrong.append((path.name, link))
    assert not wrong
    words = ('cdn.', 'jsdelivr', 'unpkg', 'googleapis', 'katex', 'mathjax')
    code = {path.name: path.read_text(encoding='utf-8').lower() for path in output.rglob('*') if path.suffix in ('.js', '.css')}
    heads = {name: page.text.partition('</head>')[0].lower() for name, page in site.items() if name}
    found = [(name, word) for name, text in (code | heads).items() for word in words if re.search(rf'//[^\s"\']*{word}', text)]
    assert not found


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_formulas_are_mathml(site, notebook):
    "As many formulas as there are in the source, each made for the browser, none left as TeX."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    texts = [re.sub(r'(?s)```.*?```|`[^`]*`', '', ''.join(cell['source'])) for cell in cells if cell['cell_type'] == 'markdown']
    formula = re.compile(r'\$\$(.+?)\$\$|(?<![\\$])\$(?=\S)([^$]+?)(?<=\S)\$(?!\d)', re.S)
    formulas = [found for text in texts for found in formula.findall(text)]
    page = site[page_name(notebook)]
    made = re.findall(r'<math .*?</math>', page.text, re.S)
    assert len(made) == len(formulas) == page.text.count('class="math ') and not [m for m in made if '\\' in m]
    assert not re.search(r'\\[(\[][^<]*\\[)\]]', re.sub(r'(?s)<(pre|code|script)\b.*?</\1>', '', page.text))


def test_a_formula_in_full(site):
    "Of the optimiser's page: the sum of rate times decay over one minus momentum."
    display = re.findall(r'<math [^>]*display="block".*?</math>', site['optim.html'].text, re.S)
    said = [html.unescape(re.sub(r'<[^>]+>|\s', '', formula)) for formula in display]
    assert any(text.startswith('D=∑') and 'η' in text and '1−μ' in text for text in said), said
    assert '<mfrac>' in ''.join(display)


def test_search_knows_every_page_and_needs_no_server(site):
    output = site['']
    text = (output / 'search.js').read_text(encoding='utf-8')
    entries = json.loads(re.fullmatch(r'window\.searchIndex = (\[.*\]);\s*', text, re.S)[1])
    assert {entry['href'].partition('#')[0] for entry in entries} == site.keys() - {''}
    for entry in entries:
        page, _, heading = entry['href'].partition('#')
        assert not heading or heading in site[page].ids, entry['href']
        assert not re.search(r'\\(?:t?frac|lambda|cdot|eta)\b', entry['text']), f'search shows TeX: {entry["href"]}'
    found = {entry['href'] for entry in entries if 'weight_decay' in entry['text'] + entry['title'] + entry['section']}
    assert {'index.html', 'config.html'} <= {href.partition('#')[0] for href in found}
    script = (output / 'site_libs' / 'smalldocs.js').read_text(encoding='utf-8')
    assert 'search.js"' in script and 'window.searchIndex' in script and 'fetch(' not in script
    assert not (output / 'search.json').exists()
    assert all({'site_libs/fuse/fuse.min.js', 'site_libs/smalldocs.js'} <= {link.removeprefix('./') for link in page.loads}
               and 'smalldocs-search' in page.text for name, page in site.items() if name)


def test_hidden_code_stays_hidden_and_tables_are_tables(site):
    words = ''.join(site['index.html'].words)
    assert 'scoreboard(records)' not in words and 'parameters(\'ablation\')' not in words and '| step |' not in words
    assert 'ResNet-200' in words and 'create_model' in words


def test_links_lead_somewhere(site):
    output, pages = site[''], {name: page for name, page in site.items() if name}
    dead = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (output / unquote(parts.path)).resolve() if parts.path else output / name
            inside = target.is_relative_to(output.resolve()) and target.exists()
            if not inside or parts.fragment and unquote(parts.fragment) not in pages[target.name].ids: dead.append((name, link))
    assert not dead


def test_links_to_files_without_a_page_lead_to_the_repository(site):
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    assert settings['DEFAULT']['git_url'] + '/blob/main/LICENSE' in site['index.html'].links
    assert 'ablation.html' in site['index.html'].links and 'contributing.html' in site['index.html'].links


def test_no_paths_of_a_machine(site):
    words = re.compile(r'(?<![\w.])/(?:tmp|root|home|Users|work|var)/|site-packages|' + re.escape(str(ROOT)))
    found = {name: words.findall(site[name].text) for name in map(page_name, NOTEBOOKS)}
    assert not {name: paths for name, paths in found.items() if paths}


def test_small_project_passes_and_replaces_its_old_site_only(small):
    for _ in range(2):
        done = build(small, small / '_docs')
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (small / '_docs').glob('*.html')} == {'index.html', 'one.html', 'page.html'}
    done = build(small, small / 'nbs')
    assert done.returncode != 0 and 'is not a site' in done.stderr and (small / 'nbs' / 'index.ipynb').exists()


@pytest.mark.parametrize('old, new, message', [
    ('../nbs/10_one.ipynb', '../nbs/11_two.ipynb', 'page.html: dead link'),
    ('../nbs/10_one.ipynb', '../nbs/10_one.ipynb#nowhere', 'page.html: dead link one.html#nowhere'),
    ('../nbs/10_one.ipynb', 'one.png', 'page.html: dead link one.png'),
    ('# Page', '---\ndraft: true\n---\n# Page', 'no page page.html'),
    ('## Part', '![](https://example.org/one.png)\n\n## Part', 'page.html: fetched from elsewhere: https://example.org/one'),
    ('## Part', '<script src="//example.org/one.js"></script>\n\n## Part', 'page.html: fetched from elsewhere: //example'),
    ('## Part', 'So $\\lamda$.\n\n## Part', 'page.html: not a formula:')])
def test_faults_stop_the_build(small, old, new, message):
    page = small / 'docs' / 'page.md'
    page.write_text(page.read_text().replace(old, new))
    done = build(small, small / '_docs')
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert not (small / '_docs').exists()


def test_two_sources_of_one_page(small):
    shutil.copy(small / 'nbs' / '10_one.ipynb', small / 'nbs' / '20_one.ipynb')
    done = build(small, small / '_docs')
    assert done.returncode != 0 and 'two sources of one page' in done.stderr
