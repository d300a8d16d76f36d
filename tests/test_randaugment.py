"""RandAugment against golden outputs of the authors' two codes, and what a batch of it promises.

The goldens and their recipe: tests/goldens/make_randaugment_tf1.py and make_randaugment_garden.py. Exact operations are compared
by CRC; AutoContrast and Sharpness truncate rounded floats and are allowed one level on 2% and two levels on 4% of the values,
should a machine round otherwise (on x86 none differs).
"""
import inspect
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_randaugment_tf1 as make
from goldens import recipe

from resnet_rs.image_ops import _DIALECTS, _arguments, _operation
from resnet_rs.randaugment import OPS, _augment, _draws, apply_op, rand_augment

GEOMETRIC = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
TOLERANCE = {'AutoContrast': (1, 0.02), 'Sharpness': (2, 0.04)}  # levels, share of the values
SHARE = dict(translate=100 / 7, cutout=40 / 7)
EVERY = [*make.SMALL, *make.LARGE]
FAST = {'tf1': dict.fromkeys(('noise_32x28', 'waves_32x28', 'levels_32x28', 'nearly_flat_20x20'), make.MAGNITUDES),
        'garden': {**dict.fromkeys(('noise_32x28', 'waves_32x28', 'levels_32x28'), make.MAGNITUDES),
                   'waves_280x320': (1, 10, 15, 20)}}  # a new shape compiles sixteen times
FORMS = ('switch', 'select', 'fused')
every_dialect = pytest.mark.parametrize('dialect', FAST)


@cache
def golden(dialect):
    path = Path(__file__).parent / 'goldens' / f'randaugment_{dialect}.npz'
    return recipe.load_arrays(path) | {'spec': recipe.load_spec(path)}


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


def check(dialect, name, magnitudes, call=apply_op):
    known = golden(dialect)
    image, wrong, rows = make.draw(name), [], known['spec']['rows']
    assert zlib.crc32(image.tobytes()) == known['spec']['inputs'][name], 'the recipe draws another image'
    for i, row in enumerate(rows):
        if row['m'] not in magnitudes:
            continue
        out = np.asarray(call(row['op'], image, row['m'], row.get('sign', 1), dialect, make.centre(row, image)))
        assert out.dtype == np.uint8 and out.shape == image.shape
        if zlib.crc32(out.tobytes()) == known['crc_' + name][i]:
            continue
        found, allowed = difference(out, known, name, i), TOLERANCE.get(row['op'])
        if not (allowed and (found is None or found[0] <= allowed[0] and found[1] <= allowed[1])):
            wrong.append((row, found))
    assert not wrong, f'{len(wrong)} rows differ from the authors, the first: {wrong[:5]}'


@every_dialect
def test_the_golden_file_is_what_its_script_describes(dialect):
    known = golden(dialect)
    spec = known['spec']
    assert spec['rows'] == make.rows() and dict(tf1=make.COMMIT, garden='tf-models-official 2.20.0')[dialect] in spec['source']
    assert tuple(make.OPS) == OPS
    assert {row['m'] for row in spec['rows']} >= set(range(1, 21))
    assert {row['op'] for i, row in enumerate(spec['rows']) if i in spec['sampled']} == set(TOLERANCE)
    assert all(len(known['crc_' + name]) == len(spec['rows']) for name in EVERY)
    # the outputs kept whole hash to the CRCs that stand for all the others
    for name in spec['full_images']:
        for i, out in zip(spec['full'], known['full_' + name], strict=True):
            assert zlib.crc32(out.tobytes()) == known['crc_' + name][i]


def test_choices_and_defaults_are_the_gardens():
    spec = golden('garden')['spec']
    assert spec['choices'] == [*OPS, 'Identity'] and len(spec['choices']) == _DIALECTS['garden'].choices
    ours = {name: p.default for name, p in inspect.signature(rand_augment).parameters.items()}
    theirs = dict(spec['defaults'])
    assert (theirs.pop('prob_to_apply'), theirs.pop('magnitude_std'), theirs.pop('exclude_ops')) == (None, 0, None)
    assert theirs == dict(num_layers=ours['num_layers'], magnitude=ours['magnitude'],
                          cutout_const=ours['cutout'], translate_const=ours['translate'])


