"""Records under fire: several processes, kill -9, damaged files, unusable folders, packing, and the command."""
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from resnet_rs import provenance as origin_module
from resnet_rs import records as module
from resnet_rs.records import (CURVE, FIELDS, METRICS, DamagedRecord, PackRefused, Records, RecordsError, content_key, main, pack,
                               provenance, read_packed)
from resnet_rs.storage import claim

COMMIT = 'a' * 40
POINTS = 600   # a record of this many takes long enough to write to be caught at it
ROOT = Path(__file__).resolve().parent.parent


def make(row='baseline', seed=0, points=1, **changes):
    """A whole record with a curve of so many points."""
    steps = list(range(points))
    record = {'experiment': 'ablation', 'row': row, 'seed': seed, 'scale': 'smoke', 'result_version': 1, 'status': 'done',
              'error': None, 'config': {'weight_decay': 1e-4, 'row_is': row}, 'effective': {'total_steps': 3},
              'metrics': dict.fromkeys(METRICS, 50.) | {'predicted_classes': 10, 'top1_ema': None, 'top5_ema': None},
              'curve': {name: [step / 7 for step in steps] for name in CURVE}, 'weights_sha256': '0f' * 32, 'steps': 3,
              'seconds': 1.5, 'images_per_second': 64., 'device': {'kind': 'cpu', 'count': 1}, 'versions': {'python': '3'},
              'git': {'commit': COMMIT, 'dirty': False}, 'time': '2026-01-31T12:00:00+00:00',
              'data': {'name': 'd', 'source': 's', 'fingerprint': 'f1', 'train_examples': 8, 'eval_examples': 4}, **changes}
    key = content_key(config=record['config'], effective=record['effective'], data=record['data']['fingerprint'],
                      seed=record['seed'], result_version=record['result_version'])
    return {'key': key, **record}


def python(code, *arguments, **options):
    """A child that runs `code` with all that is defined here at hand."""
    head = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_records import *\n'
    return subprocess.Popen([sys.executable, '-c', head + code, *map(str, arguments)], text=True, cwd=ROOT,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def go(*children):
    """Let children that wait begin at one time."""
    for child in children:
        assert child.stdout.readline() == 'ready\n', child.stderr.read()
    for child in children:
        child.stdin.write('\n')
        child.stdin.flush()


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


# keys

GOLDEN = dict(config={'model': 'resnet_50', 'epochs': 90, 'weight_decay': 4e-5, 'blocks': (3, 4, 6, 3), 'se': True, 'ema': None},
              effective={'weight_decay': 0.0125, 'tiny': 1e-300, 'name': 'Ü'}, data='5b1c', seed=3, result_version=1)


def test_the_key_of_a_known_run_never_changes():
    assert content_key(**GOLDEN) == '45ea730a56c60563'


@pytest.mark.parametrize('same', [
    {'config': dict(reversed(GOLDEN['config'].items()))},
    {'config': GOLDEN['config'] | {'epochs': 90.0}},
    {'config': GOLDEN['config'] | {'blocks': [3, 4.0, 6, 3]}},
    {'config': {name: value for name, value in GOLDEN['config'].items() if name != 'ema'}},
    {'config': GOLDEN['config'] | {'weight_decay': 0.00004}, 'seed': 3.0},
])
def test_the_key_ignores_what_means_the_same(same):
    assert content_key(**GOLDEN | same) == content_key(**GOLDEN)


@pytest.mark.parametrize('other', [
    {'seed': 4}, {'data': '5b1d'}, {'result_version': 2}, {'effective': {}},
    {'config': GOLDEN['config'] | {'weight_decay': 4.0000000000000003e-05 * (1 + 1e-15)}},
    {'config': GOLDEN['config'] | {'se': 1}}, {'config': GOLDEN['config'] | {'epochs': '90'}},
    {'config': GOLDEN['config'] | {'blocks': (3, 4, 3, 6)}}, {'config': GOLDEN['config'] | {'ema': 0}},
])
def test_the_key_notices_every_difference(other):
    assert content_key(**GOLDEN | other) != content_key(**GOLDEN)


def test_weights_to_start_from_are_part_of_the_key_and_their_absence_is_not():
    assert content_key(**GOLDEN, initial=None) == content_key(**GOLDEN)
    assert len({content_key(**GOLDEN), content_key(**GOLDEN, initial='a'), content_key(**GOLDEN, initial='b')}) == 3


@pytest.mark.parametrize('value', [float('nan'), float('inf'), {1, 2}, Path('x'), b'x'])
def test_the_key_refuses_what_it_cannot_name(value):
    with pytest.raises(ValueError, match=r'^config\.lr\[0\] is '):
        content_key(**GOLDEN | {'config': {'lr': [value]}})


def test_arrays_count_as_their_numbers():
    numpy = pytest.importorskip('numpy')
    arrays = GOLDEN['config'] | {'blocks': numpy.array([3, 4, 6, 3]), 'epochs': numpy.float32(90), 'se': numpy.bool_(True)}
    assert content_key(**GOLDEN | {'config': arrays, 'seed': numpy.int64(3)}) == content_key(**GOLDEN)


# provenance

def git(root, *command):
    env = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
    settings = ['user.name=t', 'user.email=t@example.org', 'commit.gpgsign=false', 'core.hooksPath=/dev/null']
    command = ['git', *(word for setting in settings for word in ('-c', setting)), *command]
    return subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, text=True).stdout.strip()


