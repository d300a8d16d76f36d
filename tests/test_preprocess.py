"""Decoding and preprocessing against the authors' code, the Model Garden and timm (goldens), and against damaged data."""
import io
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from goldens import recipe
from PIL import Image
from scipy.stats import ks_2samp

from resnet_rs import preprocess
from resnet_rs.decoding import BadImage, decode, decode_window, jpeg_header
from resnet_rs.preprocess import PROTOCOLS, eval_preprocess, resize, sample_crop, train_preprocess

GOLDENS = Path(__file__).parent / 'goldens'
SPECS = {p: recipe.load_spec(GOLDENS / f'preprocess_{p}.npz') for p in PROTOCOLS}
GOLD = {p: recipe.load_arrays(GOLDENS / f'preprocess_{p}.npz') for p in PROTOCOLS}
IMAGES = {name: array.tobytes() for name, array in recipe.load_arrays(GOLDENS / 'preprocess_images.npz').items()}
NAMES = recipe.load_spec(GOLDENS / 'preprocess_images.npz')['names']
every_image = pytest.mark.parametrize('name', NAMES)
every_protocol = pytest.mark.parametrize('protocol', PROTOCOLS)
tensorflows = pytest.mark.parametrize('protocol', ['tf1', 'garden'])


def encode(pixels, kind='JPEG', **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def noise(height, width, seed=0):
    """Blocks of colour and some noise, uint8 [height,width,3]."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)), np.ones((8, 8, 1), int))[:height, :width]
    return np.clip(coarse + rng.integers(-20, 20, (height, width, 3)), 0, 255).astype(np.uint8)


PHOTO = encode(noise(120, 150), quality=85, subsampling='4:2:0')


class Drawn:
    """A generator whose flips are as told."""
    def __init__(self, flip): self.flip = flip
    def random(self, **_): return 0.1 if self.flip else 0.9


# --- the same pixels -------------------------------------------------------------------------------------------------------

@every_protocol
@every_image
def test_decoding_is_exact(protocol, name):
    gold, i = GOLD[protocol], NAMES.index(name)
    whole = decode(IMAGES[name], dct='slow' if protocol == 'timm' else 'fast')
    np.testing.assert_allclose(recipe.projections(name, whole), gold['decoded'][i], rtol=0, atol=1e-9)
    for window, projected in zip(gold['windows'][i].tolist(), gold['decoded_windows'][i], strict=True):
        top, left, height, width = window
        part = whole[top:top + height, left:left + width] if protocol == 'timm' else decode_window(IMAGES[name], window)
        np.testing.assert_allclose(recipe.projections(name, part), projected, rtol=0, atol=1e-9)
        if protocol != 'timm':
            assert np.array_equal(decode_window(IMAGES[name], window, 'picture'), whole[top:top + height, left:left + width])


def test_rows_are_exact_wherever_decoding_stops():
    """Also where a block ends: colours of the last row depend on the block below."""
    photos = PHOTO, encode(noise(120, 150), subsampling='4:4:4'), IMAGES['flower_restart_420'], IMAGES['flower_progressive_420']
    for data in photos:
        whole = decode(data)
        for bottom in range(1, len(whole) + 1):
            assert np.array_equal(decode_window(data, (0, 0, bottom, whole.shape[1])), whole[:bottom]), bottom


def test_the_goldens_have_windows_with_other_edges():
    """So that the test above sees what it is there for: whole decoding alone is not enough, and timm's is another."""
    differing = [name for i, name in enumerate(NAMES) for window in GOLD['tf1']['windows'][i].tolist()
                 if not np.array_equal(decode_window(IMAGES[name], window), decode_window(IMAGES[name], window, 'picture'))]
    assert len(set(differing)) >= 4 and {'china_422', 'china_420'} <= set(differing)
    assert not np.allclose(GOLD['tf1']['decoded'], GOLD['timm']['decoded'], atol=1e-3)


@every_protocol
@every_image
def test_evaluation_equals_the_code_it_is_named_after(protocol, name):
    gold, spec, i = GOLD[protocol], SPECS[protocol], NAMES.index(name)
    for k, size in enumerate(spec['sizes']):
        options = {'crop_pct': spec['crop_pct'][k]} if protocol == 'timm' else {}
        image = eval_preprocess(IMAGES[name], size, protocol, **options)
        assert image.shape == (size, size, 3) and image.dtype == np.float32 and image.flags.c_contiguous
        np.testing.assert_allclose(recipe.samples(name, image, 64), gold['eval_samples'][i, k], rtol=0, atol=1e-3)
        np.testing.assert_allclose(recipe.projections(name, image), gold['eval_projections'][i, k], rtol=0, atol=1e-3)


@every_protocol
@every_image
def test_training_equals_the_code_it_is_named_after(protocol, name, monkeypatch):
    """With window and flip pinned; grey and colour pictures whose tries all fail differ as they do in the authors' code."""
    gold, spec, i = GOLD[protocol], SPECS[protocol], NAMES.index(name)
    height, width, *_ = jpeg_header(IMAGES[name])
    tasks = [(gold['windows'][i, 0], False), (gold['windows'][i, 1], True), ((0, 0, height, width), False)]
    if name == 'china_cmyk': tasks = tasks[:2]    # TensorFlow counts four channels there; the authors' records had three
    for k, (window, flip) in enumerate(tasks):
        monkeypatch.setattr(preprocess, 'sample_crop', lambda *_, window=window: tuple(map(int, window)))
        image = train_preprocess(IMAGES[name], spec['train'], Drawn(flip), protocol)
        assert image.shape == (spec['train'],) * 2 + (3,) and image.dtype == np.uint8 and image.flags.c_contiguous
        off = np.abs(recipe.samples(name, image, 64) - gold['train_samples'][i, k])
        assert off.max() <= 1 and (off > 0).mean() < 0.02    # none on x86; elsewhere a fused multiply-add may move a value over
        np.testing.assert_allclose(recipe.projections(name, image), gold['train_projections'][i, k], rtol=0, atol=0.02)


def test_protocols_differ():
    """By far more than what the tests above allow."""
    for k in range(2):
        for one, other in (('tf1', 'garden'), ('garden', 'timm'), ('tf1', 'timm')):
            assert np.abs(GOLD[one]['eval_samples'][:, k] - GOLD[other]['eval_samples'][:, k]).mean() > 1


# --- the same windows ------------------------------------------------------------------------------------------------------

class Philox:
    """TensorFlow's random numbers (Philox 4x32-10 and its SimplePhilox) in place of NumPy's, for the draw with number `call`."""
    def __init__(self, seeds, call):
        self.key, self.counter, self.words = seeds[0], (seeds[1] << 64) + 10 * call, []

    def word(self):
        if not self.words:
            c, key = [self.counter >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)], [self.key & 0xFFFFFFFF, self.key >> 32]
            for _ in range(10):
                a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
                c = [b >> 32 ^ c[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ key[1], a & 0xFFFFFFFF]
                key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
            self.words, self.counter = c, self.counter + 1
        return self.words.pop(0)

    def random(self, dtype):
        assert dtype == np.float32
        return np.uint32(127 << 23 | self.word() & 0x7FFFFF).view(np.float32) - np.float32(1)

    def integers(self, n):
        if n & (n - 1) == 0: return self.word() & n - 1
        while (word := self.word()) < 2 ** 32 % n: pass
        return word % n


class Mersenne:
    """Python's random numbers, which timm uses, in place of NumPy's."""
    def __init__(self, seed): self.source = random.Random(seed)
    def uniform(self, low, high): return self.source.uniform(low, high)
    def integers(self, n): return self.source.randint(0, n - 1)


def golden_windows(protocol):
    for height, width in SPECS[protocol]['shapes']: yield height, width, GOLD[protocol][f'crops_{height}_{width}']


@tensorflows
def test_given_tensorflows_random_numbers_the_windows_are_tensorflows(protocol):
    for height, width, windows in golden_windows(protocol):
        ours = [sample_crop(Philox(SPECS[protocol]['seeds'], call), height, width, protocol) for call in range(len(windows))]
        assert np.array_equal(ours, windows), (height, width)


def test_given_pythons_random_numbers_the_windows_are_timms():
    for height, width, windows in golden_windows('timm'):
        source = Mersenne(SPECS['timm']['seeds'][0])
        if min(height, width) < 3: continue    # timm draws windows without a pixel there, and fails
        assert np.array_equal([sample_crop(source, height, width, 'timm') for _ in windows], windows), (height, width)


@every_protocol
def test_with_numpys_random_numbers_the_distribution_is_the_same(protocol):
    """Kolmogorov and Smirnov find no difference to the goldens, and find the differences between protocols."""
    rng = np.random.default_rng(5)

    def traits(windows, height, width):
        top, left, h, w = np.array(windows, float).T
        return dict(area=h * w, aspect=w / h, middle_row=top + h / 2, middle_column=left + w / 2)

    for height, width, windows in golden_windows(protocol):
        if min(height, width) < 30 or len(np.unique(windows, axis=0)) < 150: continue
        ours = traits([sample_crop(rng, height, width, protocol) for _ in range(1_000)], height, width)
        for name, values in traits(windows, height, width).items():
            assert ks_2samp(ours[name], values).pvalue > 1e-3, (height, width, name)
    areas = {p: traits([sample_crop(rng, 375, 500, p) for _ in range(1_000)], 375, 500)['area'] for p in PROTOCOLS}
    assert ks_2samp(areas['tf1'], areas['timm']).pvalue < 1e-3
    assert areas['tf1'].min() >= 0.1 * 375 * 500 > areas['garden'].min()


@every_protocol
def test_windows_lie_in_the_image(protocol):
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 80, (300, 2)).tolist():
        top, left, h, w = sample_crop(rng, height, width, protocol)
        assert top >= 0 and left >= 0 and 0 < h <= height - top and 0 < w <= width - left


