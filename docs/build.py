"""Build the site: one page for each notebook and hand-written page, to be read without a network, from a server or from files.

nbdev prepares a copy of the project, smalldocs renders it: `python docs/build.py [PROJECT [OUTPUT]]`. With a dead link, a formula
that cannot be read or anything that a page would fetch from elsewhere it fails, and the old site stays."""
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

import smalldocs.markdown
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbdev.showdoc import BasicMarkdownRenderer
from smalldocs.site import SCHEME, Site, load


FROM_ELSEWHERE = re.compile(r'<(?!a\b)\w+[^<>]*\s(?:href|src)="((?:https?:)?//[^"]*)"|'
                            r'(?:@import|url\()[\s\'"(url]*((?:https?:)?//[^\'")]*)')


class Entry(BasicMarkdownRenderer):
    "nbdev's entry for a public name, with the name that JAX gives its arrays in public, and no types of defaults."
    def _repr_markdown_(self):
        text = re.sub(r'(?:jax\.)?jaxlib\._jax\.', 'jax.', super()._repr_markdown_())
        return re.sub(r':(?:_ScalarMeta|NoneType)(?==)', '', text)


def render(sym, **options):
    "The entry of a name, with the arguments of a Flax module itself, a named tuple's fields, and stars of docstrings as stars."
    if isinstance(sym, type) and type(sym).__call__ is not type.__call__:  # else `*args, **kwargs` of the metaclass
        sym.__signature__ = inspect.signature(sym.__init__.__get__(sym))
    if hasattr(sym, '_fields'): sym.__dataclass_fields__ = {}  # only of dataclasses are fields and their comments read
    entry = Entry(sym, **options)
    entry.docs = re.sub(r'`[^`]*`|\*', lambda m: r'\*' if m[0] == '*' else m[0], entry.docs)
    return entry


def mathml(tex, options):
    "A formula as MathML, which browsers set themselves; with the spaces around a plus-minus and after a function's name."
    made = convert(tex, display='block' if options.get('display_mode') else 'inline')
    made = re.sub(r'<mi>(&#x000B1;|&#x02213;)</mi>', r'<mo>\1</mo>', made)
    made = made.replace('<mo>&#x0002F;</mo>', '<mo lspace="0" rspace="0">&#x0002F;</mo>')
    return re.sub(r'(<mi>(?:cos|sin|exp|log|min|max)</mi>)(?=<m(?!o\b))', r'\1<mspace width="0.17em" />', made)


def copy_project(root):
    "Copy settings and sources to the working directory; returns the pages in order, {'nbs/01_config.ipynb': 'config.ipynb'}."
    found = [path for glob in ('nbs/*.ipynb', 'docs/*.md', 'CONTRIBUTING.md', 'CHANGELOG.md') for path in sorted(root.glob(glob))]
    pages = {p.relative_to(root).as_posix(): re.sub(r'^\d+_', '', p.name).lower().replace('.md', '.qmd') for p in found}
    if len({Path(page).stem for page in pages.values()}) < len(pages): sys.exit(f'docs: two sources of one page: {pages}')
    Path('settings.ini').write_text(f"{(root / 'settings.ini').read_text()}\nrenderer = {Path(__file__).stem}.render\n")
    Path('nbs').mkdir()
    for file in ('styles.css', 'favicon.svg'): shutil.copy(Path(__file__).with_name(file), 'nbs')  # named in nbdev's _quarto.yml
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
    website = {'sidebar': {'contents': ['index.ipynb', *groups]}, 'favicon': 'favicon.svg',
               'navbar': {'right': [{'text': 'Repository', 'href': get_config().git_url}]}}
    Path('nbs/sidebar.yml').write_text(json.dumps({'website': website}))


class ProjectSite(Site):
    "A site that needs no network, with links as in the repository: to a source, which leads to its page, or to a file there."
    def render_page(self, page):
        def unlinked(code): return re.sub(r'\[(`\w+`)\]\(http[^)]*\)', r'\1', code[0])  # nbdev links names in comments, too
        page.body = re.sub(r'(?ms)^```.*?^```', unlinked, page.body)
        formulas = []
        smalldocs.markdown.math_renderer = lambda tex, options: formulas.append(tex) or mathml(tex, options)
        super().render_page(page)
        page.env.pop('math', None)  # no script for it: formulas are MathML
        for tex in sorted({tex for tex in formulas if '\\' in tex}, key=len, reverse=True):  # search shows no TeX
            for part in page.env['search']: part['text'] = re.sub(r'\s+'.join(map(re.escape, tex.split())), '…', part['text'])
        cell = r'<td((?: style="[^"]*")?)>'
        page.html = re.sub(cell + r'(agrees|disagrees|inconclusive|not run)</td>', r'<td\1 class="verdict \2">\2</td>', page.html)
        page.html = re.sub(cell + r'(—|[-+\d][-+.,\d ]*(?:\[[-+.,\d ]+\])?)</td>', r'<td\1 class="number">\2</td>', page.html)

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


def finish(out):
    "Make the built site whole: fonts of the reader's machine, and an index that search may load in a page opened as a file."
    for sheet in out.rglob('*.css'):
        sheet.write_text(re.sub(r'@import url\(https://fonts[^)]*\);', '', sheet.read_text('utf-8')), 'utf-8')
    (out / 'search.js').write_text(f"window.searchIndex = {(out / 'search.json').read_text('utf-8')};\n", 'utf-8')
    (out / 'search.json').unlink()
    script = out / 'site_libs' / 'smalldocs.js'
    text, found = re.subn(r'const r = await fetch\(offset \+ "search.json"\);\s*index = await r.json\(\);', '''
      await new Promise((loaded, failed) => document.head.append(Object.assign(
        document.createElement("script"), { src: offset + "search.js", onload: loaded, onerror: failed })));
      index = window.searchIndex;''', script.read_text('utf-8'))
    if found != 1: sys.exit('docs: smalldocs.js does not load search.json as it did in version 0.5.4')
    script.write_text(text, 'utf-8')


def faults(out, pages):
    "What is wrong with a built site: missing pages, dead links, formulas with TeX in them, and what is fetched from elsewhere."
    files = {path.relative_to(out).as_posix() for path in out.rglob('*')} | {'.'}
    texts = {name: (out / name).read_text(encoding='utf-8') for name in sorted(files) if name.endswith('.html')}
    wrong = [f'no page {name}' for name in (Path(page).stem + '.html' for page in pages.values()) if name not in texts]
    for path in sorted(path for path in out.rglob('*') if path.suffix in ('.html', '.css', '.js', '.svg')):
        found = FROM_ELSEWHERE.findall(path.read_text(encoding='utf-8'))
        wrong += [f'{path.name}: fetched from elsewhere: {"".join(link)}' for link in found]
    for page, text in texts.items():
        wrong += [f'{page}: not a formula: {made}' for made in re.findall(r'<math.*?</math>', text, re.S) if '\\' in made]
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
        finish(site.out)
        if wrong := faults(site.out, pages): sys.exit('docs: ' + '\ndocs: '.join(wrong))
        shutil.rmtree(output, ignore_errors=True); shutil.copytree(site.out, output)
    print(f'{len(pages)} pages in {output}')