def test_provenance_tells_clean_from_dirty(tmp_path, monkeypatch):
    assert provenance(tmp_path)['git'] == {'commit': None, 'dirty': None}
    git(tmp_path, 'init', '-q')
    assert provenance(tmp_path)['git'] == {'commit': None, 'dirty': None}   # no commit yet
    (tmp_path / 'code.py').write_text('1')
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-q', '-m', 'x')
    clean = {'commit': git(tmp_path, 'rev-parse', 'HEAD'), 'dirty': False}
    assert provenance(tmp_path)['git'] == clean
    for output in ('runs', 'results'):   # what runs make is not what they are made of
        (tmp_path / output).mkdir()
        (tmp_path / output / 'x').write_text('1')
    assert provenance(tmp_path / 'runs')['git'] == clean
    monkeypatch.setenv('GIT_DIR', str(tmp_path / 'elsewhere'))   # as in a hook
    assert provenance(tmp_path)['git'] == clean
    (tmp_path / 'code.py').write_text('2')
    assert provenance(tmp_path / 'runs')['git'] == clean | {'dirty': True}
    git(tmp_path, 'checkout', '-q', 'code.py')
    (tmp_path / 'new.py').write_text('1')
    assert provenance(tmp_path)['git']['dirty'] is True


def test_a_wheel_inside_somebody_elses_repository_claims_no_commit(tmp_path):
    git(tmp_path, 'init', '-q')
    (tmp_path / '.gitignore').write_text('venv/\n')
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-q', '-m', 'x')
    (tmp_path / 'venv').mkdir()
    copy = tmp_path / 'venv' / 'copied_provenance.py'
    copy.write_text(Path(origin_module.__file__).read_text())
    code = 'import json, copied_provenance; print(json.dumps(copied_provenance.provenance()["git"]))'
    out = subprocess.run([sys.executable, '-c', code], cwd=copy.parent, check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == {'commit': None, 'dirty': None}
    git(tmp_path, 'add', '-f', 'venv')
    git(tmp_path, 'commit', '-q', '-m', 'y')
    out = subprocess.run([sys.executable, '-c', code], cwd=copy.parent, check=True, capture_output=True, text=True).stdout
    assert json.loads(out)['commit'] == git(tmp_path, 'rev-parse', 'HEAD')


def test_provenance_survives_a_missing_git(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert provenance(ROOT)['git'] == {'commit': None, 'dirty': None}
    assert set(provenance()['versions']) == {'python', 'jax', 'flax', 'optax', 'numpy', 'resnet_rs'}


def test_importing_records_imports_nothing_heavy():
    heavy = {'jax', 'numpy', 'pandas', 'flax', 'tensorflow'}
    code = f'import sys, resnet_rs.records as r; r.provenance(); print({heavy} & set(sys.modules))'
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out.strip() == 'set()'


# what may be written

def test_a_record_comes_back_as_it_went_and_the_file_is_canonical(tmp_path, no_warnings):
    record = make(points=3)
    before = json.dumps(record)
    path = Records(tmp_path / 'a' / 'b').write(record)
    assert path == tmp_path / 'a' / 'b' / f'{record["key"]}.json' and json.dumps(record) == before
    assert Records(path.parent).get(record['key']) == record
    text = path.read_text()
    assert text == json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False) + '\n'
    assert [file.name for file in path.parent.iterdir()] == [path.name]   # no temporary file left


@pytest.mark.parametrize('name', sorted(FIELDS))
def test_every_field_is_required(tmp_path, name):
    record = make()
    del record[name]
    with pytest.raises(ValueError, match=name):
        Records(tmp_path).write(record)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(metrics=make()['metrics'] | {'top1': float('nan')}), r'metrics\.top1 is nan'),
    (dict(metrics=make()['metrics'] | {'top1': None}), r'metrics\.top1 is None in a run that is done'),
    (dict(metrics=make()['metrics'] | {'top5': 101.}), r'metrics\.top5 is 101\.0, not a percentage'),
    (dict(metrics={'top1': 50.}), r'has no metrics\.top5, '),
    (dict(seconds=float('inf')), 'seconds is inf'),
    (dict(steps=True), 'steps is .True., which is not int'),
    (dict(weights_sha256=None), 'weights_sha256'),
    (dict(status='finished'), "'finished' is none of done, diverged, failed"),
    (dict(status='failed'), 'a failed run says why, and a done one has none'),
    (dict(error='but it worked'), 'a failed run says why, and a done one has none'),
    (dict(curve=make()['curve'] | {'step': [1, 2]}), 'two pairs of lists of one length'),
    (dict(experiment='../up'), "'../up' cannot name a file"),
    (dict(git={'commit': None}), r'git\.dirty'),
    (dict(data={'name': 'd'}), r'data\.fingerprint'),
    (dict(key='0' * 16), 'is not that of its content'),
    (dict(device=object()), 'device is a object'),
    (dict(initial='c0ffee'), 'is not that of its content'),
    (dict(initial=7), 'initial is .7., which is not str'),
    (dict(resumed='once'), "resumed is 'once', which is not int"),
    (dict(resumed=-1), 'resumed is -1, not a number of times'),
    (dict(divergence={'step': 3}, status='diverged'), 'divergence does not hold just step, learning_rate, checkpoint'),
    (dict(divergence={'step': 3, 'learning_rate': 0.1, 'checkpoint': None}), 'has a divergence, and its status is done'),
])
def test_a_record_that_is_not_whole_is_refused_and_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"^record of 'cosine', seed 2, refused: .*{message}"):
        Records(tmp_path).write(make('cosine', 2) | changes)
    assert not list(tmp_path.iterdir())


