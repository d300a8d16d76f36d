"""RandAugment on this machine: how ways to run it compare. Prints ratios, not promises.

    python benchmarks/randaugment.py [--rounds 7] [--batch 64] [--size 32] [--dialect tf1]

The three forms of a batch that the library has, compiled:

- switch: a loop over images with a true branch, one operation computed (what `rand_augment` does on a CPU);
- select: all images through all sixteen operations at once, results selected;
- fused: all images through one map, one table, one blend and one hole a layer (what it does on an accelerator);

and two that are not compiled as a whole:

- one by one: a Python loop that calls `apply_op` for each image and layer, with the same draws;
- Pillow: such a loop with Pillow's own operations, at the same draws and strengths. Against the dialect tf1 it gives the same
  bytes but for Color, Sharpness and Contrast (rounding; the mean of the image) and where a shear has to break a tie.

The first four return the same bytes, which is checked first. Each round times each of them once, in turn, so that a busy machine
disturbs all alike; ratios are medians over the rounds of the ratio within a round.
"""
import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from resnet_rs.image_ops import _DIALECTS
from resnet_rs.randaugment import OPS, _augment, _draws, apply_op

GREY = (128, 128, 128)
AT_FACTOR = {name: getattr(ImageEnhance, name) for name in ('Color', 'Contrast', 'Brightness', 'Sharpness')}
PLAIN = {'AutoContrast': ImageOps.autocontrast, 'Equalize': ImageOps.equalize, 'Invert': ImageOps.invert}


def pillow_op(name, image, m, sign, centre, translate, cutout):
    """One operation of Pillow's at magnitude m, with the arguments that ours has."""
    def affine(*matrix): return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=GREY)  # nearest pixel
    if name in PLAIN: return PLAIN[name](image)
    if name in AT_FACTOR: return AT_FACTOR[name](image).enhance(0.18 * m + 0.1)
    if name == 'Rotate': return image.rotate(sign * 3 * m, Image.Resampling.NEAREST, fillcolor=GREY)
    if name == 'Posterize': return ImageOps.posterize(image, min(max(int(0.4 * m), 1), 8))
    if name == 'Solarize': return ImageOps.solarize(image, int(25.6 * m) % 256)
    if name == 'ShearX': return affine(1, sign * 0.03 * m, 0, 0, 1, 0)
    if name == 'ShearY': return affine(1, 0, 0, sign * 0.03 * m, 1, 0)
    if name == 'TranslateX': return affine(1, 0, sign * m * translate / 10, 0, 1, 0)
    if name == 'TranslateY': return affine(1, 0, 0, 0, 1, sign * m * translate / 10)
    if name == 'SolarizeAdd': return image.point([min(v + int(11 * m), 255) if v < 128 else v for v in range(256)] * 3)
    (row, column), half = centre, int(m * cutout / 10)
    return image.copy() if not half else paste(image, (column - half, row - half, column + half, row + half))


def paste(image, box):
    """The image with a grey box."""
    image = image.copy()
    image.paste(GREY, tuple(int(side) for side in box))
    return image


def by_loop(images, draws, begin, step, end):
    """A Python loop over images and layers; `step(name, image, sign, centre)` does one operation."""
    out = []
    for image, ops, signs, centres in zip(images, *map(np.asarray, draws), strict=True):
        image = begin(image)
        for op, sign, centre in zip(ops, signs, centres, strict=True):
            if op < len(OPS): image = step(OPS[op], image, sign, centre)
        out.append(end(image))
    return np.stack(out)


def ways_of(images, magnitude, layers, dialect, translate, cutout):
    """{name: a function without arguments that augments the images}; the same draws for all."""
    key, (number, size, _, _) = jax.random.key(0), images.shape
    draw = jax.jit(partial(_draws, number=number, num_layers=layers, height=size, width=size, prob=1.,
                           choices=_DIALECTS[dialect].choices))

    def batch(form):
        scalars = map(jnp.float32, (magnitude, 1, translate, cutout))
        return np.asarray(_augment(key, images, *scalars, num_layers=layers, dialect=dialect, form=form))

    def ours(name, image, sign, centre): return apply_op(name, image, magnitude, sign, dialect, centre, translate, cutout)
    def pillows(name, image, sign, centre): return pillow_op(name, image, magnitude, sign, centre, translate, cutout)
    return {**{form: partial(batch, form) for form in ('switch', 'select', 'fused')},
            'one by one': lambda: by_loop(images, draw(key), lambda image: image, ours, np.asarray),
            'Pillow': lambda: by_loop(images, draw(key), Image.fromarray, pillows, np.asarray)}


def check(outs, dialect):
    """The library's ways must agree to the byte; Pillow does the same work if half of its images are nearly those of tf1."""
    ours = outs['switch']
    assert all((out == ours).all() for name, out in outs.items() if name != 'Pillow'), 'the ways disagree'
    distance = np.median(np.abs(outs['Pillow'].astype(float) - ours).mean((1, 2, 3)))
    assert dialect != 'tf1' or distance < 8, f'Pillow did something else: half of its images differ by {distance} grey levels'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--dialect', choices=list(_DIALECTS), default='tf1')
    asked = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (asked.batch, asked.size, asked.size, 3), dtype=np.uint8)
    ways = ways_of(images, magnitude=10., layers=2, dialect=asked.dialect,
                   translate=100 * asked.size / 224, cutout=40 * asked.size / 224)
    check({name: way() for name, way in ways.items()}, asked.dialect)       # compiles everything
    seconds = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f'{asked.dialect}: {asked.batch} images of {asked.size} px, 2 layers, {asked.rounds} rounds, '
          f'on {jax.devices()[0].device_kind}')
    for name in ways:
        ratios = np.divide(seconds[name], seconds['switch'])
        low, high = np.quantile(ratios, [0.25, 0.75])
        print(f'{name:10} / switch: {np.median(ratios):8.2f}   (middle half of the rounds {low:.2f} to {high:.2f})')


if __name__ == '__main__':
    main()
