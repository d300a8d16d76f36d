"""Build the site: one page for each notebook of nbs/ and each hand-written page, into _docs/, offline (`make docs`).

nbdev prepares the notebooks as it does for Quarto, smalldocs renders them. Both work on a copy of the project, so
nothing is left in nbs/, and the old site is replaced only by a whole one: a missing page or a dead link is an error.
"""
import argparse
import html
import inspect
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

import yaml
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbdev.showdoc import BasicMarkdownRenderer
from smalldocs.config import load
from smalldocs.site import SCHEME, Site

PAGES = ('docs/*.md', 'CONTRIBUTING.md', 'CHANGELOG.md')


def render(sym, **options):
    "nbdev's entry for a public name; a Flax module shows its own arguments, not its metaclass's `*args, **kwargs`."
    if isinstance(sym, type) and type(sym).__call__ is not type.__call__:
        sign = inspect.signature(sym.__init__)
        sym.__signature__ = sign.replace(parameters=list(sign.parameters.values())[1:])
    return BasicMarkdownRenderer(sym, **options)


def copy_sources(root, copy):
    "Copy settings and sources, numbers in front; returns the source of each page-to-be: `config.ipynb`: nbs/01_config.ipynb."
    found = sorted((root / 'nbs').glob('*.ipynb')) + [path for glob in PAGES for path in sorted(root.glob(glob))]
    names = [re.sub(r'^\d+_', '', path.stem).lower() for path in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice: sys.exit(f'docs: more than one source for the page {", ".join(sorted(twice))}')
    nbs = copy / 'nbs'
    nbs.mkdir()
    for path in found:
        if path.suffix == '.md': shutil.copy(path, nbs / (path.stem + '.qmd')); continue
        book = json.loads(path.read_text(encoding='utf-8'))
        for cell in (cell for cell in book['cells'] if cell['cell_type'] == 'code'):
            cell['metadata']['tags'] = ['remove-input'] * ('hide_input' in cell['metadata'].get('tags', ()))  # smalldocs' word
            if not re.match(r'#\|\s*export', ''.join(cell['source'])):  # what is saved is shown, only the library is run
                cell['source'] = ['#| eval: false\n', *cell['source']]
        (nbs / path.name).write_text(json.dumps(book), encoding='utf-8')
    (copy / 'settings.ini').write_text((root / 'settings.ini').read_text(encoding='utf-8') + f'\nrenderer = {Path(__file__).stem}.render\n')
    return {name + path.suffix.replace('.md', '.qmd'): path.relative_to(root).as_posix() for name, path in zip(names, found)}


def sidebar(nbs, sources):
    "nbdev's sidebar of the numbered notebooks, in groups; then the numbers go, from its entries and from the files."
    nbdev_sidebar(path=nbs, file_re=r'\.(?:ipynb|qmd)$')
    made = yaml.safe_load((nbs / 'sidebar.yml').read_text())
    names = {Path(source).stem: name for name, source in sources.items()}
    groups = {'Library': [], 'Experiments': [], 'Pages': []}
    for entry in made['website']['sidebar']['contents']:
        kind = 'Pages' if entry.endswith('.qmd') else 'Library' if entry[0].isdigit() else 'Experiments'
        if entry != 'index.ipynb': groups[kind].append(names[Path(entry).stem])
    for stem, name in names.items(): (nbs / stem).with_suffix(Path(name).suffix).rename(nbs / name)
    made['website']['sidebar']['contents'] = ['index.ipynb', *({'section': s, 'contents': c} for s, c in groups.items() if c)]
    (nbs / 'sidebar.yml').write_text(yaml.safe_dump(made, sort_keys=False))


class ProjectSite(Site):
    "A site whose links are written as in the repository: to a source, which leads to its page, or to another file there."

    def resolve(self, href, page, record=True):
        path, tail = re.fullmatch(r'([^#?]*)(.*)', href or '', re.S).groups()
        if page is None or not path or path[0] == '/' or SCHEME.match(href): return super().resolve(href, page, record)
        source = self.sources[page.src.name]
        base = '' if source == 'nbs/index.ipynb' else posixpath.dirname(source)  # the index is also README.md
        target = posixpath.normpath(posixpath.join(base, unquote(path)))
        names = {source: name for name, source in self.sources.items()} | {'README.md': 'index.ipynb'}
        file, cfg = self.repository / target, get_config()
        if target in names: return super().resolve('/' + names[target] + tail, page, record)
        if target[:2] in ('.', '..') or not file.exists(): return super().resolve(href, page, record)
        return f"{cfg.git_url}/{'tree' if file.is_dir() else 'blob'}/{cfg.branch}/{target}{tail}"


def faults(out, sources):
    "What is wrong with a built site: pages that are missing, links to files or headings that are not there."
    files = {path.relative_to(out).as_posix() for path in out.rglob('*')} | {'.'}
    pages = {name: (out / name).read_text(encoding='utf-8') for name in files if name.endswith('.html')}
    wrong = [f'no page {Path(name).stem}.html' for name in sources if Path(name).stem + '.html' not in pages]
    for page, text in sorted(pages.items()):
        for link in dict.fromkeys(re.findall(r'<[^<>]*\s(?:href|src)="([^"]*)"', text)):
            path, _, heading = unquote(html.unescape(link)).partition('#')
            target = posixpath.normpath(path.partition('?')[0] or page)
            if SCHEME.match(link) or target in files and (not heading or f'id="{heading}"' in pages.get(target, '')): continue
            wrong.append(f'{page}: dead link {link}')
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--project', type=Path, default=Path(__file__).parent.parent, help='folder of settings.ini and nbs/')
    parser.add_argument('--output', type=Path, help='folder for the site (_docs in the project); an old site there goes')
    args = parser.parse_args()
    root = args.project.resolve()
    output = (args.output or root / '_docs').resolve()
    if output.exists() and not (output / 'site_libs').exists(): sys.exit(f'docs: {output} is not a site: remove it first')
    with tempfile.TemporaryDirectory() as folder:
        sources = copy_sources(root, Path(folder))
        os.chdir(folder)
        refresh_quarto_yml()
        Path('nbs/styles.css').touch()  # nbdev's _quarto.yml names it
        sidebar(Path('nbs').resolve(), sources)
        site = ProjectSite(load(proc_nbs()), quiet=True)
        site.sources, site.repository = sources, root
        site.build()
        os.chdir(root)
        wrong = faults(site.out, sources)
        if wrong: sys.exit('docs: ' + '\ndocs: '.join(wrong))
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(site.out, output)
    print(f'{len(sources)} pages in {os.path.relpath(output)}')


if __name__ == '__main__':  # nbdev's workers import this file
    main()