def test_what_a_record_may_say_besides(tmp_path, no_warnings):
    records, nan = Records(tmp_path), float('nan')
    tuned, plain = make('a', resumed=2), make('a') | {'initial': None, 'resumed': None, 'divergence': None}
    key = {name: tuned[name] for name in ('config', 'effective', 'seed', 'result_version')}
    tuned |= {'initial': 'c0ffee', 'key': content_key(**key, data=tuned['data']['fingerprint'], initial='c0ffee')}
    where = {'step': 3, 'learning_rate': nan, 'checkpoint': 2}
    diverged = make('b', status='diverged', error='loss is nan', metrics={}, divergence=where)
    for record in (tuned, plain, diverged):
        records.write(record)
    assert [records.get(r['key']) for r in (tuned, plain)] == [tuned, plain] and tuned['key'] != plain['key']
    assert records.get(diverged['key'])['divergence'] == where | {'learning_rate': None}
    pack(tmp_path, tmp_path / 'out')
    assert {r['key']: r.get('initial') for r in read_packed(tmp_path / 'out')} == {
        tuned['key']: 'c0ffee', plain['key']: None, diverged['key']: None}


def test_nan_becomes_null_only_where_a_run_did_not_end_well(tmp_path):
    nan, records = float('nan'), Records(tmp_path)
    records.write(make('a', status='diverged', error='loss is nan at step 2', metrics={'loss': nan, 'top1': 10.},
                       curve={'step': [1], 'train_loss': [nan]}))
    records.write(make('b', status='failed', error='E', metrics=None, curve=None, weights_sha256=None, steps=None, seconds=nan))
    diverged, failed = records.all()
    assert diverged['metrics'] == dict.fromkeys(METRICS) | {'top1': 10.} and diverged['curve']['train_loss'] == [None]
    assert failed['metrics'] == dict.fromkeys(METRICS) and failed['curve'] == {name: [] for name in CURVE}
    assert failed['seconds'] is None
    with pytest.raises(ValueError, match=r'config\.lr is nan'):
        records.write(make('c') | {'status': 'diverged', 'config': {'lr': nan}})


