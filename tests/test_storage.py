"""Storage under fire: full disks, claims among processes that are killed or fork, and records and checkpoints in a bucket."""
import errno
import http.server
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
from test_records import READER, WRITER, damages, go, make, python

from resnet_rs import storage
from resnet_rs.records import DamagedRecord, Records, RecordsError, main, pack, read_packed
from resnet_rs.storage import (StorageError, as_path, claim, file_names, is_bucket, read_whole, set_aside, usable_folder,
                               write_whole)

ROOT = Path(__file__).resolve().parent.parent


# paths

@pytest.mark.parametrize('path', ['runs', '/a/b', '~/runs', 'C:/runs', 'a:b', Path('x')])
def test_what_is_a_folder(path):
    assert not is_bucket(path) and isinstance(as_path(path), Path) and as_path(path) == Path(path).expanduser()


@pytest.mark.parametrize('path', ['gs://bucket/a', 's3://bucket/a', Path('gs://bucket/a')])
def test_what_is_a_bucket(path):
    assert is_bucket(path) and str(as_path(path) / 'b') == str(path).replace(':/', '://').replace(':///', '://') + '/b'
    assert as_path(as_path(path)) == as_path(path)


@pytest.mark.parametrize('path', ['gcs://bucket/a', 'http://example.org/a', 'file:///a', 'S3://bucket', 'hf://a/b'])
def test_a_scheme_that_nobody_serves_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (as_path, read_whole, usable_folder, Records, lambda path: write_whole(path, ''), lambda path: pack(path, 'x')):
        with pytest.raises(ValueError, match=f"^'{path}': no storage is known as .*; use a folder, or gs:// or s3://$"):
            use(path)
    assert not list(tmp_path.iterdir())


def test_a_local_path_loads_no_package_and_a_bucket_no_tensorflow():
    code = '''import sys; from resnet_rs.storage import *
for path in ('runs', 'gs://bucket/runs'):
    as_path(path); print(*sorted({'etils', 'fsspec', 'gcsfs', 'tensorflow', 'jax', 'numpy'} & set(sys.modules)))'''
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out == '\netils fsspec\n'


# whole or not at all

def test_content_comes_back_byte_for_byte_and_folders_are_made(tmp_path):
    path = tmp_path / 'a' / 'b' / 'c.txt'
    for content, expected in [('zwölf\r\n\n', 'zwölf\r\n\n'.encode()), (b'\x00\xff', b'\x00\xff'), ('', b'')]:
        write_whole(path, content)
        assert read_whole(path) == path.read_bytes() == expected and list(path.parent.iterdir()) == [path]
    with pytest.raises(FileNotFoundError): read_whole(tmp_path / 'missing')
    assert file_names(tmp_path / 'a') == ['b'] and file_names(tmp_path / 'missing') == []
    with pytest.raises(StorageError, match=f'cannot read {path}: {path} is a file$'): file_names(path)
    with pytest.raises(StorageError, match=rf'cannot write .*: {path} is a file$'): write_whole(path / 'd', '')


def test_a_write_that_meets_a_limit_leaves_the_old_file_and_no_draft(tmp_path):
    "The operating system itself refuses, in the middle of the content."
    write_whole(tmp_path / 'a', 'old')
    child = python('''
import resource
from resnet_rs.storage import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try: write_whole(sys.argv[1], 'x' * 20_000)
except OSError as error: print(error)
''', tmp_path / 'a')
    out, errors = child.communicate(timeout=60)
    assert out == f'cannot write {tmp_path / "a"}: File too large\n', errors
    assert read_whole(tmp_path / 'a') == b'old' and len(list(tmp_path.iterdir())) == 1


def test_errors_of_other_kinds_on_a_disk_are_not_dressed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'fsync', lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_whole(tmp_path / 'a', '')
    assert not list(tmp_path.iterdir())


def test_set_aside_keeps_everything(tmp_path):
    for number, content in enumerate([b'{', b'{{', b'{{{']):
        write_whole(tmp_path / 'a', content)
        name = 'a.damaged' + (f'.{number}' if number else '')
        assert set_aside(tmp_path / 'a', json.loads) == f'moved to {name}' and (tmp_path / name).read_bytes() == content
    assert set_aside(tmp_path / 'a', json.loads) is None and len(list(tmp_path.iterdir())) == 3


# claims

