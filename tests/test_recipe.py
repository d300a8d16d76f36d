"""The training recipe against the authors' code: their TF1 release and the TF2 Model Garden, and against timm.

Optimizers, schedules, moving averages, loss, drop rates, what weight decay reaches, and three whole training steps through
`resnet_rs.steps.compiled_step`. The goldens and how they are made: tests/goldens/make_recipe_tf1.py, make_recipe_keras.py and
make_recipe_timm.py; the small problem of the optimizers is in steps.py there. All is in double precision unless it says
otherwise. Where ours is not theirs, the difference is stated and tested. `python -m pytest -s` prints what is measured.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from goldens import recipe, steps
from parity import blank, double, golden  # noqa: F401 (double is a fixture)

from resnet_rs.config import DEPTHS, DIALECTS, Config
from resnet_rs.optim import SCHEDULES, rmsprop, schedule, sgd
from resnet_rs.registry import create_model
from resnet_rs.regularizers import (decay_mask, drop_path_shares, ema_decay, ema_update, smoothed_cross_entropy, weight_norm)
from resnet_rs.steps import Hyper, compiled_step, cross_entropy, initial_state, split
from resnet_rs.weights import export_weights, load_garden, load_tf1, load_timm, names


def off(ours, theirs):
    "Largest difference, of the largest value."
    return recipe.relative_error(np.asarray(ours), theirs)


# Optimizers: 24 steps at changing rates, with L2 on one of two arrays

MASK = {name: 'kernel' in name for name in steps.SHAPES}
RMS = dict(decay=steps.DECAY, epsilon=steps.EPSILON)


def follow(rule, dtype=jnp.float64, **strengths):
    "Weights and optimizer state after each step of the problem; the rate and all strengths are traced."
    @jax.jit
    def run(params, slopes, strengths):
        def body(carry, given):
            params, state = carry
            tx = rule(given[0], weight_decay=given[2], mask=MASK, **strengths)
            updates, state = tx.update(given[1], state, params)
            carry = optax.apply_updates(params, updates), state
            return carry, carry
        count = len(steps.RATES)
        given = jnp.asarray(steps.RATES, dtype), slopes, jnp.full(count, steps.WEIGHT_DECAY, dtype)
        return jax.lax.scan(body, (params, rule(0.0).init(params)), given)[1]
    cast = lambda tree: {name: jnp.asarray(value, dtype) for name, value in tree.items()}
    numbers = {name: jnp.asarray(value, dtype if isinstance(value, float) else None) for name, value in strengths.items()}
    return run(cast(steps.start()), cast(steps.slopes()), numbers)


RULES = {
    'tf1 momentum': (partial(sgd, nesterov=False), {'': 1, '/Momentum': 1}),
    'tf1 nesterov': (sgd, {'': 1, '/Momentum': 1}),
    'tf1 rmsprop': (partial(rmsprop, **RMS), {'': 1, '/RMSProp': 1, '/RMSProp_1': -1}),
    'garden legacy_0': (partial(sgd, nesterov=False, rate_in_velocity=True), {'': 1, '/momentum': -1}),
    'garden legacy_1': (partial(sgd, rate_in_velocity=True), {'': 1, '/momentum': -1}),
    'garden new_0': (partial(sgd, nesterov=False, rate_in_velocity=True), {'': 1}),
    'garden new_1': (partial(sgd, rate_in_velocity=True), {'': 1}),
    'timm momentum': (partial(sgd, nesterov=False), {'': 1}),
    'timm sgd': (sgd, {'': 1}),
    'timm rmsproptf': (partial(rmsprop, **RMS), {'': 1}),
}


def slot(tail, state):
    "The part of our optimizer's state that a slot of TensorFlow's holds."
    if tail == '/RMSProp': return state[0].nu
    return (state if isinstance(state, optax.TraceState) else state[-1]).trace


@pytest.mark.parametrize('name', RULES)
def test_weights_and_slots_after_every_step(name):
    rule, parts = RULES[name]
    peer, run = name.split()
    arrays, (params, state) = golden(f'{peer}_recipe')[0], follow(rule, momentum=steps.MOMENTUM)
    errors = {}
    for tail, sign in parts.items():
        for key in steps.SHAPES:
            ours = sign * (slot(tail, state) if tail else params)[key]
            errors[key + tail] = off(ours, arrays[f'{run}_{key}{tail}'])
    print(f'\n{name}:', ', '.join(f'{key} {error:.0e}' for key, error in errors.items()))
    assert max(errors.values()) < 1e-13


def test_single_precision_and_switches_that_are_traced():
    "The same in float32, with Nesterov and the place of the rate as arguments of one compiled function."
    for name, nesterov, inside in (('tf1 momentum', False, False), ('tf1 nesterov', True, False),
                                   ('garden legacy_0', False, True), ('garden legacy_1', True, True)):
        peer, run = name.split()
        params, state = follow(sgd, jnp.float32, momentum=steps.MOMENTUM, nesterov=nesterov, rate_in_velocity=inside)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {np.dtype('float32')}
        assert all(off(params[key], golden(f'{peer}_recipe')[0][f'{run}_{key}']) < 1e-5 for key in steps.SHAPES)
    params, state = follow(rmsprop, jnp.float32, momentum=steps.MOMENTUM, **RMS)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {np.dtype('float32')}
    assert all(off(params[key], golden('tf1_recipe')[0][f'rmsprop_{key}']) < 1e-5 for key in steps.SHAPES)


def test_where_the_peers_differ():
    "TF1 and PyTorch are one rule, Keras another as soon as the rate changes; today's RMSProp is not TF1's."
    tf1, garden, timm = (golden(f'{peer}_recipe')[0] for peer in ('tf1', 'garden', 'timm'))
    kernel = 'dense/kernel'
    for ours, theirs in (('nesterov', 'sgd'), ('momentum', 'momentum'), ('rmsprop', 'rmsproptf')):
        assert off(timm[f'{theirs}_{kernel}'], tf1[f'{ours}_{kernel}']) < 1e-13
    moved = tf1[f'momentum_{kernel}'][-1] - steps.start()[kernel]
    apart = np.abs(garden[f'legacy_0_{kernel}'] - tf1[f'momentum_{kernel}']).max((1, 2)) / np.abs(moved).max()
    print('\nKeras and TF1, apart by % of the way:', (100 * apart).round(1))
    assert apart[0] == 0 and 0.5 < apart.max() < 1    # step 0 has rate 0: Keras's velocity is empty after it, TF1's is not
    today = lambda rate, weight_decay=0.0, mask=None: optax.chain(    # mean square from 0, epsilon outside the root
        optax.add_decayed_weights(weight_decay, MASK),
        optax.rmsprop(rate, steps.DECAY, steps.EPSILON, eps_in_sqrt=False, momentum=steps.MOMENTUM))
    assert off(follow(today)[0][kernel], tf1[f'rmsprop_{kernel}']) > 0.05


# Moving averages

def averaged(values, start, first=0):
    "Our averages of a sequence of values, the first of which is of the update after step `first`."
    average, out = start, []
    for t, value in enumerate(values, first + 1):
        average = ema_update(average, jnp.asarray(value), ema_decay(jnp.float64(t), jnp.float64(steps.AVERAGE)))
        out.append(average)
    return np.array(out)


@pytest.mark.parametrize('run, first', [('average', 0), ('late', 89_980)])
def test_averages_of_tf1(run, first):
    arrays = golden('tf1_recipe')[0]
    for name, start in steps.start().items():
        ours = averaged(arrays[f'nesterov_{name}'], start, first)
        assert off(ours, arrays[f'{run}_{name}/ExponentialMovingAverage']) < 1e-14


def test_averages_of_the_garden_start_at_zero():
    "The one difference is forgotten with the product of the first decays: after 24 steps a five-millionth of it is left."
    arrays = golden('garden_recipe')[0]
    left = np.cumprod([(1 + t) / (10 + t) for t in range(1, len(steps.RATES) + 1)])
    for name, start in steps.start().items():
        theirs = arrays[f'average_{name}/average']
        assert off(averaged(arrays[f'average_{name}'], np.zeros_like(start)), theirs) < 1e-14
        apart = averaged(arrays[f'average_{name}'], start) - theirs
        np.testing.assert_allclose(apart, left.reshape((-1,) + (1,) * start.ndim) * start, atol=1e-14)
    print(f'\nleft of the start after {len(left)} steps: {left[-1]:.1e}')
    assert 1.9e-7 < left[-1] < 2e-7


def test_decays_are_tf1s_to_the_bit():
    "In single precision, from the first update to beyond the last of a released run."
    arrays = golden('tf1_recipe')[0]
    with jax.enable_x64(False):
        ours = jax.vmap(lambda t: ema_decay(t, jnp.float32(0.9999)))(arrays['single_counts'].astype(np.int32))
    assert ours.dtype == arrays['single_decays'].dtype == np.float32
    np.testing.assert_array_equal(ours, arrays['single_decays'])
    assert ours[0] == np.float32(2 / 11) and len(np.unique(ours)) > 100


# Schedules

def test_cosine_of_the_garden():
    arrays, spec = golden('garden_recipe')
    run, at, truth = spec['run'], arrays['cosine_at'], arrays['cosine_rates']
    ours = schedule('cosine', run['peak'], run['total'], run['warmup'])
    assert ours(at).dtype == np.float64 and off(ours(at), truth) < 1e-14
    with jax.enable_x64(False): single = ours(at.astype(np.int32))
    assert single.dtype == np.float32 and off(single, truth) < 2e-7
    late = (at > run['total'] - 4) & (at < run['total'])  # their 1 + cos loses its digits there, our half-angle form does not
    errors = [np.abs(rates[late] / truth[late] - 1).max() for rates in (np.asarray(single), arrays['cosine_rates_f32'])]
    print(f'\nlast rates in single precision: ours {errors[0]:.1e} off, the Garden\'s {errors[1]:.1e}')
    assert errors[0] < 1e-5 and errors[1] > 0.1


@pytest.mark.parametrize('kind', ['rates', 'rates_f32'])
def test_stairs_of_efficientnet(kind):
    arrays, per_epoch = golden('tf1_recipe')[0], 1_281_167 / 2048
    at, theirs = arrays['efficientnet_at'], arrays[f'efficientnet_{kind}']
    stair = dict(decay_rate=np.float32(0.97), decay_steps=np.float32(2.4 * per_epoch))    # TF1 has them in single precision
    rate = schedule('exponential', 0.128, 218_949, int(5 * per_epoch), **stair)
    with jax.enable_x64(kind == 'rates'): ours = rate(at.astype(np.int32))
    assert ours.dtype == theirs.dtype and off(ours, theirs) < (1e-14 if kind == 'rates' else 1e-6)
    assert len(np.unique(theirs)) > 60 and np.argmax(theirs) == np.flatnonzero(at == 3126)[0]


#: run of resnet_main.py -> steps, steps an epoch
TF1_RUNS = {'exact': (28_080, 312), 'baseline': (28_080, 1_281_167 / 4096), 'released': (109_475, 1_281_167 / 4096)}


def tf1_stairs(run):
    "Steps, their rates, ours (warm-up as in Config.paper), and (warm-up, drops) in steps of theirs and of ours."
    arrays, (total, _) = golden('tf1_recipe')[0], TF1_RUNS[run]
    warmup = total / 312 * 5 / 90 * 312 if run == 'released' else 5 * 312
    ours = schedule('step', 1.6, total, warmup)(arrays[f'step_{run}_at'])
    drops = arrays[f'step_{run}_drops'], np.array([warmup, total / 3, total * 2 / 3, total * 8 / 9])
    return arrays[f'step_{run}_at'], arrays[f'step_{run}_rates'], np.asarray(ours), drops


def test_stairs_of_resnet_main_where_an_epoch_is_a_whole_number_of_steps():
    at, theirs, ours, drops = tf1_stairs('exact')
    assert off(ours, theirs) < 1e-14
    np.testing.assert_allclose(*drops)
    single = golden('tf1_recipe')[0]['step_exact_rates_f32']
    with jax.enable_x64(False): assert off(schedule('step', 1.6, 28_080, 1560)(at.astype(np.int32)), single) < 1e-6


@pytest.mark.parametrize('run, late, share', [('baseline', (-24, -48, -63), 0.005), ('released', (208, 105, 35), 0.004)])
def test_stairs_of_resnet_main_differ_by_its_rounding(run, late, share):
    """They round twice, an epoch to 312 of its 312.8 steps and then a drop to a whole epoch; we do not round.

    Our drops come some steps earlier in the run of 90 epochs and later in the released run; elsewhere the rates are equal."""
    at, theirs, ours, (drops, own) = tf1_stairs(run)
    total, per_epoch = TF1_RUNS[run]
    assert np.array_equal((drops / per_epoch).round(9) % 1, [0, 0, 0, 0])    # theirs are at whole epochs
    print(f'\n{run}: TF1 ends its warm-up and drops at {drops.round(1)}, we at {own.round(1)}')
    np.testing.assert_array_equal(np.ceil(own[1:]) - np.ceil(drops[1:]), late)
    between = np.zeros(len(at), bool)
    for one, other in zip(drops[1:], own[1:]): between |= (at >= min(one, other)) & (at < max(one, other))
    rising = at < max(drops[0], own[0])
    level = ~between & ~rising
    np.testing.assert_allclose(ours[level], theirs[level], rtol=1e-14)
    assert between.any() and (np.abs(ours[between] / theirs[between] - 1) > 0.8).all()
    assert np.abs(np.ceil(own[1:]) - np.ceil(drops[1:])).sum() / total < share    # the share of the run in which they differ
    both = at < min(drops[0], own[0])    # the rise is as steep as its end is early
    np.testing.assert_allclose(ours[both][1:] / theirs[both][1:], drops[0] / own[0], rtol=1e-12)
    equal = schedule('step', 1.6, total, drops[0])(at[rising])    # given their end of the warm-up it is theirs
    np.testing.assert_allclose(equal, theirs[rising], rtol=1e-12)


def test_the_released_warm_up_is_that_of_the_configuration():
    config = Config.paper('resnet_rs_50', dialect='tf1')
    total, warmup = golden('tf1_recipe')[0]['step_released_at'][-1], golden('tf1_recipe')[0]['step_released_drops'][0]
    assert config.schedule == 'step' and total < 109_475
    assert 0 <= config.warmup_epochs * 312 / warmup - 1 < 0.03    # theirs is rounded down to 19 epochs


# Loss

@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.3])
def test_label_smoothed_loss(smoothing):
    (tf1, _), (garden, _) = golden('tf1_recipe'), golden('garden_recipe')
    logits, labels = steps.classified()
    mean = lambda x: smoothed_cross_entropy(x, jnp.asarray(labels), smoothing).mean()
    loss, gradient = jax.value_and_grad(mean)(jnp.asarray(logits))
    assert abs(loss / tf1[f'loss_{smoothing}'] - 1) < 1e-14 and off(gradient, tf1[f'loss_{smoothing}_gradient']) < 1e-13
    assert off(smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing), garden[f'loss_{smoothing}']) < 1e-14


# Drop rates

@pytest.mark.parametrize('peer, depth', [('tf1', d) for d in (50, 101, 152, 200, 270, 350, 420)]
                         + [('garden', d) for d in (50, 101, 152, 200)])
def test_drop_rates_of_every_block(peer, depth):
    theirs = golden(f'{peer}_recipe')[0][f'drop_{depth}']
    ours = [0.1 * share for stage in drop_path_shares(DEPTHS[depth], DIALECTS[peer].drop_path_by) for share in stage]
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    np.testing.assert_allclose(np.unique(theirs.round(12)), [0.04, 0.06, 0.08, 0.1])    # one a stage


def test_drop_rates_of_efficientnet():
    model = nnx.eval_shape(lambda: create_model('efficientnet_b0', dialect='tf1', rngs=nnx.Rngs(0)))
    ours = [0.2 * block.drop_share for stage in model.stages for block in stage if block.skip]
    np.testing.assert_allclose(ours, golden('tf1_recipe')[0]['drop_efficientnet_b0'], rtol=1e-12)


# What weight decay reaches

VALUE = '/.ATTRIBUTES/VARIABLE_VALUE'


def garden_name(name):
    "What `model.save_weights` calls a variable of the Garden's checkpoints."
    return name.removesuffix(VALUE).removeprefix('model/').replace('backbone/', 'layer_with_weights-0/')


@pytest.mark.parametrize('peer, dialect, network', [
    ('tf1', 'tf1', 'resnet_rs_50'), ('tf1', 'paper', 'resnet_rs_50'), ('tf1', 'tf1', 'efficientnet_b0'),
    ('garden', 'garden', 'resnet_rs_50'), ('garden', 'garden', 'resnet_50'), ('garden', 'garden', 'resnet3d_rs_50'),
    ('timm', 'timm', 'resnet_rs_50'), ('timm', 'timm', 'efficientnet_b0')])
def test_what_weight_decay_reaches(peer, dialect, network):
    spec = golden(f'{peer}_recipe')[1]
    model = nnx.eval_shape(lambda: create_model(network, dialect=dialect, rngs=nnx.Rngs(0)))
    found, trained = names(model, peer), split(model)[0].names[0]
    called = lambda paths: {garden_name(found[path].name) for path in paths}
    wanted = lambda what: {name.removeprefix('efficientnet-b0/') for name in spec[what][network]}
    assert called(trained) == wanted('trained') > wanted('decayed')
    assert called(name for name, decays in decay_mask(trained, dialect).items() if decays) == wanted('decayed')


def test_biases_are_where_the_dialects_differ():
    tf1, garden = (golden(f'{peer}_recipe')[1] for peer in ('tf1', 'garden'))
    biases = [name for name in tf1['decayed']['resnet_rs_50'] if not name.endswith('kernel')]
    assert len(biases) == 33 == len(tf1['decayed']['resnet_rs_50']) - len(garden['decayed']['resnet_rs_50'])
    assert all(name.endswith('bias') for name in biases)    # two of each squeeze-and-excite, and the classifier's


# Whole steps

def start_of(spec, load, dialect, optimizer=None):
    "Network and state before the first step, with the weights of a golden."
    name, shape = ('resnet_rs_50', dict(blocks=tuple(spec['blocks']))) if 'blocks' in spec else \
        ('efficientnet_b0', dict(depth_factor=spec['depth_factor']))
    model = blank(name, num_classes=spec['classes'], dialect=dialect, **shape)
    load(model, recipe.state(spec))
    network, *arrays = split(model)
    return network, initial_state(*arrays, optimizer)._replace(step=jnp.int32(spec.get('first_step', 0)))


def train(spec, network, state, hyper, dialect, count=3, optimizer=None):
    "Losses of `count` steps, and the state after them."
    hyper = Hyper(*(np.asarray(value, np.int32 if name in ('total_steps', 'warmup_steps', 'schedule') else np.float64)
                    for name, value in hyper._asdict().items()))
    step = compiled_step(network, cross_entropy, dialect, optimizer)
    images, labels = recipe.images(spec).astype(np.float64), np.asarray(steps.labels(spec))
    losses = []
    for _ in range(count):
        state, loss = step(state, images, labels, hyper, jax.random.key(0))
        losses.append(float(loss))
    return losses, state


def warming_up(spec, kind):
    "The constants of the authors' trainers."
    return Hyper(spec['peak'], spec['total_steps'], spec['warmup_steps'], SCHEDULES.index(kind), steps.MOMENTUM,
                 spec['weight_decay'], spec['smoothing'], ema_decay=steps.AVERAGE, bn_momentum=0.0)


def theirs(network, state, source):
    "{variable of the authors' program: its value}, averages and the optimizer's slots among them."
    average = dict(tf1='/ExponentialMovingAverage', garden='/average')[source]
    trees = {'': (state.params, state.stats), average: (state.ema_params, state.ema_stats)}
    slots = {'/Momentum': 1} if source == 'tf1' else {'/momentum': -1}
    if len(state.velocity) > 1: slots = {'/RMSProp': 1, '/RMSProp_1': -1}
    for tail, sign in slots.items(): trees[tail] = {n: sign * v for n, v in slot(tail, state.velocity).items()}, state.stats
    return {garden_name(name) + tail: x for tail, tree in trees.items()
            for name, x in export_weights(network.rebuild(*tree), source).items() if tail not in slots or 'moving_' not in name}


def timm_hyper(spec):
    return Hyper(spec['peak'], spec['total_steps'], 0, SCHEDULES.index('cosine'), 0.9, spec['weight_decay'], spec['smoothing'],
                 ema_decay=spec['average'], bn_momentum=0.9)


def distances(found, truth, order):
    """Largest difference of each array's fingerprint, in root mean squares of the array.

    One below a millionth holds rounding errors alone: the velocity of a batch norm's shift that the next one takes away."""
    ours = np.stack([steps.fingerprint(name, found[name]) for name in order])
    return (np.abs(ours - truth) / truth[:, :1].clip(1e-6)).max(1)


