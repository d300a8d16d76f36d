"""RandAugment against golden outputs of the authors' code, and what a batch of it promises.

The goldens and their recipe: tests/goldens/make_randaugment_tf1.py. Exact operations are compared by CRC; AutoContrast and
Sharpness truncate rounded floats and are allowed one level on 2% and two levels on 4% of the values, should a machine round
otherwise (on x86 none differs).
"""
import json
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_randaugment_tf1 as make

from resnet_rs.randaugment import _DIALECTS, OPS, _arguments, _augment, _draw, apply_op, rand_augment

GOLDENS = Path(__file__).parent / 'goldens'

GEOMETRIC = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
TOLERANCE = {'AutoContrast': (1, 0.02), 'Sharpness': (2, 0.04)}  # levels, share of the values
SHARE = dict(translate=100 / 7, cutout=40 / 7)
EVERY = [*make.SMALL, *make.LARGE]
FAST = {**dict.fromkeys(('noise_32x28', 'waves_32x28', 'levels_32x28', 'nearly_flat_20x20'), make.MAGNITUDES),
        **dict.fromkeys(('flat_16x20', 'noise_320x280'), (1, 10, 15, 20))}  # a new shape compiles sixteen times


@pytest.fixture(scope='module')
def golden():
    with np.load(GOLDENS / 'randaugment_tf1.npz') as file:
        return dict(file) | {'spec': json.loads(str(file['spec']))}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def difference(out, golden, name, i):
    """What is known about how row i of image `name` differs: (largest, share of the values), or None."""
    spec = golden['spec']
    if i in spec['sampled']:
        out, want = out.ravel()[::spec['stride'][name]], golden['sample_' + name][spec['sampled'].index(i)]
    elif name in spec['full_images'] and i in spec['full']:
        want = golden['full_' + name][spec['full'].index(i)]
    else:
        return None
    distance = np.abs(out.astype(int) - want)
    return int(distance.max()), float((distance > 0).mean())


def check(golden, name, magnitudes, call=apply_op):
    image, wrong, rows = make.draw(name), [], golden['spec']['rows']
    assert zlib.crc32(image.tobytes()) == golden['spec']['inputs'][name], 'the recipe draws another image'
    for i, row in enumerate(rows):
        if row['m'] not in magnitudes:
            continue
        out = np.asarray(call(row['op'], image, row['m'], row.get('sign', 1), centre=make.centre(row, image)))
        assert out.dtype == np.uint8 and out.shape == image.shape
        if zlib.crc32(out.tobytes()) == golden['crc_' + name][i]:
            continue
        found, allowed = difference(out, golden, name, i), TOLERANCE.get(row['op'])
        if not (allowed and (found is None or found[0] <= allowed[0] and found[1] <= allowed[1])):
            wrong.append((row, found))
    assert not wrong, f'{len(wrong)} rows differ from the authors, the first: {wrong[:5]}'


def test_the_golden_file_is_what_its_script_describes(golden):
    spec = golden['spec']
    assert spec['rows'] == make.rows() and make.COMMIT in spec['source']
    assert sorted(make.OPS) == sorted(OPS) and tuple(make.OPS) == OPS
    assert {row['m'] for row in spec['rows']} >= set(range(1, 21))
    assert {row['op'] for i, row in enumerate(spec['rows']) if i in spec['sampled']} == set(TOLERANCE)
    assert all(len(golden['crc_' + name]) == len(spec['rows']) for name in EVERY)
    # the outputs kept whole hash to the CRCs that stand for all the others
    for name in spec['full_images']:
        for i, out in zip(spec['full'], golden['full_' + name], strict=True):
            assert zlib.crc32(out.tobytes()) == golden['crc_' + name][i]


