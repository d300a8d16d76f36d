"""The wheel: what is in it, what it asks for, and that it works alone in an empty environment on two Pythons; extras and lock."""
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
INI = configparser.ConfigParser(delimiters=['='])
INI.read(ROOT / 'settings.ini', encoding='utf-8')
CFG = INI['DEFAULT']
EXTRAS = sorted(key.removesuffix('_requirements') for key in CFG if key.endswith('_requirements'))
PYTHONS = CFG['pythons'].split()
UNSEEN = {  # required although no module of ours imports them
    'array-record': 'TFDS reads our data files with it and does not ask for it on every platform',
    'importlib-resources': 'TFDS imports it and does not ask for it',
    'ipykernel': 'papermill starts the notebooks in it'}


def requirements(key):
    "What settings.ini lists under `key`."
    return [Requirement(text) for text in CFG[key].split()]


def files_of(folder):
    "Files of the project's folder as their paths from the root, without what Python leaves there."
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob('*') if p.is_file() and '__pycache__' not in p.parts}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "(source distribution, wheel built from it), of a copy of the project."
    copy, dist = tmp_path_factory.mktemp('source') / 'project', tmp_path_factory.mktemp('dist')
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(
        '.*', 'runs', 'results', '_docs', '_proc', 'build', 'dist', '*.egg-info', '__pycache__'))
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, copy], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    (sdist,), (wheel,) = dist.glob('*.tar.gz'), dist.glob('*.whl')
    return sdist, wheel


@pytest.fixture(scope='module')
def about(built):
    "The wheel's metadata."
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith('.dist-info/METADATA')]
        return HeaderParser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_library_its_tables_and_the_licence_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    notes = {name for name in inside if '.dist-info/' in name}
    assert set(inside) - notes == files_of('resnet_rs')
    assert {name.partition('.dist-info/')[2] for name in notes} == {
        'METADATA', 'WHEEL', 'RECORD', 'entry_points.txt', 'top_level.txt', 'licenses/LICENSE'}
    for name in set(inside) - notes: assert inside[name] == (ROOT / name).read_bytes(), f'{name} differs'
    assert any(name.startswith('resnet_rs/tables/') for name in inside)
    assert next(inside[n] for n in notes if n.endswith('LICENSE')) == (ROOT / 'LICENSE').read_bytes()


