"""Videos and clips: the authors' code as golden files, real files of every kind, damage, resuming, the rendered set."""
import importlib.util
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy.stats import ks_2samp

from resnet_rs import clips, rendered_clips, videos
from resnet_rs.clips import clip_batches, clip_starts, clip_views, eval_clips, frame_indices, jitter_box, resize_frames
from resnet_rs.digits import digit_splits
from resnet_rs.rendered_clips import CLIPS, MOTIONS, load_clips, prepare_clips, render
from resnet_rs.videos import BadVideo, FolderVideos, MemoryVideos, TfdsVideos, Video, VideoFile, open_videos

GOLDENS = Path(__file__).parent / 'goldens'
TRAIN, TEST = '787996b4cb15a760', '1364f1316f4a5e23'  # fingerprints of the rendered set: part of every record's key


def golden(name):
    spec = importlib.util.spec_from_file_location(name, GOLDENS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(GOLDENS))
    try: spec.loader.exec_module(module)
    finally: sys.path.remove(str(GOLDENS))
    return module


recipe, made = golden('recipe'), golden('make_clips')
SPEC, ARRAYS = recipe.load_spec(GOLDENS / 'garden_clips.npz'), recipe.load_arrays(GOLDENS / 'garden_clips.npz')


# --- the authors' code -----------------------------------------------------------------------------------------------------

def test_frame_numbers_equal_the_authors():
    rows = SPEC['sampling']
    assert np.array_equal(np.concatenate([frame_indices(*row, 'centre') for row in rows]), ARRAYS['centre'])
    linspace = [frame_indices(*row, start) for row in rows for start in clip_starts(*row, SPEC['clips'])]
    assert np.array_equal(np.concatenate(linspace), ARRAYS['linspace'])
    assert np.array_equal(np.concatenate([frame_indices(*row) for row in SPEC['starts']]), ARRAYS['from_start'])


def test_random_starts_have_the_authors_range():
    class Recorder:
        def integers(self, high): self.high = high; return 0
    for row, high in zip(SPEC['sampling'], ARRAYS['maxval'], strict=True):
        frame_indices(*row, 'random', rng := Recorder())
        assert rng.high == high, row


@pytest.mark.parametrize('name', SPEC['videos'])
def test_views_and_training_crops_equal_the_authors(name):
    row, frames = SPEC['videos'][name], made.video(name)
    size = row['shape'][3]
    video = Video(len(frames), lambda i, each: np.stack([each(frames[k]) for k in i]), 0, name)
    views = clip_views(video, SPEC['frames'], SPEC['stride'], size, tuple(row['views']))
    assert np.array_equal(views, ARRAYS[f'eval_{name}'])
    for k, (top, left, h, w) in enumerate(row['boxes']):
        assert np.array_equal(resize_frames(frames[:2, top:top + h, left:left + w], size, size), ARRAYS[f'train_{name}_{k}'])


@pytest.mark.parametrize('size', made.SIZES)
def test_boxes_are_distributed_as_tensorflow_draws_them(size):
    theirs, rng = ARRAYS['boxes_{}x{}'.format(*size)].astype(int), np.random.default_rng(0)
    ours = np.array([jitter_box(*size, rng) for _ in range(6000)])
    columns = [[*b.T, b[:, 2] * b[:, 3], b[:, 3] / b[:, 2]] for b in (ours, theirs)]
    p = [ks_2samp(a, b).pvalue for a, b in zip(*columns, strict=True)]
    assert min(p) > 1e-3, p
    assert (ours[:, 2] * ours[:, 3]).min() >= 0.1 * size[0] * size[1], 'a tenth of the frame is covered'
    assert ((ours[:, :2] + ours[:, 2:]).max(axis=0) <= size).all()
    moved = ours[(ours[:, 2:] < size).all(axis=1)]
    assert (moved[:, :2] + moved[:, 2:] < size).all(), 'the last row and column are not drawn unless the box fills them'


