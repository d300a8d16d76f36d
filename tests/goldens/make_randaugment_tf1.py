"""Golden outputs of the ResNet-RS authors' RandAugment operations, made by running the authors' own code.

Source: tensorflow/tpu, models/official/efficientnet/autoaugment.py, commit
7dc921f846c9e4071f3884b768a7ddf521272a49 (Apache 2.0); nothing of it is copied here.

Environment: Python 3.7 with

    pip install tensorflow==1.15.5 numpy==1.18.5 protobuf==3.19.6

(newer numpy refuses the Solarize threshold that the authors' code lets wrap modulo 256). Then, with a checkout of
tensorflow/tpu in TREE, one command writes randaugment_tf1.npz beside this file (a quarter of an hour on two cores):

    python tests/goldens/make_randaugment_tf1.py TREE

What is in the file: `spec` (JSON: source, images, rows) and, for each image, `crc_IMAGE` (uint32, CRC-32 of the output
bytes of each row). CRCs check the operations that are exact; AutoContrast and Sharpness truncate rounded floats, so
their outputs are also kept as values, `sample_IMAGE`: every `stride`-th value of each row in `spec["sampled"]`.
`full_IMAGE` holds whole outputs of the rows in `spec["full"]`, for two images, so that a failure can be looked at.
The inputs are drawn from the integer recipe in `draw` and are not stored, only their CRCs.

make_randaugment_garden.py makes the same file from the authors' second code: images, rows and layout are defined here.
"""
import os
import sys
import zlib

import numpy as np

if __package__:
    from . import recipe
else:                                                              # run as a script
    import recipe

COMMIT = "7dc921f846c9e4071f3884b768a7ddf521272a49"
OPS = ["AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
       "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"]
PLAIN = ("AutoContrast", "Equalize", "Invert")                       # no argument
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
MAGNITUDES = [0, 0.5, 2.25, 7.5] + list(range(1, 21)) + [22, 23, 24, 27, 30]
CENTRES = ([0.5, 0.4], [0.1, 0.9], [0.0, 0.99])                      # fractions of height and width
SMALL = {"noise_32x28": "noise", "waves_32x28": "waves", "noise_24x40": "noise", "waves_24x40": "waves",
         "noise_32x32": "noise", "waves_32x32": "waves", "levels_32x28": "levels", "flat_16x20": "flat",
         "nearly_flat_20x20": "nearly_flat", "narrow_24x24": "narrow", "noise_7x5": "noise"}
LARGE = {"waves_64x48": "waves", "noise_96x84": "noise", "noise_128x128": "noise", "waves_128x128": "waves",
         "noise_160x160": "noise", "waves_160x160": "waves", "waves_192x192": "waves", "noise_224x224": "noise",
         "waves_224x192": "waves", "noise_256x256": "noise", "noise_320x280": "noise", "waves_280x320": "waves",
         "noise_320x320": "noise", "waves_320x320": "waves"}


def draw(name):
    """The input image uint8[H,W,3] of that name: integer arithmetic only, so equal on every machine."""
    kind = {**SMALL, **LARGE}[name]
    h, w = (int(n) for n in name.rsplit("_", 1)[1].split("x"))
    y, x, c = np.ogrid[0:h, 0:w, 0:3]
    index = ((y * w + x) * 3 + c).astype(np.uint64) + np.uint64(zlib.crc32(name.encode()))
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)       # splitmix64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    noise = (z >> np.uint64(56)).astype(np.int64)
    waves = np.abs((1400 * x // w + 900 * y // h + 170 * c) % 460 - 230) + noise % 3 + 10
    image = {"noise": noise, "waves": waves,
             "levels": noise % 4 * 60 + 20 * c,                      # four grey levels
             "flat": 40 + 90 * c + 0 * noise,                        # Equalize step 0; AutoContrast low = high
             "nearly_flat": 200 + (noise > 250) * 9 - (noise < 3) * 150,
             "narrow": 100 + noise % 17 + 20 * (c == 1) * (noise > 128)}[kind]
    return image.astype(np.uint8)


def rows():
    """Every call of the authors' operations that the file covers."""
    out = []
    for op in OPS:
        for m in [10] if op in PLAIN else MAGNITUDES:
            if op in SIGNED:
                out += [dict(op=op, m=m, sign=s) for s in (1, -1)]
            elif op == "Cutout":
                out += [dict(op=op, m=m, centre=c) for c in CENTRES]
            else:
                out.append(dict(op=op, m=m))
    return out


def centre(row, image):
    """The pixel (row, column) of a row's centre, or None."""
    return tuple(int(f * n) for f, n in zip(row["centre"], image.shape)) if "centre" in row else None   # noqa: B905


def spec(source):
    table = rows()
    return dict(source=source, rows=table, stride={**dict.fromkeys(SMALL, 1), **dict.fromkeys(LARGE, 1009)},
                full_images=["noise_32x28", "waves_32x28"],
                full=[i for i, r in enumerate(table) if r["m"] in (5, 15) and r.get("centre") != CENTRES[2]],
                sampled=[i for i, r in enumerate(table) if r["op"] == "AutoContrast"
                         or r["op"] == "Sharpness" and r["m"] in (1, 6, 10, 15, 20)])


def write(name, run, about):
    """The golden file `name` of `run`, a function (rows, image) -> outputs uint8[rows,H,W,3], described by `about`."""
    arrays = {}
    for image_name in {**SMALL, **LARGE}:
        image = draw(image_name)
        out = run(about["rows"], image)
        arrays["crc_" + image_name] = np.array([zlib.crc32(o.tobytes()) for o in out], np.uint32)
        arrays["sample_" + image_name] = np.stack([out[i].ravel()[::about["stride"][image_name]] for i in about["sampled"]])
        if image_name in about["full_images"]:
            arrays["full_" + image_name] = out[about["full"]]
        print(image_name, len(out), "rows", flush=True)
    about["inputs"] = {name: zlib.crc32(draw(name).tobytes()) for name in {**SMALL, **LARGE}}
    recipe.save(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), about, arrays)


def load_authors(tree):
    """A function (rows, image) -> outputs uint8[rows,H,W,3] that runs the authors' code, sign and centre pinned."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path.insert(0, os.path.join(tree, "models", "official", "efficientnet"))
    import tensorflow.compat.v1 as tf
    from tensorflow.contrib import training
    tf.logging.set_verbosity(tf.logging.ERROR)
    import autoaugment
    constants = training.HParams(cutout_const=40, translate_const=100)

    def build(row, image, placeholder):
        draws = list(centre(row, image) or ())                       # height first, as the authors draw them
        autoaugment._randomly_negate_tensor = lambda t: tf.convert_to_tensor(row["sign"] * t, tf.float32)
        autoaugment.tf = recipe.Replaced(tf, random_uniform=lambda **_: tf.constant(draws.pop(0), tf.int32))
        function, _, arguments = autoaugment._parse_policy_info(row["op"], 1.0, float(row["m"]), [128] * 3, constants)
        return function(placeholder, *arguments)

    def run(table, image):
        out = []
        for op in OPS:
            with tf.Graph().as_default(), tf.Session() as session:
                placeholder = tf.placeholder(tf.uint8, image.shape)
                out += session.run([build(r, image, placeholder) for r in table if r["op"] == op], {placeholder: image})
        return np.stack(out)
    return run


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write("randaugment_tf1.npz", load_authors(sys.argv[1]),
          spec("tensorflow/tpu " + COMMIT + " models/official/efficientnet/autoaugment.py"))
