"""Image sets: what a notebook cannot show. Races between processes, preparations cut off, TensorFlow nearby, damage, buckets."""
import contextlib
import hashlib
import io
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from resnet_rs import datasets, digits, preparing, run_data
from resnet_rs.config import Config, scaled
from resnet_rs.datasets import FolderSource, Subset, TfdsSource, image_set, open_source
from resnet_rs.dealing import limit_labels
from resnet_rs.digits import digit_splits, prepare_digits
from resnet_rs.image_sets import DATASETS, read_folder
from resnet_rs.images import load
from resnet_rs.preparing import preflight, prepare

TRAIN_32 = 'de072e8c2229fdf6'  # fingerprints of the digits in memory
TEST_32 = '9ea99530807eba79'
GOLDEN_LABELS = [42, 44, 54, 75, 110, 147, 230, 260, 290, 395]  # one of each class, seed 2


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    prepare_digits(root)
    return root


def start(code, *args, **env):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], text=True, **pipes,
                            env={**os.environ, 'JAX_PLATFORMS': 'cpu', **env})


def leftovers(root): return sorted(p.name for p in Path(root).iterdir())


def test_round_trip(folder):
    scans = load_digits()
    seen = []
    for split, part in digit_splits(scans.target).items():
        examples = tfds.data_source('sklearn_digits', split=split, data_dir=folder)
        examples = examples.__getitems__(range(len(examples)))
        assert [e['index'] for e in examples] == list(part)
        assert (np.stack([e['image'][:, :, 0] for e in examples]) == (scans.images[part] * 255 + 8) // 16).all()
        assert [e['label'] for e in examples] == list(scans.target[part])
        seen += list(part)
    assert sorted(seen) == list(range(1797))
    assert leftovers(folder) == ['.sklearn_digits.lock', 'sklearn_digits']


def test_two_processes_at_once(tmp_path):
    "Both find the folder empty, both get the same images; one data set and no rubbish is left."
    root = tmp_path / 'new' / 'data'
    code = '''import sys
from resnet_rs.images import load
print('ready', flush=True)
input()
print(load('digits', 'train', 32, sys.argv[1]).fingerprint)'''
    both = [start(code, root) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ['ready\n'] * 2
    for process in both:
        process.stdin.write('go\n')
        process.stdin.flush()
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, TRAIN_32), err
        assert err == ''
    assert leftovers(root) == ['.sklearn_digits.lock', 'sklearn_digits']


def test_race_without_locks(tmp_path, monkeypatch):
    "On a file system without locks the slower of two finds the other's files in place and uses them."
    def no_locks(*_): raise OSError('no locks here')
    monkeypatch.setattr(digits.fcntl, 'flock', no_locks)
    prepare = digits.SklearnDigits.download_and_prepare
    def overtaken(self, **options):
        monkeypatch.setattr(digits.SklearnDigits, 'download_and_prepare', prepare)
        prepare_digits(tmp_path)
        prepare(self, **options)
    monkeypatch.setattr(digits.SklearnDigits, 'download_and_prepare', overtaken)
    assert load('digits', 'train', 32, tmp_path).fingerprint == TRAIN_32
    assert leftovers(tmp_path) == ['.sklearn_digits.lock', 'sklearn_digits']


def test_waits_for_the_one_who_prepares(tmp_path):
    "While somebody else holds the lock, a process waits and then uses what it finds; here it could not prepare by itself."
    code = '''import sys
from resnet_rs import digits, images
digits._build_digits = None
print('ready', flush=True)
print(images.load('digits', 'train', 32, sys.argv[1]).fingerprint)'''
    with digits._lock(tmp_path / '.sklearn_digits.lock') as held:
        waiting = start(code, tmp_path)
        assert held and waiting.stdout.readline() == 'ready\n'
        time.sleep(0.7)
        assert waiting.poll() is None, waiting.communicate()
        digits._build_digits(tmp_path, tmp_path / 'sklearn_digits' / '1.0.0')
    out, err = waiting.communicate(timeout=60)
    assert out.strip() == TRAIN_32, err


def test_killed_preparation(tmp_path):
    "SIGKILL in the middle of writing: the next call starts afresh, is not held up by the lock, and sweeps the rubbish away."
    code = '''import sys, time
from resnet_rs import digits
examples = digits.SklearnDigits._generate_examples
def slow(self, *args):
    for i, example in enumerate(examples(self, *args)):
        if i == 50: print('in the middle', file=sys.__stdout__, flush=True); time.sleep(600)
        yield example
digits.SklearnDigits._generate_examples = slow
digits.prepare_digits(sys.argv[1])'''
    process = start(code, tmp_path)
    assert process.stdout.readline() == 'in the middle\n', process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any(name.startswith('.preparing-') for name in leftovers(tmp_path))
    assert load('digits', 'train', 32, tmp_path).fingerprint == TRAIN_32
    assert leftovers(tmp_path) == ['.sklearn_digits.lock', 'sklearn_digits']


@pytest.mark.parametrize('damage', ['no info', 'short file', 'no file'])
def test_damaged_set_is_replaced(tmp_path, damage):
    made = prepare_digits(tmp_path)
    shard = next(made.glob('*-test.array_record*'))
    if damage == 'no info': (made / 'dataset_info.json').unlink()
    if damage == 'short file': os.truncate(shard, shard.stat().st_size // 2)
    if damage == 'no file': shard.unlink()
    assert load('digits', 'test', 32, tmp_path).fingerprint == TEST_32
    assert leftovers(tmp_path) == ['.sklearn_digits.lock', 'sklearn_digits']


def test_prepared_folder_is_only_read(folder, tmp_path, monkeypatch):
    "A prepared folder is used as it is: no lock, no writing, so it may be shared and read-only."
    def forbidden(*_): raise AssertionError('wrote to a prepared folder')
    monkeypatch.setattr(digits, '_lock', forbidden)
    monkeypatch.setenv('RESNET_RS_DATA', str(folder))
    assert load('digits', 'train', 32).fingerprint == TRAIN_32


def test_never_imports_tensorflow_nor_touches_disk_on_import(tmp_path):
    "With a TensorFlow on the path that betrays its import, load does not import it; importing the module writes nothing."
    (tmp_path / 'tensorflow').mkdir()
    (tmp_path / 'tensorflow' / '__init__.py').write_text("raise SystemExit('tensorflow was imported')")
    code = '''import os, sys
import resnet_rs.images as images, resnet_rs.preparing
import jax
assert not jax._src.xla_bridge._backends, 'import started a device'
assert not os.listdir(sys.argv[1]), 'import wrote to disk'
images.load('digits', 'train', 32, sys.argv[1])
print('tensorflow' in sys.modules)'''
    root = tmp_path / 'data'
    root.mkdir()
    process = start(code, root, PYTHONPATH=str(tmp_path), RESNET_RS_DATA=str(root), HOME=str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, 'False\n', '')


def test_unwritable_folder(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match=r'cannot hold the prepared digits \(Not a directory\)') as e:
        load('digits', 'train', 32, tmp_path / 'file' / 'data')
    assert '\n' not in str(e.value)


# --- the table -------------------------------------------------------------------------------------------------------------

THROUGH_TFDS = [s for s in DATASETS.values() if s.tfds and s.name != 'digits']


@pytest.mark.parametrize('info', THROUGH_TFDS, ids=lambda info: info.name)
def test_the_table_against_what_tfds_knows_offline(info, tmp_path):
    "Classes, picture size, splits' expressions, sizes of downloads and files to bring by hand, as in TFDS's own builders."
    builder = tfds.builder(info.tfds, data_dir=tmp_path)
    features, name = builder.info.features, info.tfds.split('/')[0]
    assert features[info.label_key].num_classes == info.classes
    assert features[info.image_key].shape[0] == (info.native_size or None)
    sizes = {url.rsplit('/', 1)[-1]: checked.size for url, checked in builder.url_infos.items()}
    archives = dict(cifar10='cifar-10-binary', cifar100='cifar-100-binary', imagenet_v2='imagenetv2-matched-frequency.',
                    imagenette='imagenette2.tgz')
    used = [size for file, size in sizes.items() if archives.get(name, '') in file]
    assert sum(used) == info.download and used
    assert all(file in builder.MANUAL_DOWNLOAD_INSTRUCTIONS for file in info.manual)
    assert bool(info.manual) == bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    if info.manual: assert info.manual_from in builder.MANUAL_DOWNLOAD_INSTRUCTIONS and info.manual == tuple(sorted(sizes))


TFDS_SPLITS = dict(cifar10=dict(train=50_000, test=10_000), cifar100=dict(train=50_000, test=10_000),  # from TFDS's catalogue
                   fashion_mnist=dict(train=60_000, test=10_000), imagenet2012=dict(train=1_281_167, validation=50_000),
                   imagenet_v2=dict(test=10_000), imagenette=dict(train=9_469, validation=3_925))


@pytest.mark.parametrize('info', THROUGH_TFDS, ids=lambda info: info.name)
def test_sizes_of_splits_by_tfds_own_arithmetic(info):
    known = tfds.core.splits.SplitDict(tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=1, filename_template=None)
                                       for name, n in TFDS_SPLITS[info.name].items())
    def size(part): return (TFDS_SPLITS[info.name][part.splitname] if part.to is None else part.to) - (part.from_ or 0)
    for split, way in info.tfds_splits.items():
        parts = tfds.core.ReadInstruction.from_spec(way).to_absolute(known)
        assert sum(map(size, parts)) == info.splits[split], split
    assert sum(info.splits.values()) == sum(TFDS_SPLITS[info.name].values()), 'nothing is left over'


# --- any set of TFDS -------------------------------------------------------------------------------------------------------

def jpeg(i, mode='RGB', kind='jpeg'):
    crop = Image.fromarray(CHINA[3 * i:3 * i + 70, 5 * i:5 * i + 100]).convert(mode)
    crop.save(out := io.BytesIO(), kind)
    return out.getvalue()


CHINA = load_sample_image('china.jpg')
FEATURES = dict(plain=dict(image=tfds.features.Image(encoding_format='jpeg'), label=tfds.features.ClassLabel(names=[*'abc'])),
                two_labels=dict(image=tfds.features.Image(), label=tfds.features.ClassLabel(num_classes=2),
                                species=tfds.features.ClassLabel(num_classes=9)),
                no_picture=dict(text=tfds.features.Text(), label=tfds.features.ClassLabel(num_classes=2)))


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')
    name, shape, splits, keys = 'plain', 'plain', dict(train=20, validation=5, test=5), None

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(FEATURES[self.shape]),
                                     supervised_keys=self.keys)

    def _split_generators(self, dl_manager): return {s: self._generate_examples(s, n) for s, n in self.splits.items()}

    def _generate_examples(self, split, n):
        values = dict(image=jpeg(1), text='some', species=3)
        for i in range(n):
            label = -1 if split == 'unlabelled' else i % 2
            yield i, {key: dict(values, image=jpeg(i), label=label)[key] for key in FEATURES[self.shape]}


