"""The command line as people type it: in a terminal, through pipes, with and without an output path, right and wrong.

Every run is a real papermill process on a throw-away notebook in a throw-away project whose settings.ini has our name.
"""
import json
import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import nbformat
import pexpect
import pytest

from resnet_rs import papermill as ours

BIN = Path(sys.executable).parent
SETUP = """import json
from resnet_rs.papermill import Guard, choice, count, flag, names, number, optional, project_root, text
guard = Guard(globals())"""
PARAMETERS = "scale = 'smoke'\nweight_decay = 1e-4\nseeds = 2\nuse_se = True\ndepth = None\nrows = ''\nresults_dir = ''"
CHECK = """p = guard.check(scale=choice(['smoke', 'laptop']), weight_decay=number(0, 1), seeds=count(1), use_se=flag(),
                depth=optional(choice([26, 50])), rows=names(['baseline', 'cosine']), results_dir=text())"""
SHOW = "print('one')\nprint('PROBE', json.dumps(vars(p) | {'root': str(project_root())}))"


def write_notebook(path):
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, PARAMETERS, CHECK, SHOW)]
    cells[1].metadata['tags'] = ['parameters']
    kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': kernel}), path)


@pytest.fixture
def project(tmp_path):
    """A project of our name and, beside it, one of another's; both with nbs/probe.ipynb."""
    for name, lib in [('ours', 'resnet_rs'), ('theirs', 'other_lib')]:
        (tmp_path / name / 'nbs').mkdir(parents=True)
        (tmp_path / name / 'settings.ini').write_text(f'[DEFAULT]\nlib_name = {lib}\n')
        write_notebook(tmp_path / name / 'nbs' / 'probe.ipynb')
    return tmp_path / 'ours'


def terminal(args, cwd):
    """papermill `args` under a pseudo-terminal -> (exit status, what the person sees)."""
    child = pexpect.spawn(str(BIN / 'papermill'), args, cwd=str(cwd), timeout=60, encoding='utf-8', dimensions=(40, 200))
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, child.before.replace('\r\n', '\n')


def pipe(args, cwd, program=(str(BIN / 'papermill'),)):
    """papermill `args` with standard input, output and error all pipes."""
    return subprocess.run([*program, *args], cwd=cwd, stdin=subprocess.PIPE, capture_output=True, text=True, timeout=60)


def probe(shown):
    """The parameters the notebook printed."""
    return json.loads(next(line for line in shown.splitlines() if line.startswith('PROBE')).removeprefix('PROBE '))


def only_run(project):
    """The one executed notebook in runs/, relative to the project."""
    found = list((project / 'runs').iterdir())
    assert len(found) == 1, found
    return found[0].relative_to(project).as_posix()


def test_terminal_as_typed(project):
    status, shown = terminal(['nbs/probe.ipynb', '-p', 'weight_decay', '4e-5'], project)
    assert status == 0, shown
    output = only_run(project)
    assert output.startswith('runs/probe-20')
    assert shown.count(f'Output Notebook: {output}\n') == 2 and shown.endswith(f'Output Notebook: {output}\n'), shown
    assert '\none\nPROBE' in shown, f'the cells print live, line by line:\n{shown}'
    assert 'Executing:' not in shown, f'a bar runs across the lines:\n{shown}'
    assert probe(shown)['weight_decay'] == 4e-5 and probe(shown)['root'] == str(project)
    executed = nbformat.read(project / output, 4)
    assert executed.metadata.papermill.parameters == {'weight_decay': 4e-5}


def test_pipe_from_another_folder_options_first(project, tmp_path):
    """`python -m papermill`, a caller who stands elsewhere, YAML's string for 4e-5, and -p's string for false."""
    args = ['-y', 'weight_decay: 4e-5', '-p', 'use_se', 'false', '-k', 'python3', '-p', 'depth', 'none', '-p', 'rows',
            'cosine,baseline', 'ours/nbs/probe.ipynb', '--inject-paths']
    done = pipe(args, tmp_path, program=(sys.executable, '-m', 'papermill'))
    assert done.returncode == 0, done.stderr
    output = str(project / only_run(project))
    assert done.stdout.endswith(f'Output Notebook: {output}\n') and f'Output Notebook: {output}' in done.stderr
    assert probe(done.stdout) == {'scale': 'smoke', 'weight_decay': 4e-5, 'seeds': 2, 'use_se': False, 'depth': None,
                                  'rows': ['cosine', 'baseline'], 'results_dir': '', 'root': str(project)}
    assert not (tmp_path / 'runs').exists()


def test_explicit_output_path_is_papermills_business(project):
    status, shown = terminal(['nbs/probe.ipynb', 'out.ipynb', '--engine', 'resnet_rs'], project)
    assert status == 0 and (project / 'out.ipynb').is_file() and not (project / 'runs').exists(), shown
    assert 'Executing:' in shown and 'PROBE' not in shown, 'the bar and the silence are papermill\'s own defaults'


