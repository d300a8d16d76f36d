"""Eight virtual devices; two processes of four, which agree, and die in every way; and prefetch, which never hangs."""
import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from resnet_rs.hosts import TRY_AGAIN
from resnet_rs.parallel import prefetch, start

ROOT = Path(__file__).resolve().parents[1]
SILENCE = 3     # seconds, so that the tests do not take long


def play(program, devices, **environment):
    """Another Python on `program`, with so many virtual devices."""
    env = {**os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'JAX_PLATFORMS': 'cpu',
           'TF_CPP_MIN_LOG_LEVEL': '1', 'PYTHONPATH': str(ROOT), **environment}
    return subprocess.Popen([sys.executable, '-u', '-c', textwrap.dedent(program)], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def result(process, timeout=100):
    """Exit code, the last JSON object it printed (None if there is none), and its errors."""
    try: out, err = process.communicate(timeout=timeout)
    finally: process.kill()
    told, at = None, out.find('{"')
    while at >= 0:      # among what the runtime writes, which may be in the same line
        told, length = json.JSONDecoder().raw_decode(out[at:])
        at = out.find('{"', at + length)
    return process.returncode, told, err


def free_port():
    with socket.create_server(('localhost', 0)) as free: return free.getsockname()[1]


def two_hosts(program, timeout=100):
    """The results of both processes of four devices; a host prints `at` in JSON before it is killed."""
    port = free_port()
    processes = [play(program, 4, RESNET_RS_HOSTS=f'localhost:{port},2,{index}') for index in range(2)]
    try: return [result(process, timeout) for process in processes]
    finally:
        for process in processes: process.kill()


# --- devices ---------------------------------------------------------------------------------------------------------------

def test_eight_devices():
    """What lies where, what is refused, and that eight devices compute what one does."""
    code, told, err = result(play('''
        import json
        import jax, jax.numpy as jnp, numpy as np
        from resnet_rs.parallel import data_mesh, host_shard, replicate, shard_batch
        from resnet_rs.regularizers import BatchNorm

        mesh = data_mesh(reversed(jax.devices()))
        assert [d.id for d in mesh.devices] == list(range(8))
        assert host_shard(mesh) == host_shard(data_mesh(jax.devices()[5:])) == (0, 1)
        batch = np.random.default_rng(0).normal(size=(32, 4, 4, 3)).astype(np.float32)
        images, labels = shard_batch(mesh, (batch, np.arange(32)))
        assert [s.data.tolist() for s in labels.addressable_shards] == np.arange(32).reshape(8, 4).tolist()
        keys = replicate(mesh, {'key': jax.random.key(3), 'rate': 0.5, 'none': None})
        assert keys['key'].is_fully_replicated and len(keys['rate'].addressable_shards) == 8 and keys['none'] is None

        @jax.jit
        def step(scale, images): return BatchNorm(3, group_size=4)(images * scale), (images * scale).mean()

        one, many = step(2.0, batch), step(replicate(mesh, 2.0), images)
        assert many[0].sharding.spec[0] == 'data' and many[1].is_fully_replicated, many[0].sharding
        far = max(float(abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(one, many))
        text = step.lower(replicate(mesh, 2.0), images).compile().as_text()
        assert 'all-gather' not in text and 'all-to-all' not in text and 'all-reduce' in text

        donated = jnp.arange(3.0)
        jax.jit(lambda x: x + 1, donate_argnums=0)(replicate(mesh, donated))
        errors = []
        for wrong in (batch[:20], (batch, np.arange(24)), (batch, 3)):
            try: shard_batch(mesh, wrong)
            except ValueError as error: errors.append(str(error))
        print(json.dumps(dict(far=far, alive=donated.tolist(), errors=errors)))
    ''', 8))
    assert code == 0, err
    assert told['far'] < 1e-5 and told['alive'] == [0, 1, 2]
    indivisible = '20 rows of a batch do not divide over the 8 devices of this host: take 16 or another multiple of 8'
    assert told['errors'] == [indivisible,
                              'the arrays of one batch have 32 and 24 rows', 'the arrays of one batch have 32 and no rows']


def test_two_hosts_agree_and_compute_what_one_does():
    """Also: `start` touches no device and leaves SIGTERM alone, arrays keep their bits, and hosts may end at different times."""
    results = two_hosts('''
        import json, os, signal, time
        import jax, jax.numpy as jnp, numpy as np
        from jax._src import xla_bridge
        from resnet_rs.parallel import any_host, first_host, from_first_host, lost_hosts, start
        from resnet_rs.parallel import data_mesh, host_shard, prefetch, replicate, shard_batch
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        assert start() == start() == 2
        first = first_host()
        assert not xla_bridge.backends_are_initialized()
        try: start('localhost:1,3,0')
        except ValueError as error: told = str(error)
        mesh = data_mesh()
        index, count = host_shard(mesh)
        assert first == (index == 0) and count == 2 and mesh.size == 8
        batch = np.random.default_rng(0).normal(size=(3, 32, 5)).astype(np.float32)
        rows = slice(16 * index, 16 * index + 16)
        step = jax.jit(lambda state, key, images: (state + images.mean(), jax.random.normal(key, (32, 5)) * images))
        with lost_hosts():
            state, key = replicate(mesh, (jnp.float32(0), jax.random.key(1)))
            for images in prefetch([part[rows] for part in batch], lambda part: shard_batch(mesh, part)):
                assert images.shape == (32, 5)
                state, noisy = step(state, key, images)
            assert [any_host(flag) for flag in (first, not first, True, False)] == [True, True, True, False]
            if not first: os.kill(os.getpid(), signal.SIGTERM)
            stopping = any_host(bool(stopped))
            bits = np.array([-0.0, np.nan, 1 + 2.0**-52])
            nested = [{'half': jnp.full((2, 2), 1.5, jnp.bfloat16)}, (bits, np.zeros((2, 0)), np.bool_(True))]
            found = from_first_host({'step': 7, 'nested': nested} if first else None)
            half, (back, empty, yes) = found['nested'][0]['half'], found['nested'][1]
            assert found['step'] == 7 and half.dtype == jnp.bfloat16 and (half == 1.5).all() and half.shape == (2, 2)
            assert back.tobytes() == bits.tobytes() and empty.shape == (2, 0) and yes.dtype == bool and yes.shape == ()
            assert len(from_first_host('x' * 10**6 if first else None)) == 10**6
        try:
            with lost_hosts(together=(KeyError,)): raise KeyError('all raise this')
        except KeyError: pass
        try:
            with lost_hosts(): raise OSError('and this')
        except OSError: pass
        total = float(jax.jit(lambda noisy: noisy.sum())(noisy))
        print(json.dumps(dict(state=float(state), total=total, stopping=stopping, told=told)))
        if first: time.sleep(2)
    ''')
    batch = np.random.default_rng(0).normal(size=(3, 32, 5)).astype(np.float32)
    total = float((jax.random.normal(jax.random.key(1), (32, 5)) * batch[-1]).sum())
    for code, told, err in results:
        assert code == 0 and 'HostLost' not in err, err
        assert np.isclose(told['state'], batch.mean((1, 2)).sum(), atol=1e-6) and np.isclose(told['total'], total, rtol=1e-5)
        assert told['stopping'] is True, 'the Python handler of SIGTERM was called, and both hosts know'
        assert "hosts='localhost:1,3,0', but this program has joined" in told['told']


# --- hosts that are lost ----------------------------------------------------------------------------------------------------

DYING = f'''
    import os, signal, sys, time
    import jax, numpy as np
    from resnet_rs.parallel import any_host, data_mesh, first_host, lost_hosts, prefetch, shard_batch, start

    start(silence={SILENCE})
    mesh = data_mesh()
    images = shard_batch(mesh, np.ones((4, 3), np.float32))
    total = jax.jit(lambda images: images.sum())
    with lost_hosts():
        assert float(total(images)) == 24 and not any_host(False)
        print('{{"at": "work"}}')
        if first_host() == (%(victim)s == 0): %(death)s
        else: %(wait)s
    print('{{"at": "end"}}')
'''
KILLED = 'time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)'
WAITS = {'in a sum': 'total(images).block_until_ready()', 'for an answer': 'any_host(False)', 'in Python': 'time.sleep(90)',
         'between steps': 'time.sleep(2); float(total(images))',
         'for a batch': 'next(prefetch(iter(lambda: time.sleep(90), 1), str))'}


@pytest.mark.slow
@pytest.mark.parametrize('wait', WAITS)
def test_a_killed_host_ends_the_other(wait):
    begin = time.monotonic()
    (code, told, err), (killed, _, _) = two_hosts(DYING % dict(victim=1, death=KILLED, wait=WAITS[wait]))
    assert killed == -signal.SIGKILL and code in (TRY_AGAIN, 1) and told == {'at': 'work'}, err
    assert f'HostLost: host 1 has not been heard of for {SILENCE} s. Say the same command again on all hosts' in err
    assert time.monotonic() - begin < 60, 'bounded'


@pytest.mark.slow
@pytest.mark.parametrize('wait', ['in a sum', 'for an answer', 'in Python'])
def test_a_killed_first_host_ends_the_other(wait):
    """It keeps the list, so JAX aborts the others at once, if Python is not faster: one of two clear messages."""
    (killed, _, _), (code, told, err) = two_hosts(DYING % dict(victim=0, death=KILLED, wait=WAITS[wait]), timeout=60)
    assert killed == -signal.SIGKILL and code in (-signal.SIGABRT, TRY_AGAIN, 1) and told == {'at': 'work'}, err
    assert 'another task died' in err or 'HostLost: host 0, which keeps the hosts together, is out of reach' in err


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('death, ends, says', [("raise OSError('no disk')", 1, 'OSError: no disk'),
                                               ('sys.exit(3)', 3, 'SystemExit: 3')])
def test_a_host_that_raises_ends_the_other(victim, death, ends, says):
    """JAX alone would let both wait five minutes."""
    begin = time.monotonic()
    results = two_hosts(DYING % dict(victim=victim, death=death, wait=WAITS['in a sum']))
    assert results[victim][0] == ends, results[victim][2]
    code, told, err = results[1 - victim]
    assert code == TRY_AGAIN and told == {'at': 'work'} and f'HostLost: host {victim} failed: {says}' in err, err
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_an_error_that_one_host_catches_ends_the_other_only_if_it_waits():
    """Blocks that all leave with an error, at different times, are no loss."""
    for code, told, err in two_hosts(f'''
            import time
            from resnet_rs.parallel import any_host, first_host, lost_hosts, start
            start(silence={SILENCE})
            for row in range(2):
                try:
                    with lost_hosts():
                        any_host(False)
                        if first_host(): time.sleep(SILENCE)
                        raise OSError(row)
                except OSError: time.sleep(2 * SILENCE * (not first_host()))
            any_host(False)
            print('{{"at": "end"}}')
            '''.replace('SILENCE', str(SILENCE))):
        assert code == 0 and told == {'at': 'end'}, err


@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_hosts_that_do_not_come_together(index):
    code, _, err = result(play(f'''
        from resnet_rs.parallel import start
        start('localhost:{free_port()},2,{index}', patience=3)
    ''', 1))
    assert code == TRY_AGAIN and 'the hosts did not come together within 3 s' in err and 'Check failure' not in err


def test_no_cluster_and_a_port_in_use():
    with socket.create_server(('', 0)) as taken:
        code, _, err = result(play(f"""
            import sys
            from resnet_rs.parallel import start
            try: start('auto')
            except ValueError as error: sys.stderr.write(str(error))
            start('localhost:{taken.getsockname()[1]},2,0')
        """, 1))
    assert "hosts='auto': JAX finds no cluster here that it knows" in err
    assert code == 1 and err.splitlines()[-1].startswith("RuntimeError: hosts='localhost:") and 'cannot open the port' in err


# --- start -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('hosts, says', [
    ('10.0.0.1:1234', 'is of no known form'), ('10.0.0.1:1234,2', 'is of no known form'), ('two', 'is of no known form'),
    ('10.0.0.1:1234,2,-1', 'is of no known form'), (':1234,2,0', 'is of no known form'), ('a b:1,2,0', 'is of no known form'),
    ('10.0.0.1:0,2,0', 'port 0 is not in 1 to 65535'), ('10.0.0.1:65536,2,0', 'port 65536 is not'),
    ('10.0.0.1:1,2,2', 'index 2 is not in 0 to 1, of 2 hosts'), ('10.0.0.1:1,0,0', 'index 0 is not in')])
