"""ResNet-RS-50 against timm's on the same cores: ratios of a training step and of a forward pass, from one interleaved run.

    python benchmarks/networks.py --timm PYTHON [--rounds 9] [--model resnet_rs_50] [--size 160] [--batch 16]
    python benchmarks/networks.py --compile [resnet_rs_50 resnet_rs_152 resnet_rs_420]
    python benchmarks/networks.py --pointwise

PYTHON is an interpreter of an environment with torch and timm (pip install torch==2.13.0; pip install --no-deps timm==1.0.31;
pip install pyyaml huggingface_hub safetensors); torchvision, which timm imports and this does not use, may be missing. Without
--timm our own ways are compared with each other.

Every contender is a process of its own that waits for its turn; a round gives each of them one turn, in an order that changes,
so a busy machine disturbs all alike. Ratios are medians over the rounds of the ratio within a round. Random labels and a small
learning rate: constant labels drive torch into subnormal numbers, which are slow. OpenMP keeps torch's default policy: a passive
one slows torch. The flag of the second of our ways is experimental (XLA_FLAGS) and opt-in.

--compile: time to trace and to compile a training step, and again from the persistent cache.
--pointwise: 1x1 convolutions as matrix products against lax.conv, forward and with gradients, on this backend.
"""
import argparse
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import tempfile
import time
from unittest.mock import MagicMock

FLAG = '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution'
KINDS = ('train', 'forward')


def inputs(batch, size):
    import numpy as np
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, size, size, 3), dtype=np.float32), rng.integers(0, 1000, batch)


def our_turns(name, batch, size):
    "{kind: a function that does it once}: the training step of `fit`, averages of the weights and all, and inference."
    import jax
    import numpy as np
    from flax import nnx

    from resnet_rs.registry import create_model
    from resnet_rs.steps import Hyper, compiled_step, cross_entropy, initial_state, split

    network, params, stats = split(create_model(name))
    hyper = Hyper(peak_lr=1e-4, total_steps=10**6, label_smoothing=0.1, weight_decay=4e-5).traced()
    images, labels = map(jax.device_put, inputs(batch, size))
    step, key = compiled_step(network, cross_entropy, 'paper'), jax.random.key(0)
    model = network.rebuild(params, stats)
    model.eval()
    graph, *arrays = nnx.split(model, nnx.Param, nnx.BatchStat)
    predict = jax.jit(lambda arrays, images: nnx.merge(graph, *arrays)(images))
    held = [initial_state(params, stats)]

    def train():
        held[0], loss = step(held[0], images, labels, hyper, key)
        jax.block_until_ready((held[0], loss))
        assert np.isfinite(loss)
    return dict(train=train, forward=lambda: jax.block_until_ready(predict(arrays, images)))


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Stands in for torchvision: anything can be imported from it and nothing of it works."
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split('.')[0] == 'torchvision' else None

    def create_module(self, spec): return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)
    def exec_module(self, module): pass


def timm_turns(name, batch, size):
    sys.meta_path.append(_Absent())
    import timm
    import torch

    model = timm.create_model(f'tf_{name}' if name.startswith('efficientnet') else name.replace('_', ''), pretrained=False)
    images, labels = (torch.from_numpy(array) for array in inputs(batch, size))
    images = images.permute(0, 3, 1, 2).contiguous()
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True, weight_decay=4e-5)

    def train():
        model.train()
        optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)

    def forward():
        model.eval()
        with torch.inference_mode(): model(images)
    return dict(train=train, forward=forward)


def work(who, name, batch, size):
    "A contender: warms up, then does what it is told, a word a line, and answers with seconds."
    turns = (timm_turns if who == 'timm' else our_turns)(name, batch, size)
    for turn in turns.values(): turn(), turn()
    print('ready', flush=True)
    for word in sys.stdin:
        start = time.perf_counter()
        turns[word.strip()]()
        print(time.perf_counter() - start, flush=True)


