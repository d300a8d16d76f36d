"""Our networks in timm's dialect against golden outputs of timm itself, and one training step.

The goldens and how they are made: tests/goldens/make_timm.py; weights and images are drawn from names (tests/goldens/recipe.py).
Double precision must agree to 1e-9, the training step to 1e-8; in single precision our distance from the double-precision truth
may be three times timm's own. `python -m pytest -s` prints what is measured.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import recipe
from parity import GOLDENS, blank, compare, double, golden, networks, run  # noqa: F401 (double is a fixture)

from resnet_rs.registry import create_model
from resnet_rs.regularizers import smoothed_cross_entropy
from resnet_rs.weights import load_timm

FAST = ('resnetrs50_128', 'resnetrs50_75', 'resnetrs101_96', 'resnet50_75')
EVERY = [name.removeprefix('timm_') for name in networks('timm')]
OPTIONS = {'resnet50d': dict(stem='deep', shortcut='avg')}  # where no name of ours says it


def empty(timm_name, dtype=jnp.float64, **options):
    "Our network of that name, every value of it NaN, so that none can be forgotten."
    family = 'efficientnet' if 'efficientnet' in timm_name else 'resnet_rs' if 'rs' in timm_name[3:] else 'resnet'
    number = timm_name.rpartition('_')[2] if family == 'efficientnet' else ''.join(filter(str.isdigit, timm_name))
    options = dict(dialect='timm') | OPTIONS.get(timm_name, {}) | options
    return blank(f'{family}_{number}', dtype, **options)


def loaded(spec, dtype=jnp.float64, **options):
    "The network of a golden with the weights of its recipe, for inference."
    model = empty(spec['model'], dtype, **options)
    load_timm(model, recipe.state(spec))
    model.eval()
    return model


@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in EVERY])
def test_logits_and_stages(name):
    compare(f'timm_{name}', lambda dtype: loaded(golden(f'timm_{name}')[1], dtype))


def test_goldens_cover_the_networks_of_the_paper():
    depths = (50, 101, 152, 200, 270, 350, 420)
    assert {name.split('_')[0] for name in EVERY} >= {f'resnetrs{depth}' for depth in depths} | {'resnet50', 'resnet50d'}
    assert {name.rpartition('_')[0] for name in EVERY} >= {f'tf_efficientnet_b{i}' for i in range(8)}
    assert set(FAST) <= set(EVERY)


# Each of our values has one place among timm's

def numbered(params):
    "{timm's name: float64 array} that counts all values from 0."
    sizes = [int(np.prod(e['shape'])) for e in params]
    counts = np.split(np.arange(sum(sizes), dtype=np.float64), np.cumsum(sizes)[:-1])
    return {e['name']: count.reshape(e['shape']) for e, count in zip(params, counts)}


def places(model, params):
    "Where each of our values is among timm's, by that count: {path: indices}, in the shapes of our arrays."
    load_timm(model, numbered(params))
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return {path: np.asarray(leaf[...]).astype(int) for path, leaf in nnx.to_flat_state(state)}


def in_timms_layout(params, where, tree):
    "{timm's name: values} of a tree of ours; NaN where it has none."
    flat = np.full(sum(int(np.prod(e['shape'])) for e in params), np.nan)
    for path, leaf in nnx.to_flat_state(tree): flat[where[path].ravel()] = np.asarray(leaf[...]).ravel()
    return {name: flat[count.astype(int)] for name, count in numbered(params).items()}


@pytest.mark.parametrize('name', ['resnetrs50_75', 'resnet50_75', 'tf_efficientnet_b0_75'])
def test_every_value_has_its_own_place(name):
    params = golden(f'timm_{name}')[1]['params']
    where = places(empty(name.rpartition('_')[0]), params)
    times = np.bincount(np.concatenate([indices.ravel() for indices in where.values()]))
    np.testing.assert_array_equal(times, np.ones(sum(int(np.prod(e['shape'])) for e in params)))


# One step of training

@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.float64, jnp.float32])
def test_training_step(dtype):
    arrays, spec = golden('timm_training')
    model = empty(spec['model'], dtype)
    load_timm(model, recipe.state(spec))
    graph, *state = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(params, stats, images, labels):
        def loss(params):
            model = nnx.merge(graph, params, stats, copy=True)
            logits = model(images)
            return smoothed_cross_entropy(logits, labels, spec['smoothing']).mean(), (logits, nnx.state(model, nnx.BatchStat))
        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (logits, stats)), gradients = step(*state, recipe.images(spec).astype(dtype), np.array(spec['labels']))
    where = places(empty(spec['model']), spec['params'])
    errors, timms = {}, {}  # timm's in single precision; not of gradients, see make_timm.py
    for what, tree in (('gradients', gradients), ('statistics', stats)):
        ours = np.stack([fingerprint(name, x) for name, x in in_timms_layout(spec['params'], where, tree).items()
                         if ('running' in name) == (what == 'statistics')])
        truth = arrays[f'{what}_f64']
        errors[what] = (np.abs(ours - truth) / truth[:, :1]).max()  # in root mean squares of each parameter
        if what == 'statistics': timms[what] = (np.abs(arrays[f'{what}_f32'] - truth) / truth[:, :1]).max()
    errors['logits'] = recipe.relative_error(recipe.samples('logits', logits), arrays['logits_f64'])
    errors['loss'] = recipe.relative_error(loss, arrays['loss_f64'])
    timms['logits'] = recipe.relative_error(arrays['logits_f32'], arrays['logits_f64'])
    print(f'\ntraining step in {np.dtype(dtype)}:', ', '.join(f'{what} {error:.1e}' for what, error in errors.items()))
    print('timm in single:', ', '.join(f'{what} {error:.1e}' for what, error in timms.items()))
    assert np.isfinite(list(errors.values())).all()
    if dtype == jnp.float64: assert max(errors.values()) < 1e-8
    else: assert all(errors[what] <= 3 * timms[what] for what in timms)


def fingerprint(name, x):
    "[7]: what make_timm.py keeps of a gradient or a statistic."
    return np.concatenate([[np.sqrt((x**2).mean())], recipe.projections(name, x, 2), recipe.samples(name, x, 4)])


# Where timm and the others differ

@pytest.mark.parametrize('name, dialect, low, high', [
    ('resnetrs50_75', 'tf1', 0, 1e-9),  # one geometry
    ('resnetrs50_128', 'garden', 0.1, 0.4),  # SAME padding of strided convolutions, pool in the first shortcut
    ('resnet50_75', 'paper', 0.01, 0.4),  # SAME padding of the max pool
])
def test_other_dialects_give_other_logits(name, dialect, low, high):
    arrays, spec = golden(f'timm_{name}')
    error = recipe.relative_error(run(loaded(spec, dialect=dialect, activation='relu'), spec)[0], arrays['logits_f64'])
    print(f'\n{name} in dialect {dialect}: {error:.1e} off')
    assert low <= error < high


@pytest.mark.slow
def test_a_part_in_a_million_of_any_kind_of_parameter_is_noticed():
    arrays, spec = golden('timm_resnetrs50_75')
    model = loaded(spec)
    flat = nnx.to_flat_state(nnx.state(model))
    changes = {}
    for path, variable in flat[::13]:  # 17 arrays a block: all kinds, in all stages
        before = variable[...]
        variable[...] = before * (1 + 1e-6)
        changes['.'.join(map(str, path))] = recipe.relative_error(run(model, spec)[0], arrays['logits_f64'])
        variable[...] = before
    print('\nleast change', min(changes.items(), key=lambda item: item[1]))
    assert min(changes.values()) > 1e-9, changes


def initial(dialect):
    "{timm's name: initial values} of the first blocks of ResNet-RS-50."
    options = dict(blocks=(1, 1, 1, 1), dialect=dialect)
    params = [e for e in golden('timm_fresh')[1]['params'] if not e['name'].startswith('layer') or e['name'].split('.')[1] == '0']
    where = places(empty('resnetrs50', **options), params)
    with jax.default_prng_impl('unsafe_rbg'):  # compiles fastest
        model = create_model('resnet_rs_50', rngs=nnx.Rngs(0), **options)
    return in_timms_layout(params, where, nnx.state(model, (nnx.Param, nnx.BatchStat)))


def strangers(values):
    "Names of the parameters that timm does not draw like this."
    arrays, spec = golden('timm_fresh')
    found = []
    for e, (mean, std, largest) in zip(spec['params'], arrays['moments']):
        if e['name'] not in values: continue
        x = values[e['name']]
        sure = 5 / np.sqrt(x.size)  # five standard errors of the difference of two standard deviations of normal draws
        alike = abs(x.mean() - mean) <= 1.5 * sure * std and abs(x.std() - std) <= sure * std
        if std and x.size > 500: alike &= (np.abs(x).max() < 2 * x.std()) == (largest < 2 * std)  # uniform or normal
        if not alike: found.append(e['name'])
    return found


@pytest.mark.slow
def test_initial_values():
    assert strangers(initial('timm')) == []


@pytest.mark.slow
def test_initial_values_of_the_model_garden_differ():
    garden = set(strangers(initial('garden')))
    for i in range(1, 5):  # scale 1, not 0; kernels by fan-in, not twice the fan-out; biases 0, not uniform
        kinds = ('bn3.weight', 'conv1.weight', 'conv2.weight', 'conv3.weight', 'se.fc1.bias', 'se.fc2.bias')
        assert {f'layer{i}.0.{kind}' for kind in kinds} <= garden
    assert {'conv1.0.weight', 'fc.weight', 'fc.bias'} <= garden and not any('running' in name for name in garden)


def test_drop_path_rises_by_block():
    arrays, spec = golden('timm_fresh')
    blocks = {dialect: [block for stage in empty('resnetrs50', dialect=dialect).stages for block in stage]
              for dialect in ('timm', 'tf1')}
    rates = {dialect: [spec['drop_path'] * block.drop_share for block in found] for dialect, found in blocks.items()}
    np.testing.assert_allclose(rates['timm'], arrays['drop_rates'], rtol=1e-12)
    assert np.abs(np.array(rates['tf1']) - arrays['drop_rates']).max() > 0.03  # the authors' first block already drops 4%