def made(root, **attributes):
    tfds.disable_progress_bar()
    builder = type('Pictures', (Pictures,), dict(name='plain') | attributes, skip_registration=True)(data_dir=root)
    builder.download_and_prepare(file_format='array_record')
    return root


@pytest.mark.parametrize('splits, ours', [
    (dict(train=20, validation=5, test=5), dict(train=20, tune=5, test=5)),
    (dict(train=20, validation=5), dict(train=18, tune=2, test=5)),
    (dict(train=20, test=5), dict(train=18, tune=2, test=5)),
    (dict(train=20), dict(train=16, tune=2, test=2)),
    (dict(test=5), dict(test=5))])
def test_any_prepared_tfds_set(tmp_path, splits, ours):
    made(tmp_path, splits=splits)
    info = image_set('plain', tmp_path)
    assert dict(info.splits) == ours and info.classes == 3 and info.class_names == ('a', 'b', 'c') and info.streamed and info.flip
    sources = {split: open_source('plain', split, tmp_path) for split in ours}
    assert {split: len(source) for split, source in sources.items()} == ours
    seen = [example.image for source in sources.values() for example in source]
    assert len(seen) == sum(splits.values()) and all(image[:2] == b'\xff\xd8' for image in seen)
    assert len({source.fingerprint for source in sources.values()}) == len(sources)
    assert sources['test'][0].key == 'plain/test record 0'