def test_hosts_that_are_not_understood(hosts, says, monkeypatch):
    monkeypatch.setenv('RESNET_RS_HOSTS', hosts)
    for name, call in ((f'RESNET_RS_HOSTS={hosts!r}', start), (f'hosts={hosts!r}', lambda: start(hosts))):
        with pytest.raises(ValueError, match='HOST:PORT,COUNT,INDEX') as caught: call()
        assert str(caught.value).startswith(name) and says in str(caught.value)


def test_one_host_touches_nothing(monkeypatch):
    monkeypatch.delenv('RESNET_RS_HOSTS', raising=False)
    jax.devices()
    one = {start(), start(''), start(' '), start('10.0.0.1:1234,1,0'), start('[::1]:1234,1,0')}
    assert one == {1}, 'it is not too late for one host'
    with pytest.raises(RuntimeError, match=r"hosts='localhost:\d+,2,0': start\(\) comes too late"):
        start(f'localhost:{free_port()},2,0')


@pytest.mark.slow
def test_slurm_is_found_by_itself():
    """What SLURM sets for the only task of a job: `auto` takes it."""
    slurm = dict(SLURM_JOB_ID='7', SLURM_STEP_NODELIST='localhost', SLURM_NTASKS='1', SLURM_PROCID='0', SLURM_LOCALID='0',
                 SLURM_STEP_NUM_NODES='1', RESNET_RS_HOSTS='auto', JAX_COORDINATOR_ADDRESS=f'localhost:{free_port()}')
    code, told, err = result(play('''
        import json
        from resnet_rs.parallel import any_host, data_mesh, first_host, start
        count = start()
        print(json.dumps(dict(count=count, first=first_host(), any=any_host(True), devices=data_mesh().size)))
    ''', 2, **slurm))
    assert code == 0 and told == dict(count=1, first=True, any=True, devices=told['devices']), err