def test_a_wrong_range_would_be_noticed():
    theirs, rng = ARRAYS['boxes_256x340'].astype(int), np.random.default_rng(0)
    ours = np.array([jitter_box(256, 340, rng, area=(0.2, 1.0)) for _ in range(6000)])
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue < 1e-6


@pytest.fixture(scope='module')
def tfds_made(tmp_path_factory):
    "A folder with what TFDS's own UCF-101 builder wrote, with TensorFlow."
    root = tmp_path_factory.mktemp('ucf')
    folder = root / recipe.load_spec(GOLDENS / 'tfds_ucf101.npz')['folder']
    folder.mkdir(parents=True)
    for name, data in recipe.load_arrays(GOLDENS / 'tfds_ucf101.npz').items(): (folder / name).write_bytes(data.tobytes())
    return root


def test_a_set_that_tfds_wrote_is_read_without_tensorflow(tfds_made):
    source = TfdsVideos('ucf101', 'train', tfds_made)
    assert source.info.classes == 101 and source.info.class_names[:2] == ('ApplyEyeMakeup', 'ApplyLipstick')
    assert source.info.splits == dict(train=5, test=3) and len(source) == 5 and sorted(source.labels()) == [0, 3, 6, 9, 12]
    for video in (source[i] for i in range(5)):  # JPEG may be one level off
        k = video.label // 3
        frames = video.read(range(video.num_frames))
        levels = (10 * k + 3 * np.arange(5 + k))[:, None, None, None]
        assert frames.shape == (5 + k, 24, 32, 3) and np.abs(frames - levels).max() <= 1
    assert len(TfdsVideos('ucf101/ucf101_1', 'train[:40%]+test', tfds_made)) == 5
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint != TfdsVideos('ucf101', 'test', tfds_made).fingerprint
    assert again[2].label == source[2].label
    assert 'tensorflow' not in sys.modules


def test_tfds_sets_that_cannot_be_used(tfds_made, tmp_path, folder):
    with pytest.raises(ValueError, match='did you mean'): TfdsVideos('ucf101', 'tset', tfds_made)
    with pytest.raises(ValueError, match=r"not prepared.*t\.builder\('moving_mnist'"):
        open_videos('moving_mnist', 'test', tfds_made)
    with pytest.raises(ValueError, match=r'one video and one class.*motion \(ClassLabel\)'):
        TfdsVideos('rendered_digits', 'test', folder)
    copy = tmp_path / 'ucf101' / 'ucf101_1' / '2.0.0'
    copy.mkdir(parents=True)
    for path in (tfds_made / 'ucf101/ucf101_1/2.0.0').iterdir(): (copy / path.name).write_bytes(path.read_bytes())
    (copy / 'dataset_info.json').write_text((copy / 'dataset_info.json').read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(ValueError, match='stored as tfrecord'): TfdsVideos('ucf101', 'train', tmp_path)
    (other := tmp_path / 'ucf101' / 'ucf101_2' / '2.0.0').mkdir(parents=True)
    (other / 'dataset_info.json').write_text('{}')
    with pytest.raises(ValueError, match='ucf101/ucf101_1, ucf101/ucf101_2'): TfdsVideos('ucf101', 'train', tmp_path)


# --- files -----------------------------------------------------------------------------------------------------------------

LEVEL = 4  # frame n has this times n as its grey level


def write(path, count, codec='libx264', ticks=None, size=(64, 48), pix_fmt='yuv420p', sound=False, g=12, **muxer):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w', options=muxer) as container:
        stream = container.add_stream(codec, rate=25, options={'g': str(g), 'qp': '0'} if codec == 'libx264' else {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if codec != 'libx264': stream.gop_size = g; stream.bit_rate = 4_000_000
        if sound: tone = container.add_stream('aac', rate=8000)
        for n in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), LEVEL * n, np.uint8), format='rgb24')
            frame.pts = n if ticks is None else int(ticks[n])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format='fltp', layout='mono')
            quiet.sample_rate = 8000
            container.mux(tone.encode(quiet))
            container.mux(tone.encode(None))
    return path