def test_a_set_of_several_configurations_by_its_plain_name(tmp_path):
    "TFDS prepares 'eurosat' in eurosat/rgb/2.0.0."
    (made(tmp_path, name='eurosat') / 'eurosat' / '1.0.0').rename(tmp_path / '2.0.0')
    (tmp_path / 'eurosat' / 'rgb').mkdir()
    (tmp_path / '2.0.0').rename(tmp_path / 'eurosat' / 'rgb' / '2.0.0')
    for name in ('eurosat', 'eurosat/rgb'):
        assert len(open_source(name, 'test', tmp_path)) == 5
        assert preflight(name, tmp_path).folder == tmp_path / 'eurosat' / 'rgb' / '2.0.0'


@pytest.mark.parametrize('name', ['', 'cifar10/', '../x', 'caltech101:3.0.1', 'folder:'])
def test_names_that_are_none(name, tmp_path):
    with pytest.raises(ValueError) as caught: image_set(name, tmp_path)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 400


def test_features_that_will_not_do(tmp_path):
    for name in ('two_labels', 'no_picture'): made(tmp_path, name=name, shape=name)
    with pytest.raises(ValueError, match=r'has the features .*label \(ClassLabel\), species \(ClassLabel\)'):
        image_set('two_labels', tmp_path)
    with pytest.raises(ValueError, match=r'has the features label \(ClassLabel\), text \(Text\)'):
        open_source('no_picture', 'train', tmp_path)
    made(tmp_path / 'keyed', name='two_labels', shape='two_labels', keys=('image', 'species'))
    assert image_set('two_labels', tmp_path / 'keyed').classes == 9, 'the set says itself which label is meant'


