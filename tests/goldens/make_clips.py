"""Golden outputs of the TF2 Model Garden's video input, and a video set as TFDS writes it, made by running their code.

Source: tensorflow/models (Apache 2.0; nothing of it is copied here), official/vision/ops/preprocess_ops_3d.py and
official/vision/dataloaders/video_input.py, from the package tf-models-official. Environment: Python 3.11 with

    pip install tensorflow-cpu==2.21.0 numpy pyyaml gin-config scipy
    pip install --no-deps tf-keras==2.21.0 tf-models-official==2.20.0

Then one command writes garden_clips.npz beside this file, in a minute:

    python tests/goldens/make_clips.py

garden_clips.npz    `spec` (JSON: source, rows); `centre`, `linspace`: frame numbers of each row of spec["sampling"];
                    `maxval`: the number below which a random start is drawn; `from_start`: the frame numbers from spec["starts"];
                    `eval_NAME`: views uint8 of the video NAME of spec["videos"]; `train_NAME_K`: the clip cut by the K-th of its
                    boxes; `boxes_HEIGHTxWIDTH`: boxes (top, left, height, width) drawn by TensorFlow, int16 [2000, 4]

A second command, in an environment with tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10 array-record importlib_resources,
writes tfds_ucf101.npz: the files, as bytes, that TFDS's own builder of UCF-101 makes of 8 drawn videos, whose frame t of video k
is of the grey level 10 k + 3 t (5 + k frames of 24 x 32 pixels; class 3 k; the last three videos in split test):

    python tests/goldens/make_clips.py tfds
"""
import contextlib
import io
import os
import sys
import tempfile

import numpy as np

if __package__: from . import recipe
else: import recipe  # run as a script

FOLDER = os.path.dirname(os.path.abspath(__file__))
SAMPLING = [(n, frames, stride) for n in (1, 2, 5, 15, 16, 17, 31, 63, 64, 65, 100, 299, 300) for frames, stride in
            ((1, 1), (4, 1), (8, 1), (8, 3), (16, 2), (32, 2))]
STARTS = [(9, 8, 2, 3), (300, 32, 2, 237), (20, 8, 2, 19), (3, 5, 7, 2), (1, 4, 1, 0)]  # length, frames, stride, start
CLIPS = 10
# name -> frames, height, width, size; views (clips, crops); boxes of training crops
VIDEOS = {"wide": ((11, 31, 50, 24), (3, 3), [(0, 0, 31, 50), (3, 7, 11, 22), (4, 1, 24, 24), (20, 30, 7, 12)]),
          "tall": ((6, 45, 20, 24), (2, 3), [(5, 2, 33, 17)]),
          "square": ((9, 24, 24, 24), (1, 3), [(1, 1, 23, 22)]),
          "single": ((7, 37, 61, 20), (1, 1), [(30, 0, 5, 60)])}
FRAMES, STRIDE = 4, 2
SIZES = [(256, 340), (64, 64), (320, 180)]


