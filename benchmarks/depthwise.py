"""Depthwise convolution on this backend: XLA's grouped convolution against the sum of shifted images. Prints ratios.

    python benchmarks/depthwise.py [--rounds 7] [--batch 4]

The shapes are those of EfficientNet-B0 to B2. A round times each way once, in turn; ratios are medians over the rounds.
"""
import argparse
import time
from functools import partial

import jax
import numpy as np

from resnet_rs.efficientnet import _grouped, _shifted, _shifted_bwd


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batch', type=int, default=4)
    asked = parser.parse_args()
    print(f'time of grouped / time of shifted, {asked.batch} images, {asked.rounds} rounds, on {jax.devices()[0].device_kind}')
    for side, channels, size, stride in ((56, 144, 3, 1), (56, 144, 5, 2), (112, 96, 3, 2), (14, 672, 5, 1), (7, 1152, 5, 1)):
        pads = tuple(map(tuple, jax.lax.padtype_to_pads((side, side), (size, size), (stride, stride), 'SAME')))
        n, small = asked.batch, -(-side // stride)
        shapes = (n, side, side, channels), (size, size, 1, channels), (n, small, small, channels)
        x, w, dy = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
        grouped, shifted, backward = (partial(f, stride=(stride, stride), pads=pads) for f in (_grouped, _shifted, _shifted_bwd))
        def plain(x, w, dy, f=grouped): return jax.vjp(f, x, w)[1](dy)
        ratios = []
        for pair, arrays in (((grouped, shifted), (x, w)), ((plain, backward), (x, w, dy))):
            ways, seconds = [jax.jit(f) for f in pair], [[], []]
            for r in range(asked.rounds + 1):
                for way, spent in zip(ways, seconds, strict=True):
                    start = time.perf_counter()
                    jax.block_until_ready(way(*arrays))
                    if r: spent.append(time.perf_counter() - start)      # the first compiles
            ratios.append(np.median(np.divide(*seconds)))
        print(f'{side:3} px, {channels:4} channels, {size}x{size}, stride {stride}: '
              f'forward {ratios[0]:5.1f}x, gradients {ratios[1]:5.1f}x')


if __name__ == '__main__':
    main()
