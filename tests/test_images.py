"""Images in memory: fingerprints that committed records depend on, other sets, order, and bad values."""
import json
import os
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from resnet_rs import images
from resnet_rs.datasets import Example
from resnet_rs.digits import prepare_digits
from resnet_rs.images import DATASETS, ImageSet, batches, eval_batches, eval_preprocess, load, subset

TRAIN_32 = 'de072e8c2229fdf6'  # fingerprints of the digits: they are part of every record's key, so a change here orphans results
TEST_32 = '9ea99530807eba79'
SYNTHETIC_32 = 'e0db88133c6a34a0'
GOLDEN_FIRST, GOLDEN_BORDER = [89, 43, 90, 24], [115, 127, 76, 98, 3, 94]  # seed 1: epoch 0; border of epochs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    prepare_digits(root)
    return root


def test_names_that_other_rooms_and_users_import_from_here():
    from resnet_rs import image_sets, preprocess
    assert (DATASETS, ImageSet, eval_preprocess) == (image_sets.DATASETS, image_sets.ImageSet, preprocess.eval_preprocess)


def test_stratified(folder):
    shares = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]) / 1797
    for split, n in (('test', 1000), ('train', 400), ('tune', 397)):
        counts = np.bincount(load('digits', split, 8, folder).labels)
        assert counts.sum() == n and np.abs(counts - n * shares).max() < 1.01


def test_golden_fingerprints(folder):
    assert load('digits', 'train', 32, folder).fingerprint == TRAIN_32
    assert load('digits', 'test', 32, folder).fingerprint == TEST_32
    assert load('digits', 'test', 40, folder).fingerprint != TEST_32
    assert load('synthetic', 'train', 32).fingerprint == SYNTHETIC_32
    few = subset(load('digits', 'train', 32, folder), 100, seed=3)
    assert few.fingerprint == '000b33f43e333285' and few.images.shape == (100, 32, 32, 3)