@pytest.fixture(scope='module')
def small(double):  # noqa: F811 (pytest's way to ask for it)
    "(golden, spec, network, state before the first step as NumPy arrays): a network of one block a stage, compiled once."
    arrays, spec = golden('tf1_steps_small')
    network, state = start_of(spec, partial(load_tf1, ema=False), 'tf1')
    return arrays, spec, network, jax.tree.map(np.asarray, state)    # a step takes the arrays of the state it is given


def against(source, hyper, arrays, spec, network, state, optimizer=None):
    "Three steps of the authors' trainer: losses, and all that it keeps. {name: how far it is off} of moving variances."
    penalty = 0.5 * spec['weight_decay'] * float(weight_norm(state.params, source))**2
    losses, state = train(spec, network, state, hyper, source, optimizer=optimizer)
    scope, order = 'efficientnet-b0/' if optimizer else '', spec['variables']
    found = {scope + name: x for name, x in theirs(network, state, source).items()}
    assert set(found) == set(order)
    away = dict(zip(order, distances(found, arrays['fingerprints'], order)))
    variances = {name: away.pop(name) for name in order if optimizer and 'moving_variance' in name}
    averages = [away.pop(name) for name in [*away] if name.lower().endswith('average')]
    errors = dict(loss=off(losses, arrays['loss']), total=abs((losses[0] + penalty) / arrays['total'][0] - 1),
                  state=max(away.values()), averages=max(averages))
    print(f'\n{source}: losses {np.round(losses, 4)};', ', '.join(f'{what} {error:.1e} off' for what, error in errors.items()))
    assert errors.pop('averages') < 1e-7    # the decay of a step is a number of single precision here, as in TensorFlow
    assert errors['loss'] < 1e-11 and max(errors.values()) < 1e-8, errors
    return variances


