"""A small problem for optimizers, and what is kept of a training step: shared by make_recipe_*.py and tests/test_recipe.py.

The problem: a kernel and the scale of a batch norm, 24 steps, at each another gradient and another rate; L2 reaches the kernel.
Its constants are numbers of single precision, the precision in which TensorFlow and Keras keep an optimizer's constants even
when the weights are double: so all sides compute with the same ones, and can agree to the last digits of double precision.

Python 3.7 and numpy 1.18 are enough.
"""
import numpy as np

if __package__:
    from . import recipe
else:                                                              # beside the scripts
    import recipe

MOMENTUM = float(np.float32(0.9))
DECAY, EPSILON = float(np.float32(0.9)), float(np.float32(0.001))    # of RMSProp's mean square
WEIGHT_DECAY = 2.0 ** -5
AVERAGE = float(np.float32(0.9999))    # decay of the moving average
# warm-up from nothing, level, a drop to an eighth, a jump, a slow end
RATES = np.array([0, 16, 32, 48] + [64] * 6 + [8] * 6 + [32] * 4 + [12, 8, 4, 1]) / 128
SHAPES = {"dense/kernel": (3, 4), "batch_normalization/gamma": (4,)}    # with the names that the authors' filters look for


def start():
    """{name: float64 array}: the weights before the first step."""
    return {name: recipe.draw("start/" + name, shape, 0) for name, shape in SHAPES.items()}


def slopes():
    """{name: float64 [24, ...]}: the gradient of the loss without L2, at each step."""
    return {name: recipe.draw("slopes/" + name, (len(RATES),) + shape, 0) for name, shape in SHAPES.items()}


def classified(classes=10, count=6):
    """(logits float64 [count, classes], labels int [count]) for a loss."""
    return 3 * recipe.draw("logits", (count, classes), 0), recipe.generator("labels").integers(classes, size=count)


def fingerprint(name, x):
    """[6]: root mean square, 2 projections and 3 samples of an array, in the layout of the reference."""
    x = np.asarray(x, np.float64)
    return np.concatenate([[np.sqrt((x**2).mean())], recipe.projections(name, x, 2), recipe.samples(name, x, 3)])


def labels(spec):
    """The classes int [batch] of the images of a spec."""
    return recipe.generator("labels", spec["seed"]).integers(spec["classes"], size=spec["input_shape"][0])
