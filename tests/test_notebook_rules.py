"""The rules of the house, counted by a machine: which room may import which, how long things are, and what is committed."""
import ast
import configparser
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / 'nbs').glob('*.ipynb') if path.name[0] not in '._')
MODULES = sorted(path for path in (ROOT / 'resnet_rs').glob('*.py') if path.name[0] != '_')


def is_room(path):
    """A numbered notebook, which is a part of the library; the others are experiments."""
    return re.match(r'\d\d_', path.name) is not None


def stem(path):
    return re.sub(r'^\d\d_', '', path.stem)


ROOMS = {stem(path): int(path.name[:2]) for path in NOTEBOOKS if is_room(path)}
EXPERIMENTS = [path for path in NOTEBOOKS if not is_room(path) and path.stem not in ('index', 'results')]
every_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
every_room = pytest.mark.parametrize('path', [path for path in NOTEBOOKS if is_room(path)], ids=lambda path: path.stem)
every_module = pytest.mark.parametrize('path', MODULES, ids=lambda path: path.stem)
every_experiment = pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)


@cache
def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


def code_cells(path):
    """(index, source without IPython's magics, exported?) of each code cell in Python."""
    for index, cell in enumerate(read(path)['cells']):
        if cell['cell_type'] == 'code':
            source = ''.join(cell['source'])
            if source.startswith('%%'): continue
            exported = re.search(r'(?m)^#\|\s*exports?i?\b', source) is not None
            yield index, re.sub(r'(?m)^([ \t]*)(?:%[a-z]|!).*', r'\1pass', source), exported


def tell(problems):
    assert not problems, '\n  '.join(['', *dict.fromkeys(problems)])


# --- who may import whom ---------------------------------------------------------------------------------------------------

PLOTS = {'IPython', 'matplotlib', 'numpy', 'pandas', 'seaborn'}     # what an experiment may show its results with
EXAMPLES = PLOTS | {'sklearn'}                                       # a room may show its examples on real data
FLOORS = {0: set(),
          1: {'jax', 'flax', 'scipy', 'numpy', 'safetensors', 'huggingface_hub'},
          2: {'jax', 'numpy', 'scipy', 'grain', 'tensorflow_datasets', 'PIL', 'simplejpeg', 'sklearn', 'array_record', 'absl',
              'etils'},
          3: {'jax', 'optax', 'orbax', 'numpy', 'flax', 'etils'},
          4: {'jax', 'flax', 'optax', 'numpy', 'scipy', 'sklearn'},
          5: {'jax', 'flax', 'optax', 'numpy', 'joblib', 'pandas', 'tqdm'}}
PACKAGES = {'papermill': {'papermill', 'psutil'},       # its base class, imported when papermill asks for the engine
            'hub': {'huggingface_hub'},                     # imported when weights are asked for
            'storage': {'etils', 'fsspec'},                 # imported when a bucket is named
            'videos': {'numpy', 'tensorflow_datasets', 'array_record', 'PIL', 'av'},    # av when a video is opened
            'evidence': {'numpy', 'pandas', 'scipy'}, 'records': {'numpy', 'pandas'}, 'report': PLOTS | {'scipy'},
            'curves': PLOTS, 'power_laws': {'numpy', 'scipy'}, 'committed': {'numpy'}, 'entries': {'pandas'},
            'transfer_report': {'pandas'}, 'scoreboard': PLOTS | {'scipy', 'PIL'}} | dict.fromkeys(
                ('norm_report', 'scaling_points', 'scaling_report', 'equal_accuracy', 'pareto_report'), PLOTS | {'scipy'})
# evidence is read where there is no accelerator, and quickly
NO_JAX = ('power_laws', 'evidence', 'records', 'report', 'curves', 'committed', 'norm_report', 'scaling_points', 'scaling_report',
          'equal_accuracy', 'transfer_report', 'pareto_report', 'entries', 'scoreboard')


def imported(source):
    """(line, dotted name) of everything imported in `source`, also inside functions and through importlib."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['resnet_rs' if node.level else '', node.module]))
            yield from ((node.lineno, f'{base}.{alias.name}') for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ('import_module', '__import__', 'deferred'):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def called(node):
    """f of a call f(...) or x.f(...)."""
    return getattr(node.func, 'attr', getattr(node.func, 'id', ''))


def may_use(room, other, rooms):
    """Whether the room named `room` (None: an experiment) may import the room `other`; the design's floors."""
    if room is None: return True
    n, m = rooms[room], rooms[other]
    floor, below = n // 10, m // 10
    if m >= n or (floor, below) in {(2, 1), (3, 2)} or (floor, below) == (4, 4) and n < 48: return False  # 48 and 49 join rooms
    return room not in NO_JAX or below == 0 or other in NO_JAX