def test_unlabelled_split(tmp_path):
    made(tmp_path, splits=dict(train=20, unlabelled=4))
    source = open_source('plain', 'unlabelled', tmp_path)
    assert [example.label for example in source] == [-1] * 4
    with pytest.raises(ValueError, match="split 'unlabelled' of plain has no labels"): source.labels()


def test_fingerprint_depends_on_content_and_on_nothing_else(tmp_path):
    same, moved, other = (open_source('plain', 'train', made(tmp_path / place, splits=splits)).fingerprint for place, splits in
                          (('a', dict(train=20)), ('b', dict(train=20)), ('c', dict(train=21))))
    assert same == moved != other


def test_splits_that_are_not_there(tmp_path):
    made(tmp_path, splits=dict(train=20, test=5))
    for split, message in (('validation', "unknown split of plain 'validation'"), ('trian', "did you mean 'train'"),
                           ('train[50:60]', 'incompatible with 20 examples'), ('train[5:5]', 'is empty'),
                           ('train[a:b]', 'is no split of TFDS'), ('tune+val', "'val'")):
        with pytest.raises(ValueError, match=message) as error: open_source('plain', split, tmp_path)
        assert '\n' not in str(error.value)
    assert len(open_source('plain', 'tune+train[:5]+test', tmp_path)) == 12
    with pytest.raises(IndexError): open_source('plain', 'test', tmp_path)[5]


def test_labels_are_kept_beside_a_large_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, '_MANY', 10)
    source = open_source('plain', 'train', made(tmp_path, splits=dict(train=20)))
    labels = source.labels()
    kept = next((tmp_path / 'plain' / '1.0.0').glob('.labels-*'))
    assert list(labels) == [example.label for example in source] and kept.name == f'.labels-{source.fingerprint}.npy'
    monkeypatch.setattr(TfdsSource, '__getitem__', lambda self, i: 1 / 0)
    assert (source.labels() == labels).all(), 'read from the file'
    kept.write_bytes(kept.read_bytes()[:40])
    with pytest.raises(ZeroDivisionError): source.labels()  # a damaged file is not trusted


def test_labels_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, '_MANY', 10)
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(datasets, 'write_whole', full)
    assert len(open_source('plain', 'train', made(tmp_path, splits=dict(train=20))).labels()) == 16


def test_sources_in_processes_of_their_own(tmp_path):
    "As Grain's workers get them."
    root = made(tmp_path / 'tfds', splits=dict(train=20, test=5))
    for label in 'ab':
        (tmp_path / 'folder' / label).mkdir(parents=True)
        for i in range(10): (tmp_path / 'folder' / label / f'{i}.jpg').write_bytes(jpeg(i))
    sources = [open_source('plain', 'train', root), open_source(f'folder:{tmp_path}/folder', 'train')]
    sources += [open_source('synthetic', 'tune'), Subset(sources[0], [3, 1])]
    for source in sources: source[0]  # its files are open now, and must not travel
    code = '''import pickle, sys, hashlib
for source in pickle.load(open(sys.argv[1], 'rb')):
    print(len(source), source.fingerprint, source[1].key, hashlib.md5(bytes(source[1].image)).hexdigest(), source[1].label)
assert 'tensorflow' not in sys.modules'''
    (tmp_path / 'pickled').write_bytes(pickle.dumps(sources))
    out, err = start(code, tmp_path / 'pickled').communicate(timeout=60)
    here = [(len(s), s.fingerprint, s[1].key, hashlib.md5(bytes(s[1].image)).hexdigest(), s[1].label) for s in sources]
    assert out.splitlines() == [' '.join(map(str, values)) for values in here], err


# --- folders ---------------------------------------------------------------------------------------------------------------

def folder_of(root, **counts):
    for place, n in counts.items():
        (root / place.replace('__', '/')).mkdir(parents=True)
        for i in range(n): (root / place.replace('__', '/') / f'{i}.jpg').write_bytes(b'%d' % i)
    return root


def test_folder_is_dealt_by_names_alone(tmp_path):
    one = read_folder(folder_of(tmp_path / 'one', dog=30, cat=10, eel=3))
    two = read_folder(folder_of(tmp_path / 'elsewhere' / 'one', eel=3, dog=30, cat=10))
    assert one.files == two.files and one.info.class_names == ('cat', 'dog', 'eel')
    counts = {split: np.bincount([label for _, label in files]).tolist() for split, files in one.files.items()}
    assert counts == dict(train=[8, 24, 1], tune=[1, 3, 1], test=[1, 3, 1])
    assert one.files['test'][1] == ('dog/24.jpg', 1), 'golden: a change of the deal changes what results were measured on'


@pytest.mark.parametrize('places, sizes', [
    (dict(train__a=10, train__b=10, test__a=2, test__b=1), dict(train=18, tune=2, test=3)),
    (dict(train__a=10, train__b=10, val__a=2), dict(train=18, tune=2, test=2)),
    (dict(train__a=10, train__b=10, val__a=2, test__b=1), dict(train=20, tune=2, test=1))])
