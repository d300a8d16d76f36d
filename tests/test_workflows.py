"""The words in workflows and pages exist in the Makefile, and the workflows are safe, bounded, and of the Pythons we promise."""
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / 'Makefile').read_text(encoding='utf-8')
PATHS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))
FLOWS = {path.stem: yaml.safe_load(path.read_text(encoding='utf-8')) for path in PATHS}
TRIGGERS = {name: flow[True] for name, flow in FLOWS.items()}  # YAML reads the word `on` as true
JOBS = {f'{name}-{job}': body for name, flow in FLOWS.items() for job, body in flow['jobs'].items()}
STEPS = [(job, step) for job, body in JOBS.items() for step in body['steps']]
WORDS = {rule for line in re.findall(r'^([a-z][a-z -]*):(?!=)', MAKEFILE, re.M) for rule in line.split()}
CFG = configparser.ConfigParser(delimiters=['='])
CFG.read(ROOT / 'settings.ini', encoding='utf-8')
CFG = CFG['DEFAULT']
PYTHONS = CFG['pythons'].split()


def test_the_three_workflows():
    "Tests at each push and request, the site too, and what takes long or needs a device by hand."
    assert set(FLOWS) == {'tests', 'site', 'flags'}
    assert set(TRIGGERS['tests']) == {'push', 'pull_request'} and 'workflow_dispatch' in TRIGGERS['site']
    assert set(TRIGGERS['flags']) == {'workflow_dispatch'}
    assert {'slow', 'gpu', 'runner'} <= set(TRIGGERS['flags']['workflow_dispatch']['inputs'])


@pytest.mark.parametrize('name', FLOWS)
def test_each_is_bounded_and_may_only_read(name):
    flow = FLOWS[name]
    assert flow['permissions'] == {'contents': 'read'} and flow['concurrency']['group']
    for job, body in flow['jobs'].items():
        assert 0 < body['timeout-minutes'] <= 120, job
        more = {'pages': 'write', 'id-token': 'write'} if job == 'deploy' else {}
        assert body.get('permissions', {}) == more, f'{job} may do more than it needs'


def test_actions_are_githubs_own_in_one_major_version():
    uses = [step['uses'] for _, step in STEPS if 'uses' in step]
    assert all(re.fullmatch(r'actions/[a-z-]+@v\d+', use) for use in uses), uses
    assert len(set(uses)) == len({use.partition('@')[0] for use in uses}), f'one version of each: {sorted(set(uses))}'
    for job, step in STEPS:
        if step.get('uses', '').startswith('actions/checkout@'): assert step['with'] == {'persist-credentials': False}, job


def test_what_a_word_of_the_makefile_is():
    assert {'install', 'run', 'test', 'test-slow', 'test-gpu', 'lint', 'lab', 'docs', 'record', 'lock', 'wheel', 'clean'} <= WORDS
    assert not WORDS & {'PYTHON', 'no-such-word'}
    phony = re.search(r'^\.PHONY: (.*)$', MAKEFILE, re.M)[1].split()
    assert set(phony) == WORDS, 'each word is in .PHONY, or a file of its name would stop it'


def test_every_command_is_a_word_of_the_makefile():
    "So that what runs there runs anywhere; no input reaches a shell but through the environment."
    for job, step in STEPS:
        if 'run' not in step: continue
        commands = step['run'].strip().splitlines()
        for command in commands:
            assert re.match(r'make [a-z-]+( |$)', command) and command.split()[1] in WORDS, f'{job}: {command}'
            assert '${{' not in command, f'{job}: {command}'


@pytest.mark.parametrize('page', [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))],
                         ids=lambda path: path.name)
def test_every_word_in_our_pages_exists(page):
    text = page.read_text(encoding='utf-8')
    said = set(re.findall(r'(?:`|^|&& )make ([a-z][a-z-]*)', text, re.M))
    assert not said - WORDS, f'{page.name} says make {sorted(said - WORDS)}, and the Makefile does not know it'
    if page.name == 'CONTRIBUTING.md': assert {'install', 'test', 'test-slow', 'lint', 'lab', 'lock'} <= said


def test_pythons_are_those_of_settings():
    "In each workflow; the Makefile's lock and its complaint about older ones; the linter."
    assert JOBS['tests-test']['strategy']['matrix']['python'] == PYTHONS and PYTHONS[0] == CFG['min_python']
    assert TRIGGERS['flags']['workflow_dispatch']['inputs']['python']['options'] == PYTHONS
    named = [word for _, step in STEPS for word in str(step.get('with', {}).get('python-version', '')).split()]
    assert {word for word in named if re.match(r'\d', word)} <= set(PYTHONS)
    assert f'--python-version {PYTHONS[0]} ' in MAKEFILE and 'v >= ({}, {})'.format(*PYTHONS[0].split('.')) in MAKEFILE
    assert f'target-version = "py{PYTHONS[0].replace(".", "")}"' in (ROOT / 'pyproject.toml').read_text(encoding='utf-8')


def test_the_site_is_uploaded_from_where_it_is_built():
    [upload] = [step for _, step in STEPS if step.get('uses', '').startswith('actions/upload-pages-artifact@')]
    assert upload['with']['path'] == CFG['doc_path']
    guard = "github.ref == 'refs/heads/{}'".format(CFG['branch'])
    assert upload['if'] == guard == FLOWS['site']['jobs']['deploy']['if'], 'only main is deployed'


def zizmor(*paths):
    program = Path(sys.executable).with_name('zizmor')
    return subprocess.run([program, '--offline', '--no-progress', *paths], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_workflow_linter_finds_nothing(tmp_path):
    done = zizmor('.github')
    assert done.returncode == 0, done.stdout
    text = (ROOT / '.github' / 'workflows' / 'tests.yml').read_text(encoding='utf-8')
    (tmp_path / 'wrong.yml').write_text(text.replace('make lint', 'echo ${{ github.head_ref }}'))
    assert 'template-injection' in zizmor('--config', '.github/zizmor.yml', tmp_path / 'wrong.yml').stdout


def test_contributing_says_what_settings_say():
    "Where to clone from, the Pythons, and every extra."
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert f'git clone {CFG["git_url"]} && cd {CFG["repo"]}\n' in text
    assert f'Python {", ".join(PYTHONS[:-1])} or {PYTHONS[-1]}' in text
    extras = {key.removesuffix('_requirements') for key in CFG if key.endswith('_requirements')} - {'dev'}
    assert set(re.findall(r'^\| `([a-z]+)` \|', text.partition('| extra |')[2].partition('\n\n')[0], re.M)) == extras
