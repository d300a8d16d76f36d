"""Golden inputs of networks: JPEGs decoded, cropped and resized by the authors' code, the Model Garden and timm.

Four commands, each in its own environment, a minute at most; each writes one file beside this one:

    python tests/goldens/make_preprocess.py images              # preprocess_images.npz: our environment (Pillow, scikit-learn)
    python tests/goldens/make_preprocess.py tf1 --tree TREE     # preprocess_tf1.npz
    python tests/goldens/make_preprocess.py garden              # preprocess_garden.npz
    python tests/goldens/make_preprocess.py timm                # preprocess_timm.npz

tf1     Python 3.7, tensorflow==1.15.5 numpy==1.18.5 protobuf==3.19.6; TREE holds models/official/resnet of tensorflow/tpu at
        7dc921f8 (Apache 2.0; nothing of it is copied here), whose resnet_preprocessing.py is run
garden  Python 3.11, tensorflow-cpu==2.21.0 numpy pyyaml gin-config scipy, and with --no-deps tf-keras==2.21.0
        tf-models-official==2.20.0 (Apache 2.0), whose official/vision/dataloaders/classification_input.py is run
timm    Python 3.11, torch==2.13.0 torchvision==0.28.0 pillow==13.0.0 timm==1.0.31 (Apache 2.0), whose data.create_transform
        and RandomResizedCropAndInterpolation are run

preprocess_images.npz holds JPEGs as uint8 arrays, 40 kB: encoders differ from version to version, so their bytes are kept. They
are parts of the photographs china.jpg (danielbuechele) and flower.jpg (vultilion) that scikit-learn ships, from Flickr, licence
CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/), made smaller, and grey or CMYK where their names say so.

The others hold, for every image in the order of spec["names"]: `windows` [N,4,4] (top, left, height, width); `decoded` [N,8] and
`decoded_windows` [N,4,8], projections (see recipe.py) of the whole picture and of `decode_and_crop_jpeg`; `eval_samples`
[N,sizes,64] and `eval_projections` [N,sizes,8]; `train_samples` and `train_projections` of three training images of spec["train"]
pixels: windows 0 and 1, the second mirrored, and the whole picture as window. The random window and the random flip are replaced
inside the running code, nothing else is. `crops_{height}_{width}` [200,4]: windows that the sampler drew one after the other;
TensorFlow's with the seeds of spec["seeds"], timm's with `random.seed`.
"""
import argparse
import io
import os
import random
import sys
import types

import numpy as np
import recipe

FOLDER = os.path.dirname(os.path.abspath(__file__))
SIZES, TRAIN = (160, 57), 64
SHAPES = ((375, 500), (500, 333), (160, 160), (60, 900), (900, 60), (31, 47), (9, 14), (2, 2), (1200, 1600), (40, 13), (500, 1))
SEEDS = (7, 11)
CROP_PCT = (0.875, 0.95)     # timm's, of SIZES


def make_images():
    from importlib.resources import files

    from PIL import Image
    photos = {name: Image.open(files("sklearn.datasets.images") / (name + ".jpg")) for name in ("china", "flower")}

    def jpeg(name, size, mode="RGB", **options):
        file = io.BytesIO()
        picture = photos[name].resize(size, Image.Resampling.LANCZOS).convert(mode)
        if mode == "CMYK":      # Pillow prints without black: move what the three inks share there
            inks = np.asarray(picture)[..., :3]
            black = inks.min(axis=2, keepdims=True)
            picture = Image.fromarray(np.concatenate([inks - black, black], axis=2), "CMYK")
        picture.save(file, "JPEG", **dict(dict(quality=85), **options))
        return np.frombuffer(file.getvalue(), np.uint8)

    made = dict(
        china_420=jpeg("china", (212, 142), subsampling="4:2:0"), flower_444=jpeg("flower", (150, 113), subsampling="4:4:4"),
        china_422=jpeg("china", (101, 67), subsampling="4:2:2"), flower_odd_420=jpeg("flower", (133, 99), subsampling="4:2:0"),
        flower_progressive_420=jpeg("flower", (120, 97), progressive=True, subsampling="4:2:0"),
        china_grey=jpeg("china", (97, 131), "L"), china_cmyk=jpeg("china", (64, 48), "CMYK"),
        flower_restart_420=jpeg("flower", (80, 64), restart_marker_blocks=3, subsampling="4:2:0"),
        china_wide_420=jpeg("china", (200, 24), subsampling="4:2:0"), china_wide_grey=jpeg("china", (200, 24), "L"),
        flower_5x9_420=jpeg("flower", (9, 5), subsampling="4:2:0"), flower_40x3_420=jpeg("flower", (3, 40), subsampling="4:2:0"),
        china_2x2=jpeg("china", (2, 2)))
    source = "china.jpg (danielbuechele) and flower.jpg (vultilion), Flickr through scikit-learn, CC BY 2.0, changed"
    recipe.save(os.path.join(FOLDER, "preprocess_images.npz"), dict(source=source, names=list(made)), made)