def png(colour):
    out = BytesIO()
    Image.new('RGB', (32, 32), colour).save(out, 'png')
    return out.getvalue()


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    "Written as TFDS writes CIFAR-10 (same features and splits), with 40 + 10 plain-coloured images."
    VERSION = tfds.core.Version('3.0.2')
    name = 'cifar10'

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            'id': tfds.features.Text(), 'image': tfds.features.Image(shape=(32, 32, 3)),
            'label': tfds.features.ClassLabel(num_classes=10)}))

    def _split_generators(self, dl_manager): return {'train': self._generate_examples(40), 'test': self._generate_examples(10)}

    def _generate_examples(self, n):
        for i in range(n): yield i, {'id': f'{n}_{i}', 'image': png((i, 2 * i, 200)), 'label': i % 10}


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, 'cifar10', replace(DATASETS['cifar10'], splits=dict(train=36, tune=4, test=10)))
    tfds.disable_progress_bar()
    Cifar10(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    return tmp_path


def test_other_tfds_set(small_cifar):
    parts = [load('cifar10', split, 32, small_cifar) for split in ('train', 'tune')]
    colours = np.concatenate([a.images[:, 5, 5] for a in parts])
    labels = np.concatenate([a.labels for a in parts])
    assert (colours[:, 0] % 10 == labels).all() and (colours[:, 1] == 2 * colours[:, 0]).all() and (colours[:, 2] == 200).all()
    assert sorted(colours[:, 0]) == list(range(40)), 'train and tune are disjoint and complete'
    assert load('cifar10', 'test', 16, small_cifar).images.shape == (10, 16, 16, 3)
    assert parts[0].info.flip and not DATASETS['digits'].flip


@pytest.mark.parametrize('picture, label, says', [(png((1, 2, 3))[:40], 0, 'set/train record 7: no picture'),
                                                  (png((1, 2, 3)), -1, 'set/train record 7: label -1 is not in 0 to 9'),
                                                  (png((1, 2, 3)), 10, 'set/train record 7: label 10 is not in 0 to 9')])
def test_a_bad_record_is_named_before_any_training(picture, label, says, monkeypatch):
    source = [Example(png((1, 2, 3)), 0, 'a good one')] * 255 + [Example(picture, label, 'set/train record 7')]
    monkeypatch.setattr(images, 'open_source', lambda *_: source)
    with pytest.raises(ValueError, match=says): load('synthetic', 'train', 16)


def test_a_large_set_is_not_for_memory(monkeypatch):
    monkeypatch.setitem(DATASETS, 'cifar10', replace(DATASETS['cifar10'], splits=dict(train=400_000, tune=4, test=10)))
    assert DATASETS['cifar10'].streamed and not DATASETS['cifar100'].streamed
    with pytest.raises(ValueError, match='cifar10 is not for memory: its pictures differ in size or are too many'):
        load('cifar10', 'train', 32)


def test_other_tfds_set_refusals(small_cifar, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cifar10 is not prepared in data_dir .*prepare\('cifar10', "):
        load('cifar10', 'test', 32, tmp_path / 'elsewhere')
    monkeypatch.setitem(DATASETS, 'cifar10', replace(DATASETS['cifar10'], splits=dict(train=36, tune=4, test=11)))
    with pytest.raises(ValueError, match=r"cifar10 has 10 images in split 'test', not 11"):
        load('cifar10', 'test', 32, small_cifar)
    info = small_cifar / 'cifar10' / '3.0.2' / 'dataset_info.json'
    info.write_text(json.dumps({**json.loads(info.read_text()), 'fileFormat': 'tfrecord'}))
    with pytest.raises(ValueError, match='stored as tfrecord'):
        load('cifar10', 'test', 32, small_cifar)


def test_damaged_record_is_named(small_cifar):
    shard = next(small_cifar.glob('cifar10/*/*train*'))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ValueError, match='cifar10/train record 0 cannot be read'): load('cifar10', 'train', 32, small_cifar)


def test_a_set_that_is_not_in_the_table(tmp_path):
    "Pictures of one size, known to nobody but its files."
    class Plain(Cifar10): name = 'plain'
    tfds.disable_progress_bar()
    Plain(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    parts = {split: load('plain', split, 32, tmp_path) for split in ('train', 'tune', 'test')}
    assert {split: len(part) for split, part in parts.items()} == dict(train=36, tune=4, test=10)
    assert parts['train'].info.classes == 10 and parts['train'].info.mean == DATASETS['imagenet2012'].mean


def test_subset_is_balanced_nested_and_by_seed(folder):
    train = load('digits', 'train', 8, folder)
    rows = lambda a: {x.tobytes() for x in a.images}
    for seed in (0, 3):
        small, large = subset(train, 40, seed), subset(train, 100, seed)
        assert (np.bincount(large.labels) == 10).all() and rows(small) < rows(large) < rows(train)
    overlap = len(rows(subset(train, 100, 0)) & rows(subset(train, 100, 1)))
    assert 10 < overlap < 45, 'two seeds share about a quarter of the images, as chance has it'
    few = subset(train, 398, 0)  # more than the smallest class can give evenly
    assert len(few) == 398 and np.bincount(few.labels).min() == np.bincount(train.labels).min()
    with pytest.raises(ValueError, match='n = 401 images asked for, digits has 400'): subset(train, 401, 0)
    with pytest.raises(ValueError, match='n = -1'): subset(train, -1, 0)


def test_synthetic_is_learnable_and_repeatable():
    train, test = load('synthetic', 'train', 32), load('synthetic', 'test', 32)
    means = np.stack([train.images[train.labels == c].mean(axis=0) for c in range(10)])
    nearest = ((test.images[:, None].astype(float) - means) ** 2).sum(axis=(2, 3, 4)).argmin(axis=1)
    assert (nearest == test.labels).mean() > 0.9
    assert train.fingerprint == load('synthetic', 'train', 32).fingerprint != test.fingerprint


@pytest.mark.parametrize('batch_size', [7, 64, 250])
def test_batches_from_any_step(batch_size):
    few = subset(load('synthetic', 'train', 16), 100, 0)
    steps = 20
    whole = list(batches(few, batch_size, steps, seed=5))
    assert len(whole) == steps
    for k in (0, 1, 2, 13, 19, 20):
        rest = list(batches(few, batch_size, steps, seed=5, start=k))
        assert len(rest) == steps - k
        assert all((a == c).all() and (b == d).all() for (a, b), (c, d) in zip(rest, whole[k:], strict=True))
    flat = np.concatenate([x for x, _ in whole]).reshape(steps * batch_size, -1)
    for epoch in range(len(flat) // 100):
        assert len(np.unique(flat[100 * epoch:100 * (epoch + 1)], axis=0)) == 100, 'each image once an epoch'
    assert (next(batches(few, batch_size, 1, seed=5))[0] == whole[0][0]).all(), 'the length of the run does not matter'


def test_golden_order():
    "The order is part of a result: a NumPy that draws another must not go unnoticed."
    few = replace(load('synthetic', 'tune', 8), labels=np.arange(128, dtype=np.int32))
    (_, first), (_, second) = batches(few, 100, 2, seed=1)
    assert list(first[:4]) == GOLDEN_FIRST and list(second[26:32]) == GOLDEN_BORDER


def test_eval_covers_each_image_once():
    data = load('synthetic', 'tune', 8)
    for size in (1, 50, 128, 500):
        parts = list(eval_batches(data, size))
        assert {x.shape for x, _, _ in parts} == {(size, 8, 8, 3)}
        assert {(x.dtype.name, y.dtype.name, m.dtype.name) for x, y, m in parts} == {('uint8', 'int32', 'bool')}
        assert (np.concatenate([x[m] for x, _, m in parts]) == data.images).all()
        assert sum(m.sum() for _, _, m in parts) == 128 and sum(len(m) for _, _, m in parts) < 128 + size
        x, y, m = parts[-1]
        assert not x[~m].any() and not y[~m].any()


@pytest.mark.parametrize('call, message', [
    (lambda d: load('digits', 'train', 32.5), 'image_size = 32.5'),
    (lambda d: load('digits', 'train', True), 'image_size = True'),
    (lambda d: load('digits', 'trian', 32), "did you mean 'train'"),
    (lambda d: load('cifar', 'train', 32), "did you mean 'cifar10'"),
    (lambda d: load('imagenet2012', 'train', 224), 'imagenet2012 is not for memory: its pictures differ in size'),
    (lambda d: batches(d, 0, 5, 0), 'batch_size = 0'),
    (lambda d: batches(d, 4, 5, 0, start=6), 'start = 6 .* from 0 to 5'),
    (lambda d: batches(d, 4, -1, 0), 'steps = -1'),
    (lambda d: batches(d, 4, 5, -1), 'seed = -1'),
    (lambda d: eval_batches(d, 0), 'batch_size = 0')])
def test_bad_values_are_named_at_the_call(call, message):
    with pytest.raises(ValueError, match=message): call(load('synthetic', 'tune', 8))


def test_arrays_are_read_only():
    data = load('synthetic', 'tune', 8)
    with pytest.raises(ValueError, match='read-only'): data.images[0] = 0