def numbers(frames): return np.rint(frames.astype(float).mean(axis=(-1, -2, -3)) / LEVEL).astype(int).tolist()


KINDS = [('a.mp4', 'libx264'), ('a.mkv', 'libx264'), ('a.mov', 'mpeg4'), ('a.avi', 'mpeg4'), ('a.avi', 'mjpeg'),
         ('a.webm', 'libvpx-vp9'), ('a.ts', 'libx264'), ('a.mpg', 'mpeg2video')]


@pytest.mark.parametrize('name, codec', KINDS)
def test_every_frame_of_every_kind_of_file(tmp_path, name, codec):
    sound = name in ('a.mp4', 'a.mkv')
    video = VideoFile(write(tmp_path / name, 50, codec, pix_fmt='yuvj420p' if codec == 'mjpeg' else 'yuv420p', sound=sound))
    assert video.num_frames == 50
    assert numbers(video.read(range(50))) == list(range(50))
    for asked in ([49], [0], [30, 5, 30, 44], [13, 12, 11], list(range(3, 48, 5))):
        assert numbers(video.read(asked)) == asked, asked


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv'])
def test_a_variable_frame_rate_is_read_by_number(tmp_path, name):
    ticks = np.cumsum(np.random.default_rng(1).integers(1, 30, 60))
    video = VideoFile(write(tmp_path / name, 60, ticks=ticks))
    assert video.num_frames == 60 and numbers(video.read(range(60))) == list(range(60))
    assert numbers(video.read([58, 17, 36])) == [58, 17, 36]


def test_only_what_is_needed_is_decoded(tmp_path):
    video = VideoFile(write(tmp_path / 'a.mp4', 60, g=10))
    passed = [i for i, _ in videos._by_time(video.path, video._times, [3, 42, 45], video._keys)]
    assert passed == [0, 1, 2, 3, 40, 41, 42, 43, 44, 45], 'up to the third; then from the key frame before the 42nd'


def test_open_groups_of_pictures(tmp_path):
    "Frames that are shown before a key frame and decoded after it need the group before."
    path = tmp_path / 'a.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=25, options={
            'g': '10', 'qp': '0', 'x264-params': 'open-gop=1:bframes=3:scenecut=0'})
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for n in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), LEVEL * n, np.uint8), format='rgb24')
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = VideoFile(path)
    for asked in (list(range(60)), [29], [28, 31], [9, 10, 11], [59, 38, 3]): assert numbers(video.read(asked)) == asked, asked


def test_a_file_that_cannot_be_sought_is_read_from_its_beginning(tmp_path, monkeypatch):
    video = VideoFile(write(tmp_path / 'a.mp4', 40))
    monkeypatch.setattr(video, '_keys', [0, 5, 21])  # no key frames are at 5 and 21: seeking lands elsewhere
    assert numbers(video.read([30, 22, 6])) == [30, 22, 6]
    raw = VideoFile(write(tmp_path / 'a.h264', 40))  # a bare stream has no times at all
    assert raw.num_frames == 40 and numbers(raw.read([39, 7])) == [39, 7]


def test_one_frame_and_short_videos(tmp_path):
    one = FolderVideos(write(tmp_path / 'train' / 'a' / 'one.mp4', 1).parents[2], 'train')
    assert one[0].num_frames == 1
    (x, y), = clip_batches(one, 8, 2, 32, 3, steps=1, seed=0)
    assert x.shape == (3, 8, 32, 32, 3) and y.tolist() == [0, 0, 0] and np.ptp(x.astype(int)) <= 1
    five = VideoFile(write(tmp_path / 'five.mp4', 5))
    assert numbers(five.read(frame_indices(5, 8, 2, 'centre'))) == [0, 2, 4, 1, 3, 0, 2, 4]