def test_a_failure_never_hides_a_result_and_a_result_ends_a_failure(tmp_path):
    records, key = Records(tmp_path), make()['key']
    assert records.write(make(status='failed', error='first')).name == f'{key}.failed.json'
    records.write(make(status='failed', error='second'))
    assert records.get(key)['error'] == 'second' and len(records.all()) == 1
    records.write(make())
    assert records.get(key)['status'] == 'done' and len(list(tmp_path.iterdir())) == 1
    records.write(make(status='failed', error='a late process'))
    assert records.get(key)['status'] == 'done' and [r['status'] for r in records.all()] == ['done']


def test_all_selects_and_sorts(tmp_path):
    records = Records(tmp_path)
    for row, seed in [('b', 10), ('b', 9), ('a', 1)]:
        records.write(make(row, seed))
    records.write(make('z', experiment='a_study', status='diverged', metrics={}))
    records.write(make('y', status='failed', error='E'))
    assert [(r['row'], r['seed']) for r in records.all()] == [('z', 0), ('a', 1), ('b', 9), ('b', 10), ('y', 0)]
    assert [r['row'] for r in records.all('a_study')] == [r['row'] for r in records.all(status='diverged')] == ['z']
    assert len(records.all(status=('done', 'diverged'))) == 4 and records.all('nothing') == []


@pytest.mark.parametrize('key', ['', '../../etc/passwd', 'A' * 16, 'a' * 15, 'a' * 17])
def test_get_wants_a_key(tmp_path, key):
    with pytest.raises(ValueError, match='sixteen hexadecimal digits'):
        Records(tmp_path).get(key)


# folders

def test_unusable_folders_say_so_at_once(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('x')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'under' / 'it'):
        with pytest.raises(RecordsError, match=f'{folder} cannot be written to: {tmp_path / "file"} is a file') as caught:
            Records(folder)
        assert '\n' not in str(caught.value)
    with pytest.raises(RecordsError, match='File name too long'):
        Records(tmp_path / ('x' * 300))

    def full(self, *_, **__):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(RecordsError, match='cannot be written to: No space left on device'):
        Records(tmp_path)


@pytest.mark.skipif(not Path('/proc/self').exists(), reason='needs a folder that refuses even the superuser')
def test_a_folder_that_refuses_even_the_superuser():
    with pytest.raises(RecordsError, match='/proc/self/records cannot be written to: '):
        Records('/proc/self/records')


