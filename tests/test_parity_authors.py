"""Our networks against the authors' own code: their TF1 release and the TF2 Model Garden.

The goldens, the checkpoints and how they are made: tests/goldens/make_tf1.py and make_garden.py; weights and images are drawn
from names (tests/goldens/recipe.py). Double precision must agree to 1e-9, also with TF1, whose code runs in double precision
with one batch norm for another (make_tf1.py says how); in single precision our distance from the double-precision truth may be
three times theirs. `python -m pytest -s` prints what is measured.
"""
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import checkpoints, recipe
from parity import GOLDENS, blank, compare, double, golden, networks, run  # noqa: F401 (double is a fixture)

from resnet_rs.blocks import ACTIVATIONS
from resnet_rs.registry import create_model
from resnet_rs.resnet3d import VIDEO_VARIANTS
from resnet_rs.weights import load_garden, load_tf1

EVERY = networks('garden', 'tf1')
FAST = ('garden_resnet_rs_50_swish_128', 'tf1_resnet_rs_50_128', 'tf1_resnet_50_75')
#: part of a golden's name -> what our network of that name needs to be told
OPTIONS = {'_relu': dict(activation='relu'), 'garden_resnet_50_': dict(activation='relu'), '_half': dict(width=0.5),
           '_skip': dict(stem_pool='none'), 'resnet3d_garden': VIDEO_VARIANTS['resnet3d_garden']}
VALUE = '/.ATTRIBUTES/VARIABLE_VALUE'


def empty(name, dtype=jnp.float64, **options):
    "Our network of a golden's name, every value of it NaN, so that none can be forgotten."
    dialect, rest = name.split('_', 1)
    model = next(m for m in ('resnet3d_rs_101', 'resnet3d_rs_50', 'resnet3d_50', 'resnet_rs_101', 'resnet_rs_50', 'resnet_50',
                             'efficientnet_b0') if rest.replace('3d_garden', '3d').startswith(m))
    for part, more in OPTIONS.items(): options = dict(more if part in name else {}) | options
    options = dict(num_classes=golden(name)[0]['logits_f64'].shape[1], dialect=dialect) | options
    return blank(model, dtype, **options)


def fill(model, name, spec):
    "Load the recipe's weights under the names that they have in the authors' checkpoints."
    if name.startswith('tf1'): load_tf1(model, recipe.state(spec), ema=False)
    else: load_garden(model, {f'model/{key}{VALUE}': value for key, value in recipe.state(spec).items()})
    model.eval()
    return model


def loaded(name, dtype=jnp.float64, **options):
    "The network of a golden with the weights of its recipe, for inference."
    return fill(empty(name, dtype, **options), name, golden(name)[1])


def off(name, **options):
    "How far the logits of a golden's weights in another geometry are from the golden's, of the largest."
    return recipe.relative_error(run(loaded(name, **options), golden(name)[1])[0], golden(name)[0]['logits_f64'])


@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in EVERY])
def test_logits_and_stages(name): compare(name, partial(loaded, name))


def test_goldens_cover_the_authors_networks():
    assert set(FAST) <= set(EVERY)
    for part in ('garden_resnet_rs_50_swish', 'garden_resnet_rs_50_relu', 'garden_resnet_50', 'garden_resnet3d_rs_50',
                 'garden_resnet3d_50', 'garden_resnet3d_garden_50', 'tf1_resnet_rs_50', 'tf1_resnet_50', 'tf1_resnet_rs_50_skip',
                 'tf1_efficientnet_b0'):
        assert any(name.startswith(part) for name in EVERY), part


# Checkpoints that the authors' code wrote

#: name of a checkpoint -> the golden whose weights it holds
CHECKPOINTS = {'tf1_efficientnet_b0_train': 'tf1_efficientnet_b0_96', 'tf1_train': 'tf1_resnet_rs_50_128',
               'garden_train': 'garden_resnet_rs_50_swish_128', 'garden_model': 'garden_resnet_rs_50_swish_128',
               'garden_video_model': 'garden_resnet3d_rs_50_8x64'}