def turned(path, matrix):
    "The file with the quarter turn that phones store: another matrix in its track header."
    data = bytearray(path.read_bytes())
    at = data.index(b'tkhd') + 44
    assert data[at:at + 4] == b'\0\1\0\0' and data[at + 32:at + 36] == b'\x40\0\0\0'
    data[at:at + 36] = b''.join(v.to_bytes(4, 'big', signed=True) for v in (*matrix, 0x40000000))
    path.write_bytes(data)
    return path


def test_quarter_turns_are_done(tmp_path):
    one, size = 0x10000, (64, 48)
    with av.open(str(tmp_path / 'a.mp4'), 'w') as container:
        stream = container.add_stream('libx264', rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, 'yuv420p'
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:24, :32] = 200  # light at the top left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(stream.encode(None))
    def light(path):
        frame = VideoFile(path).read([0])[0, :, :, 0]
        h, w = frame.shape
        return (h, w), [frame[y:y + h // 2, x:x + w // 2].mean() > 100 for y in (0, h // 2) for x in (0, w // 2)].index(True)
    assert light(tmp_path / 'a.mp4') == ((48, 64), 0)
    assert light(turned(tmp_path / 'a.mp4', (0, one, 0, -one, 0, 0, 48 * one, 0))) == ((64, 48), 1), 'clockwise: to the top right'


@pytest.mark.parametrize('name, codec, options', [('a.mp4', 'libx264', {}), ('b.mp4', 'libx264', {'movflags': 'faststart'}),
                                                  ('a.avi', 'mpeg4', {}), ('c.mp4', 'mpeg4', {'movflags': 'faststart'}),
                                                  ('a.mkv', 'libx264', {}), ('a.webm', 'libvpx-vp9', {})])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path, name, codec, options):
    whole = write(tmp_path / name, 60, codec, **options).read_bytes()
    (tmp_path / name).write_bytes(whole[:int(len(whole) * 0.7)])
    with pytest.raises(BadVideo, match=name): VideoFile(tmp_path / name).read(range(60))


def test_an_avi_cut_off_between_two_frames_is_refused_by_name(tmp_path):
    "FFmpeg marks no frame of such a file as damaged."
    path = write(tmp_path / 'a.avi', 60, 'mpeg4')
    whole = path.read_bytes()
    path.write_bytes(whole[:whole.rindex(b'00dc', 0, int(len(whole) * 0.6))])
    with pytest.raises(BadVideo, match=r'a\.avi is cut off: it holds \d+ of 60 frames'): VideoFile(path)


def test_damage_is_refused_by_name(tmp_path):
    path = write(tmp_path / 'a.mp4', 60, 'mpeg4')
    data = bytearray(path.read_bytes())
    start = data.index(b'mdat') + 4
    for k in range(start + 200, start + 2000): data[k] = (k * 7919) % 251
    path.write_bytes(data)
    with pytest.raises(BadVideo, match=r'a\.mp4'): VideoFile(path).read(range(60))


@pytest.mark.parametrize('content', [b'', b'words', b'\0' * 5000, None])
def test_what_is_no_video_is_refused_by_name(tmp_path, content):
    path = tmp_path / 'train' / 'x' / 'odd.mp4'
    path.parent.mkdir(parents=True)
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(BadVideo, match=r'odd\.mp4'): VideoFile(path)
    with pytest.raises(BadVideo, match=r'odd\.mp4'):
        next(clip_batches(FolderVideos(tmp_path, 'train'), 4, 1, 16, 1, steps=1, seed=0, workers=2))


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / 'a.mp4'), 'w') as container:
        tone = container.add_stream('aac', rate=8000)
        quiet = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format='fltp', layout='mono')
        quiet.sample_rate = 8000
        container.mux(tone.encode(quiet))
        container.mux(tone.encode(None))
    with pytest.raises(BadVideo, match=r'a\.mp4 holds no video'): VideoFile(tmp_path / 'a.mp4')