@pytest.mark.parametrize('dialect, name', [(dialect, name) for dialect, names in FAST.items() for name in names])
def test_equal_to_the_authors(dialect, name):
    check(dialect, name, FAST[dialect][name])


@pytest.mark.slow
@every_dialect
@pytest.mark.parametrize('name', EVERY)
def test_equal_to_the_authors_everywhere(dialect, name):
    check(dialect, name, make.MAGNITUDES)


@every_dialect
def test_equal_to_the_authors_with_everything_traced(dialect):
    def call(op, image, magnitude, sign, dialect, centre):
        return traced[op](image, magnitude, sign, centre or (0, 0), 100., 40.)

    traced = {op: jax.jit(lambda image, m, sign, centre, translate, cutout, op=op: apply_op(
        op, image, m, sign, dialect, centre, translate, cutout)) for op in OPS}
    check(dialect, 'noise_32x28', range(0, 31, 3), call)


@pytest.mark.parametrize('dialect, op', [*(('tf1', op) for op in OPS),
                                         *(('garden', op) for op in ('AutoContrast', 'Contrast', 'Sharpness', 'Rotate'))])
def test_compiled_equals_eager(dialect, op):
    image = noise(32, 28, 3)
    with jax.disable_jit():
        eager = np.asarray(_operation(op, dialect)(jnp.asarray(image), _arguments(13, 30, 12, -1, (20, 22))))
    compiled = np.asarray(apply_op(op, image, 13, -1, dialect, centre=(20, 22), translate=30, cutout=12))
    assert (eager != compiled).mean() <= (0.01 if op in GEOMETRIC else 0)


def test_dialects_differ_where_they_should():
    image = noise(32, 28, 3)
    tf1, garden = ({op: np.asarray(apply_op(op, image, 13, -1, dialect, (20, 22), **SHARE)) for op in OPS} for dialect in FAST)
    assert {op for op in OPS if (tf1[op] != garden[op]).any()} - set(TOLERANCE) == {*GEOMETRIC, 'Contrast'}
    for op in GEOMETRIC:
        inside = (tf1[op] != 128).any(-1)
        assert (tf1[op] == garden[op])[inside].all() and inside.mean() < 0.95, op


@pytest.mark.parametrize('pixels', [0, 1, 5, 27, 28, 29, 56, 100, 150])
@pytest.mark.parametrize('sign', [1, -1])
def test_reflection_is_symmetric_padding(pixels, sign):
    image, start = noise(32, 28, 3), pixels + sign * pixels
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), 'symmetric')
    across, down = (apply_op(op, image, 10, sign, 'garden', translate=pixels) for op in ('TranslateX', 'TranslateY'))
    assert (across == padded[pixels:pixels + 32, start:start + 28]).all()
    assert (down == padded[start:start + 32, pixels:pixels + 28]).all()


def test_contrast_is_rounded_as_the_gardens_in_a_batch():
    images, factor, third = noise(96, 32, 28, 3), np.float32(1.72), np.float32(1 / 255)
    total = unit = images.reshape(96, -1, 3) * third                        # NumPy rounds every result
    while total.shape[1] > 1:
        half, rest = divmod(total.shape[1], 2)
        total = np.concatenate([total[:, :half] + total[:, half + rest:], total[:, half:half + rest]], 1)
    mean = total * (np.float32(1) / np.float32(unit.shape[1]))
    want = np.clip((mean + (unit - mean) * factor) * np.float32(255.5), 0, 255).astype(np.uint8).reshape(images.shape)
    contrast = _operation('Contrast', 'garden')
    assert (jax.jit(jax.vmap(contrast, (0, None)))(images, _arguments(9., 100., 40.)) == want).all()


def augmented(form, dialect, key, images, magnitude, prob=1., translate=100., cutout=40., num_layers=2):
    """One form of the batch; on a CPU the public function is the form switch."""
    numbers = map(jnp.float32, (magnitude, prob, translate, cutout))
    return np.asarray(_augment(key, images, *numbers, num_layers=num_layers, dialect=dialect, form=form))


