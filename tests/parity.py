"""What the parity tests share: our network beside a golden of somebody else's code (tests/goldens/recipe.py)."""
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import recipe

from resnet_rs.registry import create_model

GOLDENS = Path(__file__).parent / 'goldens'


@pytest.fixture(scope='module', autouse=True)
def double():
    "Double precision is possible; what was compiled is dropped at the end, deep networks hold gigabytes."
    with jax.enable_x64(True): yield
    jax.clear_caches()


def networks(*origins):
    "The goldens of somebody's networks: the others of this folder hold training steps, images or weights."
    paths = sorted(path for origin in origins for path in GOLDENS.glob(f'{origin}_*_*.npz'))
    return [path.stem for path in paths if 'logits_f64' in np.load(path).files]


def golden(name):
    "What the other code gave, and from which weights and images."
    path = GOLDENS / f'{name}.npz'
    return recipe.load_arrays(path), recipe.load_spec(path)


def blank(name, dtype=jnp.float64, **options):
    "Our network of that name, every value of it NaN, so that none can be forgotten."
    model = nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), param_dtype=dtype, **options))  # draws no initial values
    nnx.update(model, jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), nnx.state(model)))
    return model


@partial(jax.jit, static_argnums=0)
def _forward(graph, state, images):
    model, seen = nnx.merge(graph, state), []
    features = model.features
    object.__setattr__(model, 'features', lambda *given, **options: seen.append(features(*given, **options)) or seen[0])
    return model(images), seen[0]     # traced once: deep networks are slow to compile


def run(model, spec):
    "Logits and the outputs of the stages for the images of a golden."
    graph, state = nnx.split(model)
    images = recipe.images(spec).astype(jax.tree.leaves(state)[0].dtype)
    # in half the time; single precision is judged as users get it
    quick = {'xla_backend_optimization_level': 0} if images.dtype == np.float64 else {}
    logits, stages = _forward.lower(graph, state, images).compile(quick)(state, images)
    return np.asarray(logits), [np.asarray(stage) for stage in stages]


def compare(name, load):
    """Logits and stages of `load(dtype)`, with the weights of a golden, against the golden.

    Double precision agrees to 1e-9; in single our distance from the truth is at most three times that of the other code."""
    arrays, spec = golden(name)
    truth = arrays['logits_f64']
    logits, stages = run(load(jnp.float64), spec)
    errors = {'logits': recipe.relative_error(logits, truth)}
    for i, stage in enumerate(stages):
        assert stage.shape == tuple(arrays[f'stage{i}_shape'])
        for kept in (recipe.samples, recipe.projections):
            key = f'stage{i}_{kept.__name__}'
            errors[key] = recipe.relative_error(kept(f'stage{i}', stage), arrays[key])
    assert len(stages) == sum(key.endswith('_shape') for key in arrays)
    single = run(load(jnp.float32), spec)[0]
    ours, theirs = (recipe.relative_error(x, truth) for x in (single, arrays['logits_f32']))
    print(f'\n{name}: logits {errors["logits"]:.1e}, stages {max(errors.values()):.1e}; single {ours:.1e}, theirs {theirs:.1e}')
    assert (logits.dtype, single.dtype) == (np.float64, np.float32)
    assert max(errors.values()) < 1e-9, errors
    assert ours <= 3 * theirs
