"""Streams: what a notebook cannot show. Threads against worker processes, interruptions, sets that are bad all over."""
import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from resnet_rs import streams
from resnet_rs.datasets import Example
from resnet_rs.images import _make_arrays, batches
from resnet_rs.run_data import _subset
from resnet_rs.streams import BadData, BadRecords, eval_stream, train_stream


class Pictures:
    "`count` small JPEGs, record i of class i; each is one colour, so that a batch shows which records are in it."
    split, fingerprint = 'train', '0' * 16

    def __init__(self, count=60, pause=0.0, **changes):
        self.count, self.pause, self.changes, self.reads = count, pause, changes, []
        self.info = SimpleNamespace(classes=count)

    def __len__(self): return self.count

    def __getitem__(self, index):
        self.reads.append(index)
        time.sleep(self.pause * (index * 7 % 5))    # late ones overtake early ones
        what = self.changes.get(f'r{index}', self.changes.get('all'))
        if what == 'unreadable': raise OSError(5, 'Input/output error')
        if what == 'label': return Example(jpeg(index), self.count, f'record {index}')
        data = jpeg(index)
        return Example(data[:len(data) // 2] if what == 'cut' else data, index, f'record {index}')


def jpeg(index):
    file, noise = io.BytesIO(), np.random.default_rng(index).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(noise).save(file, 'jpeg')
    return file.getvalue()


BAD = dict(r7='cut', r23='unreadable', r24='label')


def stream(source=None, batch_size=16, steps=9, seed=3, **more):
    return train_stream(source or Pictures(), 24, batch_size, steps, seed, **more)


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for u, v in zip(a, b) for x, y in zip(u, v, strict=True))


def script(code, **popen):
    "Run `code`, with the helpers of this file, in a process of its own."
    code = f'import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nfrom test_streams import *\n{code}'
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def said(process, line):
    "Wait until the process prints `line`."
    for text in process.stdout:
        if text.strip() == line: return
    pytest.fail(process.stderr.read())


# --- which picture, where ---------------------------------------------------------------------------------------------------

def test_the_order_is_that_of_the_sets_in_memory():
    "Batches over the borders of epochs, too: 60 records are 3.75 batches of 16."
    twin = _make_arrays(np.zeros((60, 8, 8, 3), np.uint8), np.arange(60), 'train', SimpleNamespace(name='twin'))
    labels = [labels for _, labels in stream()]
    assert all(np.array_equal(a, b) for a, (_, b) in zip(labels, batches(twin, 16, 9, 3), strict=True))
    epochs = np.concatenate(labels)[:120].reshape(2, 60)
    assert (np.sort(epochs) == np.arange(60)).all() and (epochs[0] != epochs[1]).any()


def test_an_image_has_other_crops_in_other_epochs_and_seeds():
    seen = {}
    for seed in (3, 4):
        for k, (images, labels) in enumerate(stream(batch_size=60, steps=2, seed=seed)): seen[seed, k] = images[labels.argsort()]
    kinds = list(seen.values())
    assert all((a != b).any(axis=(1, 2, 3)).all() for i, a in enumerate(kinds) for b in kinds[:i])


def test_threads_change_nothing(monkeypatch):
    one = list(stream(Pictures(**BAD)))
    for cores in (1, 16):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _, n=cores: range(n), raising=False)
        assert same(stream(Pictures(pause=0.001, **BAD)), one)


def test_going_on_reads_nothing_of_what_was_before():
    source = Pictures(**BAD)
    whole = list(stream(Pictures(**BAD), steps=9))
    assert same(stream(source, steps=9, start=8), whole[8:])
    assert len(source.reads) <= 16 + 2 * len(BAD)
    far = stream(steps=10**9, start=10**9 - 1)
    assert len(next(far)[1]) == 16 and next(far, None) is None


def test_a_state_is_small_and_exact():
    one, other = stream(steps=9), stream(steps=9)
    for _ in range(4): next(one)
    other.set_state(json.loads(json.dumps(one.get_state())))
    assert same(one, other)
    assert one.get_state() == {'step': 9}


@pytest.mark.parametrize('batch_size, hosts', [(12, 3), (40, 2), (5, 5)])
def test_hosts_share_a_batch(batch_size, hosts):
    alone = stream(Pictures(**BAD), batch_size)
    parts = [stream(Pictures(**BAD), batch_size, shard=(i, hosts)) for i in range(hosts)]
    for whole, *part in zip(alone, *parts, strict=True):
        assert all(np.array_equal(np.concatenate(p), w) for p, w in zip(zip(*part), whole))