def test_a_video_stream_without_frames_is_refused(tmp_path):
    with pytest.raises(BadVideo, match=r'a\.(mkv|avi)'): VideoFile(write(tmp_path / 'a.avi', 0, 'mpeg4'))


def test_without_the_decoder_the_message_names_the_extra(tmp_path):
    write(tmp_path / 'train' / 'a' / 'a.mp4', 3)
    code = '''import sys
sys.modules['av'] = None
from resnet_rs import clips
from resnet_rs.videos import FolderVideos
source = FolderVideos(sys.argv[1], 'train')
print(len(source))
try: source[0]
except ImportError as error: print(error)
print('tensorflow' in sys.modules)'''
    done = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    said = "video files are decoded by PyAV: pip install 'resnet_rs[video]'"
    assert done.stdout.splitlines() == ['1', said, 'False'], done.stderr


# --- batches ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp('films')
    for k in range(5): write(root / 'train' / 'ab'[k % 2] / f'{k}.mp4', 20 + 8 * k, size=(80, 48))
    write(root / 'test' / 'b' / 'z.mp4', 30)
    (root / 'train' / 'a' / 'notes.txt').write_text('no video')
    (root / 'train' / 'a' / '._0.mp4').write_text('left by a file system')
    return root


def test_a_folder(films):
    source = open_videos(f'folder:{films}', 'train')
    assert len(source) == 5 and source.labels().tolist() == [0, 0, 0, 1, 1] and source.info.class_names == ('a', 'b')
    assert source[0].key == 'train/a/0.mp4' and FolderVideos(films, 'test').labels().tolist() == [1]
    before = source.fingerprint
    with open(films / 'train' / 'a' / '4.mp4', 'ab') as file: file.write(b'\0' * 8)
    assert FolderVideos(films, 'train').fingerprint != before, 'another file, another fingerprint'


def test_batches_are_a_function_of_seed_and_step(films):
    source = pickle.loads(pickle.dumps(FolderVideos(films, 'train')))
    settings = dict(frames=4, stride=3, size=24, batch_size=3, steps=6)
    whole = list(clip_batches(source, seed=1, **settings))
    for options in (dict(start=4), dict(start=4, workers=3), dict(workers=1)):
        part = list(clip_batches(source, seed=1, **settings, **options))
        assert len(part) == 6 - options.get('start', 0)
        for (x, y), (again, labels) in zip(whole[-len(part):], part, strict=True):
            assert (x == again).all() and (y == labels).all()
    assert any((x != other).any() for (x, _), (other, _) in zip(whole, clip_batches(source, seed=2, **settings), strict=True))
    labels = np.concatenate([y for _, y in whole])[:15].reshape(3, 5)
    assert (np.sort(labels, axis=1) == source.labels()).all(), 'an epoch shows each video once'
    for clip in np.concatenate([x for x, _ in whole]): assert np.diff(numbers(clip)).tolist() == [3, 3, 3]


def test_bad_videos_are_skipped_by_choice(films, tmp_path):
    shutil.copytree(films, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'train' / 'a' / '2.mp4').write_bytes(b'no video')
    source, settings = FolderVideos(tmp_path, 'train'), dict(frames=4, stride=1, size=16, batch_size=5, seed=3)
    with pytest.raises(BadVideo, match=r'2\.mp4'): list(clip_batches(source, steps=1, **settings))
    whole = list(clip_batches(source, steps=4, **settings, bad=(bad := {})))
    assert list(bad) == [1] and '2.mp4' in bad[1] and all(len(y) == 5 for _, y in whole)
    x, y = next(clip_batches(source, steps=4, start=3, workers=2, **settings, bad={}))
    assert (x == whole[3][0]).all() and (y == whole[3][1]).all()
    for path in (tmp_path / 'train').rglob('*.mp4'): path.write_bytes(b'')
    with pytest.raises(BadVideo): next(clip_batches(source, steps=1, **settings, bad={}))