# --- prefetch --------------------------------------------------------------------------------------------------------------

def ended(thread, seconds=10):
    thread.join(seconds)
    return not thread.is_alive()


@pytest.fixture
def threads():
    """Those of prefetch which a test started; all have ended when it ends."""
    before = set(threading.enumerate())
    def new(): return [t for t in set(threading.enumerate()) - before if t.name == 'prefetch']
    yield new
    assert all(ended(thread) for thread in new())


@pytest.mark.parametrize('ahead', [0, 1, 2, 7])
def test_order_and_end(ahead, threads):
    got = prefetch(range(50), lambda i: -i, ahead)
    assert list(got) == [-i for i in range(50)] and next(got, 'end') == 'end'


@pytest.mark.parametrize('ahead', [1, 3])
def test_never_further_ahead(ahead, threads):
    drawn = itertools.count()
    with prefetch(drawn, lambda i: i, ahead) as batches:
        for wanted in range(5):
            assert next(batches) == wanted
            time.sleep(0.02)
            following = int(repr(drawn)[6:-1])
            assert following - wanted - 1 <= ahead


@pytest.mark.parametrize('ahead', [0, 2])
@pytest.mark.parametrize('fails', ['source', 'place'])
@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt, SystemExit])
def test_errors_come_where_they_belong(ahead, fails, error, threads):
    def source():
        yield from range(3)
        if fails == 'source': raise error('here')
        yield 3
        yield 4

    def place(i):
        if i == 3 and fails == 'place': raise error('here')
        return i
    got, batches = [], prefetch(source(), place, ahead)
    with pytest.raises(error, match='here'):
        for batch in batches: got.append(batch)
    assert got == [0, 1, 2]
    if ahead: assert next(batches, 'end') == 'end'


