"""`make lab` as a reader uses it: open a notebook, change a parameter, run from the top, save; and what git sees of that."""
import asyncio
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
CHANGES = {  # in the parameters cell, before and after
    r"scale: str = 'laptop'": "scale: str = 'smoke'",
    r"rows: str = ''": "rows: str = 'baseline'",
    r'seeds: int = \d+': 'seeds: int = 1'}


class Lab:
    "The server's programming interface, as JupyterLab's page uses it."

    def __init__(self, project, port, token): self.project, self.port, self.token = project, port, token

    def ask(self, path, method='GET', body=None):
        request = urllib.request.Request(f'http://127.0.0.1:{self.port}/{path}', method=method,
                                         data=None if body is None else json.dumps(body).encode(),
                                         headers={'Authorization': f'token {self.token}', 'Content-Type': 'application/json'})
        with urllib.request.urlopen(request, timeout=60) as answer: text = answer.read().decode()
        return json.loads(text) if text.startswith(('{', '[')) else text

    def execute(self, kernel, sources):
        "Run `sources` one after another in the kernel, over its web socket; their outputs. AssertionError where one fails."
        return asyncio.run(asyncio.wait_for(self._execute(kernel, sources), 420))

    async def _execute(self, kernel, sources):
        from tornado.httpclient import HTTPRequest
        from tornado.websocket import websocket_connect
        address = f'ws://127.0.0.1:{self.port}/api/kernels/{kernel}/channels'
        socket = await websocket_connect(HTTPRequest(address, headers={'Authorization': f'token {self.token}'}),
                                         max_message_size=2 ** 28)
        outputs, session = [], uuid.uuid4().hex
        for source in sources:
            header = dict(msg_id=uuid.uuid4().hex, msg_type='execute_request', session=session, username='', version='5.3',
                          date=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()))
            content = dict(code=source, silent=False, store_history=True, user_expressions={}, allow_stdin=False,
                           stop_on_error=True)
            await socket.write_message(json.dumps(dict(header=header, parent_header={}, metadata={}, content=content,
                                                       channel='shell', buffers=[])))
            while True:
                message = json.loads(await socket.read_message())
                if message['parent_header'].get('msg_id') != header['msg_id']: continue
                kind, content = message['header']['msg_type'], message['content']
                assert kind != 'error', '\n'.join([source, *content['traceback']])
                if kind in ('stream', 'display_data', 'execute_result'): outputs.append(content)
                if kind == 'status' and content['execution_state'] == 'idle': break
        socket.close()
        return outputs


def git(project, *args):
    who = ['-c', 'user.name=reader', '-c', 'user.email=reader@localhost', '-c', 'commit.gpgsign=false']
    return subprocess.run(['git', *who, *args], cwd=project, check=True, capture_output=True, text=True).stdout


