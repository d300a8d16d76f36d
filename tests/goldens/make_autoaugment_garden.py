"""Golden outputs of the TF2 Model Garden's AutoAugment, policy v0, made by running its own code with its chance pinned.

Source and environment are those of make_randaugment_garden.py; rows, images and layout those of autoaugment_tf1.npz, see
make_autoaugment_tf1.py. One command writes autoaugment_garden.npz beside this file (some minutes on two cores):

    python tests/goldens/make_autoaugment_garden.py

Its class `AutoAugment` runs in a compiled graph, as in a training run's input pipeline. The pinned numbers are arguments of the
graph, so that one graph for each image makes all rows.
"""
import inspect
import itertools

import numpy as np
import recipe
from make_autoaugment_tf1 import write
from make_randaugment_tf1 import SIGNED

recipe.stub_model_garden()
import tensorflow as tf
from official.vision.ops import augment

AUTHORS = augment.AutoAugment()
POLICY = [[list(step) for step in steps] for steps in AUTHORS.policies]
DIRECTED = [(i, j) for i, steps in enumerate(POLICY) for j, (name, _, _) in enumerate(steps) if name in SIGNED]


def distort(image, number, us, signs):
    """The authors' operation on an image with what it draws given: `us` of the two operations, `signs` of DIRECTED."""
    asked, waiting = itertools.cycle(us), list(signs)

    def uniform(shape, maxval=None, dtype=None):
        assert shape == []
        if maxval is not None:                                       # which sub-policy
            assert (maxval, dtype) == (len(POLICY), tf.int32)
            return number
        return next(asked) if dtype == tf.float32 else waiting.pop(0)
    augment.tf = recipe.Replaced(tf, random=recipe.Replaced(tf.random, uniform=uniform))
    out = AUTHORS.distort(image)
    assert not waiting and next(asked) is us[0], "the authors' code draws otherwise than this script believes"
    return out


def run(table, image, optimize):
    """Outputs uint8[rows,H,W,3] of all rows."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not optimize})
    compiled, out = tf.function(distort), []
    for row in table:
        signs = [row["sign"][j] if i == row["sub"] else 1 for i, j in DIRECTED]
        signs = [tf.constant(0.75 if sign > 0 else 0.25) for sign in signs]         # floor(this + 0.5): as it is, or negative
        out.append(compiled(tf.constant(image), tf.constant(row["sub"]), [tf.constant(u, tf.float32) for u in row["u"]], signs))
    return np.stack(out)


if __name__ == "__main__":
    defaults = inspect.signature(augment.AutoAugment).parameters
    assert defaults["augmentation_name"].default == "v0" and defaults["policies"].default is None
    write("autoaugment_garden.npz", run, "tf-models-official 2.20.0 official/vision/ops/augment.py, TensorFlow " + tf.__version__,
          POLICY, {name: defaults[name].default for name in ("cutout_const", "translate_const")})