some_slow = [name if 'efficientnet' in name else pytest.param(name, marks=pytest.mark.slow) for name in CHECKPOINTS]


def read(name, prefix, ema):
    "Our network in single precision with what is in a checkpoint."
    model = empty(CHECKPOINTS[name], jnp.float32)
    (load_tf1 if name.startswith('tf1') else load_garden)(model, prefix, ema=ema)
    model.eval()
    return model


def assert_same(model, other):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


@pytest.mark.parametrize('name', some_slow)
def test_a_real_checkpoint_holds_the_weights_of_the_golden(name, tmp_path):
    prefix = checkpoints.redraw(name, tmp_path)  # asserts that every byte is as the authors' code wrote it
    assert_same(read(name, prefix, False), loaded(CHECKPOINTS[name], jnp.float32))


@pytest.mark.parametrize('name', [case for case in some_slow if 'train' in str(case)])
def test_the_moving_averages_of_a_real_checkpoint(name, tmp_path):
    prefix, spec = checkpoints.redraw(name, tmp_path, check=False), checkpoints.load_spec(name)
    ends = ('/ExponentialMovingAverage', '/average')
    averages = [e for e in spec['params'] if e['name'].endswith(ends)]
    assert len(averages) == len(spec['params']) / 2
    values = {e['name'].rpartition('/')[0]: recipe.value(e, spec['seed']) for e in averages}
    model = empty(CHECKPOINTS[name], jnp.float32)
    if name.startswith('tf1'): load_tf1(model, values, ema=False)
    else: load_garden(model, {f'model/{key}{VALUE}': value for key, value in values.items()})
    model.eval()
    assert_same(read(name, prefix, True), model)


# Where the Model Garden and the TF1 release differ

def differs(name, low, high, **options):
    error = off(name, **options)
    print(f'\n{name}, {options}: {100 * error:.1f}% off')
    assert low < error < high


@pytest.mark.parametrize('size', [128, pytest.param(75, marks=pytest.mark.slow)])
def test_geometry_of_the_model_garden(size):
    "Its weights in the TF1 geometry: SAME padding is one reason of the difference, the pool in the first shortcut the other."
    name = f'garden_resnet_rs_50_swish_{size}'
    differs(name, 0.05, 0.5, dialect='tf1', activation='swish')


@pytest.mark.slow
def test_padding_alone_and_pool_alone():
    name = 'garden_resnet_rs_50_relu_128'
    arrays, spec = golden(name)
    errors = {'both': off(name, dialect='tf1')}
    for what, dialect in (('pool', 'garden'), ('padding', 'tf1')):
        model = loaded(name, dialect=dialect)
        model.stages[0][0].shortcut.pool = None if what == 'pool' else ((2, 2), (1, 1))
        errors[what] = recipe.relative_error(run(model, spec)[0], arrays['logits_f64'])
    print('\nwithout the Garden\'s', ', '.join(f'{what}: {100 * error:.1f}% off' for what, error in errors.items()))
    assert all(0.03 < error < 0.5 for error in errors.values())


@pytest.mark.slow
@pytest.mark.parametrize('name, dialect, equal', [
    ('tf1_resnet_rs_50_128', 'paper', True), ('tf1_resnet_rs_50_128', 'timm', True), ('tf1_resnet_rs_50_128', 'garden', False),
    ('tf1_resnet_50_75', 'paper', True),
    ('tf1_resnet_50_75', 'timm', False),  # TF pads the max pool at one side, PyTorch at both
    ('tf1_resnet_50_75', 'garden', False), ('garden_resnet_50_75', 'tf1', False)])
def test_weights_in_another_dialect(name, dialect, equal):
    if equal: assert off(name, dialect=dialect) < 1e-9
    else: differs(name, 0.01, 0.6, dialect=dialect, activation='relu')