def test_a_full_disk_while_writing_is_one_line_and_keeps_the_old_record(tmp_path, monkeypatch):
    records = Records(tmp_path)
    records.write(make())

    def full(_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(RecordsError, match=r'cannot write .*json: No space left on device$'):
        records.write(make(seconds=9.))
    assert records.get(make()['key'])['seconds'] == 1.5 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_vanishes_during_a_run_is_made_again(tmp_path):
    records = Records(tmp_path / 'results')
    records.folder.rmdir()
    assert records.write(make()).exists()


# damage

def damages(path):
    whole = json.loads(path.read_text())
    yield 'empty', b'', 'it is empty'
    yield 'cut', path.read_bytes()[:300], 'it is not JSON'
    yield 'noise', bytes(range(256)), 'it is not JSON'
    yield 'list', b'[]', 'it is not a JSON object'
    yield 'less', json.dumps({k: v for k, v in whole.items() if k != 'metrics'}).encode(), 'it has no metrics'
    yield 'nan', path.read_bytes().replace(b'"seconds": 1.5', b'"seconds": NaN'), 'seconds is nan'
    edited = whole | {'config': whole['config'] | {'weight_decay': 4e-5}}
    yield 'edited', json.dumps(edited).encode(), 'is not that of its content'
    yield 'renamed', json.dumps(make('another')).encode(), f'its content belongs into {make("another")["key"]}.json'
    yield 'failed', json.dumps(make(status='failed', error='E')).encode(), r'belongs into \w+\.failed\.json'


def test_damage_is_set_aside_and_named(tmp_path):
    records = Records(tmp_path)
    other, path = records.write(make('other')), records.write(make())
    key, good = make()['key'], path.read_bytes()
    for number, (_, content, reason) in enumerate(list(damages(path))):
        path.write_bytes(content)
        aside = f'{path.name}.damaged' + (f'.{number}' if number else '')
        with pytest.warns(DamagedRecord, match=rf'{path}: .*{reason}.*; moved to {aside}, the run counts as not done') as caught:
            assert [r['row'] for r in records.all()] == ['other']
        assert len(caught) == 1 and (tmp_path / aside).read_bytes() == content and not path.exists()
        assert records.get(key) is None
        records.write(make())
        assert path.read_bytes() == good
    assert other.exists()


def test_a_file_under_a_wrong_name_is_not_passed_over_in_silence(tmp_path):
    records = Records(tmp_path)
    path = records.write(make())
    path.rename(tmp_path / f'{path.stem} (1).json')
    with pytest.warns(DamagedRecord, match=r'\(1\)\.json is not named as a record is'):
        assert records.all() == []
    assert len(list(tmp_path.iterdir())) == 1


def test_a_record_rewritten_while_its_damage_is_being_moved_is_not_lost(tmp_path, monkeypatch, no_warnings):
    records = Records(tmp_path)
    path = records.write(make())
    good, replace = path.read_bytes(), os.replace
    path.write_bytes(b'half')

    def slow(source, target):   # between reading and moving, another process writes the whole record
        if str(target).endswith('.damaged'):
            path.write_bytes(good)
        return replace(source, target)
    monkeypatch.setattr(os, 'replace', slow)
    assert records.get(make()['key']) == make() and path.read_bytes() == good


# several processes

WRITER = '''
records = Records(sys.argv[1])
print('ready', flush=True)
sys.stdin.readline()
for turn in range(int(sys.argv[3])):
    records.write(make('shared', points=POINTS, seconds=float(turn)))
    records.write(make(sys.argv[2], turn, points=POINTS))
'''
READER = '''
warnings.simplefilter('error')
records, seen = Records(sys.argv[1]), 0
print('ready', flush=True)
while not Path(sys.argv[2]).exists():
    for record in records.all():
        assert record == make(record['row'], record['seed'], points=POINTS, seconds=record['seconds']), record['key']
        seen += 1
print(seen)
'''


def test_processes_writing_and_reading_at_once_lose_and_corrupt_nothing(tmp_path, no_warnings):
    "The same and different keys, a reader meanwhile, and one writer that is killed in the middle."
    turns, stop, folder = 6, tmp_path / 'stop', tmp_path / 'results'
    reader, victim = python(READER, folder, stop), python(WRITER, folder, 'victim', 10**6)
    writers = [python(WRITER, folder, name, turns) for name in ('one', 'two', 'three')]
    assert reader.stdout.readline() == 'ready\n', reader.stderr.read()
    go(*writers, victim)
    while not (folder / f'{make("victim", 1)["key"]}.json').exists():
        assert victim.poll() is None
        time.sleep(0.005)
    victim.kill()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    _, errors = victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL, errors
    stop.write_text('')
    seen, errors = reader.communicate(timeout=60)
    assert reader.returncode == 0 and int(seen) > 0, errors
    found = {(r['row'], r['seed']) for r in Records(folder).all()}
    killed = sum(row == 'victim' for row, _ in found)
    assert killed and found == {('shared', 0), *((name, turn) for name in ('one', 'two', 'three') for turn in range(turns)),
                                *(('victim', turn) for turn in range(killed))}
    drafts = list(folder.glob('.*.tmp'))
    assert len(drafts) <= 1 and len(list(folder.iterdir())) == len(found) + len(drafts)   # and nothing damaged


def test_kill_9_leaves_whole_records_only(tmp_path, no_warnings):
    chance = random.Random(0)
    for _ in range(5):
        child = python(WRITER, tmp_path, 'victim', 10**6)
        go(child)
        time.sleep(chance.uniform(0.02, 0.2))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        records = Records(tmp_path).all()
        assert all(r == make(r['row'], r['seed'], points=POINTS, seconds=r['seconds']) for r in records)
    assert records and not list(tmp_path.glob('*.damaged*'))


@pytest.mark.parametrize('moment', ['fsync', 'replace'])
def test_kill_9_between_writing_and_naming_keeps_the_old_record(tmp_path, moment, no_warnings):
    Records(tmp_path).write(make(seconds=1.))
    child = python(f'''
def stop(*_):
    print('now', flush=True)
    time.sleep(60)
os.{moment} = stop
Records(sys.argv[1]).write(make(seconds=2.))
''', tmp_path)
    assert child.stdout.readline() == 'now\n', child.stderr.read()
    child.kill()
    child.communicate()
    draft, = tmp_path.glob('.*.tmp')
    assert [r['seconds'] for r in Records(tmp_path).all()] == [1.] and draft.exists()   # it may belong to a living writer
    long_ago = time.time() - 7200
    os.utime(draft, (long_ago, long_ago))
    foreign = tmp_path / '.somebody-elses.tmp'
    foreign.write_text('')
    os.utime(foreign, (long_ago, long_ago))
    assert [r['seconds'] for r in Records(tmp_path).all()] == [1.] and not draft.exists() and foreign.exists()


# packing

def fill(folder, *made):
    records = Records(folder)
    for record in made:
        records.write(record)
    return folder


def test_pack_sorts_merges_and_is_idempotent(tmp_path):
    out = tmp_path / 'out'
    first = fill(tmp_path / 'first', make('b', 10), make('b', 9), make('a'), make('y', status='failed', error='E'),
                 make('z', experiment='study', status='diverged', metrics={}))
    ablation, study = pack(first, out)
    assert ablation == {'experiment': 'ablation', 'scale': 'smoke', 'rows': ['a', 'b'], 'seeds': [0, 9, 10], 'runs': 3,
                        'new': 3, 'unchanged': 0, 'replaced': 0, 'differs': []}
    assert (study['experiment'], study['rows'], study['new']) == ('study', ['z'], 1)
    assert sorted(file.name for file in out.iterdir()) == ['ablation.jsonl', 'study.jsonl']
    assert [(r['row'], r['seed']) for r in read_packed(out / 'ablation.jsonl')] == [('a', 0), ('b', 9), ('b', 10)]
    assert len(read_packed(out)) == 4 and read_packed(out / 'ablation.jsonl')[0] == make('a')
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}
    assert [group['unchanged'] for group in pack(first, out)] == [3, 1]
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()} == before

    second = fill(tmp_path / 'second', make('a', seconds=99., time='later', device={'kind': 'gpu', 'count': 1}), make('a', 1))
    group, = pack(second, out)   # what is not in this folder stays; the same outcome elsewhere changes nothing
    assert (group['new'], group['unchanged'], group['seeds']) == (1, 1, [0, 1])
    assert [(r['row'], r['seed']) for r in read_packed(out / 'ablation.jsonl')] == [('a', 0), ('a', 1), ('b', 9), ('b', 10)]
    assert read_packed(out / 'ablation.jsonl')[0] == make('a')