def load_images():
    path = os.path.join(FOLDER, "preprocess_images.npz")
    arrays = recipe.load_arrays(path)
    return {name: arrays[name].tobytes() for name in recipe.load_spec(path)["names"]}


def windows_of(name, height, width):
    """Four windows in that image: one of them at multiples of 16, one to the right edge."""
    rng, found = recipe.generator("windows/" + name), []
    for i in range(4):
        h, w = (int(rng.integers(1 + n // 2, n + 1)) for n in (height, width))
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        if i == 1:
            top, left = top // 16 * 16, left // 16 * 16
        if i == 2:
            left = width - w
        found.append((top, left, h, w))
    return found


def write(kind, source, decode, crop, evaluate, train, draw, **spec):
    """Run the functions of a peer on all images; `train` takes (bytes, window, flip), `draw` (height, width)."""
    images, rows = load_images(), []
    for name, data in images.items():
        whole = decode(data)
        windows = windows_of(name, *whole.shape[:2])
        tasks = [(windows[0], False), (windows[1], True), ((0, 0) + whole.shape[:2], False)]
        tested = [evaluate(data, i, size) for i, size in enumerate(SIZES)]
        trained = [train(data, window, flip) for window, flip in tasks]
        assert all(x.shape == (size, size, 3) and x.dtype == np.float32 for x, size in zip(tested, SIZES))      # noqa: B905
        assert all(x.shape == (TRAIN, TRAIN, 3) and x.dtype == np.uint8 for x in trained)
        rows.append(dict(
            windows=np.array(windows, np.int16), decoded=recipe.projections(name, whole),
            decoded_windows=[recipe.projections(name, crop(data, window)) for window in windows],
            eval_samples=np.float32([recipe.samples(name, x, 64) for x in tested]),
            eval_projections=[recipe.projections(name, x) for x in tested],
            train_samples=np.uint8([recipe.samples(name, x, 64) for x in trained]),
            train_projections=[recipe.projections(name, x) for x in trained]))
    arrays = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    arrays.update((f"crops_{shape[0]}_{shape[1]}", np.int16(draw(*shape))) for shape in SHAPES)
    spec = dict(spec, source=source, names=list(images), sizes=SIZES, train=TRAIN, shapes=SHAPES, seeds=SEEDS)
    recipe.save(os.path.join(FOLDER, f"preprocess_{kind}.npz"), spec, arrays)


def fixed_sampler(tf, window):
    """sample_distorted_bounding_box that returns `window`."""
    top, left, height, width = window
    return lambda *a, **k: (tf.constant([top, left, 0]), tf.constant([height, width, -1]), None)


def session(tf, graph):
    """A session with one thread, so that random numbers come in order."""
    return tf.Session(graph=graph, config=tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1))


def draw_windows(tf, covered):
    """(height, width) -> 200 windows of TensorFlow's sampler, one after the other. `tf` is TensorFlow 1, or 2 as 1."""
    def draw(height, width):
        with tf.Graph().as_default() as graph:
            begin, size, _ = tf.raw_ops.SampleDistortedBoundingBoxV2(
                image_size=tf.constant([height, width, 3]), bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
                min_object_covered=tf.constant(covered), seed=SEEDS[0], seed2=SEEDS[1], aspect_ratio_range=[3 / 4, 4 / 3],
                area_range=[0.08, 1.0], max_attempts=10, use_image_if_no_bounding_boxes=True)
            window = tf.concat([begin[:2], size[:2]], 0)
        with session(tf, graph) as run:
            return [run.run(window) for _ in range(200)]
    return draw


def make_tf1(tree):
    sys.path.insert(0, os.path.join(tree, "models", "official", "resnet"))
    import resnet_preprocessing as authors
    import tensorflow as tf
    # RandAugment does nothing here; what the authors do right before it (clip, cast) is run
    sys.modules["official"], augment = types.ModuleType("official"), types.ModuleType("official.efficientnet")
    sys.modules["official.efficientnet"], sys.modules["official"].efficientnet = augment, augment
    augment.autoaugment = types.SimpleNamespace(distort_image_with_randaugment=lambda image, layers, magnitude: image)
    plain = authors.tf

    def run(build):
        with tf.Graph().as_default() as graph:
            out = build()
        with session(tf, graph) as running:
            return running.run(out)

    def train(data, window, flip):
        flips = tf.image.flip_left_right if flip else tf.identity
        authors.tf = recipe.Replaced(plain, image=recipe.Replaced(
            plain.image, random_flip_left_right=flips, sample_distorted_bounding_box=fixed_sampler(tf, window)))
        image = run(lambda: authors.preprocess_for_train(tf.constant(data), False, TRAIN, "randaugment", 2, 10))
        authors.tf = plain
        assert (image == np.rint(image)).all()
        return image.astype(np.uint8)

    write("tf1", "tensorflow/tpu 7dc921f8 models/official/resnet/resnet_preprocessing.py, TensorFlow " + tf.__version__,
          decode=lambda data: run(lambda: tf.image.decode_jpeg(data, channels=3)),
          crop=lambda data, window: run(lambda: tf.image.decode_and_crop_jpeg(data, window, channels=3)),
          evaluate=lambda data, i, size: run(lambda: authors.preprocess_for_eval(tf.constant(data), False, size)),
          train=train, draw=draw_windows(tf, 0.1))


def make_garden():
    recipe.stub_model_garden()
    import tensorflow as tf
    from official.vision.dataloaders import classification_input
    from official.vision.ops import preprocess_ops
    plain = recipe.Replaced(preprocess_ops, normalize_image=lambda image, **k: image)   # what is normalised, not the result

    def parse(data, size, training):
        parser = classification_input.Parser([size, size], num_classes=1000)
        return (parser._parse_train_image if training else parser._parse_eval_image)({"image/encoded": tf.constant(data)})

    def train(data, window, flip):
        flips = tf.image.flip_left_right if flip else tf.identity
        classification_input.tf = recipe.Replaced(tf, image=recipe.Replaced(tf.image, random_flip_left_right=flips))
        preprocess_ops.tf = recipe.Replaced(tf, image=recipe.Replaced(
            tf.image, sample_distorted_bounding_box=fixed_sampler(tf, window)))
        image = parse(data, TRAIN, True)
        classification_input.tf = preprocess_ops.tf = tf
        return tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8).numpy()   # as its RandAugment begins

    classification_input.preprocess_ops = plain
    write("garden", "tf-models-official 2.20.0 official/vision/dataloaders/classification_input.py, TensorFlow " + tf.__version__,
          decode=lambda data: tf.image.decode_jpeg(data, channels=3).numpy(),
          crop=lambda data, window: tf.image.decode_and_crop_jpeg(data, window, channels=3).numpy(),
          evaluate=lambda data, i, size: parse(data, size, False).numpy(), train=train, draw=draw_windows(tf.compat.v1, 0.08))


def make_timm():
    import timm
    from PIL import Image
    from timm.data import create_transform
    from timm.data.transforms import RandomResizedCropAndInterpolation as Crop

    def decode(data):
        return Image.open(io.BytesIO(data)).convert("RGB")

    def evaluate(data, i, size):
        transform = create_transform(size, is_training=False, crop_pct=CROP_PCT[i], interpolation="bicubic", normalize=False)
        return transform(decode(data)).numpy().transpose(1, 2, 0).astype(np.float32)

    def train(data, window, flip):
        crop = Crop(TRAIN, interpolation="bicubic")
        crop.get_params = lambda *a: window
        image = np.asarray(crop(decode(data)))
        return image[:, ::-1] if flip else image

    def draw(height, width):
        random.seed(SEEDS[0])
        image = Image.new("L", (width, height))
        return [Crop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(200)]

    def crop(data, window):
        top, left, height, width = window
        return np.asarray(decode(data))[top:top + height, left:left + width]

    write("timm", f"timm {timm.__version__} data/transforms_factory.py and data/transforms.py", crop_pct=CROP_PCT,
          decode=lambda data: np.asarray(decode(data)), crop=crop, evaluate=evaluate, train=train, draw=draw)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("images", "tf1", "garden", "timm"))
    parser.add_argument("--tree", help="for tf1: an export of tensorflow/tpu")
    asked = parser.parse_args()
    if asked.kind == "tf1":
        make_tf1(asked.tree or parser.error("tf1 needs --tree"))
    else:
        {"images": make_images, "garden": make_garden, "timm": make_timm}[asked.kind]()