@pytest.mark.parametrize('size, batch_size, hosts', [(60, 16, 4), (33, 32, 2), (3, 8, 8)])
def test_evaluation_counts_every_image_once_on_some_host(size, batch_size, hosts):
    parts = [list(eval_stream(Pictures(size), 24, batch_size, shard=(i, hosts))) for i in range(hosts)]
    assert {len(part) for part in parts} == {-(-size // batch_size)}
    labels = np.concatenate([labels[mask] for part in parts for _, labels, mask in part])
    assert np.sort(labels).tolist() == list(range(size))
    images = [images for part in parts for images, *_ in part]
    assert all(a.shape == (batch_size // hosts, 24, 24, 3) and a.dtype == np.float32 for a in images)


# --- bad records --------------------------------------------------------------------------------------------------------------

def test_a_bad_record_is_replaced_by_the_next_of_its_epoch():
    order, bad = np.random.default_rng((3, 0)).permutation(60), BadRecords()
    good, spoilt = (list(stream(Pictures(**changes), 60, 1, bad=bad))[0] for changes in ({}, BAD))
    changed = np.flatnonzero((good[0] != spoilt[0]).any(axis=(1, 2, 3)))
    assert sorted(order[changed]) == [7, 23, 24] and sorted(good[1][changed]) == [7, 23, 24]
    assert all(spoilt[1][i] == next(o for o in np.roll(order, -i) if o not in (7, 23, 24)) for i in changed)
    assert bad.count == 3 and 'record 7' in bad.found and bad.found['record 24'] == 'label 60 is not in 0 to 59'
    assert 'Input/output error' in bad.found['train[23]']


def test_bad_records_are_counted_when_the_batch_is_taken():
    bad = BadRecords()
    s = stream(Pictures(**BAD), 4, 15, bad=bad)
    place = {int(np.flatnonzero(np.random.default_rng((3, 0)).permutation(60) == i)[0]) for i in (7, 23, 24)}
    for k in range(15):
        next(s)
        assert bad.count >= sum(p < 4 * (k + 1) for p in place) and bad.seen >= min(4 * (k + 1), 60)
        assert bad.count <= sum(p < 4 * (k + 1) + 3 for p in place)
    assert s.bad is bad and bad.count == 3


def test_stop_names_the_record_at_its_batch():
    order = np.random.default_rng((3, 0)).permutation(60)
    first = next(int(i) for i in order if i in (7, 23, 24))
    s, taken = stream(Pictures(**BAD), 4, 15, on_bad='stop'), 0
    with pytest.raises(BadData, match={7: 'record 7: ', 23: r'train\[23\]: cannot be read', 24: 'record 24: label 60'}[first]):
        for _ in s: taken += 1
    assert taken == np.flatnonzero(order == first)[0] // 4 and next(s, None) is None
    with pytest.raises(BadData, match='record 7'): list(eval_stream(Pictures(**BAD), 24, 16, on_bad='stop'))


@pytest.mark.parametrize('size', [1, 5, 60, 5000])
@pytest.mark.parametrize('kind', ['cut', 'unreadable', 'label'])
def test_a_set_that_is_bad_all_over_is_an_error(size, kind):
    for s in (stream(Pictures(size, all=kind)), eval_stream(Pictures(size, all=kind), 24, 16)):
        with pytest.raises(BadData, match=r'no record of the set|more than 1% is too many'): list(s)


def test_more_than_the_limit_is_an_error_and_the_limit_can_be_raised():
    eleven = Pictures(**{f'r{i}': 'cut' for i in range(0, 44, 4)})
    with pytest.raises(BadData, match=r'11 bad of \d+ records: record \d+: .*; more than 1% .* BadRecords\(limit=') as caught:
        list(stream(eleven, 60, 3))
    assert len(str(caught.value).splitlines()) == 1
    bad = BadRecords(limit=0.5)
    assert len(list(stream(eleven, 60, 3, bad=bad))) == 3 and bad.count == 11 and bad.seen == 60
    with pytest.raises(BadData, match='20 records in a row are bad'):
        list(stream(Pictures(2000, all='cut', r5='good'), bad=BadRecords(limit=10)))


def test_evaluation_masks_bad_records():
    masks = np.concatenate([mask for *_, mask in eval_stream(Pictures(**BAD), 24, 16)])
    assert np.flatnonzero(~masks).tolist() == [7, 23, 24, 60, 61, 62, 63]


def test_a_subset_of_a_set_with_a_bad_record_is_drawn_all_the_same():
    "Without a look at the classes; the stream meets the record and says so."
    def labels(): raise ValueError('train record 7 cannot be read: it is empty')
    source = Pictures(60)
    source.labels = labels
    part = _subset(source, 30, 1)
    assert len(part) == len({part[i].key for i in range(30)}) == 30


def test_wrong_arguments():
    for wrong, says in [(dict(source=Pictures(0)), "'train' has no example"), (dict(batch_size=0), 'batch_size = 0'),
                        (dict(seed=-1), 'seed = -1'), (dict(steps=2.5), r'steps = 2\.5'), (dict(start=10), 'beyond the 9 steps'),
                        (dict(shard=(2, 2)), 'number of hosts'), (dict(shard=(0, 3)), 'shared equally by 3 hosts'),
                        (dict(protocol='tf2'), 'protocol'), (dict(on_bad='ignore'), 'on_bad'),
                        (dict(workers=-1), 'workers = -1')]:
        with pytest.raises(ValueError, match=says): train_stream(**dict(
            source=Pictures(), image_size=24, batch_size=16, steps=9, seed=3) | wrong)


# --- an end in the middle -----------------------------------------------------------------------------------------------------

def test_an_error_that_no_record_explains_passes_and_ends_the_stream(monkeypatch):
    def broken(image, size, random, *rest): raise ZeroDivisionError('a mistake in the code')
    monkeypatch.setattr(streams, 'train_preprocess', broken)
    s = stream()
    with pytest.raises(ZeroDivisionError): next(s)
    assert next(s, None) is None and s.bad.count == 0


def test_closing_does_not_wait_for_what_is_ahead():
    "The eight chunks that are being made would take a quarter of a minute, and any other batch as long."
    source = Pictures()
    s = stream(source, 64, 1000)
    next(s)
    source.pause, begin = 0.1, time.monotonic()
    s.close()
    assert next(s, None) is None and time.monotonic() - begin < 2
    time.sleep(0.5)
    read = len(source.reads)
    time.sleep(4)
    assert len(source.reads) <= read + 16 * 16    # what was begun is finished, nothing else is taken up


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_and_left_alone_a_process_ends(workers):
    "Ctrl-C, which reaches workers too, while a batch is awaited; and the end of a program that never closed its stream."
    process = script(f'''if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)    # who starts the tests in the background ignores it
    s = stream(Pictures(pause=0.05), 8, 10**6, workers={workers})
    try:
        next(s)
        print('on', flush=True)
        for _ in s: pass
    except KeyboardInterrupt: print('interrupted', flush=True)
    left = stream(Pictures(pause=0.05), 8, 10**6, workers={workers})
    next(left)
    print('end', flush=True)''', start_new_session=True)
    try:
        said(process, 'on')
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally: process.kill()
    assert process.returncode == 0 and out.split() == ['interrupted', 'end'] and 'Traceback' not in error, error


def test_workers_change_nothing():
    "Order, crops, replacements and reports of two worker processes are those of this one; then both are gone."
    import multiprocessing
    one, two = BadRecords(), BadRecords()
    alone = list(stream(Pictures(**BAD), steps=5, bad=one))
    with stream(Pictures(**BAD), steps=5, bad=two, workers=2) as s:
        made = [next(s) for _ in range(3)]
        assert len(multiprocessing.active_children()) >= 2
    assert same(made, alone[:3]) and not multiprocessing.active_children()
    assert two.found.items() <= one.found.items() and s.get_state() == {'step': 3}


@pytest.mark.slow
def test_workers_evaluate_and_report_the_same():
    for workers in (1, 3):
        bad = BadRecords()
        assert same(eval_stream(Pictures(**BAD), 24, 16, workers=workers, bad=bad), eval_stream(Pictures(**BAD), 24, 16))
        assert bad.count == 3 and bad.seen == 60


@pytest.mark.slow
def test_workers_do_not_outlive_a_parent_that_is_killed():
    process = script('''if __name__ == '__main__':
    import multiprocessing
    s = stream(steps=10**6, workers=2)
    next(s)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)''')
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert len(children) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(os.path.exists(f'/proc/{pid}/stat') and open(f'/proc/{pid}/stat').read().split()[2] != 'Z' for pid in children):
        assert time.monotonic() < end, 'workers live on'
        time.sleep(0.1)
