"""Golden outputs of the TF2 Model Garden's RandAugment operations, made by running its own code.

Source: tensorflow/models (Apache 2.0; nothing of it is copied here), official/vision/ops/augment.py, from the package
tf-models-official. Environment: Python 3.11 with

    pip install tensorflow-cpu==2.21.0 numpy==2.4.6
    pip install --no-deps tf-keras==2.21.0 tf-models-official==2.20.0

(another numpy may refuse the Solarize threshold that the authors' code lets wrap modulo 256). Then one command writes
randaugment_garden.npz beside this file (some minutes on two cores):

    python tests/goldens/make_randaugment_garden.py

Images, rows and layout are those of randaugment_tf1.npz, see make_randaugment_tf1.py. The operations run eagerly, with sign
and centre pinned; that they give the same in a compiled graph, as in a training run's input pipeline, is asserted at one
magnitude. `spec["choices"]` holds what RandAugment draws from, "Identity" for nothing, and `spec["defaults"]` the arguments of
its class.
"""
import inspect

import numpy as np
import recipe
from make_randaugment_tf1 import OPS, centre, draw, rows, spec, write

recipe.stub_model_garden()
import tensorflow as tf
from official.vision.ops import augment


def operation(row, image):
    """The authors' operation of a row, a function of the image, with its chance pinned."""
    draws = list(centre(row, image) or ())                           # height first, as the authors draw them
    uniform = recipe.Replaced(tf.random, uniform=lambda **_: tf.constant(draws.pop(0), tf.int32))
    augment.tf = recipe.Replaced(tf, random=uniform)
    augment._randomly_negate_tensor = lambda t: tf.convert_to_tensor(row["sign"] * t, tf.float32)
    function, _, arguments = augment._parse_policy_info(row["op"], 1.0, float(row["m"]), [128] * 3, 40.0, 100.0)
    return lambda x: function(tf.convert_to_tensor(x), None, *arguments)[0]


def run(table, image):
    """Outputs uint8[rows,H,W,3] of all rows."""
    return np.stack([operation(row, image)(image).numpy() for row in table])


def run_compiled(table, image):
    """The same in one graph, as an input pipeline runs them."""
    return np.stack(tf.function(lambda x: [operation(row, image)(x) for row in table])(tf.constant(image)))


def choices(image):
    """What each number that a layer of RandAugment may draw does, found by drawing it: names, "Identity" for nothing."""
    row = dict(m=7, sign=1, centre=[0.5, 0.4])
    names = {operation(dict(row, op=op), image)(image).numpy().tobytes(): op for op in OPS}
    names[image.tobytes()] = "Identity"

    def drawn(number):
        bounds, pinned = [], [tf.constant(at, tf.int32) for at in centre(row, image)]

        def uniform(shape, minval=None, maxval=None, dtype=tf.float32):
            if minval is None:                                       # the draw of the operation
                bounds.append(maxval)
                return tf.constant(number)
            return pinned.pop(0) if dtype == tf.int32 else tf.constant(minval)
        augment.tf = recipe.Replaced(tf, random=recipe.Replaced(tf.random, uniform=uniform))
        out = augment.RandAugment(num_layers=1, magnitude=7).distort(tf.constant(image))
        return bounds[0], names[out.numpy().tobytes()]
    return [drawn(number)[1] for number in range(drawn(0)[0])]


def main():
    some, image = [row for row in rows() if row["m"] == 10], draw("noise_32x28")
    assert (run(some, image) == run_compiled(some, image)).all(), "compiled operations differ from eager ones"
    defaults = inspect.signature(augment.RandAugment).parameters.values()
    about = spec("tf-models-official 2.20.0 official/vision/ops/augment.py, TensorFlow " + tf.__version__)
    about.update(choices=choices(image), defaults={p.name: p.default for p in defaults})
    write("randaugment_garden.npz", run, about)


if __name__ == "__main__":
    main()