def violations(room, source, rooms, example=False):
    """What the room `room` (None: an experiment notebook) imports in `source` and must not, a line of text each.
    `example`: a cell that is not exported, which may use its own room as installed, and draw."""
    packages = PLOTS if room is None else PACKAGES.get(room, FLOORS[rooms[room] // 10]) | (EXAMPLES if example else set())
    for line, name in sorted(imported(source)):
        top, _, rest = name.partition('.')
        other = rest.partition('.')[0]
        if top == 'resnet_rs':
            if other in rooms and not (example and other == room) and not may_use(room, other, rooms):
                yield (f'line {line}: {room} ({rooms[room]:02}) must not import {other} ({rooms[other]:02}); '
                       'a room looks down, and 2x not at 1x, 3x not at 2x, 4x not at 4x, records and report at nothing with jax')
        elif top not in sys.stdlib_module_names and top not in packages:
            yield (f'line {line}: {room or "an experiment"} must not import {top}; beyond the standard library it may import '
                   f'{", ".join(sorted(packages)) or "nothing"}')


@every_module
def test_a_module_imports_only_from_below(path):
    assert path.stem in ROOMS, f'resnet_rs/{path.name} has no notebook nbs/NN_{path.stem}.ipynb: delete it'
    tell([f'resnet_rs/{path.name}, {problem}' for problem in violations(path.stem, path.read_text(encoding='utf-8'), ROOMS)])


@every_notebook
def test_a_notebook_imports_only_from_below(path):
    room = stem(path) if is_room(path) else None
    tell([f'nbs/{path.name}, cell {index}, {problem}' for index, source, exported in code_cells(path)
          for problem in violations(room, source, ROOMS, example=not exported)])


@pytest.mark.parametrize('room, source, example, wrong', [
    ('config', 'import numpy', False, 'must not import numpy'),
    ('config', 'import numpy, matplotlib.pyplot', True, ''),
    ('config', 'from json import loads\nfrom resnet_rs import __version__', False, ''),
    ('config', 'from resnet_rs.blocks import Block', True, 'config (01) must not import blocks (11)'),
    ('blocks', 'from resnet_rs import config', False, ''),
    ('blocks', 'from resnet_rs import images', False, 'blocks (11) must not import images (21)'),
    ('blocks', 'import jax, optax', False, 'must not import optax'),
    ('blocks', 'from resnet_rs.blocks import Block', True, ''),
    ('blocks', 'from resnet_rs.blocks import Block', False, 'must not import blocks'),
    ('images', 'def f():\n    import resnet_rs.blocks as b', False, 'line 2: images (21) must not import blocks (11)'),
    ('images', 'from .config import Config', False, ''),
    ('images', 'from .blocks import Block', False, 'must not import blocks'),
    ('images', 'from . import train', False, 'must not import train (34)'),
    ('images', 'import importlib; importlib.import_module("resnet_rs.train")', False, 'must not import train'),
    ('images', 'import tensorflow', True, 'must not import tensorflow'),
    ('train', 'import optax, orbax.checkpoint\nfrom resnet_rs.blocks import Block', False, ''),
    ('train', 'from resnet_rs.images import batches', True, 'must not import images'),
    ('finetune', 'from resnet_rs.images import a\nfrom resnet_rs.train import b', False, ''),
    ('contrastive', 'from resnet_rs.finetune import a', False, 'must not import finetune'),
    ('records', 'import jax', False, 'must not import jax'),
    ('records', 'from resnet_rs.train import fit', False, 'must not import train'),
    ('report', 'from resnet_rs.records import read_runs\nimport seaborn', False, ''),
    ('report', 'from resnet_rs.experiment import run', False, 'must not import experiment'),
    ('experiment', 'from resnet_rs import images, train, records', False, ''),
    (None, 'from resnet_rs.train import fit\nimport seaborn', True, ''),
    (None, 'import jax.numpy as jnp', True, 'an experiment must not import jax'),
])
def test_the_import_rule_itself(room, source, example, wrong):
    rooms = dict(config=1, blocks=11, images=21, train=34, finetune=41, contrastive=42, records=50, experiment=51, report=52)
    found = ' '.join(violations(room, source, rooms, example))
    assert (wrong in found) if wrong else not found, found


def test_no_star_imports():
    sources = [(f'nbs/{path.name}, cell {i}', source) for path in NOTEBOOKS for i, source, _ in code_cells(path)]
    sources += [(f'resnet_rs/{path.name}', path.read_text(encoding='utf-8')) for path in MODULES]
    tell([f'{where}, line {line}: name what you import from {name[:-2]}' for where, source in sources
          for line, name in imported(source) if name.startswith('resnet_rs') and name.endswith('.*')])


GRADIENTS = {'grad', 'value_and_grad', 'vjp', 'jvp', 'linearize', 'jacfwd', 'jacrev', 'jacobian', 'hessian'}


def gradients(source):
    """Lines that differentiate with jax or flax: jax.grad, nnx.value_and_grad, `from jax import grad`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in GRADIENTS and ast.unparse(node.value) in ('jax', 'nnx', 'flax.nnx'):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in ('jax', 'flax'):
            yield from (node.lineno for alias in node.names if alias.name in GRADIENTS)


def test_one_gradient_loop():
    """Exported code differentiates in resnet_rs.steps only, experiments nowhere."""
    assert sorted(gradients('import jax\nf = jax.value_and_grad(g)\nfrom jax import grad')) == [2, 3]
    assert not list(gradients('grad = 1; grad.vjp'))
    where = {path.stem: lines for path in MODULES if (lines := list(gradients(path.read_text(encoding='utf-8'))))}
    where |= {path.name: [i] for path in EXPERIMENTS for i, source, _ in code_cells(path) if list(gradients(source))}
    tell([f'{name}, line {lines[0]}: leave the gradient to 33_steps (fit takes the loss)'
          for name, lines in where.items() if name != 'steps'])
    assert 'steps' in where, '33_steps takes no gradient: this test looks for the wrong thing'


# --- names and sizes -------------------------------------------------------------------------------------------------------

def test_stems_are_unique():
    stems = [stem(path) for path in NOTEBOOKS]
    tell([f'{name} is the stem of two notebooks: their pages would overwrite each other'
          for name in sorted(set(stems)) if stems.count(name) > 1])


@every_notebook
def test_numbered_notebooks_export_and_the_others_do_not(path):
    exports = [index for index, _, exported in code_cells(path) if exported]
    named = [line for _, source, _ in code_cells(path) for line in re.findall(r'(?m)^#\|\s*default_exp\s+(\S+)', source)]
    if is_room(path):
        assert named == [stem(path)], f'nbs/{path.name}: write `#| default_exp {stem(path)}` once (found {named})'
        assert exports, f'nbs/{path.name} exports nothing: remove its number'
    else:
        assert not named and not exports, f'nbs/{path.name} has no number: move what it exports (cells {exports}) to one that has'


def lines_of(node):
    return node.end_lineno - node.lineno + 1


@every_notebook
def test_sizes_of_notebooks(path):
    longest = 60 if stem(path) in ('blocks', 'training') and is_room(path) else 40
    count = len(read(path)['cells'])
    problems = [f'nbs/{path.name} has {count} cells, at most 70: make it two notebooks'] * (count > 70)
    for index, source, exported in code_cells(path):
        lines = len(source.strip().splitlines())
        where = f'nbs/{path.name}, cell {index}'
        if exported and lines > longest: problems.append(f'{where}: {lines} exported lines, at most {longest}: split it')
        if not is_room(path):
            problems += [f'{where}: {node.name} has {lines_of(node)} lines, at most 8: move it to the library'
                         for node in ast.walk(ast.parse(source))
                         if isinstance(node, ast.FunctionDef | ast.ClassDef) and lines_of(node) > 8]
    tell(problems)


@every_module
def test_sizes_of_modules(path):
    text = path.read_text(encoding='utf-8')
    lines = len(text.splitlines())
    tell([f'resnet_rs/{path.name} has {lines} lines, at most 300: make it two rooms'] * (lines > 300)
         + [f'resnet_rs/{path.name}: {node.name} has {lines_of(node)} lines, at most 50: split it'
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and lines_of(node) > 50])


def public_names(tree):
    """__all__ of a module, from its syntax."""
    return [name for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__'
            for name in ast.literal_eval(node.value)]


@every_room
def test_public_names_are_shown_and_described(path):
    module = ROOT / 'resnet_rs' / f'{stem(path)}.py'
    assert module.is_file(), f'nbs/{path.name} is not exported: run nbdev_export'
    tree = ast.parse(module.read_text(encoding='utf-8'))
    examples = [node for _, source, exported in code_cells(path) if not exported for node in ast.walk(ast.parse(source))]
    used = {getattr(node, 'id', getattr(node, 'attr', '')) for node in examples if isinstance(node, ast.Name | ast.Attribute)}
    public = public_names(tree)
    assert public, f'resnet_rs/{module.name} has no public name'
    tell([f'nbs/{path.name}: {name} is public and no example uses it: show it, or call it _{name}'
          for name in public if name not in used]
         + [f'nbs/{path.name}: {node.name} is public and has no docstring' for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public and not ast.get_docstring(node)])


# --- what is committed -----------------------------------------------------------------------------------------------------

MACHINE_FOLDERS = ('root', 'home', 'tmp', 'work', 'Users', 'var/folders')
MACHINE_PATH = re.compile(rf'(?:(?<![\w.~+/-])|(?<=://))/(?:{"|".join(MACHINE_FOLDERS)})\b(?![\w])[\w./-]*|[A-Z]:\\Users\\')


def texts(output):
    """The saved texts of an output; pictures are not text."""
    yield ''.join(output.get('text', ''))
    for kind, data in output.get('data', {}).items():
        if not kind.startswith('image/') or 'svg' in kind:
            yield ''.join(data) if isinstance(data, list | str) else json.dumps(data)


@pytest.mark.parametrize('folder', MACHINE_FOLDERS)
def test_what_a_machine_path_is(folder):
    for text in ['File /{}/x.py', "'/{}/a'", '(/{}/b', 'file:///{}/x', 'at /{}', 'C:\\Users\\me']:
        assert MACHINE_PATH.search(text.format(folder)), text
    for text in ['https://example.org/{}/x', 'base64,AAA/{}/AAA', 'nbs/{}/x', 'images/{}', '~/{}/', '/{}ers/x']:
        assert not MACHINE_PATH.search(text.format(folder)), text


@every_notebook
def test_saved_outputs(path):
    problems, size = [], 0
    for index, cell in enumerate(read(path)['cells']):
        for output in cell.get('outputs', []):
            size += len(json.dumps(output))
            where = f'nbs/{path.name}, cell {index}'
            if output['output_type'] == 'error': problems.append(f'{where}: a saved {output["ename"]}: mend it, run it again')
            problems += [f'{where}: the output names a place on your machine, {found[0]}: print a relative path'
                         for text in texts(output) if (found := MACHINE_PATH.search(text))]
    problems += [f'nbs/{path.name}: outputs of {size // 1000} kB, at most 300: fewer or smaller figures'] * (size > 300_000)
    tell(problems)


TAGGED = {'cells': [{'cell_type': 'code', 'id': 'a', 'execution_count': None, 'outputs': [], 'source': ['x = 1'],
                     'metadata': {'tags': ['parameters'], 'collapsed': True}}],
          'metadata': {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}},
          'nbformat': 4, 'nbformat_minor': 5}


def nbdev(home, command):
    """An nbdev command in the project `home`; without IN_TEST, under which nbdev does nothing."""
    env = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}
    program = Path(sys.executable).with_name(command)
    done = subprocess.run([program], cwd=home, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f'{command} fails:\n{done.stdout}{done.stderr}'


def files(home):
    return {path.relative_to(home): path.read_bytes() for path in home.rglob('*') if path.is_file()}


def test_export_and_clean_leave_no_difference(tmp_path):
    """On a copy whose modules are deleted first, so that one without a notebook is found as well."""
    committed, made = tmp_path / 'committed', tmp_path / 'made'
    for folder in ('nbs', 'resnet_rs'):
        shutil.copytree(ROOT / folder, committed / folder, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md'): shutil.copy(ROOT / name, committed)
    shutil.copytree(committed, made)
    for module in (made / 'resnet_rs').glob('*.py'):
        if module.name != '__init__.py': module.unlink()
    nbdev(made, 'nbdev_export')
    nbdev(made, 'nbdev_clean')
    before, after = files(committed), files(made)
    lines = {path: [side.get(path, b'').decode('utf-8', 'replace').splitlines() for side in (before, after)]
             for path in sorted(before | after) if before.get(path) != after.get(path)}
    tell(['\n'.join([f'{path} differs after nbdev_export and nbdev_clean; run both and commit. The first lines:',
                     *list(difflib.unified_diff(*sides, 'committed', 'made', n=0, lineterm=''))[:12]])
          for path, sides in lines.items()])


def test_clean_keeps_the_tag_because_settings_say_so(tmp_path):
    """Without the tag papermill injects at the top, and the defaults win."""
    settings = (ROOT / 'settings.ini').read_text(encoding='utf-8')
    (tmp_path / 'nbs').mkdir()
    for text, left in [(settings, {'tags': ['parameters']}), (settings.replace('allowed_cell_metadata_keys = tags', ''), {})]:
        (tmp_path / 'settings.ini').write_text(text, encoding='utf-8')
        notebook = tmp_path / 'nbs' / 'tagged.ipynb'
        notebook.write_text(json.dumps(TAGGED))
        nbdev(tmp_path, 'nbdev_clean')
        assert json.loads(notebook.read_text())['cells'][0]['metadata'] == left, 'settings.ini: allowed_cell_metadata_keys = tags'


# --- experiments -----------------------------------------------------------------------------------------------------------

def literals(source):
    """{name: value} of a parameters cell; ValueError where it holds anything but `name = literal`."""
    values = {}
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else getattr(node, 'target', None)
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name) or node.value is None:
            raise ValueError(f'line {node.lineno}: only `name = literal`')
        try: values[target.id] = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(f'line {node.lineno}: {target.id} is computed: it goes stale when papermill injects') from None
    return values


def test_what_a_literal_is():
    source = "scale = 'laptop'   # words\nrate: float = -4e-5\nrows = ['a', 'b']"
    assert literals(source) == {'scale': 'laptop', 'rate': -4e-5, 'rows': ['a', 'b']}
    for wrong in ['a = 1\nb = a * 2', 'import os', 'a, b = 1, 2', 'a += 1', 'print(1)', 'x: int', 'a = int("1")']:
        with pytest.raises(ValueError, match='line'): literals(wrong)


def check_guarded(cells):
    """Code cells [{source, metadata}] of an experiment: setup with the guard, tagged literals, check; else AssertionError."""
    tagged = [i for i, cell in enumerate(cells) if 'parameters' in cell['metadata'].get('tags', [])]
    assert len(tagged) == 1, f'tag exactly one cell `parameters`, not {len(tagged)}'
    at = tagged[0]
    assert 0 < at < len(cells) - 1, 'the parameters cell stands between the setup and the check'
    setup, parameters, check = (''.join(cells[i]['source']) for i in (at - 1, at, at + 1))
    last = ast.unparse(ast.parse(setup).body[-1])
    assert re.fullmatch(r'\w+ = Guard\(globals\(\)\)', last), f'end the setup cell with guard = Guard(globals()), not {last!r}'
    try: defaults = literals(parameters)
    except ValueError as error: raise AssertionError(f'the parameters cell, {error}') from None
    lacking = {'scale', 'seeds', 'results_dir', 'data_dir'} - set(defaults)
    assert not lacking, f'every experiment takes {", ".join(sorted(lacking))} too'
    checks = [node for node in ast.walk(ast.parse(check)) if isinstance(node, ast.Call) and called(node) == 'check']
    assert checks, 'check the parameters in the cell after them, p = guard.check(...)'
    checked = {keyword.arg for keyword in checks[0].keywords}
    assert checked == set(defaults), f'checked and defined parameters differ in {", ".join(sorted(checked ^ set(defaults)))}'


@every_experiment
def test_experiments_guard_their_parameters(path):
    try: check_guarded([cell for cell in read(path)['cells'] if cell['cell_type'] == 'code'])
    except AssertionError as error: pytest.fail(f'nbs/{path.name}: {error}', pytrace=False)


def test_the_guard_rule_itself():
    setup, check = 'import json\nguard = Guard(globals())', 'p = guard.check(scale=a, seeds=b, results_dir=c, data_dir=d)'
    parameters = "scale = 'laptop'\nseeds = 3\nresults_dir = ''\ndata_dir = ''"

    def cells(*sources, tags=('parameters',)):
        return [{'source': [source], 'metadata': {'tags': list(tags)} if i == 1 else {}} for i, source in enumerate(sources)]
    check_guarded(cells(setup, parameters, check))
    for wrong, says in [(cells(setup, parameters, check, tags=()), 'tag exactly one'),
                        (cells(setup, parameters), 'stands between'),
                        (cells('import json', parameters, check), 'Guard'),
                        (cells(setup, parameters, 'run()'), 'p = guard.check'),
                        (cells(setup, parameters + '\nlr = 0.1', check), 'differ in lr'),
                        (cells(setup, 'scale = 1', check), 'data_dir'),
                        (cells(setup, parameters + '\nlr = seeds * 2', check), 'goes stale')]:
        with pytest.raises(AssertionError, match=says): check_guarded(wrong)


def check_colab(cells, name, settings):
    """Cells of the experiment nbs/`name`: a link to Colab in the first; the first one of code installs there, and only there."""
    address = f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/nbs/{name}"
    assert f'[Open in Colab]({address})' in ''.join(cells[0]['source']), f'write [Open in Colab]({address}) in the first cell'
    source = next(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    for there in (False, True):
        ran = ran_by(source, there)
        if not there: assert not ran, f'the first cell of code runs {ran} outside of Colab'
    package = f"git+{settings['git_url']}@{settings['branch']}"
    assert ran == [([sys.executable, '-m', 'pip', 'install', '--quiet', package], {'check': True})], \
        f'in Colab the first cell of code installs {package} by pip, not {ran}'


def ran_by(source, in_colab):
    """What `source` gives to subprocess.run, where google.colab is loaded and where it is not; nothing is run."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ('google', 'google.colab'): patch.delitem(sys.modules, name, raising=False)
        if in_colab: patch.setitem(sys.modules, 'google.colab', ModuleType('google.colab'))
        for name in ('run', 'Popen', 'call', 'check_call', 'check_output'):
            patch.setattr(subprocess, name, lambda command, **options: ran.append((command, options)))
        patch.setattr(os, 'system', lambda command: ran.append((command, {})))
        exec(source, {'__name__': '__main__'})
    return ran


@pytest.fixture(scope='module')
def settings():
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


@every_experiment
def test_experiments_open_and_install_in_colab(path, settings):
    try: check_colab(read(path)['cells'], path.name, settings)
    except AssertionError as error: pytest.fail(f'nbs/{path.name}: {error}', pytrace=False)


def test_the_colab_rule_itself(settings):
    link = f"# A\n\n[Open in Colab](https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/main/nbs/a.ipynb)"
    run = f"subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', 'git+{settings['git_url']}@main'], check=True)"
    install = f"import subprocess, sys\nif 'google.colab' in sys.modules: {run}"

    def cells(text, code): return [{'cell_type': 'markdown', 'source': [text]}, {'cell_type': 'code', 'source': [code]}]
    check_colab(cells(link, install), 'a.ipynb', settings)
    for wrong, says in [(cells('# A', install), 'Open in Colab'), (cells(link.replace('/a.', '/b.'), install), 'Open in Colab'),
                        (cells(link, f'import subprocess, sys\n{run}'), 'outside of Colab'),
                        (cells(link, 'import sys'), 'installs'), (cells(link, install.replace('@main', '')), 'installs'),
                        (cells(link, install.replace(', check=True', '')), 'installs')]:
        with pytest.raises(AssertionError, match=says): check_colab(wrong, 'a.ipynb', settings)


# --- imports, run ----------------------------------------------------------------------------------------------------------

def loaded_by(*modules, then=''):
    """Top-level packages in a fresh process after importing `modules`, and what `then` prints."""
    code = '; '.join(['import sys', *(f'import {name}' for name in modules)])
    code += f'\nprint(*sorted({{name.partition(".")[0] for name in sys.modules}}))\n{then}'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f'import {", ".join(modules)} fails:\n{done.stderr}'
    packages, *more = done.stdout.splitlines()
    return set(packages.split()), more


def test_importing_the_package_loads_nothing_heavy():
    packages, _ = loaded_by('resnet_rs')
    heavy = packages & {'jax', 'tensorflow', 'numpy', 'pandas', 'papermill'}
    assert not heavy, f'resnet_rs/__init__.py holds the version only, and loads {heavy}'


def test_rooms_without_jax_load_none():
    light = [f'resnet_rs.{name}' for name, number in ROOMS.items() if number < 10 or name in NO_JAX]
    packages, _ = loaded_by(*light)
    heavy = packages & {'jax', 'flax', 'tensorflow'}
    assert not heavy, f'one of {", ".join(light)} imports {heavy}, perhaps through another package'


def test_importing_everything_touches_no_device_and_no_tensorflow():
    modules = [f'resnet_rs.{path.stem}' for path in MODULES]
    packages, more = loaded_by(*modules, then='from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())')
    assert 'tensorflow' not in packages, 'a module imports TensorFlow'
    assert more == ['False'], 'a module starts a device when imported: no jnp arrays and no jax.devices() at its top level'
