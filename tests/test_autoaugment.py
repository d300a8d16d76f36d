"""AutoAugment against golden outputs of the authors' two codes, its frequencies, and what training makes of it.

The goldens and their recipe: tests/goldens/make_autoaugment_tf1.py and make_autoaugment_garden.py. They hold everything that can
happen to an image, with the authors' chance pinned: each sub-policy, each step applied or not, just above and just below its
probability, in either direction. Outputs are compared by CRC, and equal those of TensorFlow with its graph optimizer on or off,
which differ in a few pixels of a few rows; where AutoContrast was applied, which truncates rounded floats, one level on 2% of the
values is allowed, should a machine round otherwise (on x86 none differs).
"""
import inspect
import json
import zlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_autoaugment_tf1 as make
from goldens import recipe
from goldens.make_randaugment_tf1 import COMMIT, SIGNED, draw
from scipy.stats import chi2

from resnet_rs.autoaugment import POLICY, _augment, _chosen, _draws, auto_augment
from resnet_rs.config import Config, scaled
from resnet_rs.effective import effective
from resnet_rs.image_ops import OPS, _arguments, apply_op
from resnet_rs.randaugment import _carry_out, rand_augment

DIALECTS = ('tf1', 'garden')
NAMES = {name for steps in POLICY for name, _, _ in steps}
SHARE = dict(translate_px=250 / 7, cutout_px=100 / 7)
FORMS = ('switch', 'select', 'fused')
CPU = (('tf1', 'switch'), ('tf1', 'fused'), ('garden', 'switch'))       # the others are slow to compile
ELSEWHERE = (('tf1', 'select'), ('garden', 'select'), ('garden', 'fused'))
every_dialect = pytest.mark.parametrize('dialect', DIALECTS)


@cache
def golden(dialect):
    path = Path(__file__).parent / 'goldens' / f'autoaugment_{dialect}.npz'
    return recipe.load_arrays(path) | {'spec': recipe.load_spec(path)}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- the authors ---------------------------------------------------------------------------------------------------------------

@every_dialect
def test_the_table_and_the_constants_are_the_authors(dialect):
    spec = golden(dialect)['spec']
    assert json.loads(json.dumps(POLICY)) == spec['policy'] and len(POLICY) == 25
    ours = {name: p.default for name, p in inspect.signature(auto_augment).parameters.items()}
    assert spec['constants'] == dict(cutout_const=ours['cutout_px'], translate_const=ours['translate_px'])
    assert (COMMIT if dialect == 'tf1' else 'tf-models-official 2.20.0') in spec['source']
    assert ours['policy'] is POLICY and ours['dialect'] == 'tf1'


@every_dialect
def test_the_golden_file_holds_everything_that_can_happen(dialect):
    known = golden(dialect)
    spec, seen = known['spec'], set()
    assert spec['rows'] == make.rows(POLICY) and len(spec['rows']) == 111
    for row in spec['rows']:
        applied = tuple(u + p >= 1 for u, (_, p, _) in zip(row['u'], POLICY[row['sub']], strict=True))
        seen.add((row['sub'], applied, tuple(row['sign'])))
    ways = [(i, (a, b)) for i, ((_, p, _), (_, q, _)) in enumerate(POLICY)
            for a in {p > 0, p == 1} for b in {q > 0, q == 1}]               # applied or not, where both can be
    assert {(i, applied) for i, applied, _ in seen} == {*ways} and len(seen) == 111
    for i, applied, sign in seen:
        for j, (name, _, _) in enumerate(POLICY[i]):
            if name in SIGNED and applied[j]: assert (i, applied, (*sign[:j], -sign[j], *sign[j + 1:])) in seen
    for name in make.SMALL + make.LARGE:
        assert zlib.crc32(draw(name).tobytes()) == spec['inputs'][name], 'the recipe draws another image'
        both = known['crc_' + name], known['plain_' + name]
        assert len(both[0]) == len(both[1]) == 111 and len(set(both[0])) > 60
        rows = [spec['rows'][i] for i in np.flatnonzero(both[0] != both[1])]
        assert len(rows) == spec['optimized'][name][0] <= 3
        for row in rows:                                                    # the optimizer reaches nothing else
            last, p, _ = POLICY[row['sub']][1]
            assert last in ('AutoContrast', 'Rotate') and row['u'][1] + p >= 1
    for name in make.SMALL:
        for i, out in zip(spec['full'], known['full_' + name], strict=True):
            assert zlib.crc32(out.tobytes()) == known['crc_' + name][i]