def video(name):
    """The frames uint8 [T, H, W, 3] of the video `name`: smooth waves that move, and noise."""
    n, h, w, _ = VIDEOS[name][0]
    random = np.random.RandomState(sum(name.encode()))
    t, y, x, c = np.ogrid[0:n, 0:h, 0:w, 0:3]
    waves = np.abs((700 * x // w + 500 * y // h + 40 * t + 90 * c) % 460 - 230)
    return np.clip(waves + random.randint(-20, 40, (n, h, w, 3)), 0, 255).astype(np.uint8)


def garden():
    recipe.stub_model_garden()
    import tensorflow as tf
    from official.vision.dataloaders import video_input
    from official.vision.ops import preprocess_ops_3d as ops
    arrays = {}

    def numbers(n, *args, f=ops.sample_sequence): return f(tf.range(n), *args).numpy().astype(np.int16)

    arrays["centre"] = np.concatenate([numbers(n, frames, False, stride) for n, frames, stride in SAMPLING])
    arrays["linspace"] = np.concatenate([numbers(n, CLIPS, frames, stride, f=ops.sample_linspace_sequence)
                                         for n, frames, stride in SAMPLING])
    drawn = []

    def record(shape, maxval, dtype, seed):
        drawn.append(int(maxval))
        return tf.constant(start, dtype)

    real, start = ops.tf, 0
    ops.tf = recipe.Replaced(tf, random=recipe.Replaced(tf.random, uniform=record))
    for n, frames, stride in SAMPLING: ops.sample_sequence(tf.range(n), frames, True, stride)
    arrays["maxval"], chosen = np.array(drawn, np.int16), []
    for n, frames, stride, start in STARTS: chosen.append(numbers(n, frames, True, stride))  # noqa: B007 (`record` reads it)
    arrays["from_start"] = np.concatenate(chosen)
    ops.tf = real

    for name, ((_, _, _, size), (clips, crops), boxes) in VIDEOS.items():
        made = video_input.process_image(tf.constant(video(name)), False, FRAMES, STRIDE, num_test_clips=clips, min_resize=size,
                                         crop_size=size, num_crops=crops)
        made = video_input.postprocess_image(made[None], False, FRAMES, clips, crops).numpy() * 255
        made = made.reshape(-1, FRAMES, size, size, 3)
        arrays["eval_" + name] = np.rint(made).astype(np.uint8)
        assert np.abs(made - arrays["eval_" + name]).max() < 1e-3
        for k, (top, left, height, width) in enumerate(boxes):
            box = (tf.constant([top, left, 0]), tf.constant([height, width, -1]), None)
            image = recipe.Replaced(tf.image, sample_distorted_bounding_box=lambda *_, box=box, **__: box)
            ops.tf = recipe.Replaced(tf, image=image)
            arrays[f"train_{name}_{k}"] = ops.random_crop_resize(tf.constant(video(name)[:2]), size, size, 2, 3, (0.5, 2.0),
                                                                 (0.08, 1.0)).numpy()
            ops.tf = real
    for h, w in SIZES: arrays[f"boxes_{h}x{w}"] = draw_boxes(tf, ops, h, w)
    source = "tf-models-official 2.20.0, official/vision/ops/preprocess_ops_3d.py; TensorFlow " + tf.__version__
    spec = dict(source=source, sampling=SAMPLING, starts=STARTS, clips=CLIPS, frames=FRAMES, stride=STRIDE,
                videos={name: dict(shape=shape, views=views, boxes=boxes) for name, (shape, views, boxes) in VIDEOS.items()})
    recipe.save(os.path.join(FOLDER, "garden_clips.npz"), spec, arrays)


def draw_boxes(tf, ops, height, width, count=2000):
    """Boxes that TensorFlow draws when the authors' `random_crop_resize` asks for them, with the released run's ranges."""
    tf.random.set_seed(height)
    boxes = []

    def record(*args, **kwargs):
        begin, size, _ = answer = tf.image.sample_distorted_bounding_box(*args, **kwargs)
        boxes.append([*begin.numpy()[:2], *size.numpy()[:2]])
        return answer

    real, frames = ops.tf, tf.zeros((1, height, width, 3), tf.uint8)
    ops.tf = recipe.Replaced(tf, image=recipe.Replaced(tf.image, sample_distorted_bounding_box=record))
    for _ in range(count): ops.random_crop_resize(frames, 4, 4, 1, 3, (0.5, 2.0), (0.08, 1.0))
    ops.tf = real
    return np.array(boxes, np.int16)


def tfds_set():
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from tensorflow_datasets.video.ucf101 import Ucf101

    def examples(begin, end):
        for k in range(begin, end):
            yield k, {"video": np.stack([np.full((24, 32, 3), 10 * k + 3 * t, np.uint8) for t in range(5 + k)]), "label": 3 * k}

    Ucf101._split_generators = lambda self, manager: {"train": examples(0, 5), "test": examples(5, 8)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        builder = tfds.builder("ucf101/ucf101_1", data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        files = {p.name: np.frombuffer(p.read_bytes(), np.uint8) for p in sorted(builder.data_path.iterdir())}
    source = f"tensorflow-datasets {tfds.__version__}, video/ucf101.py; TensorFlow {tf.__version__}"
    recipe.save(os.path.join(FOLDER, "tfds_ucf101.npz"), dict(source=source, folder="ucf101/ucf101_1/2.0.0"), files)


if __name__ == "__main__":
    if sys.argv[1:] == ["tfds"]: tfds_set()
    else: garden()