# --- what is used --------------------------------------------------------------------------------------------------------

@every_protocol
def test_one_generator_one_image(protocol):
    draws = [[train_preprocess(PHOTO, 40, np.random.default_rng(seed), protocol) for seed in range(12)] for _ in range(2)]
    assert np.array_equal(*draws)
    assert len({image.tobytes() for image in draws[0]}) == 12
    plain = [train_preprocess(PHOTO, 40, np.random.default_rng(seed), protocol, flip=False) for seed in range(12)]
    flipped = [not np.array_equal(a, b) for a, b in zip(draws[0], plain, strict=True)]
    assert 2 <= sum(flipped) <= 10
    for image, other, f in zip(draws[0], plain, flipped, strict=True):   # garden and timm may round the other way
        assert np.abs(image[:, ::-1 if f else 1].astype(int) - other).max() <= (0 if protocol == 'tf1' else 1)


@tensorflows
def test_bytes_and_pixels_give_the_same_where_nothing_is_blended(protocol):
    data = encode(noise(90, 110), subsampling='4:4:4')
    for seed in range(4):
        both = [train_preprocess(image, 32, np.random.default_rng(seed), protocol) for image in (data, decode(data))]
        assert np.array_equal(*both)
    assert np.array_equal(*(eval_preprocess(image, 32, protocol) for image in (data, decode(data))))