@pytest.mark.parametrize('name', FAST)
def test_equal_to_the_authors(golden, name):
    check(golden, name, FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize('name', EVERY)
def test_equal_to_the_authors_everywhere(golden, name):
    check(golden, name, make.MAGNITUDES)


def test_equal_to_the_authors_with_everything_traced(golden):
    def call(op, image, magnitude, sign, centre):
        return traced[op](image, magnitude, sign, centre or (0, 0), 100., 40.)

    traced = {op: jax.jit(lambda image, m, sign, centre, translate, cutout, op=op: apply_op(
        op, image, m, sign, centre=centre, translate=translate, cutout=cutout)) for op in OPS}
    check(golden, 'noise_32x28', range(0, 31, 3), call)


@pytest.mark.parametrize('op', OPS)
def test_compiled_equals_eager(op):
    image = noise(32, 28, 3)
    for magnitude in (7, 13):
        with jax.disable_jit():
            eager = np.asarray(_DIALECTS['tf1'][op](jnp.asarray(image), _arguments(magnitude, 30, 12, -1, (20, 22))))
        compiled = np.asarray(apply_op(op, image, magnitude, -1, centre=(20, 22), translate=30, cutout=12))
        assert (eager != compiled).mean() <= (0.01 if op in GEOMETRIC else 0)


@pytest.mark.parametrize('form', ['public', 'select'])  # on a CPU the public function is a loop with a switch
def test_a_batch_is_apply_op_composed_by_the_draws(form):
    key, images, magnitude = jax.random.key(5), noise(48, 32, 28, 3), 9.
    if form == 'public':
        out = np.asarray(rand_augment(key, images, magnitude=magnitude, **SHARE))
    else:
        out = np.asarray(_augment(key, images, *map(jnp.float32, (magnitude, 1, *SHARE.values())),
                                  num_layers=2, dialect='tf1', form=form))
    seen = Counter()
    for i, image in enumerate(images):
        draw = jax.tree.map(np.asarray, _draw(key, i, 2, 32, 28, 1.))
        for op, sign, centre in zip(*draw, strict=True):
            image = apply_op(OPS[op], image, magnitude, sign, centre=centre, **SHARE)
            seen[OPS[op]] += 1
        moved = any(OPS[op] in GEOMETRIC for op in draw.op)
        assert (out[i] != np.asarray(image)).mean() <= (0.01 if moved else 0), [OPS[op] for op in draw.op]
    assert len(seen) == 16, f'the key does not draw every operation: {seen}'


def chi_square(counts):
    counts = np.asarray(counts, float)
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_operations_signs_and_centres_are_uniform():
    # every possible outcome on one small image is different, so the outputs tell what was drawn; public functions only
    image, m, constants, number = noise(16, 16, 3) // 2 + 60, 6., dict(translate=8., cutout=3.), 3200
    outcome = {}
    for op in OPS:
        signs, centres = (1, -1) if op in GEOMETRIC else (1,), np.ndindex(16, 16) if op == 'Cutout' else [(0, 0)]
        for sign in signs:
            for centre in centres:
                outcome[np.asarray(apply_op(op, image, m, sign, centre=centre, **constants)).tobytes()] = op, sign, centre
    expected = 16 - 6 + 2 * 5 + 256
    assert len(outcome) == expected, 'two outcomes look the same: choose another image'
    out = np.asarray(rand_augment(jax.random.key(0), np.stack([image] * number), 1, m, **constants))
    drawn = [outcome[o.tobytes()] for o in out]
    ops = Counter(op for op, _, _ in drawn)
    assert chi_square([ops[op] for op in OPS]) < 37.7                       # 15 degrees of freedom, p = 0.001
    for op in GEOMETRIC:
        signs = [sign for name, sign, _ in drawn if name == op]
        assert abs(np.sum(signs)) < 3.3 * np.sqrt(len(signs)), op
    centres = [centre for op, _, centre in drawn if op == 'Cutout']
    for axis in (0, 1):
        assert chi_square(np.bincount([c[axis] for c in centres], minlength=16)) < 37.7


def test_layers_are_drawn_independently():
    draws = jax.vmap(partial(_draw, num_layers=2, height=9, width=5, prob=1.), (None, 0))(jax.random.key(1), jnp.arange(5120))
    pairs = np.zeros((16, 16))
    np.add.at(pairs, tuple(np.asarray(draws.op).T), 1)
    assert chi_square(pairs) < 331                                          # 255 degrees of freedom, p = 0.001
    centre = np.asarray(draws.centre)
    assert centre.min() == 0 and (centre.max((0, 1)) == (8, 4)).all()


def test_prob_is_the_share_of_augmented_images():
    images = noise(1, 16, 16, 3).repeat(3200, 0)  # one compilation with the test above
    key = jax.random.key(2)
    assert (rand_augment(key, images, 1, prob=0) == images).all()
    always = np.asarray(rand_augment(key, images, 1, 6, **SHARE))
    some = np.asarray(rand_augment(key, images, 1, 6, prob=0.3, **SHARE))
    changed = (some != images).any((1, 2, 3))
    possible = (always != images).any((1, 2, 3)).mean()
    assert abs(changed.mean() - 0.3 * possible) < 4 * np.sqrt(0.21 / 3200)
    assert (some[changed] == always[changed]).all()


def test_no_layers_is_the_identity():
    images = noise(3, 8, 8, 3)
    assert (rand_augment(jax.random.key(0), images, num_layers=0) == images).all()


def test_one_compilation_for_a_sweep():
    images, sweep = noise(12, 16, 16, 3), jax.jit(rand_augment)
    outs = [sweep(jax.random.key(0), images, magnitude=m, prob=p, translate=t, cutout=c)
            for m, p, t, c in ((5., 1., 100., 40.), (10., .5, 7., 3.), (15., 0., 0., 0.))]
    assert sweep._cache_size() == 1 and (outs[2] == images).all()
    rand_augment(jax.random.key(0), images)
    before = _augment._cache_size()
    for m, p in ((5, 1), (10., 0.5), (np.float32(15), 1.), (jnp.float32(20), np.float64(0.2))):
        rand_augment(jax.random.key(0), images, magnitude=m, prob=p, translate=m)
    assert _augment._cache_size() == before


def test_an_image_depends_on_the_key_its_place_and_itself():
    key, images = jax.random.key(3), noise(12, 16, 16, 3)
    out = np.asarray(rand_augment(key, images, magnitude=6, **SHARE))
    assert (out == rand_augment(key, images, magnitude=6, **SHARE)).all()
    others = images.copy()
    others[1::2] = 255 - others[1::2]
    assert (out[::2] == np.asarray(rand_augment(key, others, magnitude=6, **SHARE))[::2]).all()
    assert (out[:5] == rand_augment(key, images[:5], magnitude=6, **SHARE)).all()
    assert (out != rand_augment(jax.random.key(4), images, magnitude=6, **SHARE)).any()
    same = np.asarray(rand_augment(key, images[:1].repeat(12, 0), magnitude=6, **SHARE))
    assert len({o.tobytes() for o in same}) > 6                             # the place matters
    assert (out == rand_augment(jax.random.PRNGKey(3), images, magnitude=6, **SHARE)).all()  # either kind of key


IMAGE = noise(8, 8, 3)


@pytest.mark.parametrize('wrong, message', [
    (dict(name='Rotat'), "unknown operation 'Rotat'; did you mean 'Rotate'?"),
    (dict(dialect='garden'), "unknown dialect 'garden'"),
    (dict(magnitude=30.5), 'magnitude must be a number from 0 to 30, got 30.5'),
    (dict(magnitude=-1), 'magnitude must be'),
    (dict(magnitude=float('nan')), 'magnitude must be'),
    (dict(sign=0), r'sign must be \+1 or -1, got 0'),
    (dict(name='Cutout'), r'Cutout needs centre=\(row, column\)'),
    (dict(name='Cutout', centre=(8, 0)), "the row of Cutout's centre must be a number from 0 to 7, got 8"),
    (dict(image=IMAGE / 255), r'image must be uint8\[H,W,3\] with H and W of 3 or more, got float64\[8, 8, 3\]'),
    (dict(image=IMAGE[..., :1]), r'got uint8\[8, 8, 1\]'),
    (dict(image=IMAGE[:2]), r'got uint8\[2, 8, 3\]'),
    (dict(translate=-1), 'translate must be'),
])
def test_apply_op_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        apply_op(**(dict(name='Rotate', image=IMAGE, magnitude=10) | wrong))


@pytest.mark.parametrize('wrong, message', [
    (dict(images=IMAGE), r'images must be uint8\[N,H,W,3\]'),
    (dict(prob=1.5), 'prob must be a number from 0 to 1, got 1.5'),
    (dict(num_layers=1.5), 'num_layers must be a whole number'),
    (dict(dialect='torchvision'), "unknown dialect 'torchvision'"),
    (dict(magnitude=31), 'magnitude must be'),
])
def test_rand_augment_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        rand_augment(**(dict(key=jax.random.key(0), images=IMAGE[None]) | wrong))
