"""Golden outputs of the authors' AutoAugment, policy v0, made by running the authors' own code with its chance pinned.

Source: tensorflow/tpu, models/official/efficientnet/autoaugment.py, commit
7dc921f846c9e4071f3884b768a7ddf521272a49 (Apache 2.0); nothing of it is copied here but the table of the policy, which is
data and is read from the code. EfficientNet's input pipeline calls `distort_image_with_autoaugment(image, 'v0')`, and so does
this script.

The environment is that of make_randaugment_tf1.py. Then one command writes autoaugment_tf1.npz beside this file (a few minutes on
two cores):

    python tests/goldens/make_autoaugment_tf1.py TREE

What is pinned: the number of the sub-policy; for each of its two operations a number `u` just above or just below 1 - p, where
the authors' code begins to apply an operation of probability p; and the sign of each operation that has a direction. `rows`
lists everything that can happen so: an operation of probability 1 is always applied, one of probability 0 never.

Each row is made twice: as TensorFlow runs it, and with its graph optimizer off, in the arithmetic that the authors wrote down.
The optimizer takes AutoContrast's product out of a bracket and rewrites the offset of a rotation whose angle is not known in
advance. That changes last bits, and with them by one level what AutoContrast truncates, and a pixel at a tie between two
neighbours: `spec["optimized"]` says for each image in how many rows, and in how many of a row's pixels at most.

In the file: `spec` (JSON: source, policy, constants, rows, CRCs of the inputs) and for each image `crc_IMAGE`, CRC-32 of the
output bytes of each row, and `plain_IMAGE`, the same without the optimizer. AutoContrast truncates rounded floats, so
`full_IMAGE` keeps whole outputs of the rows in `spec["full"]` for the small images. Images are those of make_randaugment_tf1.py.

make_autoaugment_garden.py makes the same file from the authors' second code: images, rows and layout are defined here.
"""
import itertools
import os
import sys
import zlib

import numpy as np

if __package__:
    from . import make_randaugment_tf1 as single
    from . import recipe
else:                                                              # run as a script
    import make_randaugment_tf1 as single
    import recipe

SMALL = ["noise_32x28", "waves_32x28", "levels_32x28"]
LARGE = ["waves_280x320"]                                           # higher than the policy's translation is long


def rows(policy):
    """All that can happen to an image: dictionaries with the sub-policy's number, and for each operation u and the sign."""
    out = []
    for number, steps in enumerate(policy):
        for applied in itertools.product((True, False), repeat=len(steps)):
            if any(p == (0 if yes else 1) for yes, (_, p, _) in zip(applied, steps)):   # noqa: B905 (Python 3.7)
                continue
            us = [1 - p + (1 if yes else -1) / 64 for yes, (_, p, _) in zip(applied, steps)]   # noqa: B905
            ways = [(1, -1) if yes and name in single.SIGNED else (1,) for yes, (name, _, _) in zip(applied, steps)]  # noqa: B905
            out += [dict(sub=number, u=us, sign=list(signs)) for signs in itertools.product(*ways)]
    return out


def kept(row, policy):
    """Whether the output of a row is kept as values: AutoContrast is applied."""
    return any(name == "AutoContrast" and u + p >= 1
               for u, (name, p, _) in zip(row["u"], policy[row["sub"]]))   # noqa: B905


def write(name, run, source, policy, constants):
    """The golden file `name` of `run`, a function (rows, image, optimize?) -> outputs uint8[rows,H,W,3]."""
    table = rows(policy)
    about = dict(source=source, policy=policy, constants=constants, rows=table,
                 full=[i for i, row in enumerate(table) if kept(row, policy)],
                 inputs={image: zlib.crc32(single.draw(image).tobytes()) for image in SMALL + LARGE}, optimized={})
    arrays = {}
    for image in SMALL + LARGE:
        out, plain = (run(table, single.draw(image), optimize) for optimize in (True, False))
        moved = (out != plain).any(-1).sum((1, 2))
        about["optimized"][image] = [int((moved > 0).sum()), int(moved.max())]
        for kind, made in (("crc_", out), ("plain_", plain)):
            arrays[kind + image] = np.array([zlib.crc32(o.tobytes()) for o in made], np.uint32)
        if image in SMALL:
            arrays["full_" + image] = out[about["full"]]
        print(image, len(out), "rows,", len(set(arrays["crc_" + image])), "different outputs; rows and pixels that the optimizer",
              "changes:", about["optimized"][image], flush=True)
    recipe.save(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), about, arrays)


def load_authors(tree):
    """(run, policy, constants): a function (rows, image, optimize?) -> outputs, the table of v0, and the authors' constants."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path.insert(0, os.path.join(tree, "models", "official", "efficientnet"))
    import tensorflow.compat.v1 as tf
    tf.logging.set_verbosity(tf.logging.ERROR)
    import autoaugment
    policy, constants = autoaugment.policy_v0(), {}
    directed = [(i, j) for i, steps in enumerate(policy) for j, (name, _, _) in enumerate(steps) if name in single.SIGNED]
    training = autoaugment.contrib_training

    def hparams(**given):
        constants.update(given)
        return training.HParams(**given)
    autoaugment.contrib_training = recipe.Replaced(training, HParams=hparams)

    def build(image):
        """(output, number of the sub-policy, u of its operations, signs by operation), the last three to be fed."""
        number, us = tf.placeholder(tf.int32, []), [tf.placeholder(tf.float32, []) for _ in range(2)]
        signs, asked, waiting = {}, itertools.cycle(us), list(directed)

        def uniform(shape, maxval=None, dtype=None):
            assert shape == []
            if maxval is not None:                                   # which sub-policy
                assert (maxval, dtype) == (len(policy), tf.int32)
                return number
            if dtype == tf.float32:                                  # whether to apply the next operation
                return next(asked)
            sign = signs[waiting.pop(0)] = tf.placeholder(tf.float32, [])
            return sign
        autoaugment.tf = recipe.Replaced(tf, random_uniform=uniform)
        out = autoaugment.distort_image_with_autoaugment(image, "v0")
        assert not waiting and next(asked) is us[0], "the authors' code draws otherwise than this script believes"
        return out, number, us, signs

    def run(table, image, optimize):
        config = tf.ConfigProto()
        config.graph_options.rewrite_options.disable_meta_optimizer = not optimize
        with tf.Graph().as_default(), tf.Session(config=config) as session:
            placeholder = tf.placeholder(tf.uint8, image.shape)
            out, number, us, signs = build(placeholder)

            def feed(row):
                pinned = {sign: 0.5 for sign in signs.values()}
                pinned.update({signs[row["sub"], j]: 0.75 if s > 0 else 0.25        # floor(this + 0.5): as it is, or negative
                               for j, s in enumerate(row["sign"]) if (row["sub"], j) in signs})
                pinned.update(zip(us, row["u"]))   # noqa: B905
                return {**pinned, placeholder: image, number: row["sub"]}
            return np.stack([session.run(out, feed(row)) for row in table])
    return run, policy, constants


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    authors, table, numbers = load_authors(sys.argv[1])
    authors(rows(table)[:1], single.draw(SMALL[0]), True)                   # the authors' code says its constants
    write("autoaugment_tf1.npz", authors, "tensorflow/tpu " + single.COMMIT + " models/official/efficientnet/autoaugment.py",
          table, numbers)