def test_a_run_that_serves_two_studies_is_packed_once(tmp_path):
    out = tmp_path / 'out'
    pack(fill(tmp_path / 'first', make('a')), out)
    other = make('a') | {'experiment': 'study', 'row': 'another name'}
    assert pack(fill(tmp_path / 'second', other), out)[0]['unchanged'] == 1
    assert read_packed(out) == [make('a')]


def test_a_committed_line_stays_when_a_new_run_disagrees(tmp_path):
    out = tmp_path / 'out'
    pack(fill(tmp_path / 'first', make('a')), out)
    other = make('a', metrics=make()['metrics'] | {'top1': 49.})
    group, = pack(fill(tmp_path / 'second', other), out)
    assert group['differs'] == ['a seed 0'] and group['new'] == 0 and read_packed(out) == [make('a')]


@pytest.mark.parametrize(('commit', 'dirty'), [(COMMIT, True), (None, None), (COMMIT, None)])
def test_pack_refuses_uncommitted_code(tmp_path, commit, dirty):
    out, origin = tmp_path / 'out', {'commit': commit, 'dirty': dirty}
    folder = fill(tmp_path / 'runs', make('a'), make('b', 1, git=origin), make('c', 2, git=origin))
    with pytest.raises(PackRefused, match=rf'ablation b seed 1 \({make("b", 1)["key"]}.json\), ablation c seed 2 \(') as caught:
        pack(folder, out)
    assert '\n' not in str(caught.value) and not out.exists()
    assert pack(folder, out, allow_dirty=True)[0]['new'] == 3
    assert pack(folder, out)[0]['unchanged'] == 3                                  # nothing of it would be written
    fill(folder, make('b', 1))
    assert pack(folder, out)[0]['replaced'] == 1 and pack(folder, out)[0]['replaced'] == 0
    assert [r['git']['dirty'] for r in read_packed(out)] == [False, False, dirty]