def test_dash_still_means_standard_output(project):
    done = pipe(['nbs/probe.ipynb', '-'], project)
    assert done.returncode == 0, done.stderr
    assert nbformat.reads(done.stdout, 4).cells[-1].outputs[0].text.startswith('one\nPROBE')
    assert not (project / 'runs').exists()


def test_wrong_parameters_are_one_line_each(project):
    status, shown = terminal(['nbs/probe.ipynb', '-p', 'weight_decy', '4e-5', '-p', 'seeds', '1.5', '-p', 'weight_decay', '-1',
                              '-p', 'scale', 'labtop'], project)
    assert status == 1, shown
    known = 'scale, weight_decay, seeds, use_se, depth, rows, results_dir'
    lines = [f"ParameterError: unknown parameter 'weight_decy'; did you mean 'weight_decay'? Parameters: {known}",
             "ParameterError: scale = 'labtop' is not one of smoke, laptop; did you mean 'laptop'?",
             'ParameterError: weight_decay = -1.0 is out of range: 0 <= weight_decay <= 1',
             'ParameterError: seeds = 1.5 is not a whole number']
    output = only_run(project)
    assert shown.endswith('\n'.join([*lines, f'Output Notebook: {output}', ''])), shown
    assert 'Traceback' not in shown and 'PROBE' not in shown
    errors = [o for cell in nbformat.read(project / output, 4).cells for o in cell.get('outputs', []) if o.output_type == 'error']
    assert [error.traceback for error in errors] == [lines]


def test_other_projects_notebook_is_left_to_papermill(project):
    status, shown = terminal(['nbs/probe.ipynb'], project.parent / 'theirs')
    assert status == 2 and "Missing argument 'OUTPUT_PATH'" in shown
    assert not (project.parent / 'theirs' / 'runs').exists()


def test_programs_that_import_papermill_keep_their_arguments(project):
    code = ('import sys; sys.argv = ["papermill.py.bak", "nbs/probe.ipynb"]; hook = sys.excepthook; import papermill\n'
            'from papermill.engines import papermill_engines, NBClientEngine\n'
            'assert sys.argv == ["papermill.py.bak", "nbs/probe.ipynb"] and sys.excepthook is hook\n'
            'engine = papermill_engines.get_engine("resnet_rs")\n'
            'from resnet_rs.papermill import RunsEngine\n'
            'assert engine is RunsEngine and issubclass(engine, NBClientEngine)')
    done = pipe(['-c', code], project, program=(sys.executable,))
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert not (project / 'runs').exists()


def test_importing_the_room_first_gives_the_same_engine():
    code = ('from resnet_rs.papermill import RunsEngine; from papermill.engines import papermill_engines as engines\n'
            'assert engines.get_engine("resnet_rs") is RunsEngine')
    done = pipe(['-c', code], '.', program=(sys.executable,))
    assert done.returncode == 0, done.stderr


def test_the_room_is_light():
    code = ('import sys; old = set(sys.modules); import resnet_rs.papermill\n'
            'print(*{module.split(".")[0] for module in set(sys.modules) - old})')
    done = pipe(['-c', code], '.', program=(sys.executable,))
    loaded = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert done.returncode == 0 and loaded <= {'resnet_rs'}, f'papermill loads it at each start, with {loaded}'


def test_option_table_is_papermills():
    """An option that is missing in the table would make its value look like an output path."""
    from papermill.cli import papermill as command
    takes = {name: option.nargs for option in command.params if option.param_type_name == 'option' and not option.is_flag
             for name in option.opts}
    assert ours._TAKES == takes


def test_what_counts_as_one_path(project):
    with chdir(project):
        first = ['--stdout-file', '-', '--no-progress-bar']
        cases = {'nbs/probe.ipynb': first, '-- nbs/probe.ipynb': first, '--engine=x -pscale laptop nbs/probe.ipynb': first,
                 '--parameters=a b nbs/probe.ipynb': first, '--log-output nbs/probe.ipynb': [],
                 '--stdout-file f nbs/probe.ipynb': [], '--progress-bar nbs/probe.ipynb': first[:2]}
        for typed, added in cases.items():
            args = typed.split()
            assert ours.fill_output(args, 'T') == added + args + ['runs/probe-T.ipynb'], typed
        for typed in ['nbs/probe.ipynb -', '- out.ipynb', 'nbs/probe.ipynb --help', '-h', '--version', '-p a b', '',
                      'nbs/probe.ipynb --help-notebook', 'settings.ini', 'nbs', 'nbs/absent.ipynb', '../theirs/nbs/probe.ipynb']:
            assert ours.fill_output(typed.split()) == typed.split(), typed