def race(asked):
    import numpy as np
    plain = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
    contenders = {'ours': (sys.executable, plain), 'ours, flag': (sys.executable, plain | {'XLA_FLAGS': FLAG})}
    if asked.timm: contenders = {'timm': (asked.timm, plain)} | contenders
    arguments = [asked.model, str(asked.batch), str(asked.size)]
    running = {}
    for who, (python, env) in contenders.items():
        command = [python, __file__, '--work', 'timm' if who == 'timm' else 'ours', *arguments]
        running[who] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        if running[who].stdout.readline().strip() != 'ready': sys.exit(f'{who} did not start')
    base = next(iter(running))
    print(f'{asked.model}, {asked.size} px, {asked.batch} images, float32, {asked.rounds} rounds, {os.cpu_count()} cores')
    for kind in KINDS:
        seconds = {who: [] for who in running}
        for r in range(asked.rounds):
            order = list(running)
            for who in order[r % len(order):] + order[:r % len(order)]:
                print(kind, file=running[who].stdin, flush=True)
                seconds[who].append(float(running[who].stdout.readline()))
        for who in running:
            speed = np.divide(seconds[base], seconds[who])
            low, high = np.quantile(speed, [0.25, 0.75])
            print(f'{kind:8} {who:11} {np.median(seconds[who]):7.3f} s    speed / {base}: {np.median(speed):5.2f}x'
                  f'   (middle half of the rounds {low:.2f} to {high:.2f})')
    for process in running.values(): process.kill()


def compile_times(names):
    "Trace and compile a training step in fresh processes: without a cache, then with the one the first has left."
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
                            'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
        for name in names:
            for what in ('first', 'second'):
                command = [sys.executable, __file__, '--compile-one', name]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                print(f'{name}, {what} start: {done.stdout.strip()}', flush=True)


def compile_one(name):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from resnet_rs.registry import create_model
    from resnet_rs.steps import Hyper, compiled_step, cross_entropy, initial_state, split

    model = nnx.eval_shape(lambda: create_model(name))
    network, params, stats = split(model)
    state = jax.eval_shape(initial_state, params, stats)
    shapes = (jax.ShapeDtypeStruct((16, 160, 160, 3), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32))
    start = time.perf_counter()
    lowered = compiled_step(network, cross_entropy, 'paper').lower(state, *shapes, Hyper().traced(), jax.random.key(0))
    traced = time.perf_counter()
    lowered.compile()
    print(f'trace and lower {traced - start:5.1f} s, compile {time.perf_counter() - traced:5.1f} s')


def pointwise(rounds):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from resnet_rs.blocks import _pointwise

    layout = ('NHWC', 'HWIO', 'NHWC')
    def conv(x, w): return jax.lax.conv_general_dilated(x, w[None, None], (1, 1), 'SAME', dimension_numbers=layout)
    def gradients(f): return jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), (0, 1))
    print(f'1x1 convolution on {jax.devices()[0].device_kind}: time of lax.conv / time of the matrix product, {rounds} rounds')
    for side, c_in, c_out in ((40, 64, 256), (40, 256, 64), (20, 512, 128), (10, 256, 1024), (5, 2048, 512)):
        shapes = (16, side, side, c_in), (c_in, c_out)
        arrays, ratios = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)], []
        for pair in ((conv, _pointwise), (gradients(conv), gradients(_pointwise))):
            ways, seconds = [jax.jit(f) for f in pair], [[], []]
            for r in range(rounds + 1):
                for way, spent in zip(ways, seconds, strict=True):
                    start = time.perf_counter()
                    for _ in range(5): out = way(*arrays)
                    jax.block_until_ready(out)
                    if r: spent.append(time.perf_counter() - start)      # the first compiles
            ratios.append(np.median(np.divide(*seconds)))
        print(f'{side:3} px, {c_in:4} to {c_out:4}: forward {ratios[0]:5.2f}x, with gradients {ratios[1]:5.2f}x')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--timm', metavar='PYTHON')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--model', default='resnet_rs_50')
    parser.add_argument('--size', type=int, default=160)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--compile', nargs='*', metavar='NAME')
    parser.add_argument('--pointwise', action='store_true')
    parser.add_argument('--work', nargs=4, help=argparse.SUPPRESS)
    parser.add_argument('--compile-one', help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work: work(asked.work[0], asked.work[1], *map(int, asked.work[2:]))
    elif asked.compile_one: compile_one(asked.compile_one)
    elif asked.compile is not None: compile_times(asked.compile or ['resnet_rs_50', 'resnet_rs_152', 'resnet_rs_420'])
    elif asked.pointwise: pointwise(asked.rounds)
    else: race(asked)


if __name__ == '__main__':
    main()