def test_damaged_evidence_is_named_and_stops_the_pack(tmp_path):
    out, folder = tmp_path / 'out', fill(tmp_path / 'runs', make('a'), make('b'), make('c'))
    pack(folder, out)
    path = out / 'ablation.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    for content, message in [(lines[0] + lines[1][:50] + b'\n' + lines[2], 'line 2: it is not JSON'),
                             (lines[0] + b'<<<<<<< HEAD\n', 'line 2: it is not JSON'),
                             (lines[0] + b'\n' + lines[1], 'line 2: it is empty'),
                             (b''.join(lines) + lines[1], r'line 4: key \w+ is also on ablation\.jsonl line 2'),
                             (lines[0].replace(b'"row_is":"a"', b'"row_is":"x"'), 'line 1: key .* is not that of its content')]:
        path.write_bytes(content)
        for reading in (lambda: read_packed(path), lambda: read_packed(out), lambda: pack(folder, out)):
            with pytest.raises(ValueError, match=rf'ablation\.jsonl {message}'):
                reading()
        assert path.read_bytes() == content
    path.write_bytes(b''.join(lines))
    (out / 'study.jsonl').write_bytes(lines[1])
    with pytest.raises(ValueError, match=r'study\.jsonl line 1: key \w+ is also on ablation\.jsonl line 2'):
        pack(folder, out)
    with pytest.raises(FileNotFoundError):
        read_packed(out / 'nothing.jsonl')


def test_packing_while_runs_write_loses_and_corrupts_nothing(tmp_path, no_warnings):
    "`make record` again and again, as a command and with a reader of the evidence, while two runs share its folder."
    turns, folder, out = 8, tmp_path / 'runs', tmp_path / 'results'
    writers = [python(WRITER, folder, name, turns) for name in ('one', 'two')]
    go(*writers)
    packs, before = 0, {}
    while packs < 2 or any(writer.poll() is None for writer in writers):
        code = main([str(folder), str(out)])
        assert code == 0 or not before and code == 1          # nothing finished yet
        packed = {r['key']: r for r in read_packed(out)} if out.exists() else {}
        assert all(packed[key] == record for key, record in before.items())   # a line that is packed stays as it is
        packs, before = packs + 1, packed
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    assert main([str(folder), str(out)]) == 0
    found = {(r['row'], r['seed']) for r in read_packed(out)}
    assert found == {('shared', 0)} | {(name, turn) for name in ('one', 'two') for turn in range(turns)}
    once = (out / 'ablation.jsonl').read_bytes()
    assert main([str(folder), str(out)]) == 0 and (out / 'ablation.jsonl').read_bytes() == once
    assert [file.name for file in out.iterdir()] == ['ablation.jsonl']


PACKER = """
print('ready', flush=True)
sys.stdin.readline()
sys.exit(main(sys.argv[1:]))
"""