def test_the_source_distribution_builds_it_and_leaves_the_rest_at_home(built):
    "The wheel above was built from it; it needs settings.ini and what that names."
    with tarfile.open(built[0]) as archive: names = {name.partition('/')[2] for name in archive.getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'} | files_of('resnet_rs') <= names
    assert not {name.partition('/')[0] for name in names} & {'tests', 'nbs', 'docs', 'results', 'runs', 'benchmarks', '.github'}


def test_metadata_say_what_settings_say(about):
    assert (about['Name'], about['Version']) == (CFG['lib_name'], CFG['version'])
    assert about['Requires-Python'] == '>=' + CFG['min_python'] == '>=' + PYTHONS[0]
    assert about['License-Expression'] == 'Apache-2.0' and about['Summary'] == CFG['description']
    assert {c.rpartition(' ')[2] for c in about.get_all('Classifier') if 'Python ::' in c} == {'3', *PYTHONS}
    assert sorted(about.get_all('Provides-Extra')) == EXTRAS == ['bucket', 'cuda', 'dev', 'prepare', 'tpu', 'video']
    asked = {}
    for text in about.get_all('Requires-Dist'):
        needed = Requirement(text)
        extra = next((e for e in EXTRAS if re.search(f'extra == "{e}"', text)), '')
        asked.setdefault(extra, set()).add((needed.name, frozenset(needed.extras), str(needed.specifier)))
    listed = {extra: {(r.name, frozenset(r.extras), str(r.specifier)) for r in requirements(f'{extra}_requirements'.lstrip('_'))}
              for extra in ['', *EXTRAS]}
    assert asked == listed


def test_requirements_are_what_the_library_imports():
    "Each package that a module imports is asked for by name, and nothing is asked for without a reason."
    found, ours = set(), {r.name for r in requirements('requirements')}
    for path in (ROOT / 'resnet_rs').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import): found |= {alias.name.partition('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.partition('.')[0])
            elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'deferred':
                found.add(node.args[0].value.partition('.')[0])
    found -= set(sys.stdlib_module_names) | {'resnet_rs', 'av'}    # av: an extra, asked for by name where a video is opened
    owners = metadata.packages_distributions()
    needed = {canonicalize_name(owner) for name in found for owner in owners.get(name, [name])}
    ours = {canonicalize_name(name) for name in ours}
    assert not needed - ours, f'imported in resnet_rs/, and not in requirements of settings.ini: {sorted(needed - ours)}'
    idle = ours - needed - set(UNSEEN)
    assert not idle, f'in requirements of settings.ini, and imported nowhere in resnet_rs/: {sorted(idle)}'


# --- the lock --------------------------------------------------------------------------------------------------------------

def locked(version):
    "{package: pinned version} of requirements.lock for the Python `version` on this platform."
    here = default_environment() | {'python_version': version, 'python_full_version': f'{version}.9'}
    pins = {}
    for line in (ROOT / 'requirements.lock').read_text(encoding='utf-8').splitlines():
        pin = Requirement(line.partition('  #')[0])
        if pin.marker and not pin.marker.evaluate(here): continue
        name, (exact,) = canonicalize_name(pin.name), pin.specifier
        assert name not in pins and exact.operator == '==', f'{line}: one exact version of {name} for Python {version}'
        pins[name] = exact.version
    return pins


@pytest.mark.parametrize('version', PYTHONS)
def test_the_lock_follows_from_settings(version):
    pins = locked(version)
    for needed in requirements('requirements') + requirements('dev_requirements'):
        pin = pins.get(canonicalize_name(needed.name))
        assert pin and needed.specifier.contains(pin), f'{needed} for Python {version}: the lock has {pin}; run `make lock`'


@pytest.mark.slow
@pytest.mark.parametrize('extra', EXTRAS)
def test_every_extra_resolves_on_every_python(extra):
    "Together with the requirements, and without moving what the lock has pinned."
    done = subprocess.run([Path(sys.executable).with_name('uv'), 'pip', 'compile', '--universal', '--python-version', PYTHONS[0],
                           '--no-annotate', '--no-header', '--extra', extra, '--constraint', 'requirements.lock', 'setup.py'],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {canonicalize_name(Requirement(line).name) for line in done.stdout.splitlines() if line.strip()}
    hallmark = {'bucket': {'gcsfs', 's3fs'}, 'cuda': {'jax-cuda12-plugin'}, 'dev': {'nbdev'}, 'prepare': {'tensorflow'},
                'tpu': {'libtpu'}, 'video': {'av'}}
    # dev holds what bucket and video do: the tests write to stand-in buckets, and videos
    expected = {extra, 'bucket', 'video'} if extra == 'dev' else {extra}
    assert {name for name, marks in hallmark.items() if marks <= found} == expected


# --- an empty environment --------------------------------------------------------------------------------------------------

def interpreter(version):
    "A working Python `version` on the path or in pyenv, with venv; else None."
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv')) / 'versions'
    for program in (shutil.which(f'python{version}'), *sorted(pyenv.glob(f'{version}.*/bin/python'))):
        asked = program and subprocess.run([program, '-c', 'import ensurepip, sys; print(*sys.version_info[:2], sep=".")'],
                                           capture_output=True, text=True)
        if asked and asked.returncode == 0 and asked.stdout.strip() == version: return program


THIS = '{}.{}'.format(*sys.version_info)


@pytest.fixture(scope='module', params=['this', 'another'])
def installed(request, built, tmp_path_factory):
    """`run(program, *args)` in an environment that holds the wheel and what it asks for, in an empty folder with an empty home.

    Versions are those of the lock, so that the test repeats; with RESNET_RS_UNLOCKED=1 the newest that may be had."""
    version = THIS if request.param == 'this' else next((v for v in reversed(PYTHONS) if v != THIS and interpreter(v)), None)
    if version is None: pytest.skip(f'no Python of {", ".join(PYTHONS)} but {THIS} on this machine')
    place = tmp_path_factory.mktemp('empty')
    env = {name: value for name, value in os.environ.items()
           if not re.match('PYTHON|RESNET_RS|JUPYTER|IPYTHON|VIRTUAL_ENV|XLA_|JAX_', name)}
    (place / 'home').mkdir()
    (place / 'work').mkdir()

    def run(program, *args, home=place / 'home'):
        done = subprocess.run([place / 'env' / 'bin' / program, *map(str, args)], cwd=place / 'work', stdin=subprocess.DEVNULL,
                              env=env | {'HOME': str(home)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=900)
        assert done.returncode == 0, f'Python {version}: {program} {" ".join(map(str, args))}\n{done.stdout[-3000:]}'
        return done.stdout

    subprocess.run([interpreter(version) or sys.executable, '-m', 'venv', place / 'env'], check=True, timeout=120)
    lock = [] if os.environ.get('RESNET_RS_UNLOCKED') else ['--constraint', ROOT / 'requirements.lock']
    run('pip', 'install', '--quiet', '--no-compile', *lock, built[1], home=Path.home())  # with the user's index and cache
    yield run
    shutil.rmtree(place, ignore_errors=True)  # more than a gigabyte


@pytest.mark.slow
def test_the_plain_wheel_brings_no_tools_of_ours(installed):
    assert 'No broken requirements' in installed('pip', 'check')
    packages = json.loads(installed('pip', 'list', '--format', 'json', '--disable-pip-version-check'))
    names = {canonicalize_name(package['name']) for package in packages}
    assert {'resnet-rs', 'jax', 'flax', 'papermill'} <= names
    assert not names & {'nbdev', 'jupyterlab', 'pytest', 'ruff', 'uv', 'tensorflow', 'gcsfs', 'jax-cuda12-plugin', 'libtpu'}


@pytest.mark.slow
def test_importing_the_package_is_light_and_silent(installed):
    code = 'import sys; before = set(sys.modules); import resnet_rs; print(*set(sys.modules) - before, resnet_rs.__version__)'
    assert installed('python', '-W', 'error', '-c', code).split() == ['resnet_rs', CFG['version']]


@pytest.mark.slow
def test_create_model_works(installed):
    code = ('import numpy as np; from flax import nnx; from resnet_rs.registry import create_model\n'
            "model = create_model('resnet_rs_50', num_classes=1000, rngs=nnx.Rngs(0)); model.eval()\n"
            'logits = model(np.random.default_rng(0).normal(size=(1, 160, 160, 3)).astype(np.float32))\n'
            'print(logits.shape, logits.dtype, bool(np.isfinite(logits).all() and np.std(logits) > 0))')
    assert installed('python', '-c', code).splitlines()[-1] == '(1, 1000) float32 True'


@pytest.mark.slow
def test_the_tables_of_the_paper_are_there(installed):
    code = ('from importlib.resources import files\n'
            "print(*sorted(p.name for p in (files('resnet_rs') / 'tables').iterdir()))")
    assert set(installed('python', '-c', code).split()) == {Path(p).name for p in files_of('resnet_rs/tables')}


@pytest.mark.slow
def test_papermill_finds_the_engine_and_runs_a_notebook(installed, tmp_path):
    assert 'NOTEBOOK_PATH' in installed('papermill', '--help')
    code = ("from importlib.metadata import entry_points; found = entry_points(group='papermill.engine')\n"
            "[engine] = [e for e in found if e.name == 'resnet_rs']; print(engine.load().__name__)")
    assert installed('python', '-c', code).strip() == 'RunsEngine'
    shutil.copy(ROOT / 'nbs' / 'ablation.ipynb', tmp_path)
    installed('papermill', tmp_path / 'ablation.ipynb', tmp_path / 'out.ipynb', '-p', 'scale', 'smoke', '-p', 'seeds', 1,
              '-p', 'rows', 'baseline', '-p', 'results_dir', tmp_path / 'results')
    [record] = [json.loads(path.read_text()) for path in (tmp_path / 'results').glob('*.json')]
    assert record['status'] == 'done' and record['versions']['resnet_rs'] == CFG['version']
    assert '<table' in (tmp_path / 'out.ipynb').read_text(encoding='utf-8')