def test_a_clip_is_mirrored_and_cut_as_a_whole():
    ramp = np.zeros((1, 10, 40, 60, 3), np.uint8) + np.arange(60, dtype=np.uint8)[:, None] * 4
    arrays = load_clips_like(ramp, flip=True)
    falling = 0
    for x, _ in clip_batches(MemoryVideos(arrays), 4, 2, 16, 1, steps=60, seed=0):
        assert (x[0] == x[0, 0]).all(), 'one box and one mirror for all frames'
        falling += int(x[0, 0, 0, 0, 0]) > int(x[0, 0, 0, -1, 0])
    assert 15 < falling < 45, 'mirrored half of the time'
    for allowed, asked in ((False, None), (True, False)):
        for x, _ in clip_batches(MemoryVideos(load_clips_like(ramp, flip=allowed)), 4, 2, 16, 1, steps=20, seed=0, flip=asked):
            assert int(x[0, 0, 0, 0, 0]) < int(x[0, 0, 0, -1, 0])
    plain = clip_batches(MemoryVideos(arrays), 4, 2, 16, 1, steps=40, seed=0, area=None)
    widths = {int(np.ptp(x[0, 0, 0, :, 0].astype(int))) for x, _ in plain}
    assert len(widths) <= 3, 'without jitter all boxes have one size'


def load_clips_like(images, flip):
    info = replace(rendered_clips.clip_set('motion'), flip=flip)
    return rendered_clips.Arrays(images, np.zeros(len(images), np.int32), info.name, 'train', '0' * 16, info)


def test_evaluation_sees_each_video_once(films):
    source = FolderVideos(films, 'train')
    parts = list(eval_clips(source, 4, 2, 32, 2, views=(3, 3), workers=2))
    assert [p[0].shape for p in parts] == [(18, 4, 32, 32, 3)] * 3
    assert np.concatenate([m for *_, m in parts]).tolist() == [True] * 5 + [False]
    assert np.concatenate([y for _, y, _ in parts])[:5].tolist() == source.labels().tolist()
    lengths = [source[i].num_frames for i in range(5)]
    views = np.concatenate([x for x, _, _ in parts]).reshape(6, 9, 4, 32, 32, 3)
    for k, n in enumerate(lengths):
        assert [numbers(v) for v in views[k]] == [frame_indices(n, 4, 2, s).tolist() for s in clip_starts(n, 4, 2, 3)] * 3


def test_a_reader_that_stops_early_leaves_no_thread(films):
    before = threading.active_count()
    stream = clip_batches(FolderVideos(films, 'train'), 4, 1, 16, 2, steps=50, seed=0, workers=2)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_average_of_probabilities_not_of_logits():
    logits = np.array([[0.0, 10.0], [0.0, -1.0], [0.0, -1.0]])
    found = np.asarray(clips.average_views(logits, 3))
    soft = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(found, soft.mean(axis=0)[None], atol=1e-6)


# --- the rendered set ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A data folder with the rendered clips; rendered once a machine, since that takes seconds."
    root, there = tmp_path_factory.mktemp('data'), prepare_clips()
    shutil.copytree(there, root / there.parent.name / there.name)
    return root


def test_rendered_clips_round_trip(folder):
    from sklearn.datasets import load_digits
    digits, seen = load_digits(), {}
    parts = digit_splits(digits.target)
    for split, count in CLIPS.items():
        stored = tfds.data_source('rendered_digits', split=split, data_dir=folder, decoders={'video': rendered_clips._Encoded()})
        examples = stored.__getitems__(range(len(stored)))
        assert len(examples) == count and {e['source'] for e in examples} == {b'rendered from a real scan'}
        seen[split] = {int(e['index']) for e in examples}
        assert seen[split] == set(parts[split].tolist())
        for e in examples[::97]:
            frames = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in e['video']])
            assert (frames == render(digits.images[e['index']], e['index'], e['copy'], e['motion'])).all()
            assert e['digit'] == digits.target[e['index']]
    assert not seen['train'] & seen['test'] and not seen['train'] & seen['tune'] and not seen['tune'] & seen['test']