def test_packs_at_once_from_several_folders_lose_nothing(tmp_path):
    for round in range(3):
        out = tmp_path / f'out{round}'
        packers = [python(PACKER, fill(tmp_path / name, *(make(name, seed, points=POINTS) for seed in range(6))), out)
                   for name in ('a', 'b', 'c')]
        go(*packers)
        for packer in packers:
            _, errors = packer.communicate(timeout=60)
            assert packer.returncode == 0, errors
        assert [(r['row'], r['seed']) for r in read_packed(out)] == [(name, seed) for name in 'abc' for seed in range(6)]
        assert [file.name for file in out.iterdir()] == ['ablation.jsonl']


def test_a_pack_that_is_killed_leaves_the_evidence_as_it_was_and_the_next_one_works(tmp_path):
    out, folder = tmp_path / 'out', fill(tmp_path / 'runs', make('a'))
    assert main([str(folder), str(out)]) == 0
    before = (out / 'ablation.jsonl').read_bytes()
    fill(folder, make('b'))
    child = python("""
def stop(*_):
    print('now', flush=True)
    time.sleep(60)
os.replace = stop
main(sys.argv[1:])
""", folder, out)
    assert child.stdout.readline() == 'now\n', child.stderr.read()
    child.kill()
    child.communicate()
    assert (out / 'ablation.jsonl').read_bytes() == before
    assert pack(folder, out)[0]['new'] == 1 and [r['row'] for r in read_packed(out)] == ['a', 'b']


def test_a_pack_does_not_wait_for_ever(tmp_path, monkeypatch):
    out, folder = tmp_path / 'out', fill(tmp_path / 'runs', make('a'))
    out.mkdir()
    monkeypatch.setattr(module, 'claim', lambda path, wait: claim(path))
    with claim(out / 'pack') as mine, pytest.raises(RecordsError, match='out is being packed by another process; try again'):
        assert mine
        pack(folder, out)
    assert not list(out.iterdir()) and pack(folder, out)[0]['new'] == 1


# the command

def command(*arguments, cwd):
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-m', 'resnet_rs.records', *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path):
    fill(tmp_path / 'runs', make('a'), make('a', 1), make('b'))
    code, out, errors = command('runs', 'results', cwd=tmp_path)
    assert (code, errors) == (0, '')
    assert out == 'results/ablation.jsonl, smoke scale: 3 runs (3 new, 0 unchanged, 0 replaced); 2 rows: a b; seeds: 0 1\n'
    packed = (tmp_path / 'results' / 'ablation.jsonl').read_bytes()
    code, out, _ = command('runs', 'results', cwd=tmp_path)
    assert code == 0 and '0 new, 3 unchanged' in out and (tmp_path / 'results' / 'ablation.jsonl').read_bytes() == packed

    dirty = make('d', git={'commit': COMMIT, 'dirty': True})
    fill(tmp_path / 'runs', dirty)
    (tmp_path / 'runs' / f'{make("b")["key"]}.json').write_text('half')
    code, out, errors = command('runs', 'results', cwd=tmp_path)
    assert (code, out) == (2, '') and (tmp_path / 'results' / 'ablation.jsonl').read_bytes() == packed
    damaged, refused = errors.splitlines()
    assert damaged.startswith('warning: damaged record runs/') and 'counts as not done' in damaged
    assert refused.startswith('refused: ') and f'ablation d seed 0 ({dirty["key"]}.json)' in refused
    code, out, _ = command('runs', 'results', '--allow-dirty', cwd=tmp_path)
    assert code == 0 and '3 runs (1 new, 2 unchanged, 0 replaced)' in out
    assert len(read_packed(tmp_path / 'results')) == 4   # the line whose run was damaged since is still there


def test_the_command_fails_in_one_clear_line(tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('x')
    fill(tmp_path / 'runs', make())
    for folder, out, message in [('missing', 'out', 'error: no results folder '), ('empty', 'out', 'error: no finished run in '),
                                 ('runs', 'file', 'error: results folder '), ('runs', 'file/out', 'error: results folder ')]:
        assert main([str(tmp_path / folder), str(tmp_path / out)]) == 1
        printed = capsys.readouterr()
        assert printed.out == '' and printed.err.startswith(message) and printed.err.count('\n') == 1, printed.err
    assert not (tmp_path / 'out').exists() and (tmp_path / 'file').read_text() == 'x'
    with pytest.raises(SystemExit, match='2'):
        main([])