def by_hand(dialect, key, images, magnitude, num_layers=2, **constants):
    """(outputs of apply_op composed by the draws, which operations each image got)"""
    draws = map(np.asarray, _draws(key, len(images), num_layers, *images.shape[1:3], 1., _DIALECTS[dialect].choices))
    outs, ops = [], []
    for image, numbers, signs, centres in zip(images, *draws, strict=True):
        ops.append([(*OPS, 'Identity')[number] for number in numbers])
        for op, sign, centre in zip(ops[-1], signs, centres, strict=True):
            if op != 'Identity': image = apply_op(op, image, magnitude, sign, dialect, centre, **constants)
        outs.append(np.asarray(image))
    return np.stack(outs), ops


def check_forms(dialect, key, images, magnitude, forms=FORMS, **constants):
    want, ops = by_hand(dialect, key, images, magnitude, **constants)
    for form in forms:
        out = augmented(form, dialect, key, images, magnitude, **constants)
        for i, names in enumerate(ops):
            share = (out[i] != want[i]).mean()
            assert share <= (0.01 if {*names} & {*GEOMETRIC} else 0), (form, names, share)
    return want, ops


@pytest.mark.parametrize('dialect', ['tf1', pytest.param('garden', marks=pytest.mark.slow)])
def test_a_batch_is_apply_op_composed_by_the_draws_in_every_form(dialect):
    key, images = jax.random.key(5), noise(48, 32, 28, 3)
    images[1::2] = np.sort(images[1::2], 1) // 2 + 40                       # smooth along an axis, and of low contrast
    forms = FORMS if dialect == 'tf1' else ('switch', 'fused')               # select is slow to compile
    want, ops = check_forms(dialect, key, images, 9., forms, **SHARE)
    assert len({*sum(ops, [])}) == _DIALECTS[dialect].choices, 'the key does not draw every operation'
    assert (rand_augment(key, images, magnitude=9., dialect=dialect, **SHARE) == want).all()


@pytest.mark.slow
@every_dialect
@pytest.mark.parametrize('size', [32, 96, 160])
def test_forms_are_equal_at_the_authors_constants(dialect, size):
    images = np.concatenate([noise(24, size, size, 3), np.sort(noise(24, size, size, 3, seed=1), 2)])
    for magnitude in (1, 10, 15, 20):
        check_forms(dialect, jax.random.key(magnitude), images, magnitude, translate=100., cutout=40.)


@pytest.mark.parametrize('dialect, form', [('tf1', 'switch'), ('tf1', 'fused'), ('garden', 'switch')])
def test_prob_leaves_the_same_images_alone_in_every_form(dialect, form):
    key, images = jax.random.key(5), noise(48, 32, 28, 3)
    assert (augmented(form, dialect, key, images, 9., prob=0., **SHARE) == images).all()
    always, some = (augmented(form, dialect, key, images, 9., prob=p, **SHARE) for p in (1, 0.5))
    changed = (some != images).any((1, 2, 3))
    assert (some[changed] == always[changed]).all() and 12 < changed.sum() < 36
    assert (some == rand_augment(key, images, magnitude=9., dialect=dialect, prob=0.5, **SHARE)).all()


def operations_lowered(platform, form=None):
    """How often some operations occur in the program of a batch for a kind of device that need not be here."""
    args = jax.random.key(0), jnp.zeros((4, 32, 28, 3), jnp.uint8), *map(jnp.float32, (10, 1, 14, 6))
    program = _augment.trace(*args, num_layers=2, dialect='tf1', form=form).lower(lowering_platforms=(platform,)).as_text()
    return {name: program.count(f'stablehlo.{name}') for name in ('gather', 'scatter', 'cosine', 'select', 'while')}


def test_accelerators_get_the_fused_form_and_cpus_the_switch():
    programs = {form: operations_lowered('cpu', form) for form in FORMS}
    assert len({tuple(program.values()) for program in programs.values()}) == 3
    assert operations_lowered('cpu') == programs['switch']
    for platform in ('tpu', 'cuda'):
        assert operations_lowered(platform) == operations_lowered(platform, 'fused')


def chi_square(counts):
    counts = np.asarray(counts, float)
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