def test_claims_exclude_each_other(tmp_path):
    "Six processes add one to a number, many times; reading and writing it are apart, so that any two at once lose one."
    children = [python('''
from resnet_rs.storage import claim
print('ready', flush=True)
sys.stdin.readline()
number = Path(sys.argv[1])
for _ in range(40):
    with claim(number, wait=60) as mine:
        assert mine
        before = int(number.read_text())
        time.sleep(0.0005)
        number.write_text(str(before + 1))
''', tmp_path / 'number') for _ in range(6)]
    (tmp_path / 'number').write_text('0')
    go(*children)
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    assert (tmp_path / 'number').read_text() == '240' and len(list(tmp_path.iterdir())) == 1


HOLDER = '''
import multiprocessing
from resnet_rs.storage import claim
with claim(sys.argv[1]) as mine:
    if sys.argv[2] == 'fork':
        warnings.simplefilter('ignore')
        child = os.fork() or time.sleep(60)
        print(mine, child, flush=True)
    else: print(mine, flush=True)
    time.sleep(60)
'''


@pytest.mark.parametrize('how', ['alone', 'fork'])
def test_a_killed_holder_holds_nothing(tmp_path, how):
    "Nor does a child that it has forked, and that lives on."
    holder = python(HOLDER, tmp_path / 'run', how)
    mine, *child = holder.stdout.readline().split()
    try:
        assert mine == 'True'
        with claim(tmp_path / 'run') as second: assert not second
        with claim(tmp_path / 'run', wait=0.2) as second: assert not second
        with claim(tmp_path / 'other') as other: assert other
        holder.send_signal(signal.SIGKILL)
        with claim(tmp_path / 'run', wait=math.inf) as second: assert second
    finally:
        for number in child: os.kill(int(number), signal.SIGKILL)
        holder.kill()
        holder.communicate()
    assert not list(tmp_path.iterdir())