@cache
def everything(dialect, form):
    "A program of all rows on one image, from the numbers that the authors' chance was pinned to."
    rows = golden(dialect)['spec']['rows']
    image, layers, sign = (np.array([row[key] for row in rows], np.float32) for key in ('sub', 'u', 'sign'))
    numbers = (image + 0.5) / 25, layers, sign, np.zeros((len(rows), 2, 2), np.int32)

    @jax.jit
    def run(image):
        draws = jax.vmap(lambda *row: _chosen(POLICY, *row))(*numbers)
        images = jnp.broadcast_to(image, (len(rows), *image.shape))
        return _carry_out(draws, images, lambda d: _arguments(d.level, 250., 100., d.sign, d.centre), dialect, form, NAMES)
    return run


def check(dialect, form, name):
    known, wrong = golden(dialect), []
    spec, image = known['spec'], draw(name)
    for i, out in enumerate(np.asarray(everything(dialect, form)(image))):
        if zlib.crc32(out.tobytes()) in (known['crc_' + name][i], known['plain_' + name][i]): continue
        row, allowed = spec['rows'][i], False
        if i in spec['full'] and name in make.SMALL:
            distance = np.abs(out.astype(int) - known['full_' + name][spec['full'].index(i)])
            allowed = distance.max() <= 1 and (distance > 0).mean() <= 0.02
        if not allowed: wrong.append((row, POLICY[row['sub']]))
    assert not wrong, f'{len(wrong)} of {i + 1} rows differ from the authors, the first: {wrong[:3]}'


@pytest.mark.parametrize('dialect, form', CPU)
@pytest.mark.parametrize('name', make.SMALL)
def test_equal_to_the_authors(dialect, form, name):
    check(dialect, form, name)


@pytest.mark.parametrize('dialect', ['tf1', pytest.param('garden', marks=pytest.mark.slow)])
def test_equal_to_the_authors_on_an_image_that_the_translation_does_not_empty(dialect):
    check(dialect, 'switch', *make.LARGE)


@pytest.mark.slow
@pytest.mark.parametrize('dialect, form', ELSEWHERE)
@pytest.mark.parametrize('name', make.SMALL)
def test_equal_to_the_authors_in_the_other_forms(dialect, form, name):
    check(dialect, form, name)


# --- chance --------------------------------------------------------------------------------------------------------------------

def chi_square(counts, expected):
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return float(((counts - expected) ** 2 / expected).sum())


def probe(number):
    "A policy whose sub-policies and steps can be told from the draws: the levels number them."
    return tuple((('Rotate', p, 10 * i / number), ('ShearX', q, 10 * i / number))
                 for i, ((_, p, _), (_, q, _)) in enumerate(POLICY[:number]))


def test_sub_policies_and_steps_are_as_frequent_as_the_table_says():
    number = 100_000
    draws = _draws(jax.random.key(7), number, probe(25), 9, 5)
    level, op, sign, centre = (np.asarray(a) for a in (draws.level, draws.op, draws.sign, draws.centre))
    which = np.rint(level[:, 0] * 2.5).astype(int)
    assert (level[:, 0] == level[:, 1]).all()
    assert chi_square(np.bincount(which, minlength=25), [number / 25] * 25) < 51.2        # 24 degrees of freedom, p = 0.001
    applied = op != len(OPS)
    counts, expected = [], []
    for i, ((_, p, _), (_, q, _)) in enumerate(POLICY):
        mine, total = applied[which == i], (which == i).sum()
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            chance = (p if a else 1 - p) * (q if b else 1 - q)
            seen = ((mine[:, 0] == a) & (mine[:, 1] == b)).sum()
            if chance < 1e-9: assert seen == 0, (i, a, b)
            else: counts.append(seen), expected.append(total * chance)
    assert min(expected) > 50
    free = len(counts) - 25                                                               # given how often each was drawn
    assert chi_square(counts, expected) < chi2.isf(0.001, free), 'both steps together'
    for j in range(2): assert abs(sign[:, j].sum()) < 3.3 * np.sqrt(number)
    assert chi_square(np.bincount(centre[:, 0, 0], minlength=9), [number / 9] * 9) < 26.2
    assert centre.min() == 0 and (centre.max((0, 1)) == (8, 4)).all()