def test_three_steps_of_the_authors_tf1_trainer(small):
    *rest, state = small
    against('tf1', warming_up(small[1], 'step'), *rest, jax.tree.map(jnp.array, state))


@pytest.mark.slow
def test_three_steps_of_the_authors_tf1_trainer_on_resnet_rs_50():
    arrays, spec = golden('tf1_steps_50')
    against('tf1', warming_up(spec, 'step'), arrays, spec, *start_of(spec, partial(load_tf1, ema=False), 'tf1'))


@pytest.mark.slow
def test_three_steps_of_the_authors_efficientnet_trainer():
    "RMSProp, the stairs, and its batch norm: the one thing that differs is the moving variance, theirs the biased one."
    arrays, spec = golden('tf1_steps_efficientnet')
    keep = 1 - float(np.float32(1 - 0.99))    # TF1 has the constant in single precision
    hyper = warming_up(spec, 'exponential')._replace(bn_momentum=keep, rms_decay=steps.DECAY, rms_epsilon=steps.EPSILON,
                                                     lr_decay_factor=spec['decay_rate'], lr_decay_steps=spec['decay_steps'])
    start = start_of(spec, partial(load_tf1, ema=False), 'tf1', 'rmsprop')
    variances = against('tf1', hyper, arrays, spec, *start, 'rmsprop')
    print(f'moving variances: up to {max(variances.values()):.1e} off')
    assert 1e-6 < max(variances.values()) < 3 * 0.01 * 0.1    # three times a hundredth of a few per cent