def test_a_claim_ends_with_its_block_even_by_an_error_and_between_threads(tmp_path):
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / 'run') as mine:
        assert mine
        raise KeyboardInterrupt
    begun, answers = threading.Event(), []

    def hold():
        with claim(tmp_path / 'run') as mine:
            answers.append(mine)
            begun.set()
            time.sleep(0.3)
    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    with claim(tmp_path / 'run') as mine: answers.append(mine)
    with claim(tmp_path / 'run', wait=30) as mine: answers.append(mine)
    thread.join()
    assert answers == [True, False, True] and not list(tmp_path.iterdir())


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_where_there_are_no_locks_nobody_is_kept_from_working(tmp_path, monkeypatch, number):
    def none(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(storage.fcntl, 'flock', none)
    with claim(tmp_path / 'run') as one, claim(tmp_path / 'run') as two: assert one and two
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_hold_the_lock_keeps_nobody_from_working(tmp_path, monkeypatch):
    with claim(tmp_path / 'missing' / 'run') as mine: assert mine
    (tmp_path / 'file').write_text('')
    with claim(tmp_path / 'file' / 'run') as mine: assert mine
    monkeypatch.setattr(storage, 'fcntl', None)   # Windows
    with claim(tmp_path / 'run') as one, claim(tmp_path / 'run') as two: assert one and two
    assert [path.name for path in tmp_path.iterdir()] == ['file']


# buckets: a real server on this machine, no network

def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def wait_for(address, process):
    for _ in range(300):
        assert process.poll() is None, f'the server at {address} has ended'
        try: return urllib.request.urlopen(address, timeout=5).close()
        except OSError: time.sleep(0.1)
    raise TimeoutError(address)


NEEDED = {'gs': ('gcsfs', 'gcp_storage_emulator'), 's3': ('s3fs', 'moto')}
GOOGLE = """
import gcp_storage_emulator.handlers.objects as objects
content = objects.download

def download(request, response, storage, *more, **named):   # Google says which generation it gives; this server does not
    try: found = storage.get_file_obj(request.params['bucket_name'], request.params['object_id'])
    except objects.NotFound: found = {}
    if found: response['x-goog-generation'] = found['generation']
    content(request, response, storage, *more, **named)

objects.download = download
from gcp_storage_emulator.__main__ import main
main()
"""
SERVERS = {'gs': ['-c', GOOGLE, *'start --in-memory --default-bucket evidence --host 127.0.0.1 --port'.split()],
           's3': ['-m', 'moto.server', '-H', '127.0.0.1', '-p']}
QUIET = {'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}   # gcsfs would ask Google what kind of bucket it is, and warn
SETTINGS = {'gs': QUIET | dict.fromkeys(('STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL'), '{}'),
            's3': {'AWS_ENDPOINT_URL': '{}', 'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_ACCESS_KEY_ID': 'a',
                   'AWS_SECRET_ACCESS_KEY': 'b'}}


def need(*packages):
    "Skip without them; they are not imported, because gcsfs looks at its settings when it is."
    for name in packages:
        if not importlib.util.find_spec(name): pytest.skip(f'needs {name}')


@pytest.fixture(scope='module', params=['gs', pytest.param('s3', marks=pytest.mark.slow)])   # s3: pip install s3fs 'moto[server]'
def bucket(request):
    "An empty bucket: gs://evidence, or s3://evidence."
    need(*NEEDED[request.param])
    address = f'http://127.0.0.1:{(port := free_port())}'
    command = [sys.executable, *SERVERS[request.param], str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS[request.param].items(): patch.setenv(name, value.format(address))
        try:
            wait_for(address, server)
            if request.param == 's3':
                urllib.request.urlopen(urllib.request.Request(f'{address}/evidence', method='PUT'), timeout=5).close()
            yield f'{request.param}://evidence'
        finally:
            server.kill()
            server.wait()


def test_records_in_a_bucket(bucket, tmp_path):
    folder = f'{bucket}/runs/one'
    records, twin = Records(folder), Records(folder)
    assert records.all() == [] and records.get(make()['key']) is None
    path = records.write(make())
    assert str(path) == f'{folder}/{make()["key"]}.json' and twin.get(make()['key']) == make() and twin.all() == [make()]
    records.write(make('late', status='failed', error='interrupted'))                    # listings are never stale
    assert [r['status'] for r in twin.all()] == ['done', 'failed']
    twin.write(make('late'))
    assert [r['status'] for r in records.all()] == ['done', 'done']
    twin.write(make(seconds=3.) | {'time': 'a longer record than the one it replaces'})
    assert records.get(make()['key'])['seconds'] == 3.
    names = {file.name for file in as_path(folder).iterdir()}
    assert names == {f'{make(row)["key"]}.json' for row in ('baseline', 'late')}          # no probe, no draft, no failure

    with claim(as_path(folder) / 'run') as one, claim(as_path(folder) / 'run') as two: assert one and two
    out = tmp_path / 'results'
    assert pack(folder, out)[0]['new'] == 2 and pack(folder, out)[0]['unchanged'] == 2
    assert [r['row'] for r in read_packed(out)] == ['baseline', 'late']
    assert pack(folder, f'{bucket}/results')[0]['new'] == 2 and read_packed(f'{bucket}/results') == read_packed(out)
    assert main([folder, str(out)]) == 0 and main([f'{bucket}/nothing', str(out)]) == 1


def test_what_another_process_has_put_into_a_bucket_is_seen_at_once(bucket, tmp_path):
    "The usual libraries remember a listing, and then know nothing of what came after it, nor how long a file has become."
    records, key = Records(f'{bucket}/runs/listed'), make()['key']
    records.write(make('other'))
    assert len(records.all()) == len(list(records.folder.iterdir())) == 1
    for seconds in (1., 123456789.):
        _, errors = python('Records(sys.argv[1]).write(make(seconds=float(sys.argv[2])))', records.folder, seconds).communicate()
        assert records.get(key) and records.get(key)['seconds'] == seconds, errors
        assert len(records.all()) == len(list(records.folder.iterdir())) == len(list(records.folder.glob('*.json'))) == 2
        assert (records.folder / f'{key}.json').read_bytes() == read_whole(records.folder / f'{key}.json')


def test_damage_in_a_bucket_is_said_and_kept_until_the_run_is_made_again(bucket, tmp_path):
    folder, (local, key) = f'{bucket}/runs/two', (tmp_path / f'{make()["key"]}.json', make()['key'])
    records = Records(folder)
    local.write_bytes(read_whole(records.write(make())))
    for name, content, reason in list(damages(local)):
        write_whole(records.folder / local.name, content)
        for _ in range(2):
            with pytest.warns(DamagedRecord, match=f'{folder}/{key}.json: .*{reason}.*; a copy is kept as {key}.json.damaged-'):
                assert records.get(key) is None
        copies = [read_whole(file) for file in records.folder.glob('*.damaged-*')]
        assert copies.count(content) == 1, name
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            records.write(make())
            assert records.all() == [make()]


def test_processes_that_share_a_bucket_lose_and_corrupt_nothing(bucket, tmp_path):
    "Two that write the same and different keys, one of them killed in the middle, and one that reads."
    folder, turns, stop = f'{bucket}/runs/three', 3, tmp_path / 'stop'
    reader, writer, victim = (python(READER, folder, stop), *(python(WRITER, folder, *more) for more in
                                                              [('one', turns), ('two', 10**6)]))
    try:
        assert reader.stdout.readline() == 'ready\n', reader.stderr.read()
        go(writer, victim)
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    finally:
        victim.kill()
        victim.communicate()
        stop.write_text('')
    seen, errors = reader.communicate(timeout=60)
    assert reader.returncode == 0 and int(seen) > 0, errors
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = {(r['row'], r['seed']) for r in Records(folder).all()}
    assert {('shared', 0), *(('one', turn) for turn in range(turns))} <= found
    assert {row for row, _ in found} <= {'shared', 'one', 'two'}
    assert all(file.suffix == '.json' for file in as_path(folder).iterdir())


def test_a_run_stopped_in_a_bucket_goes_on_there(bucket, tmp_path, monkeypatch):
    "Records and checkpoints under one bucket path. Orbax (0.12) knows no s3://: a warning, and the run starts anew."
    from resnet_rs.checkpoint import CheckpointWarning, Stopped
    from resnet_rs.config import Config, scaled
    from resnet_rs.experiment import Experiment, Progress, run
    rows = {'cosine': scaled(Config(schedule='cosine', epochs=300), 'smoke')}

    def grid(folder): return Experiment('bucket', rows, scale='smoke', seeds=1, results_dir=folder)

    whole, = run(grid(tmp_path))
    interrupted, = grid(f'{bucket}/grid').runs
    with monkeypatch.context() as patch:
        patch.setattr(Progress, 'step', lambda self, step, total, loss: step == 5 and signal.raise_signal(signal.SIGTERM))
        with warnings.catch_warnings(record=True) as caught, pytest.raises(Stopped):
            warnings.simplefilter('always', CheckpointWarning)
            run(grid(f'{bucket}/grid'))
    assert not grid(f'{bucket}/grid').finished(interrupted)
    told = [str(w.message) for w in caught if issubclass(w.category, CheckpointWarning)]
    record, = run(grid(f'{bucket}/grid'))
    assert all(record[name] == whole[name] for name in ('key', 'metrics', 'curve', 'weights_sha256'))
    if bucket.startswith('gs'): assert record['resumed'] == 1 and not told, told
    else: assert record['resumed'] is None and 'on disks and in gs:// only' in told[0]
    assert not grid(f'{bucket}/grid').folder(interrupted, 'checkpoints').exists()


class Refuses(http.server.BaseHTTPRequestHandler):
    "Answers everything with the status of its server."
    def _refuse(self):
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = json.dumps({'error': {'code': self.server.status, 'message': 'Anonymous caller,\nno access.'}}).encode()
        self.send_response(self.server.status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = do_PUT = do_DELETE = _refuse

    def log_message(self, *_): pass


@pytest.mark.parametrize(('status', 'reason'), [
    (401, 'no credentials for gs:// are found'), (403, 'these credentials do not allow it'),
    (404, "there is no bucket 'nobodys'")])
def test_a_bucket_that_refuses_says_why_in_one_line(status, reason):
    need('gcsfs')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Refuses)
    server.status = status
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | QUIET | {'STORAGE_EMULATOR_HOST': f'http://127.0.0.1:{server.server_port}'}
    out, _ = python('''
import logging; logging.disable()
try: Records('gs://nobodys/runs')
except RecordsError as error: print(error)
''', env=env).communicate(timeout=60)
    server.shutdown()
    server.server_close()
    assert out.startswith(f'results folder gs://nobodys/runs cannot be written to: {reason}') and out.count('\n') == 1, out


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_without_the_packages_it_says_what_to_install(scheme, monkeypatch):
    import fsspec
    monkeypatch.setattr(fsspec.core, 'url_to_fs', lambda *_, **__: __import__('no_such_package'))
    reason = rf"no support for {scheme}:// is installed: pip install 'resnet_rs\[bucket\]'$"
    with pytest.raises(RecordsError, match=f'results folder {scheme}://b/runs cannot be written to: {reason}'):
        Records(f'{scheme}://b/runs')