def test_what_an_image_gets_is_what_the_table_says_by_the_outputs_alone():
    "Public functions only: each sub-policy leaves its own pictures, and as often as its probabilities say."
    image, number, first = noise(16, 16, 3) // 2 + 60, 2000, POLICY[3]
    out = np.asarray(auto_augment(jax.random.key(1), np.stack([image] * number), policy=(first,), **SHARE))
    (one, p, at), (two, q, then) = first
    solarized, equalized = (np.asarray(apply_op(name, image, level)) for name, level in ((one, at), (two, then)))
    outcomes = {image.tobytes(): (1 - p) * (1 - q), solarized.tobytes(): p * (1 - q), equalized.tobytes(): (1 - p) * q,
                np.asarray(apply_op(two, solarized, then)).tobytes(): p * q}
    assert len(outcomes) == 4
    seen = [sum(o.tobytes() == known for o in out) for known in outcomes]
    assert sum(seen) == number and chi_square(seen, [number * share for share in outcomes.values()]) < 16.3


# --- a batch -------------------------------------------------------------------------------------------------------------------

BATCH = noise(96, 32, 28, 3, seed=3)
BATCH[1::2] = np.sort(BATCH[1::2], 1) // 2 + 40                       # smooth along an axis, and of low contrast


def by_hand(key, images, dialect):
    """(outputs of apply_op composed by the draws, which operations each image got)"""
    draws = map(np.asarray, _draws(key, len(images), POLICY, *images.shape[1:3]))
    outs, ops = [], []
    for image, *steps in zip(images, *draws, strict=True):
        ops.append([])
        for op, sign, centre, level in zip(*steps, strict=True):
            if op == len(OPS): continue
            ops[-1].append(OPS[op])
            image = apply_op(OPS[op], image, level, sign, dialect, centre, SHARE['translate_px'], SHARE['cutout_px'])
        outs.append(np.asarray(image))
    return outs, ops


@pytest.mark.parametrize('dialect, forms', [('tf1', ('switch', 'fused')), pytest.param('garden', FORMS, marks=pytest.mark.slow)])
def test_a_batch_is_apply_op_composed_by_the_draws(dialect, forms):
    key = jax.random.key(4)
    want, ops = by_hand(key, BATCH, dialect)
    assert {*sum(ops, [])} == NAMES, 'the key does not draw every operation'
    for form in forms:
        out = np.asarray(_augment(key, BATCH, *map(jnp.float32, SHARE.values()), policy=POLICY, dialect=dialect, form=form))
        for i, names in enumerate(ops):
            share = (out[i] != want[i]).mean()
            assert share <= (0.01 if {*names} & {*SIGNED} else 0), (form, names, share)


def test_compiled_is_eager_and_a_part_is_that_part_of_the_whole():
    key = jax.random.key(5)
    out = np.asarray(auto_augment(key, BATCH, **SHARE))
    jitted = jax.jit(auto_augment)
    for first in (0, 24, 72): assert (jitted(key, BATCH[first:first + 24], first=first, **SHARE) == out[first:first + 24]).all()
    assert jitted._cache_size() == 1                                                      # `first` is traced
    with jax.disable_jit(): eager = np.stack(by_hand(key, BATCH[:3], 'tf1')[0])
    assert (eager != out[:3]).mean() <= 0.01
    others = BATCH.copy()
    others[1::2] = 255 - others[1::2]
    assert (np.asarray(auto_augment(key, others, **SHARE))[::2] == out[::2]).all()         # nor do the images around it matter
    assert (out != auto_augment(jax.random.key(6), BATCH, **SHARE)).any()
    assert (out == auto_augment(jax.random.PRNGKey(5), BATCH, **SHARE)).all()              # either kind of key


def test_the_constants_are_traced_and_cutout_has_its_own():
    policy = ((('Cutout', 1.0, 5), ('TranslateX', 1.0, 10)),)
    black = np.zeros((1, 40, 40, 3), np.uint8)
    sweep = jax.jit(lambda translate, cutout: auto_augment(jax.random.key(0), black, translate, cutout, policy=policy))
    assert (sweep(0., 0.) == 0).all() and (sweep(0., 200.) == 128).all() and (sweep(40., 0.) == 128).all()
    hole = np.asarray(sweep(0., 8.))[0, ..., 0] == 128                                     # half a side of 8 at level 10: 4 at 5
    assert hole.any(0).sum() <= 8 and hole.sum() == hole.any(0).sum() * hole.any(1).sum() > 0
    assert (np.asarray(sweep(10., 0.))[0, ..., 0] == 128).sum() == 10 * 40 and sweep._cache_size() == 1