@pytest.mark.slow
def test_three_steps_of_the_model_garden():
    "Keras's momentum, L2 on kernels alone, averages from zero."
    arrays, spec = golden('garden_steps_small')
    load = lambda model, values: load_garden(model, {f'model/{name}{VALUE}': value for name, value in values.items()})
    network, state = start_of(spec, load, 'garden')
    zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    state = state._replace(ema_params=zero(state.ema_params), ema_stats=zero(state.ema_stats))
    against('garden', warming_up(spec, 'cosine'), arrays, spec, network, state)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['timm_steps_small', 'timm_steps'])
def test_three_steps_of_timm(name):
    arrays, spec = golden(name)
    network, state = start_of(spec, load_timm, 'timm')
    losses, state = train(spec, network, state, timm_hyper(spec), 'timm')
    order, found = [e['name'] for e in spec['params']], export_weights(network.rebuild(state.params, state.stats))
    averages = export_weights(network.rebuild(state.ema_params, state.ema_stats))
    rates = schedule('cosine', spec['peak'], spec['total_steps'])(np.arange(3))
    errors = dict(loss=off(losses, arrays['loss']), rates=off(rates, arrays['rates']),
                  state=distances(found, arrays['fingerprints'], order).max(),
                  averages=distances(averages, arrays['averages'], order).max())
    print(f'\n{name}: losses {np.round(losses, 4)};', ', '.join(f'{what} {error:.1e} off' for what, error in errors.items()))
    assert errors['loss'] < 1e-11 and max(errors.values()) < 1e-8, errors


def test_a_part_in_a_million_of_any_strength_is_noticed(small):
    "And another number of the step. The executable is that of the test above."
    arrays, spec, network, state = small
    little = {e['name'] for e in spec['params'] if np.prod(e['shape']) < 4e4}
    some = [i for i, name in enumerate(spec['variables']) if name.removesuffix('/Momentum') in little]
    hyper, errors = warming_up(spec, 'step'), {}
    changes = {name: getattr(hyper, name) * (1 + 1e-6) for name in ('peak_lr', 'momentum', 'weight_decay', 'label_smoothing')}
    for name, value in (changes | {'bn_momentum': 1e-6, 'step': 2}).items():
        begin = jax.tree.map(jnp.array, state)
        if name == 'step': after = train(spec, network, begin._replace(step=jnp.int32(value)), hyper, 'tf1')[1]
        else: after = train(spec, network, begin, hyper._replace(**{name: value}), 'tf1')[1]
        found, order = theirs(network, after, 'tf1'), [spec['variables'][i] for i in some]
        errors[name] = distances(found, arrays['fingerprints'][some], order).max()
    print('\n' + ', '.join(f'{what} {error:.1e}' for what, error in errors.items()))
    assert min(errors.values()) > 1e-8