def test_folder_with_splits_of_its_own(tmp_path, places, sizes):
    assert dict(read_folder(folder_of(tmp_path, **places)).info.splits) == sizes


@pytest.mark.parametrize('places, message', [
    ({}, 'has none'), (dict(a=3), "has one, 'a'"), (dict(a=0, b=0), 'no class in .* has a picture'),
    (dict(a=0, b=3), 'the class .*/a has no picture'), (dict(train__a=3, train__b=3), 'none called test or val'),
    (dict(train__a=3, train__b=3, val__c=3), "class 'c' is in 'test' and not in train"),
    (dict(a=1, b=1), "none is left for 'tune'"),
    (dict(train__a=3, train__b=3, val__a=3, valid__a=3), 'has val, valid: keep test and one')])
def test_folders_that_will_not_do(tmp_path, places, message):
    root = folder_of(tmp_path, **places)
    with pytest.raises(ValueError, match=message) as error: open_source(f'folder:{root}', 'train')
    assert '\n' not in str(error.value)


def test_folder_odds_and_ends(tmp_path):
    root = folder_of(tmp_path, a__deep=9, b=9)
    (root / 'b' / 'notes.txt').write_text('no picture')
    (root / 'b' / '.hidden.jpg').write_text('no picture')
    (root / '.git').mkdir()
    (root / 'b' / '.ipynb_checkpoints').mkdir()
    (root / 'b' / '.ipynb_checkpoints' / 'copy.jpg').write_bytes(b'x')
    (root / 'b' / 'Ünï çödé.JPEG').write_bytes(b'x')
    source = FolderSource(root, 'train')
    assert source.info.classes == 2 and sum(source.info.splits.values()) == 19
    assert {key for split in source.info.splits for _, _, key in FolderSource(root, split)} >= {'b/Ünï çödé.JPEG', 'a/deep/3.jpg'}
    before = source.fingerprint
    (root / source[0].key).write_bytes(b'longer')
    assert FolderSource(root, 'train').fingerprint != before
    (root / source[0].key).unlink()
    with pytest.raises(ValueError, match='cannot be read: No such file'): source[0]
    with pytest.raises(ValueError, match="did you mean 'train'"): FolderSource(root, 'trian')
    with pytest.raises(ValueError, match='is a bucket'): open_source('folder:gs://bucket/pictures', 'train')
    link = tmp_path / 'b' / 'loop'
    link.symlink_to(tmp_path / 'b')
    assert FolderSource(root, 'test').info.classes == 2, 'a link in a circle is not followed'


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    root = folder_of(tmp_path, a=3, b=3)
    def refused(path, *_, **__): raise PermissionError(13, 'Permission denied', os.fspath(path))
    monkeypatch.setattr(os, 'scandir', refused)
    with pytest.raises(ValueError, match='cannot be read: Permission denied'): read_folder(root)


# --- files of arrays -------------------------------------------------------------------------------------------------------

def arrays(n=40, size=8, **changes):
    "What a file of arrays holds, in grey."
    rng = np.random.default_rng(0)
    parts = {f'{split}_{kind}': value for split in ('train', 'test') for kind, value in
             dict(images=rng.integers(0, 256, (n, size, size), np.uint8), labels=np.arange(n) % 4).items()}
    return {key: value for key, value in (parts | changes).items() if value is not None}


def test_a_file_of_arrays_trains_like_any_set(tmp_path):
    content = arrays(class_names=['a', 'b', 'c', 'd'], flip=False)
    np.savez(tmp_path / 'mine.npz', **content)
    name = f"npz:{tmp_path / 'mine.npz'}"
    info = image_set(name)
    assert (info.name, info.class_names, info.flip, dict(info.splits)) == ('npz:mine.npz', ('a', 'b', 'c', 'd'), False,
                                                                          dict(train=36, tune=4, test=40))
    loaded = load(name, 'train', 8)
    assert (loaded.images == content['train_images'][:36, ..., None]).all() and (loaded.labels == np.arange(36) % 4).all()
    assert np.allclose(info.mean, content['train_images'][:36].mean() / 255) and info is image_set(name)
    data = run_data.seeded_data(scaled(Config(), 'smoke', dataset=name, train_examples=12), 0)
    assert len(data.train) == 12 and (np.bincount(data.train.labels) == 3).all() and len(data.held_out) == 40
    with pytest.raises(ValueError, match="unknown split of npz:mine.npz 'val'"): open_source(name, 'val')