def test_accelerators_get_the_fused_form_without_what_the_policy_lacks():
    def lowered(platform, form=None):
        args = jax.random.key(0), jnp.zeros((4, 32, 28, 3), jnp.uint8), jnp.float32(35), jnp.float32(14)
        program = _augment.trace(*args, policy=POLICY, dialect='tf1', form=form).lower(lowering_platforms=(platform,)).as_text()
        return {name: program.count(f'stablehlo.{name}') for name in ('gather', 'scatter', 'cosine', 'select', 'while', 'pad')}
    programs = {form: lowered('cpu', form) for form in FORMS}
    assert len({tuple(program.values()) for program in programs.values()}) == 3
    assert lowered('cpu') == programs['switch']
    for platform in ('tpu', 'cuda'): assert lowered(platform) == lowered(platform, 'fused')


IMAGE = noise(1, 8, 8, 3)


@pytest.mark.parametrize('wrong, message', [
    (dict(dialect='gardn'), "unknown dialect 'gardn'; did you mean 'garden'?"),
    (dict(images=IMAGE / 255), r'images must be uint8\[N,H,W,3\]'),
    (dict(images=IMAGE[0]), r'images must be uint8\[N,H,W,3\]'),
    (dict(translate_px=-1), 'translate_px must be a number from 0 to inf, got -1'),
    (dict(cutout_px=float('nan')), 'cutout_px must be'),
    (dict(policy=((('Rotat', 1.0, 1),),)), "unknown operation 'Rotat'; did you mean 'Rotate'?"),
    (dict(policy=((('Rotate', 1.5, 1),),)), 'the probability of Rotate must be a number from 0 to 1, got 1.5'),
    (dict(policy=((('Rotate', 1.0, 11),),)), 'the level of Rotate must be a number from 0 to 10, got 11'),
    (dict(policy=((('Rotate', 1.0, 1),), ())), 'as many steps each'),
    (dict(policy=()), 'as many steps each')])
def test_what_is_wrong_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error: auto_augment(**(dict(key=jax.random.key(0), images=IMAGE) | wrong))
    assert '\n' not in str(error.value)


# --- in training ---------------------------------------------------------------------------------------------------------------

def test_a_run_takes_it_in_the_place_of_randaugment():
    from resnet_rs.datasets import image_set
    from resnet_rs.images import normalise, random_flip
    from resnet_rs.runs import augmentation, fit_options, hyper_of
    config = scaled(Config.paper('efficientnet_b0'), 'smoke')
    info = image_set(config.dataset)
    values = effective(config, 'smoke', 40)
    assert (values.translate_px, values.cutout_px) == (250 / 8, 100 / 8) and values.randaug_prob == 0
    chosen = fit_options(config, info)['augment']
    assert chosen is augmentation(config.dataset, 2, 'paper', 'autoaugment') is not augmentation(config.dataset, 2, 'paper')
    key, images = jax.random.key(2), BATCH
    flip_key, ops_key = jax.random.split(key)
    flipped = random_flip(flip_key, images, 0.5 if info.flip else 0.0, 0)
    want = normalise(auto_augment(ops_key, flipped, values.translate_px, values.cutout_px), info.mean, info.std)
    assert (chosen(key, images, hyper_of(values)) == want).all()
    part = chosen(key, np.roll(images, -8, 0), hyper_of(values), 8)
    assert (part[:-8] == want[8:]).all()
    plain = fit_options(config.replace(augmentation=None, randaug_prob=1.0), info)['augment']
    drawn = rand_augment(ops_key, flipped, 2, values.randaug_magnitude, translate=values.translate_px, cutout=values.cutout_px)
    hyper = hyper_of(values)._replace(randaug_prob=1.0)
    assert (plain(key, images, hyper) == normalise(drawn, info.mean, info.std)).all()


def test_one_compiled_step_for_each_augmentation(tmp_path):
    from resnet_rs.experiment import Experiment, _architecture
    rows = {name: scaled(Config.paper('efficientnet_b0').replace(**how), 'smoke')
            for name, how in (('learned', {}), ('drawn', dict(augmentation=None, randaug_prob=1.0)))}
    learned, drawn = Experiment('try', rows, scale='smoke', seeds=1, results_dir=tmp_path).runs
    assert _architecture(learned) != _architecture(drawn)


@pytest.mark.slow
def test_an_efficientnet_trains_with_it(tmp_path):
    from resnet_rs.experiment import Experiment, run
    released = scaled(Config.paper('efficientnet_b0'), 'smoke')
    rows = {'learned': released, 'none': released.replace(augmentation=None)}
    records = run(Experiment('try', rows, scale='smoke', seeds=1, results_dir=tmp_path))
    assert [r['status'] for r in records] == ['done', 'done']
    assert [r['config']['augmentation'] for r in records] == ['autoaugment', None]
    assert records[0]['effective']['translate_px'] == 31.25
    assert records[0]['weights_sha256'] != records[1]['weights_sha256'], 'the augmentation was not used'