def test_sizes_of_no_pixel_or_odd_ones_give_a_square_or_say_why():
    rng, refused, shapes = np.random.default_rng(0), 0, [(1, 1), (2, 2), (7, 5000), (5000, 7), (3, 3)]
    shapes += [(1, n) for n in (2, 9, 700)] + [(n, 1) for n in (2, 9, 700)] + rng.integers(1, 40, (12, 2)).tolist()
    for height, width in shapes:
        for kind in ('JPEG', 'PNG'):
            data = encode(noise(height, width), kind)
            for protocol in PROTOCOLS:
                for run in (lambda d, p: train_preprocess(d, 16, rng, p), lambda d, p: eval_preprocess(d, 16, p)):
                    try: image = run(data, protocol)
                    except BadImage as error:
                        refused += 1
                        assert min(height, width) == 1 and protocol != 'timm' and 'too small' in str(error)
                    else: assert image.shape == (16, 16, 3) and np.isfinite(image).all()
    assert refused


def test_enlarged_timm_panoramas_do_not_fill_the_memory():
    with pytest.raises(BadImage, match='not decoded'): eval_preprocess(noise(1, 5000), 256, 'timm')


@pytest.mark.parametrize('call, says', [
    (lambda: eval_preprocess(PHOTO, 32, 'tf2'), 'tf2'), (lambda: eval_preprocess(PHOTO, 0), 'image_size'),
    (lambda: eval_preprocess(PHOTO, 32.0), 'image_size'), (lambda: eval_preprocess(PHOTO, 32, crop_pct=0.9), 'crop_pct'),
    (lambda: eval_preprocess(PHOTO, 32, 'timm', crop_pct=1.2), 'crop_pct'), (lambda: eval_preprocess('a.jpg', 32), 'bytes'),
    (lambda: train_preprocess(np.zeros((9, 9)), 32, Drawn(0)), 'float64'), (lambda: decode(PHOTO, 3), 'shrink'),
    (lambda: train_preprocess(PHOTO, 32, Drawn(0), reduced=True), 'antialias'), (lambda: decode(PHOTO, dct='best'), 'dct'),
    (lambda: resize(noise(9, 9), 32, 'cubic'), 'cubic'), (lambda: decode_window(PHOTO, (0, 0, 500, 10)), 'does not lie'),
    (lambda: sample_crop(Drawn(0), 9, 9, 'torch'), 'torch')])
