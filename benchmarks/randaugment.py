"""RandAugment on this machine: how three ways to run it compare. Prints ratios, not promises.

    python benchmarks/randaugment.py [--rounds 7] [--batch 64] [--size 32]

- switch: a loop over images with a true branch, one operation computed (what `rand_augment` does on a CPU);
- select: all images through all sixteen operations at once, results selected (what it does on an accelerator);
- one by one: a Python loop that calls `apply_op` for each image and layer, with the same draws.

All three return the same bytes, which is checked first. Each round times each of them once, in turn, so that a busy machine
disturbs all alike; ratios are medians over the rounds of the ratio within a round.
"""
import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from resnet_rs.randaugment import OPS, _augment, _draw, apply_op


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--size', type=int, default=32)
    asked = parser.parse_args()
    number, size, layers, magnitude = asked.batch, asked.size, 2, 10.
    translate, cutout = 100 * size / 224, 40 * size / 224
    images = np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    key = jax.random.key(0)
    draw = jax.jit(jax.vmap(partial(_draw, num_layers=layers, height=size, width=size, prob=1.), (None, 0)))

    def batch(form):
        scalars = map(jnp.float32, (magnitude, 1, translate, cutout))
        return np.asarray(_augment(key, images, *scalars, num_layers=layers, dialect='tf1', form=form))

    def one_by_one():
        draws, out = jax.tree.map(np.asarray, draw(key, jnp.arange(number))), []
        for i, image in enumerate(images):
            for op, sign, centre in zip(draws.op[i], draws.sign[i], draws.centre[i], strict=True):
                image = apply_op(OPS[op], image, magnitude, sign, centre=centre, translate=translate, cutout=cutout)
            out.append(np.asarray(image))
        return np.stack(out)

    ways = {'switch': partial(batch, 'switch'), 'select': partial(batch, 'select'), 'one by one': one_by_one}
    outs = [way() for way in ways.values()]                                 # compiles everything
    assert all((out == outs[0]).all() for out in outs), 'the three ways disagree'
    seconds = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f'{number} images of {size} px, {layers} layers, {asked.rounds} rounds, on {jax.devices()[0].device_kind}')
    for name in ways:
        ratios = np.divide(seconds[name], seconds['switch'])
        low, high = np.quantile(ratios, [0.25, 0.75])
        print(f'{name:10} / switch: {np.median(ratios):8.2f}   (middle half of the rounds {low:.2f} to {high:.2f})')


if __name__ == '__main__':
    main()
