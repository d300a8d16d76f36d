"""Reading training images: decode, random crop, resize, flip. Ours against tf.data with the authors' operations and Pillow.

    python benchmarks/jpeg.py [--images FOLDER_OR_TAR] [--tf PYTHON] [--size 160] [--count 96] [--rounds 15]

FOLDER_OR_TAR holds JPEGs, also in folders or tars inside it; without it, the two photographs that scikit-learn ships are used, as
they are and at half their size. PYTHON is an interpreter of an environment with TensorFlow (pip install tensorflow-cpu).

ours     train_preprocess in protocol tf1: exactly the authors' pixels
timm     train_preprocess in protocol timm, and with reduced=True, which decodes large photographs at a smaller size
tf.data  the authors' operations: decode_image, sample_distorted_bounding_box, the central square if the whole image comes back,
         resize_bicubic, flip, clip and cast, mapped over encoded images in memory
Pillow   decode, crop to the same kind of window, bicubic resize (with antialiasing), flip

Every contender is a process of its own with one thread, that waits for its turn; a round gives each of them one turn over the
same images, in an order that changes, so a busy machine disturbs all alike. Ratios are medians over the rounds of the ratio
within a round. tf.data may not work ahead (no prefetching): it would do so while others have their turns.
"""
import argparse
import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

CONTENDERS = ('ours', 'timm', 'timm, reduced', 'Pillow', 'tf.data')


def encoded(place, count):
    "`count` JPEGs, repeated if there are fewer."
    found = []
    for data in (photographs() if place is None else jpegs(Path(place))):
        found.append(data)
        if len(found) == count: break
    if not found: sys.exit(f'no JPEG in {place}')
    return [found[i % len(found)] for i in range(count)]


def jpegs(place):
    if place.is_dir():
        for path in sorted(place.rglob('*')):
            if path.is_file(): yield from unpacked(path.read_bytes())
    else: yield from unpacked(place.read_bytes())


def unpacked(data):
    "The JPEGs in a JPEG, which is one, and in a tar of JPEGs and of such tars."
    if data[:3] == b'\xff\xd8\xff': yield data
    elif data[257:262] == b'ustar':
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.isfile(): yield from unpacked(tar.extractfile(member).read())


def photographs():
    from importlib.resources import files

    from PIL import Image
    for name in ('china', 'flower'):
        data = (files('sklearn.datasets.images') / f'{name}.jpg').read_bytes()
        half = io.BytesIO()
        Image.open(io.BytesIO(data)).resize((320, 213)).save(half, 'JPEG', quality=90)
        yield from (data, half.getvalue())


def our_turn(images, size, **options):
    import numpy as np

    from resnet_rs.preprocess import train_preprocess
    rng = np.random.default_rng(0)
    return lambda: [train_preprocess(data, size, rng, **options) for data in images]


def pillow_turn(images, size):
    import numpy as np
    from PIL import Image

    from resnet_rs.preprocess import sample_crop
    rng = np.random.default_rng(0)

    def one(data):
        image = Image.open(io.BytesIO(data)).convert('RGB')
        top, left, height, width = sample_crop(rng, image.height, image.width, 'timm')
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image)
    return lambda: [one(data) for data in images]


def tf_turn(images, size):
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    box, share = tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), size / (size + round(size / 7))

    def square(data, shape):
        side = tf.cast(share * tf.cast(tf.minimum(shape[0], shape[1]), tf.float32), tf.int32)
        window = tf.stack([(shape[0] - side + 1) // 2, (shape[1] - side + 1) // 2, side, side])
        return tf.image.decode_and_crop_jpeg(data, window, channels=3)

    def one(data):
        whole = tf.io.decode_image(data, channels=3, expand_animations=False)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(whole), box, seed=0, min_object_covered=0.1, aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0),
            max_attempts=10, use_image_if_no_bounding_boxes=True)
        part = tf.image.crop_to_bounding_box(whole, begin[0], begin[1], extent[0], extent[1])
        shape = tf.image.extract_jpeg_shape(data)
        part = tf.cond(tf.reduce_all(shape == tf.shape(part)), lambda: square(data, shape), lambda: part)
        image = tf.image.random_flip_left_right(tf.compat.v1.image.resize_bicubic(part[None], [size, size])[0])
        return tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = options.experimental_optimization.inject_prefetch = False
    data = tf.data.Dataset.from_tensor_slices(images).repeat().map(one).with_options(options).as_numpy_iterator()
    return lambda: [next(data) for _ in images]


def work(who, size):
    "A contender: gets the images, warms up, then does a turn for every line and answers with seconds."
    import pickle
    images = pickle.load(sys.stdin.buffer)
    options = {'timm': dict(protocol='timm'), 'timm, reduced': dict(protocol='timm', reduced=True)}.get(who, {})
    turn = {'Pillow': pillow_turn, 'tf.data': tf_turn}.get(who, our_turn)(images, size, **options)
    result = turn()
    assert len(result) == len(images) and all(r.shape == (size, size, 3) and r.dtype == 'uint8' for r in result)
    print('ready', flush=True)
    while sys.stdin.buffer.readline():
        start = time.perf_counter()
        turn()
        print(time.perf_counter() - start, flush=True)


def race(asked):
    import pickle

    import numpy as np
    images = encoded(asked.images, asked.count)
    env = os.environ | {f'{name}_NUM_THREADS': '1' for name in ('OMP', 'OPENBLAS', 'MKL')} | {'CUDA_VISIBLE_DEVICES': ''}
    running = {}
    for who in CONTENDERS[:None if asked.tf else -1]:
        command = [asked.tf if who == 'tf.data' else sys.executable, __file__, '--work', who, '--size', str(asked.size)]
        running[who] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        pickle.dump(images, running[who].stdin, protocol=4)
        running[who].stdin.flush()
        if running[who].stdout.readline().strip() != b'ready': sys.exit(f'{who} did not start')
    seconds = {who: [] for who in running}
    for r in range(asked.rounds):
        order = list(running)
        for who in order[r % len(order):] + order[:r % len(order)]:
            running[who].stdin.write(b'go\n')
            running[who].stdin.flush()
            seconds[who].append(float(running[who].stdout.readline()))
    for process in running.values(): process.kill()
    where = Path(asked.images).name if asked.images else "scikit-learn's two photographs, whole and half"
    print(f'{asked.count} JPEGs ({where}), {sum(map(len, images)) / len(images) / 1000:.0f} kB on average, to {asked.size} px; '
          f'{asked.rounds} rounds, one thread each')
    for who in running:
        rate = asked.count / np.median(seconds[who])
        print(f'{who:14} {rate:7.0f} images/s a core', end='')
        for base in ('tf.data', 'Pillow'):
            if base in running and base != who:
                ratios = np.divide(seconds[base], seconds[who])
                low, high = np.quantile(ratios, [0.25, 0.75])
                print(f'   {np.median(ratios):5.2f}x {base} ({low:.2f} to {high:.2f})', end='')
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', metavar='FOLDER_OR_TAR')
    parser.add_argument('--tf', metavar='PYTHON')
    parser.add_argument('--size', type=int, default=160)
    parser.add_argument('--count', type=int, default=96)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--work', choices=CONTENDERS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work: work(asked.work, asked.size)
    else: race(asked)


if __name__ == '__main__':
    main()