def test_root_is_the_nearest_settings_file(project, monkeypatch):
    monkeypatch.delenv('RESNET_RS_ROOT', raising=False)
    assert ours.project_root(project / 'nbs') == project
    assert ours.project_root(project.parent) == project.parent, 'outside: where the caller is'
    inner = project / 'peers'
    inner.mkdir()
    (inner / 'settings.ini').write_text('[DEFAULT]\nlib_name = resnet_rs_fork\n')
    assert ours.project_root(inner) == inner, 'another project inside ours is not ours'
    monkeypatch.setenv('RESNET_RS_ROOT', str(project))
    assert ours.project_root(project.parent) == project, 'outside, run by papermill: the notebook\'s project'
    with chdir(project / 'nbs'):
        assert ours.runs_dir('results') == project / 'runs' / 'results'


def test_unwritable_runs_folder_is_said(project):
    (project / 'runs').write_text('a file where the folder should be')
    status, shown = terminal(['nbs/probe.ipynb'], project)
    assert status == 1 and 'Traceback' not in shown and 'runs' in shown and 'output path' in shown, shown


def test_other_errors_keep_their_traceback(capsys):
    seen = []
    hook = ours._show_lines(lambda *what: seen.append(what))
    hook(ValueError, ValueError('x'), None)
    assert len(seen) == 1 and capsys.readouterr().err == ''


def test_guard_in_jupyter():
    """Cells run again: later variables are no parameters, a typo stays one until it is gone."""
    cells = {'np': 1}
    cells['guard'] = guard = ours.Guard(cells)
    cells |= {'seeds': 3, 'seed': 4}
    for _ in range(2):
        with pytest.raises(ours.ParameterError, match="unknown parameter 'seed'; did you mean 'seeds'"):
            guard.check(seeds=ours.count(1))
    del cells['seed']
    assert guard.check(seeds=ours.count(1)).seeds == 3
    cells |= {'figure': 1, 'seeds': 5}
    assert guard.check(seeds=ours.count(1)).seeds == 5
    cells['seeds'] = 0
    with pytest.raises(ours.ParameterError, match='1 <= seeds'): guard.check(seeds=ours.count(1))


@pytest.mark.parametrize('spec, value, right', [
    (ours.number(), '-1e3', -1000.0), (ours.number(0, 1), 1, 1.0), (ours.number(0), '4e-5', 4e-5), (ours.number(), ' 2 ', 2.0),
    (ours.count(), '7', 7), (ours.count(), 7.0, 7), (ours.count(), '1e2', 100), (ours.choice([26, 50]), '50', 50),
    (ours.choice({'a': 1, 'b': 2}), 'b', 'b'), (ours.names('ab'), 'b, a', ('b', 'a')), (ours.names('ab'), '', ('a', 'b')),
    (ours.names('ab'), None, ('a', 'b')), (ours.flag(), 'NO', False), (ours.flag(), 1, True), (ours.flag(), 'true', True),
    (ours.text(), 'x', 'x'), (ours.text(), 2026, '2026'), (ours.optional(ours.count()), 'None', None),
    (ours.optional(ours.text()), '', None), (ours.optional(ours.count()), 0, 0)])
def test_right_values(spec, value, right):
    got = spec('x', value)
    assert got == right and type(got) is type(right)


@pytest.mark.parametrize('spec, value, says', [
    (ours.number(), 'four', 'not a number'), (ours.number(), True, 'not a number'), (ours.number(), 'nan', 'not a number'),
    (ours.number(), float('inf'), 'not a number'), (ours.number(), None, 'not a number'), (ours.number(), [1], 'not a number'),
    (ours.number(0, 1, low_open=True), 0, '0 < x <= 1'), (ours.number(0, 1, high_open=True), 1, '0 <= x < 1'),
    (ours.number(high=3), 4, 'x <= 3'), (ours.count(1), 3.5, 'not a whole number'), (ours.count(1), '0', '1 <= x'),
    (ours.count(1), False, 'not a number'), (ours.choice([0, 1]), True, 'not one of 0, 1'),
    (ours.choice(['a']), None, 'not one of a'), (ours.names(['cosine', 'ema']), 'cosin', "did you mean 'cosine'?"),
    (ours.names('ab'), 'a,a', 'names a more than once'), (ours.names('ab'), 'a,', "'' is not one of a, b"),
    (ours.names('ab'), 3, 'not a comma string'), (ours.flag(), 'maybe', 'neither'), (ours.flag(), None, 'neither'),
    (ours.text(), 1e3, 'not text'), (ours.text(), None, 'not text'), (ours.text(), True, 'not text'),
    (ours.optional(ours.count(1)), 0, 'None leaves it to the scale')])
def test_wrong_values(spec, value, says):
    with pytest.raises(ours.ParameterError) as caught: spec('x', value)
    assert says in str(caught.value) and '\n' not in str(caught.value) and str(caught.value).startswith('x = ')


def test_papermill_api_leaves_no_trace(project):
    """papermill.execute_notebook in a program of the user's: no runs/, the error in one line."""
    import papermill
    with chdir(project), pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook('nbs/probe.ipynb', 'out.ipynb', {'seeds': '0'}, progress_bar=False)
    assert 'ParameterError: seeds = 0 is out of range: 1 <= seeds\n' in str(caught.value)
    assert not (project / 'runs').exists() and 'RESNET_RS_ROOT' not in os.environ