def test_rendered_fingerprints(folder):
    assert load_clips('train', data_dir=folder).fingerprint == TRAIN
    assert load_clips('test', data_dir=folder).fingerprint == TEST
    assert 'RENDERED' in rendered_clips.clip_set('digit').source


def test_opposites_are_each_other_backwards():
    "One coordinate walks at one speed around its circle, forth in the first of a pair and back in the second."
    square, period = np.full((8, 8), 16), [32, 32, np.pi / 2, np.log(20 / 9)]
    for m in range(0, len(MOTIONS), 2):
        k, walks = m // 2, [rendered_clips.poses(3, 0, n) for n in (m, m + 1)]
        forth, back = (np.diff(np.log(w[:, 3]) if k == 3 else w[:, k]) for w in walks)
        speed = forth[forth > 0].min()
        assert np.allclose(forth % period[k], speed) and np.allclose(-back % period[k], speed), MOTIONS[m]
        assert 0.3 <= speed * 15 / period[k] <= 0.6, MOTIONS[m]
        assert (render(square, 3, 0, m)[0] == render(square, 3, 0, m + 1)[0]).all(), 'the first frame does not know the motion'


@pytest.mark.parametrize('damage', ['no info', 'short file', 'no file'])
def test_damaged_clips_are_replaced(folder, tmp_path, damage, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    made_at = tmp_path / 'rendered_digits' / '1.0.0'
    shard = next(made_at.glob('*-test.array_record*'))
    if damage == 'no info': (made_at / 'dataset_info.json').unlink()
    if damage == 'short file': os.truncate(shard, shard.stat().st_size // 2)
    if damage == 'no file': shard.unlink()
    rendered = []

    def build(root, final):  # rendering anew takes seconds: copy instead
        rendered.append(final)
        shutil.rmtree(final)
        shutil.copytree(folder / 'rendered_digits' / '1.0.0', final)
    monkeypatch.setattr(rendered_clips, '_build', build)
    (tmp_path / '.rendering-left').mkdir()
    assert prepare_clips(tmp_path) == made_at and rendered == [made_at] and rendered_clips._is_whole(made_at)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.rendered_digits.lock', 'rendered_digits'], 'rubbish is swept away'
    prepare_clips(tmp_path)
    assert len(rendered) == 1, 'whole now'


def test_a_killed_rendering_leaves_nothing_half_done(tmp_path):
    code = '''import os, sys
from resnet_rs import rendered_clips as r
examples = r.RenderedDigits._generate_examples
def dies(self, *args):
    for i, example in enumerate(examples(self, *args)):
        if i == 5: os.kill(os.getpid(), 9)
        yield example
r.RenderedDigits._generate_examples = dies
r.prepare_clips(sys.argv[1])'''
    done = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, timeout=120,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    assert done.returncode == -9
    assert any(p.name.startswith('.rendering-') for p in tmp_path.iterdir()) and not (tmp_path / 'rendered_digits').exists()
    assert not rendered_clips._is_whole(tmp_path / 'rendered_digits' / '1.0.0')


def test_two_processes_render_once(tmp_path):
    code = '''import sys
from resnet_rs import rendered_clips as r
splits, build = r.digit_splits, r._build
r.digit_splits = lambda labels: {split: part[:20] for split, part in splits(labels).items()}  # a smaller set, in less time
r.CLIPS.update(train=40, tune=20, test=20)
def told(*args): print('rendering', file=sys.__stdout__, flush=True); build(*args)
r._build = told
print(len(r.load_clips('tune', data_dir=sys.argv[1])))'''
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    both = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], **pipes) for _ in range(2)]
    said = [p.communicate(timeout=180) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    words = ' '.join(out for out, _ in said).split()
    assert words.count('20') == 2 and words.count('rendering') == 1, words
