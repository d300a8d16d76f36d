"""Build the site offline: one page for each notebook and hand-written page; with a dead link it fails and the old site stays.

nbdev prepares a copy of the project, smalldocs renders it: `python docs/build.py [PROJECT [OUTPUT]]`."""
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote

from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbdev.showdoc import BasicMarkdownRenderer
from smalldocs.site import SCHEME, Site, load


def render(sym, **options):
    "nbdev's entry for a public name, with the arguments of a Flax module itself, and stars of docstrings as stars."
    if isinstance(sym, type) and type(sym).__call__ is not type.__call__:  # else `*args, **kwargs` of the metaclass
        sym.__signature__ = inspect.signature(sym.__init__.__get__(sym))
    entry = BasicMarkdownRenderer(sym, **options)
    entry.docs = re.sub(r'`[^`]*`|\*', lambda m: r'\*' if m[0] == '*' else m[0], entry.docs)
    return entry


def copy_project(root):
    "Copy settings and sources to the working directory; returns the pages in order, {'nbs/01_config.ipynb': 'config.ipynb'}."
    found = [path for glob in ('nbs/*.ipynb', 'docs/*.md', 'CONTRIBUTING.md', 'CHANGELOG.md') for path in sorted(root.glob(glob))]
    pages = {p.relative_to(root).as_posix(): re.sub(r'^\d+_', '', p.name).lower().replace('.md', '.qmd') for p in found}
    if len({Path(page).stem for page in pages.values()}) < len(pages): sys.exit(f'docs: two sources of one page: {pages}')
    Path('settings.ini').write_text(f"{(root / 'settings.ini').read_text()}\nrenderer = {Path(__file__).stem}.render\n")
    Path('nbs').mkdir(); Path('nbs/styles.css').touch()  # nbdev's _quarto.yml names the style sheet
    for source, page in pages.items():
        text = (root / source).read_text(encoding='utf-8').replace('"hide_input"', '"remove-input"')  # smalldocs' word
        book = json.loads(text) if page.endswith('.ipynb') else {'cells': []}
        book['cells'][:1] = [{**cell, 'source': [part]} for cell in book['cells'][:1]  # nbdev drops what follows the summary
                             for part in re.split(r'\n\n(?!>)', ''.join(cell['source']), maxsplit=1)]
        for cell in book['cells']:  # only the library is run, of the rest what is saved is shown
            if cell['cell_type'] == 'code' and not re.match(r'#\|\s*export', ''.join(cell['source'])):
                cell['source'] = ['#| eval: false\n', *cell['source']]
        Path('nbs', page).write_text(json.dumps(book) if book['cells'] else text, encoding='utf-8')
    return pages


def sidebar(pages):
    "nbdev's sidebar, in groups and in reading order."
    nbdev_sidebar(file_glob='', file_re=r'\.(?:ipynb|qmd)$')
    listed = re.findall(r'\S+\.(?:ipynb|qmd)', Path('nbs/sidebar.yml').read_text())
    groups = [{'section': name, 'contents': [page for path, page in pages.items() if re.match(start, path) and page in listed]}
              for name, start in (('Library', r'nbs/\d'), ('Experiments', r'nbs/(?!\d|index)'), ('Pages', r'(?!nbs/)'))]
    Path('nbs/sidebar.yml').write_text(json.dumps({'website': {'sidebar': {'contents': ['index.ipynb', *groups]}}}))


class ProjectSite(Site):
    "A site whose links are written as in the repository: to a source, which leads to its page, or to another file there."
    def resolve(self, href, page, record=True):
        cfg, (path, tail) = get_config(), re.fullmatch(r'([^#?]*)(.*)', href or '', re.S).groups()
        if page is not None and path and path[0] != '/' and not SCHEME.match(href):
            base = '' if page.src.name == 'index.ipynb' else dirname({p: s for s, p in self.sources.items()}[page.src.name])
            file, known = normpath(join(base, unquote(path))), self.sources | {'README.md': 'index.ipynb'}  # of which it is made
            if file in known: href = '/' + known[file] + tail
            elif file[:2] not in ('.', '..') and (self.repository / file).exists():
                href = f"{cfg.git_url}/{'tree' if (self.repository / file).is_dir() else 'blob'}/{cfg.branch}/{file}{tail}"
        elif path.startswith(home := cfg.doc_host + cfg.doc_baseurl + '/'):  # nbdev's, for a name; only public ones have headings
            href = '/' + path.removeprefix(home) + re.sub(r'^#_.*|(?<=\w)\..*', '', tail)
        return super().resolve(href, page, record)


def faults(out, pages):
    "What is wrong with a built site: pages that are missing, links to files or headings that are not there."
    files = {path.relative_to(out).as_posix() for path in out.rglob('*')} | {'.'}
    texts = {name: (out / name).read_text(encoding='utf-8') for name in sorted(files) if name.endswith('.html')}
    wrong = [f'no page {name}' for name in (Path(page).stem + '.html' for page in pages.values()) if name not in texts]
    for page, text in texts.items():
        for link in dict.fromkeys(re.findall(r'<[^<>]*\s(?:href|src)="([^"]*)"', text)):
            target, heading = normpath(re.split('[?#]', unquote(link))[0] or page), unquote(link).partition('#')[2]
            if SCHEME.match(link) or target in files and (not heading or f'id="{heading}"' in texts.get(target, '')): continue
            wrong.append(f'{page}: dead link {link}')
    return wrong


if __name__ == '__main__':  # nbdev's workers import this file
    root = Path(*sys.argv[1:2]).resolve()
    output = Path(*sys.argv[2:3] or [root / '_docs']).resolve()
    if output.exists() and not (output / 'site_libs').exists(): sys.exit(f'docs: {output} is not a site: remove it first')
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pages = copy_project(root)
        refresh_quarto_yml(); sidebar(pages)
        site = ProjectSite(load(proc_nbs()), quiet=True)
        site.sources, site.repository = pages, root
        site.build()
        if wrong := faults(site.out, pages): sys.exit('docs: ' + '\ndocs: '.join(wrong))
        shutil.rmtree(output, ignore_errors=True); shutil.copytree(site.out, output)
    print(f'{len(pages)} pages in {output}')