def test_activation_is_a_choice_of_the_dialect():
    def activation(dialect, **options):
        model = nnx.eval_shape(lambda: create_model('resnet_rs_50', dialect=dialect, rngs=nnx.Rngs(0), **options))
        return model.stages[0][0].act
    assert activation('garden') is ACTIVATIONS['swish'] and activation('tf1') is activation('paper') is ACTIVATIONS['relu']
    assert activation('garden', activation='relu') is ACTIVATIONS['relu']


@pytest.mark.parametrize('dialect', ['tf1', 'garden'])
def test_drop_rates_rise_by_stage(dialect):
    arrays, spec = golden(f'{dialect}_fresh')
    model = nnx.eval_shape(lambda: create_model('resnet_rs_50', dialect=dialect, rngs=nnx.Rngs(0)))
    ours = [spec['init_drop_rate'] * block.drop_share for stage in model.stages for block in stage]
    np.testing.assert_allclose(ours, arrays['drop_rates'], rtol=1e-12)


# Initial values

@cache
def authors(dialect):
    "{path in our ResNet-RS-50: (mean, standard deviation, largest magnitude) of the authors' initial values}, and its classes."
    arrays, spec = golden(f'{dialect}_fresh')
    tags = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(spec['variables'])}
    classes = next(shape[1] for _, shape in spec['variables'] if len(shape) == 2)  # the one dense kernel
    model = nnx.eval_shape(lambda: create_model('resnet_rs_50', classes, dialect=dialect, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), nnx.state(model)))
    if dialect == 'tf1': load_tf1(model, tags, ema=False)
    else: load_garden(model, {f'model/{name}{VALUE}': tag for name, tag in tags.items()})
    found = {'.'.join(map(str, path)): np.unique(tag[...]) for path, tag in nnx.to_flat_state(nnx.state(model, PARTS))}
    assert sorted(np.concatenate(list(found.values()))) == list(range(len(tags)))  # one variable of theirs is one of ours
    return {path: tuple(arrays['moments'][int(tag[0])]) for path, tag in found.items()}, classes


PARTS = (nnx.Param, nnx.BatchStat)


@pytest.mark.slow
@pytest.mark.parametrize('dialect', ['tf1', 'garden'])
def test_initial_values(dialect):
    theirs, classes = authors(dialect)
    ours = nnx.to_flat_state(nnx.state(create_model('resnet_rs_50', classes, dialect=dialect, rngs=nnx.Rngs(0)), PARTS))
    assert len(ours) == len(theirs)
    for path, x in (('.'.join(map(str, path)), np.asarray(leaf[...])) for path, leaf in ours):
        (mean, std, largest), sure = theirs[path], 5 / np.sqrt(x.size)  # five standard errors of two such estimates
        assert abs(x.mean() - mean) <= 1.5 * sure * std and abs(x.std() - std) <= sure * std, (path, x.mean(), mean, x.std(), std)
        if std and x.size > 5000:  # uniform 1.7, truncated normal 2.3, normal 4 and more standard deviations
            assert abs(np.log(np.abs(x).max() / x.std() / (largest / std))) < 0.2, path


def test_what_differs_between_the_initial_values_of_the_authors_two_releases():
    tf1, garden = (authors(dialect)[0] for dialect in ('tf1', 'garden'))
    close = {path: np.allclose(tf1[path][:2], garden[path][:2], rtol=0.15, atol=0.005) for path in tf1}
    last = {path for path in tf1 if path.endswith('layer3.norm.scale')}
    assert {path for path in tf1 if not close[path]} == last | {'head.kernel'}
    assert {tf1[path] for path in last} == {(0, 0, 0)} and {garden[path] for path in last} == {(1, 0, 1)}
    assert abs(tf1['head.kernel'][1] / 0.01 - 1) < 0.01  # normal
    assert garden['head.kernel'][2] <= 0.05 and abs(garden['head.kernel'][1] / 0.05 * 3**0.5 - 1) < 0.01  # uniform in +-0.05