@pytest.mark.parametrize('changes, says', [
    (dict(test_labels=None), 'npz:x.npz lacks test_labels; it has test_images, train_images, train_labels'),
    (dict(tune_images=np.zeros((2, 8, 8), np.uint8)), 'lacks tune_labels'),
    (dict(train_images=np.zeros((40, 8, 8))),
     r'train_images should be uint8 \[N,S,S,3\] or \[N,S,S\], not float64 \(40, 8, 8, 3\)'),
    (dict(train_images=np.zeros((40, 8, 9), np.uint8)), r'not uint8 \(40, 8, 9, 3\)'),
    (dict(train_labels=np.zeros(39, int)), r'train_labels should be 40 whole numbers from 0, not int64 \(39,\)'),
    (dict(train_labels=-np.ones(40, int)), 'train_labels should be 40 whole numbers from 0'),
    (dict(test_labels=np.arange(40)), 'label 39 is not in 0 to 3'),
    (dict(test_images=np.zeros((40, 9, 9), np.uint8)), 'the pictures of its splits differ in size: 8, 9'),
])
def test_wrong_files_of_arrays(tmp_path, changes, says):
    np.savez(tmp_path / 'x.npz', **arrays(**changes))
    with pytest.raises(ValueError, match=says): image_set(f"npz:{tmp_path / 'x.npz'}")


def test_what_is_no_file_of_arrays(tmp_path):
    with pytest.raises(ValueError, match="there is no file 'nowhere.npz'"): image_set('npz:nowhere.npz')
    (tmp_path / 'text.npz').write_text('nothing')
    np.save(tmp_path / 'one.npy', np.zeros(3))
    np.savez(tmp_path / 'cut.npz', **arrays())
    os.truncate(tmp_path / 'cut.npz', 3000)
    for name in ('text.npz', 'one.npy', 'cut.npz'):
        with pytest.raises(ValueError, match=f'{name} is no .npz file, or was cut off'): image_set(f'npz:{tmp_path / name}')


# --- labels ----------------------------------------------------------------------------------------------------------------

def test_budget_of_labels(folder):
    source = open_source('digits', 'train', folder)
    labels, before = source.labels(), set()
    for n in (1, 4, 10, 38):
        few, rest = limit_labels(source, n, seed=1)
        assert (np.bincount(labels[few]) == n).all() and sorted([*few, *rest]) == list(range(400)) and before <= set(few)
        before = set(few)
    assert (limit_labels(labels, 4, seed=1)[0] == limit_labels(source, 4, seed=1)[0]).all()
    assert limit_labels(list(labels), 1, seed=2)[0].tolist() == GOLDEN_LABELS
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match='per_class'): limit_labels(labels, wrong, 0)
    with pytest.raises(ValueError, match='indices should be from 0 to 399'): Subset(source, [400])
    assert Subset(source, few).fingerprint != Subset(source, rest).fingerprint


# --- buckets ---------------------------------------------------------------------------------------------------------------

GOOGLE = '''
import re
import gcp_storage_emulator.handlers.objects as objects
content = objects.download

def download(request, response, storage, *more, **named):   # Google sends the last n bytes when asked; this server does not
    find = request.get_header
    def header(name, default=None):
        value = find(name, default)
        last = name == 'range' and re.fullmatch(r'bytes=-([0-9]+)', value or '')
        size = len(storage.get_file(request.params['bucket_name'], request.params['object_id'])) if last else 0
        return f'bytes={max(0, size - int(last[1]))}-' if last else value
    request.get_header = header
    content(request, response, storage, *more, **named)

objects.download = download
from gcp_storage_emulator.__main__ import main
main()
'''
READ = '''
import sys
from pathlib import Path
from resnet_rs.storage import write_whole
from resnet_rs.datasets import image_set, open_source
from resnet_rs.preparing import preflight
folder = Path(sys.argv[1]) / 'plain' / '1.0.0'
for path in folder.iterdir(): write_whole(f'gs://evidence/data/plain/1.0.0/{path.name}', path.read_bytes())
for place in (sys.argv[1], 'gs://evidence/data'):
    print(image_set('plain', place).splits, [(e.label, hash(e.image)) for e in open_source('plain', 'tune+test', place)],
          open_source('plain', 'train', place).fingerprint, open_source('plain', 'train', place).labels().sum())
print(preflight('plain', 'gs://evidence/data').damage or 'whole', preflight('imagenette', 'gs://evidence/data').obstacle)
'''