def test_wrong_arguments_are_no_bad_images(call, says):
    with pytest.raises(ValueError, match=says) as caught: call()
    assert not isinstance(caught.value, BadImage)


@pytest.mark.parametrize('shrink', [2, 4, 8])
def test_decoding_at_reduced_size(shrink):
    pixels = np.asarray(Image.fromarray(noise(16, 20)).resize((213, 150), Image.Resampling.BICUBIC))
    for kind in ('JPEG', 'PNG'):
        small = decode(encode(pixels, kind), shrink)
        assert small.shape == (-(-150 // shrink), -(-213 // shrink), 3)
        mean = pixels[:144, :208].reshape(144 // shrink, shrink, 208 // shrink, shrink, 3).mean(axis=(1, 3))
        assert np.abs(small[:144 // shrink, :208 // shrink] - mean).mean() < 4
    for seed in range(6):
        near = [train_preprocess(encode(pixels, quality=95), 24, np.random.default_rng(seed), 'timm', reduced=r) for r in (0, 1)]
        assert np.abs(near[0].astype(int) - near[1]).mean() < 4


# --- bad data ------------------------------------------------------------------------------------------------------------

def patched_size(height, width):
    """PHOTO with another size in its header."""
    data, (_, begin, _) = bytearray(PHOTO), jpeg_header(PHOTO).segments[-1]
    data[begin + 5:begin + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(data)


def patched_sampling(value):
    """PHOTO with another sampling factor of its first component in its header."""
    data, (_, begin, _) = bytearray(PHOTO), jpeg_header(PHOTO).segments[-1]
    data[begin + 11] = value
    return bytes(data)


CHUNK = b'IHDR' + (60_000).to_bytes(4) * 2 + b'\x08\x02\0\0\0'
BOMB = b'\x89PNG\r\n\x1a\n\0\0\0\r' + CHUNK + zlib.crc32(CHUNK).to_bytes(4) + b'\0\0\0\x09IDATpixels'
BAD = {'empty': (b'', 'empty'), 'a web page': (b'<!DOCTYPE html>', 'not an image'), 'zeros': (bytes(5000), 'not an image'),
       'two bytes': (PHOTO[:2], 'not an image'), 'half a header': (PHOTO[:150], 'header'), 'a header': (PHOTO[:640], 'truncated'),
       'half': (PHOTO[:len(PHOTO) // 2], 'truncated'), 'without the end mark': (PHOTO[:-2], 'truncated'),
       'wider than its data': (patched_size(120, 300), 'damaged'), 'no height': (patched_size(0, 150), 'empty'),
       'huge': (patched_size(65_000, 65_000), '65000 x 65000'), 'half a PNG': (encode(noise(64, 64), 'PNG')[:3000], 'truncated'),
       'half a PNG header': (encode(noise(64, 64), 'PNG')[:20], 'cannot be decoded'),
       'sampling 0 x 2': (patched_sampling(0x02), 'damaged'), 'sampling 15 x 1': (patched_sampling(0xF1), 'damaged'),
       'TIFF of floats': (encode(Image.fromarray(np.eye(20, dtype=np.float32)), 'TIFF'), '32-bit'),
       'TIFF of integers': (encode(Image.fromarray(np.eye(20, dtype=np.int32) * 200), 'TIFF'), '32-bit'),
       'PNG bomb': (BOMB, 'exceeds|not decoded')}


@pytest.mark.parametrize('name', BAD)
def test_bad_data_says_what_it_is(name):
    data, says = BAD[name]
    calls = [lambda: decode(data), lambda: decode(data, dct='slow'), lambda: decode(data, 4)]
    for p in PROTOCOLS:
        calls += [lambda p=p: eval_preprocess(data, 32, p), lambda p=p: train_preprocess(data, 32, np.random.default_rng(0), p)]
    for call in calls:
        with pytest.raises(BadImage, match=says) as caught: call()
        assert '\n' not in str(caught.value) and len(str(caught.value)) < 250


def test_no_cut_anywhere_passes():
    """A JPEG cut at any place is refused whole; and cut anywhere above, a window is."""
    for end in range(0, len(PHOTO), 97):
        with pytest.raises(BadImage): decode(PHOTO[:end])
        with pytest.raises(BadImage): decode_window(PHOTO[:end], (0, 0, 20, 20))


def test_any_byte_may_be_wrong():
    """A picture or a BadImage, whatever byte is changed; nothing else, and no warning."""
    rng, seen = np.random.default_rng(0), []
    for _ in range(300):
        data = bytearray(PHOTO)
        for place in rng.integers(2, len(PHOTO) - 2, 3): data[place] = rng.integers(256)
        try: seen.append(train_preprocess(bytes(data), 16, rng).shape == (16, 16, 3))
        except BadImage: pass
    assert all(seen) and 20 < len(seen) < 280


def test_bytes_between_segments_pass_as_in_tensorflow():
    padded = PHOTO[:-2] + b'\x12\x34\x56\x78' + PHOTO[-2:]
    assert np.array_equal(decode(padded), decode(PHOTO))
    with pytest.raises(BadImage, match='truncated'): decode(padded[:-2])
    scans = encode(Image.open(io.BytesIO(PHOTO)), progressive=True)
    second = scans.index(b'\xff\xc4', scans.index(b'\xff\xda'))
    padded = scans[:second] + b'\x12\x34' * 20 + scans[second:]
    assert np.array_equal(decode(padded), decode(scans))
    with pytest.raises(BadImage): decode(padded[:-200])     # the harmless warning comes first, and hides nothing
    assert np.array_equal(decode(PHOTO + b'trailing'), decode(PHOTO))


def test_other_formats_and_modes():
    grey16 = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    assert np.array_equal(decode(encode(Image.fromarray(grey16), 'PNG'))[..., 1], grey16 >> 8)
    pixels = noise(20, 30)
    for mode, kind in (('RGBA', 'PNG'), ('RGB', 'BMP'), ('RGB', 'TIFF'), ('RGB', 'PPM')):
        assert np.array_equal(decode(encode(Image.fromarray(pixels).convert(mode), kind)), pixels)
    palette = Image.fromarray(pixels).quantize(16)
    assert np.array_equal(decode(encode(palette, 'PNG', transparency=0)), np.asarray(palette.convert('RGB')))
    assert decode(encode(Image.fromarray(pixels).convert('1'), 'PNG')).max() == 255
    assert np.array_equal(decode(bytearray(PHOTO)), decode(memoryview(PHOTO)))
    inks = encode(Image.fromarray(np.dstack([pixels, pixels[..., 1]]), 'CMYK'))
    assert np.array_equal(decode(inks, dct='slow'), np.asarray(Image.open(io.BytesIO(inks)).convert('RGB')))


def test_a_sampling_that_the_fast_decoder_lacks_goes_to_pillow(monkeypatch):
    def lacks(*_, **__): raise ValueError('tjDecompressHeader3(): Could not determine subsampling level of JPEG image')
    monkeypatch.setattr(simplejpeg, 'decode_jpeg', lacks)
    assert np.array_equal(decode(PHOTO), np.asarray(Image.open(io.BytesIO(PHOTO))))