@pytest.mark.slow
@every_dialect
def test_operations_signs_and_centres_are_uniform(dialect):
    # every possible outcome on one small image is different, so the outputs tell what was drawn; public functions only
    image, m, constants, number = noise(16, 16, 3) // 2 + 60, 6., dict(translate=8., cutout=3.), 3200
    outcome = {image.tobytes(): ('Identity', 1, (0, 0))}
    for op in OPS:
        signs, centres = (1, -1) if op in GEOMETRIC else (1,), np.ndindex(16, 16) if op == 'Cutout' else [(0, 0)]
        for sign in signs:
            for centre in centres:
                outcome[np.asarray(apply_op(op, image, m, sign, dialect, centre, **constants)).tobytes()] = op, sign, centre
    expected = 16 - 6 + 2 * 5 + 256 + 1
    assert len(outcome) == expected, 'two outcomes look the same: choose another image'
    out = np.asarray(rand_augment(jax.random.key(0), np.stack([image] * number), 1, m, dialect, **constants))
    drawn = [outcome[o.tobytes()] for o in out]
    ops = Counter(op for op, _, _ in drawn)
    choices = OPS if dialect == 'tf1' else (*OPS, 'Identity')
    assert {*ops} == {*choices} and chi_square([ops[op] for op in choices]) < 39.3      # 16 degrees of freedom, p = 0.001
    for op in GEOMETRIC:
        signs = [sign for name, sign, _ in drawn if name == op]
        assert abs(np.sum(signs)) < 3.3 * np.sqrt(len(signs)), op
    centres = [centre for op, _, centre in drawn if op == 'Cutout']
    for axis in (0, 1):
        assert chi_square(np.bincount([c[axis] for c in centres], minlength=16)) < 37.7


@pytest.mark.parametrize('choices, bound', [(16, 331), (17, 367)])          # 255 and 288 degrees of freedom, p = 0.001
def test_layers_are_drawn_independently(choices, bound):
    draws = _draws(jax.random.key(1), 5120, num_layers=2, height=9, width=5, prob=1., choices=choices)
    pairs = np.zeros((choices, choices))
    np.add.at(pairs, tuple(np.asarray(draws.op).T), 1)
    assert chi_square(pairs) < bound
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
    images, sweep = noise(48, 32, 28, 3), jax.jit(rand_augment)        # a shape that other tests compile as well
    outs = [sweep(jax.random.key(0), images, magnitude=m, prob=p, translate=t, cutout=c)
            for m, p, t, c in ((5., 1., 100., 40.), (10., .5, 7., 3.), (15., 0., 0., 0.))]
    assert sweep._cache_size() == 1 and (outs[2] == images).all()
    rand_augment(jax.random.key(0), images)
    before = _augment._cache_size()
    for m, p in ((5, 1), (10., 0.5), (np.float32(15), 1.), (jnp.float32(20), np.float64(0.2))):
        rand_augment(jax.random.key(0), images, magnitude=m, prob=p, translate=m)
    assert _augment._cache_size() == before


def test_an_image_depends_on_the_key_its_place_and_itself():
    key, images = jax.random.key(3), noise(48, 32, 28, 3)
    out = np.asarray(rand_augment(key, images, magnitude=6, **SHARE))
    assert (out == rand_augment(key, images, magnitude=6, **SHARE)).all()
    others = images.copy()
    others[1::2] = 255 - others[1::2]
    assert (out[::2] == np.asarray(rand_augment(key, others, magnitude=6, **SHARE))[::2]).all()
    assert (out[:5] == rand_augment(key, images[:5], magnitude=6, **SHARE)).all()
    assert (out != rand_augment(jax.random.key(4), images, magnitude=6, **SHARE)).any()
    same = np.asarray(rand_augment(key, images[:1].repeat(48, 0), magnitude=6, **SHARE))
    assert len({o.tobytes() for o in same}) > 24                            # the place matters
    assert (out == rand_augment(jax.random.PRNGKey(3), images, magnitude=6, **SHARE)).all()  # either kind of key


IMAGE = noise(8, 8, 3)


@pytest.mark.parametrize('wrong, message', [
    (dict(name='Rotat'), "unknown operation 'Rotat'; did you mean 'Rotate'?"),
    (dict(dialect='gardn'), "unknown dialect 'gardn'; did you mean 'garden'?"),
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