@pytest.mark.slow
def test_bucket(tmp_path):
    "What is copied to a bucket is read there as on a disk; Google's own server is replaced by one that runs here."
    for name in ('gcsfs', 'gcp_storage_emulator'): pytest.importorskip(name)
    made(tmp_path, splits=dict(train=20, test=5))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    serve = 'start --in-memory --default-bucket evidence --host 127.0.0.1 --port'.split()
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen([sys.executable, '-c', GOOGLE, *serve, port], **quiet) as server:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', int(port))): break
                time.sleep(0.1)
            settings = dict.fromkeys(('STORAGE_EMULATOR_HOST', 'CLOUD_STORAGE_EMULATOR_ENDPOINT'), f'http://127.0.0.1:{port}')
            process = start(READ, tmp_path, GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false', PYTHONHASHSEED='0', **settings)
            out, err = process.communicate(timeout=90)
        finally: server.kill()
    assert process.returncode == 0, err
    disk, there, last = out.splitlines()
    assert disk == there and last.startswith('whole prepare imagenette in a folder'), out


def test_buckets_that_will_not_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='no storage is known as ftp://'): open_source('cifar10', 'train', 'ftp://host/data')
    monkeypatch.setattr(datasets, 'file_names', lambda folder, *_: ['3.0.2'])
    class Stored:
        class info: file_format = tfds.core.FileFormat.ARRAY_RECORD
    monkeypatch.setattr(tfds, 'builder_from_directory', lambda _: Stored)
    with pytest.raises(ValueError, match='are read from a disk or from gs://, not from s3://'):
        open_source('cifar10', 'train', 's3://bucket/data')