def test_a_consumer_that_leaves(threads):
    closed = []
    def source():
        try: yield from itertools.count()
        finally: closed.append(True)
    for batch in (batches := prefetch(source(), str)):
        if batch == '3': break
    batches.close()
    batches.close()
    assert closed == [True] and list(batches) == []

    next(iter(forgotten := prefetch(source(), str)))
    del forgotten
    gc.collect()
    assert all(ended(thread) for thread in threads()) and closed == [True, True]


def test_closed_while_the_source_is_busy(threads):
    answer = threading.Event()
    batches = prefetch(iter(answer.wait, False), str)
    time.sleep(0.1)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 5 and next(batches, 'end') == 'end' and not ended(threads()[0], 0.1)
    answer.set()


def test_closed_while_the_consumer_waits(threads):
    answer, got = threading.Event(), []
    batches = prefetch(iter(answer.wait, False), str)
    consumer = threading.Thread(target=lambda: got.extend(batches))
    consumer.start()
    time.sleep(0.1)
    batches.close()
    assert ended(consumer) and got == []
    answer.set()


def test_closed_by_its_own_thread(threads):
    """`place` or the source may close it (a signal's handler, a finalizer): no thread waits for itself."""
    batches = prefetch(itertools.count(), lambda i: batches.close() if i == 2 else i)
    assert list(batches) in ([0, 1], [0], [])


@pytest.mark.parametrize('source', ['iter(threading.Event().wait, False)',
                                    pytest.param('itertools.count()', marks=pytest.mark.slow)])
def test_a_program_ends_with_an_open_one(source):
    code, _, err = result(play(f'''
        import itertools, threading
        from resnet_rs.parallel import prefetch
        batches = prefetch({source}, str)
    ''', 1), timeout=60)
    assert code == 0 and not err, err


@pytest.mark.parametrize('ahead', [-1, 1.5, True, '2', None])
def test_ahead_is_a_number(ahead):
    with pytest.raises(ValueError, match='ahead must be a whole number, 0 or more, got'): prefetch([], str, ahead)
    with pytest.raises(TypeError): prefetch(3, str)