def end(server):
    "Stop make and what it started, with kindness first."
    os.killpg(server.pid, signal.SIGTERM)
    for _ in range(60):
        server.poll()
        try: os.killpg(server.pid, 0)
        except ProcessLookupError: return
        time.sleep(0.5)
    os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab as the Makefile starts it, in a copy of the project that is committed whole, with a home of its own."
    place = tmp_path_factory.mktemp('lab')
    project = place / 'project'
    shutil.copytree(ROOT, project, symlinks=True, ignore=shutil.ignore_patterns(
        '.git', '.venv', '.*_cache', 'runs', '_docs', '*.egg-info', '__pycache__', '.ipynb_checkpoints', '.last_checked'))
    git(project, 'init', '--quiet')
    git(project, 'add', '--all')
    git(project, 'commit', '--quiet', '--message', 'as it is')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    flags = f'--no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token}'
    if hasattr(os, 'getuid') and os.getuid() == 0: flags += ' --allow-root'
    env = {name: value for name, value in os.environ.items() if not re.match('JUPYTER|IPYTHON|IN_TEST|MAKE', name)}
    log = (place / 'log').open('w+')
    server = subprocess.Popen(['make', '--assume-old=.venv/.installed', 'lab', f'BIN={Path(sys.executable).parent}',
                               f'LAB_ARGS={flags}'], cwd=project, env=env | {'HOME': str(place)}, stdout=log,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    lab = Lab(project, port, token)
    try:
        for _ in range(240):
            try: lab.ask('api/status'); break
            except (urllib.error.URLError, ConnectionError): time.sleep(0.5)
            assert server.poll() is None, (place / 'log').read_text()[-3000:]
        else: pytest.fail(f'not up after two minutes\n{(place / "log").read_text()[-3000:]}')
        yield lab
    finally:
        end(server)
        log.close()


def code_cells(content): return [cell for cell in content['cells'] if cell['cell_type'] == 'code']


def test_all_notebooks_are_there(lab):
    assert 'JupyterLab' in lab.ask('lab')
    listed = {item['name'] for item in lab.ask('api/contents')['content'] if item['type'] == 'notebook'}
    assert listed == {path.name for path in (ROOT / 'nbs').glob('*.ipynb')}


def test_change_a_parameter_and_run_from_the_top(lab):
    "The kernel starts in nbs/; the table, the figures and the verdicts come; git sees nothing of it."
    content = lab.ask('api/contents/ablation.ipynb')['content']
    [parameters] = [cell for cell in code_cells(content) if 'parameters' in cell['metadata'].get('tags', [])]
    for before, after in CHANGES.items():
        parameters['source'], count = re.subn(before, after, parameters['source'])
        assert count == 1, f'{before} in the parameters cell of ablation.ipynb'
    session = lab.ask('api/sessions', 'POST', dict(path='ablation.ipynb', name='ablation.ipynb', type='notebook',
                                                   kernel=dict(name=content['metadata']['kernelspec']['name'])))
    kernel = session['kernel']['id']
    where = lab.execute(kernel, ['import os; print(os.getcwd())'])[0]['text'].strip()
    assert Path(where).samefile(lab.project / 'nbs')
    outputs = lab.execute(kernel, [cell['source'] for cell in code_cells(content)])
    lab.ask(f'api/sessions/{session["id"]}', 'DELETE')
    rich = [output.get('data', {}) for output in outputs]
    assert any('<table' in ''.join(data.get('text/html', '')) for data in rich), 'the table'
    assert sum('image/png' in data for data in rich) >= 2, 'the figures'
    assert 'C1' in json.dumps(outputs) and 'scale smoke' in json.dumps(outputs)
    [record] = [json.loads(path.read_text()) for path in (lab.project / 'runs' / 'results').glob('*.json')]
    assert (record['row'], record['scale'], record['status']) == ('baseline', 'smoke', 'done')
    assert git(lab.project, 'status', '--porcelain') == ''


def test_saving_adds_nothing_but_what_the_reader_wrote(lab):
    "What JupyterLab adds on its own when it saves is taken off again; a changed line stays, and the tag with it."
    content = lab.ask('api/contents/ablation.ipynb')['content']
    content['metadata'] |= {'language_info': {'name': 'python', 'version': '3.99'}}
    content['metadata']['kernelspec'] |= {'display_name': 'Python 3 (ipykernel)'}
    for cell in code_cells(content):
        cell['execution_count'] = 7
        cell['metadata'] |= {'trusted': True, 'collapsed': False, 'execution': {'iopub.status.busy': 'just now'}}
    save = dict(type='notebook', format='json', content=content)
    lab.ask('api/contents/ablation.ipynb', 'PUT', save)
    assert git(lab.project, 'status', '--porcelain') == '', git(lab.project, 'diff')[:3000]
    [parameters] = [cell for cell in code_cells(content) if 'parameters' in cell['metadata'].get('tags', [])]
    parameters['source'] = re.sub('seeds: int = [0-9]+', 'seeds: int = 2', parameters['source'])
    lab.ask('api/contents/ablation.ipynb', 'PUT', save)
    difference = git(lab.project, 'diff', '--unified=0').splitlines()
    changed = [line for line in difference if re.match(r'[+-](?![+-])', line)]
    assert len(changed) == 2 and all('seeds: int' in line for line in changed), difference
    assert git(lab.project, 'status', '--porcelain').split() == ['M', 'nbs/ablation.ipynb']