def test_bucket_without_support(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    with pytest.raises(OSError, match=r"no support for gs:// is installed: pip install 'resnet_rs\[bucket\]'"):
        open_source('cifar10', 'train', 'gs://bucket/data')


# --- preparing -------------------------------------------------------------------------------------------------------------

def tar(path, members, mode='w'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            (entry := tarfile.TarInfo(name)).size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture(scope='module')
def tiny_imagenet(tmp_path_factory):
    "TFDS's own builder on two tars like ImageNet's, with one CMYK picture and one PNG under the names TFDS knows them by."
    root = tmp_path_factory.mktemp('imagenet')
    files = {f'n01440764_{i}.JPEG': jpeg(i) for i in range(98)} | {'n01739381_1309.JPEG': jpeg(1, 'CMYK'),
             'n02105855_2933.JPEG': jpeg(2, kind='png')}
    inner = {s: tar(root / 'inner' / f'{s}.tar', {n: d for n, d in files.items() if n.startswith(s)}).read_bytes()
             for s in ('n01440764', 'n01739381', 'n02105855')}
    tar(root / 'downloads' / 'manual' / 'ILSVRC2012_img_train.tar', {f'{s}.tar': data for s, data in inner.items()})
    tar(root / 'downloads' / 'manual' / 'ILSVRC2012_img_val.tar', {f'ILSVRC2012_val_{i:08}.JPEG': jpeg(i) for i in range(1, 4)})
    logging.getLogger('absl').setLevel('ERROR')
    tfds.disable_progress_bar()
    prepare('imagenet2012', root)
    return root, files


def test_imagenet_through_tfds_own_builder(tiny_imagenet):
    root, files = tiny_imagenet
    parts = {split: open_source('imagenet2012', split, root) for split in ('train', 'tune', 'test', 'train+tune')}
    assert [len(part) for part in parts.values()] == [98, 2, 3, 100]
    seen = {e.key: e for e in parts['train+tune']}
    odd = {'n01739381_1309.JPEG', 'n02105855_2933.JPEG'}
    assert seen.keys() == files.keys() and all(seen[key].image == files[key] for key in seen.keys() - odd)
    for key in odd:
        stored, original = (Image.open(io.BytesIO(data)) for data in (seen[key].image, files[key]))
        assert (stored.format, stored.mode) == ('JPEG', 'RGB')
        difference = np.asarray(stored, float) - np.asarray(original.convert('RGB'), float)
        assert np.abs(difference).mean() < 3
    names = tfds.builder_from_directory(datasets.prepared_folder('imagenet2012', root)).info.features['label'].names
    assert all(names[e.label] == key.split('_')[0] for key, e in seen.items())
    assert parts['test'][0].key.startswith('ILSVRC2012_val_') and parts['test'].info is DATASETS['imagenet2012']
    assert 'tensorflow' not in sys.modules


def test_preflight_tells_what_is_there(tiny_imagenet, capsys):
    root, _ = tiny_imagenet
    report = preflight('imagenet2012', root)
    assert (report.holds, report.damage, report.obstacle) == (dict(train=100, validation=3), '', '')
    assert prepare('imagenet2012', root) == report.folder and '100 train, 3 validation' in capsys.readouterr().out


def test_preflight_before_anything(tmp_path, monkeypatch, capsys):
    report = preflight('imagenet2012', tmp_path)
    for word in ('1,255,544 train', '155 GB', 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar', 'image-net.org/download',
                 str(tmp_path / 'downloads' / 'manual'), 'not needed', 'non-commercial'): assert word in str(report), word
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'ILSVRC2012_img_val.tar').touch()
    assert preflight('imagenet2012', tmp_path, tmp_path / 'mine').missing == ('ILSVRC2012_img_train.tar',)
    monkeypatch.setattr(tfds, 'builder', lambda *_, **__: pytest.fail('something was started'))
    with pytest.raises(ValueError, match='cannot be downloaded by a program'): prepare('imagenet2012', tmp_path)
    with pytest.raises(ValueError, match=r"needs TensorFlow .*pip install 'resnet_rs\[prepare\]'"): prepare('cifar10', tmp_path)
    assert capsys.readouterr().out.count('licence:') == 2, 'both were printed first'
    monkeypatch.setattr(preparing, '_free', lambda _: 10**9)
    with pytest.raises(ValueError, match=r'4\.68 GB are needed .* 1 GB are free'): prepare('imagenette', tmp_path)
    assert os.listdir(tmp_path) == ['mine']
    assert prepare('synthetic', tmp_path) is None and prepare('digits', tmp_path).name == '1.0.0'


def test_files_by_hand_for_a_set_that_is_not_in_the_table(tmp_path, monkeypatch):
    class ByHand(Pictures):
        name, MANUAL_DOWNLOAD_INSTRUCTIONS = 'by_hand', """Get pictures.zip
                                                           from its authors."""
    monkeypatch.setattr(tfds, 'builder', lambda name, data_dir=None, **_: ByHand(data_dir=data_dir, file_format='array_record'))
    with pytest.raises(ValueError, match='manual, is empty, and TFDS says: Get pictures.zip from its authors'):
        prepare('by_hand', tmp_path)
    (tmp_path / 'downloads' / 'manual').mkdir(parents=True)
    (tmp_path / 'downloads' / 'manual' / 'pictures.zip').touch()
    tfds.disable_progress_bar()
    assert prepare('by_hand', tmp_path).name == '1.0.0'


@pytest.mark.parametrize('damage, words', [('gone', 'is missing'), ('half', 'cannot be read'), ('other', r'holds 20 of 5')])
def test_preflight_finds_damage(tmp_path, damage, words):
    made(tmp_path, splits=dict(train=20, test=5))
    shard, other = (next((tmp_path / 'plain' / '1.0.0').glob(f'*-{split}.*')) for split in ('test', 'train'))
    if damage == 'gone': shard.unlink()
    if damage == 'half': os.truncate(shard, shard.stat().st_size // 2)
    if damage == 'other': shard.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=f'is damaged .*{words}.*remove that folder'): prepare('plain', tmp_path)


def test_downloaded_set_without_tensorflow(tmp_path, monkeypatch):
    "Imagenette's archive is unpacked, listed and stored by TFDS's own code; only the download itself is replaced."
    files = {f'imagenette2/{part}/{s}/{s}_{i}.JPEG': jpeg(i) for part, n in (('train', 10), ('val', 2))
             for s in ('n01440764', 'n02102040') for i in range(n)}
    archive = tar(tmp_path / 'imagenette2.tgz', files, 'w:gz')
    def fetched(self, url):
        assert url.endswith('/imagenette2.tgz')
        return self.extract(archive)
    monkeypatch.setattr(tfds.download.DownloadManager, 'download_and_extract', fetched)
    tfds.disable_progress_bar()
    assert prepare('imagenette', tmp_path / 'data').parts[-3:] == ('imagenette', 'full-size-v2', '1.0.0')
    parts = {split: open_source('imagenette', split, tmp_path / 'data') for split in ('train', 'tune', 'test')}
    assert {split: len(part) for split, part in parts.items()} == dict(train=18, tune=2, test=4)
    assert sorted(e.image for part in parts.values() for e in part) == sorted(files.values())
    assert parts['train'][0].key == 'imagenette/train record 0'
    assert '20 train, 4 validation' in str(preflight('imagenette', tmp_path / 'data'))


def test_set_that_turns_out_to_need_tensorflow(tmp_path, monkeypatch):
    "A set that is not in the table is tried without; the message says what to do."
    class Arrays(Pictures):
        name = 'arrays'
        def _generate_examples(self, split, n): yield 0, {'image': np.zeros((8, 8, 3), np.uint8), 'label': 0}
    monkeypatch.setattr(tfds, 'builder', lambda name, data_dir=None, **_: Arrays(data_dir=data_dir, file_format='array_record'))
    tfds.disable_progress_bar()
    with pytest.raises(ValueError, match=r"preparing arrays needs .*pip install 'resnet_rs\[prepare\]'"):
        prepare('arrays', tmp_path)
    assert not list(tmp_path.glob('arrays/1*')), 'nothing half done is left as if it were whole'
    assert '_module' not in vars(tfds.core.utils.lazy_imports_utils.tensorflow), 'the stand-in is gone'
