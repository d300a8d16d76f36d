"""The network of the laptop scale on a CPU: Python's share of a step, the same network in PyTorch, the second start.

    python benchmarks/laptop.py [overhead] [torch] [start] [--torch PYTHON] [--rows baseline resnet_d] [--rounds 9]

PYTHON is an interpreter of an environment with torch; without it our own ways are compared with each other. --dry goes through
everything on the scale `smoke`, once, and says nothing of speed.

overhead  What the interpreter costs in a step as `fit` makes it: a batch taken, the augmentation called, the step called. JAX
          computes on threads of its own while the main thread calls ahead, so neither the time in a call (which waits when too
          much is under way) nor the step less its computation can be measured well. Two things can. (1) The processor time of
          the main thread, by the operating system's clock of that thread, over the wall time of the loop: it counts Python,
          dispatch and the handling of some hundreds of arrays, and not waiting. Should JAX compute something in the calling
          thread (it does so with programs that it deems cheap), that is counted too: the share is never too small. (2) The
          same loop with programs of the same arguments, results and donation that compute nothing: all of its time is
          overhead, that of JAX's own threads too, which a real step hides behind computation. (2) is the share of
          which the goal speaks, at most 5%: all of Python and of JAX's dispatch; (1) has the computation in it that XLA makes in
          the calling thread, such as clearing memory. (1) is given for what the
          library does, a step over flat dictionaries of arrays, and for the same step under nnx.jit, which walks through the
          module at every call, both as parts of the flat step.
torch     The training step of that network against the same one in PyTorch, written here: the number of parameters and the
          FLOPs are compared first. Float32, the same batch, random labels, SGD with Nesterov's momentum, weight decay, label
          smoothing; dropout, stochastic depth and averages of the weights where the row has them (ours keeps the averages in
          every row). PyTorch in its usual layout, in channels_last and, with --compile, compiled. Goal: at least as fast.
start     From the start of a process to the end of the first step of the ablation's run, as the notebook makes it, with no
          compiled programs kept and with those that the first start has kept. The data set is prepared and Python's files
          are compiled before. Goal: the second takes at most a quarter of the time.

Every contender is a process of its own that waits for its turn; a round gives each of them one turn, in an order that changes, so
a busy machine disturbs all alike. Ratios are medians over the rounds of the ratio within a round, with the middle half. The flag
of `ours, flag` is experimental (see docs/performance.md) and opt-in.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from networks import FLAG

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PARTS = ('overhead', 'torch', 'start')


# What the parts share.

def planned(row, dry):
    "Configuration and effective values of a row of the ablation at the scale laptop."
    from resnet_rs.config import ladder, scaled
    from resnet_rs.effective import effective
    scale = 'smoke' if dry else 'laptop'
    config = scaled(ladder()[row], scale)
    return config, effective(config, scale, config.train_examples)


def start(command, python=sys.executable, **env):
    plain = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
    return subprocess.Popen([python, __file__, '--work', *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, env=plain | env)


def heard(process, what):
    "The next line of a contender, which is JSON."
    line = process.stdout.readline()
    if not line: sys.exit(f'{what} gave up with status {process.wait()}')
    return json.loads(line)


def say(answer): print(json.dumps(answer), flush=True)


def middle(values):
    import numpy as np
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f'{median:.3g} (middle half of the rounds {low:.3g} to {high:.3g})'


def percent(values):
    import numpy as np
    low, median, high = 100 * np.quantile(values, [0.25, 0.5, 0.75])
    return f'{median:.1f}% ({low:.1f} to {high:.1f})'


# Python's share of a step.

def overhead(row, rounds, dry):
    "In a process of its own: {way: [(wall, main thread) in seconds a step, one a round]}."
    import jax
    import numpy as np
    from flax import nnx

    from resnet_rs.experiment import use_compilation_cache
    from resnet_rs.registry import from_config
    from resnet_rs.run_data import seeded_data, training_batches
    from resnet_rs.runs import augmentation, hyper_of
    from resnet_rs.steps import compiled_augment, compiled_step, cross_entropy, initial_state, split

    use_compilation_cache()
    config, values = planned(row, dry)
    data, hyper, key = seeded_data(config, 0), jax.device_put(hyper_of(values).traced()), jax.random.key(0)
    info, steps = data.train.info, 2 if dry else 20
    network, params, stats = split(from_config(config, info.classes, nnx.Rngs(0)))
    augment = compiled_augment(augmentation(info, values.randaug_layers, config.dialect))
    step = compiled_step(network, cross_entropy, config.dialect)
    def first(): return initial_state(params, stats)
    def batches(): return training_batches(data.train, config.batch_size, steps, 0)

    def a_round(way):
        "As the loop of `fit`."
        call, prepare, state, losses = *way, []
        wall, own = time.perf_counter(), time.thread_time()
        for i, (images, labels) in enumerate(batches()):
            inputs = prepare(images, hyper, key, np.int32(i))
            state, value = call(state, inputs, labels, hyper, key)
            losses.append(value)
        jax.block_until_ready(losses)
        way[2] = state
        return (time.perf_counter() - wall) / steps, (time.thread_time() - own) / steps

    example = jax.block_until_ready(augment(next(iter(batches()))[0], hyper, key, np.int32(0)))
    ways = {'flat': [step, augment, first()], 'nnx.jit': [under_nnx(step, network), augment, with_module(network, first())],
            'nothing to compute': [*that_compute_nothing(example), first()]}
    for way in ways.values(): a_round(way), a_round(way)
    found = {name: [] for name in ways}
    for r in range(rounds):
        names = list(ways)
        for name in names[r % 3:] + names[:r % 3]: found[name].append(a_round(ways[name]))
    say(found | dict(leaves=len(jax.tree.leaves(first()))))


def with_module(network, state): return network.rebuild(state.params, state.stats), state._replace(params={}, stats={})


def under_nnx(step, network):
    "The same step over a module, the rest of the state as it was."
    from flax import nnx

    from resnet_rs.steps import split

    @nnx.jit(donate_argnums=(0, 1))
    def by_module(model, rest, *given):
        params, stats = split(model)[1:]
        state, value = step.__wrapped__(rest._replace(params=params, stats=stats), *given)
        nnx.update(model, nnx.state(network.rebuild(state.params, state.stats)))
        return state._replace(params={}, stats={}), value

    def call(state, *given):
        rest, value = by_module(*state, *given)
        return (state[0], rest), value
    return call


def that_compute_nothing(inputs):
    "Programs with the arguments and results of the step and of the augmentation, which gives `inputs`."
    import jax
    def same(tree): return jax.tree.map(lambda x: x * 1, tree)   # XLA makes nothing of it
    step = jax.jit(lambda state, inputs, labels, hyper, key: (same(state), hyper.peak_lr * 1), donate_argnums=0, keep_unused=True)
    augment = jax.jit(lambda inputs, images, hyper, key, step: inputs, keep_unused=True)
    return step, lambda images, *given: augment(inputs, images, *given)


def show_overhead(row, asked):
    import numpy as np
    process = start(['overhead', row, asked.rounds, int(asked.dry)])
    found, walls, owns = heard(process, 'overhead'), {}, {}
    process.wait()
    leaves = found.pop('leaves')
    for name, pairs in found.items(): walls[name], owns[name] = np.array(pairs).T
    step = walls['flat']
    print(f'{row}: a step takes {1000 * np.median(step):.1f} ms, its state is {leaves} arrays')
    shares = {name: percent(own / step) for name, own in owns.items()}
    print(f'  main thread, of a step: flat {shares["flat"]}, nnx.jit {shares["nnx.jit"]}')
    print(f'  with nothing to compute, of a step: {percent(walls["nothing to compute"] / step)} in all (goal: 5% or less),'
          f' main thread {shares["nothing to compute"]}')
    print(f'  main thread, nnx.jit / flat: {middle(owns["nnx.jit"] / owns["flat"])};'
          f' a whole step, nnx.jit / flat: {middle(walls["nnx.jit"] / step)}')


# The same network in PyTorch.

def our_step(row, dry):
    "(parameters, FLOPs, a function that makes n steps) of the network of a row."
    import jax
    import numpy as np
    from flax import nnx

    from resnet_rs.experiment import use_compilation_cache
    from resnet_rs.registry import from_config
    from resnet_rs.runs import hyper_of
    from resnet_rs.scaling_rules import count_flops, count_params
    from resnet_rs.steps import compiled_step, cross_entropy, initial_state, split
    use_compilation_cache()
    config, values = planned(row, dry)
    model = from_config(config, 10, nnx.Rngs(0))
    counts = count_params(model), count_flops(model, config.image_size)
    network, params, stats = split(model)
    hyper = hyper_of(values)._replace(peak_lr=1e-4, total_steps=10**6, warmup_steps=0).traced()
    images, labels = map(jax.device_put, inputs(config))
    step, key = compiled_step(network, cross_entropy, config.dialect), jax.random.key(0)
    held = [initial_state(params, stats), None]

    def make(n):
        for _ in range(n): held[:] = step(held[0], images, labels, hyper, key)
        jax.block_until_ready(held)
        assert np.isfinite(held[1])
    return *counts, make


def inputs(config):
    import numpy as np
    rng = np.random.default_rng(0)
    size, batch = config.image_size, config.batch_size
    return rng.standard_normal((batch, size, size, 3), dtype=np.float32), rng.integers(0, 10, batch, dtype=np.int32)


def torch_network(config, values):
    "The ResNet of `config` in PyTorch, with padding, order of operations and rates of the dialect `paper`."
    import torch
    from torch import nn

    from resnet_rs.config import DEPTHS

    def conv_norm(c_in, c_out, size=1, stride=1, act=True):
        conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
        norm = nn.BatchNorm2d(c_out, momentum=1 - values.bn_momentum)
        return nn.Sequential(conv, norm, nn.ReLU(inplace=True) if act else nn.Identity())

    class Gate(nn.Module):
        def __init__(self, channels):
            super().__init__()
            hidden = int(channels * config.se_ratio)
            reduce, expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
            self.layers = nn.Sequential(reduce, nn.ReLU(inplace=True), expand, nn.Sigmoid())

        def forward(self, x): return x * self.layers(x.mean((2, 3), keepdim=True))

    class Block(nn.Module):
        def __init__(self, c_in, features, stride, project, drop):
            super().__init__()
            c_out, pooled = 4 * features, config.shortcut == 'avg' and stride > 1
            self.branch = nn.Sequential(conv_norm(c_in, features), conv_norm(features, features, 3, stride),
                                        conv_norm(features, c_out, act=False), Gate(c_out) if config.se_ratio else nn.Identity())
            nn.init.zeros_(self.branch[2][1].weight)
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()
            projection = conv_norm(c_in, c_out, 1, 1 if pooled else stride, act=False)
            self.shortcut, self.drop = nn.Sequential(pool, projection) if project else nn.Identity(), drop

        def forward(self, x):
            branch = self.branch(x)
            if self.training and self.drop:
                kept = torch.rand(len(x), 1, 1, 1) >= self.drop
                branch = branch * kept / (1 - self.drop)
            return torch.relu(branch + self.shortcut(x))

    half, full = int(32 * config.width), int(64 * config.width)
    deep = [(3, half, 3, 2), (half, half, 3, 1), (half, full, 3, 1)]
    stem = [conv_norm(*shape) for shape in (deep if config.stem == 'deep' else [(3, full, 7, 2)])]
    # ceil_mode: TensorFlow's SAME on even sizes
    stem.append(conv_norm(full, full, 3, 2) if config.stem_pool == 'conv' else nn.MaxPool2d(3, 2, ceil_mode=True))
    blocks, channels = [], full
    for i, count in enumerate(DEPTHS[config.depth]):
        features, drop = int(64 * 2**i * config.width), values.drop_path * (i + 2) / 5    # one rate for each stage
        for j in range(count):
            blocks.append(Block(channels, features, 2 if i and not j else 1, not j, drop))
            channels = 4 * features
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(values.dropout), nn.Linear(channels, 10)
    return nn.Sequential(*stem, *blocks, *head)


def torch_step(row, dry, layout, compiled):
    "As `our_step`, in PyTorch."
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torch.utils.flop_counter import FlopCounterMode
    config, values = planned(row, dry)
    layout = dict(memory_format=torch.channels_last if layout == 'channels_last' else torch.contiguous_format)
    model = torch_network(config, values).to(**layout)
    images, labels = (torch.from_numpy(array) for array in inputs(config))
    images, labels = images.permute(0, 3, 1, 2).contiguous(**layout), labels.long()
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(images[:1])
    counts = sum(p.numel() for p in model.parameters()), counter.get_total_flops()
    model.train()
    averaging = get_ema_multi_avg_fn(values.ema_decay)
    averages = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True) if values.ema_decay else None
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=values.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=values.momentum, nesterov=True, fused=True,
                                weight_decay=values.weight_decay)
    call = torch.compile(model) if compiled else model

    def make(n):
        for _ in range(n):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(call(images), labels)
            loss.backward()
            optimizer.step()
            if averages: averages.update_parameters(model)
        assert torch.isfinite(loss)
    return *counts, make


def contend(who, row, dry):
    "A contender: says what its network is, then makes as many steps as it is told, a number a line, and answers with seconds."
    options = dict(layout='channels_last' if 'channels_last' in who else 'usual', compiled='compiled' in who)
    params, flops, make = torch_step(row, dry, **options) if who.startswith('torch') else our_step(row, dry)
    make(2)
    say(dict(params=params, flops=flops))
    for line in sys.stdin:
        make(1)
        begin = time.perf_counter()
        make(int(line))
        say((time.perf_counter() - begin) / int(line))


def race(row, asked):
    import numpy as np
    contenders = {'ours': (sys.executable, {}), 'ours, flag': (sys.executable, dict(XLA_FLAGS=FLAG))}
    if asked.torch:
        theirs = ['torch', 'torch, channels_last'] + ['torch, channels_last, compiled'] * asked.compile
        contenders = {who: (asked.torch, {}) for who in theirs} | contenders
    running, steps = {}, 1 if asked.dry else 10
    for who, (python, env) in contenders.items(): running[who] = start(['contend', row, int(asked.dry), who], python, **env)
    try:
        made = {who: heard(process, who) for who, process in running.items()}
        if len(set(map(str, made.values()))) > 1: sys.exit(f'these are different networks: {made}')
        print(f"{row}: {made['ours']['params']:,} parameters, {made['ours']['flops'] / 1e6:.1f} MFLOPs an image, in all of them")
        seconds = {who: [] for who in running}
        for r in range(asked.rounds):
            order = list(running)
            for who in order[r % len(order):] + order[:r % len(order)]:
                print(steps, file=running[who].stdin, flush=True)
                seconds[who].append(heard(running[who], who))
    finally:
        for process in running.values(): process.kill()
    for base in [who for who in seconds if who.startswith('torch')] or ['ours']:
        for who in ('ours', 'ours, flag'):
            if who == base: continue
            speed = middle(np.divide(seconds[base], seconds[who]))
            print(f'  {who:10} {1000 * np.median(seconds[who]):7.1f} ms    speed / {base}: {speed}')
    if asked.torch: print('  goal: 1 or more')


# The second start.

def first_step(row, dry):
    "What the ablation does until its first step is made; a line at each landmark."
    from resnet_rs.experiment import Experiment
    from resnet_rs.run_data import training_batches
    from resnet_rs.runs import fit_options, hyper_of, initial_model
    from resnet_rs.training import fit
    say('imports')
    config, values = planned(row, dry)
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment('ablation', {row: config}, scale='smoke' if dry else 'laptop', seeds=1, results_dir=folder)
    data = experiment.data(experiment.runs[0])
    info = data.train.info
    say('plan and data')
    model = initial_model(config, 0, classes=info.classes)
    say('network')
    fit(model, training_batches(data.train, config.batch_size, 1, 0), hyper_of(values)._replace(total_steps=1, warmup_steps=0),
        **fit_options(config, info))
    say('first step')


def prepare(row, dry):
    "Everything that only the first start on a machine does: the data set, Python's compiled files."
    from resnet_rs import experiment, run_data  # noqa: F401
    config, _ = planned(row, dry)
    run_data.seeded_data(config, 0)
    say('ready')


def landmarks(row, asked, cache):
    "Seconds from the start of a process to each landmark."
    begin = time.perf_counter()
    process, found = start(['first_step', row, int(asked.dry)], RESNET_RS_CACHE=cache), {}
    while 'first step' not in found:
        name = heard(process, 'the start')
        found[name] = time.perf_counter() - begin
    process.wait()
    return found


def starts(row, asked):
    import numpy as np
    process = start(['prepare', row, int(asked.dry)])
    heard(process, 'preparing')
    process.wait()
    found = {'first': [], 'second': []}
    for _ in range(min(asked.rounds, 3)):
        with tempfile.TemporaryDirectory() as cache:
            for which in found: found[which].append(landmarks(row, asked, cache))
    print(f'{row}: from the start of a process to the end of the first step, {len(found["first"])} times')
    for which, runs in found.items():
        times = {name: np.median([marks[name] for marks in runs]) for name in runs[0]}
        print(f'  {which:6} start: ' + ', '.join(f'{name} {seconds:.2f} s' for name, seconds in times.items()))
    ratio = np.divide(*([marks['first step'] for marks in found[which]] for which in ('second', 'first')))
    print(f'  second / first: {percent(ratio)} (goal: 25% or less)')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', metavar='part', help=f'of {", ".join(PARTS)}; all if none is named')
    parser.add_argument('--torch', metavar='PYTHON')
    parser.add_argument('--compile', action='store_true', help='torch.compile as one more contender')
    parser.add_argument('--rows', nargs='+', default=['baseline', 'resnet_d'])
    parser.add_argument('--rounds', type=int, default=9, help='of starts no more than 3 (%(default)s)')
    parser.add_argument('--dry', action='store_true')
    parser.add_argument('--work', nargs='+', help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        what, row, *numbers = asked.work
        if what == 'contend': return contend(numbers[1], row, bool(int(numbers[0])))
        return dict(overhead=overhead, first_step=first_step, prepare=prepare)[what](row, *map(int, numbers))
    for part in asked.parts:
        if part not in PARTS: parser.error(f'no part is called {part!r}; there are {", ".join(PARTS)}')
    for part in asked.parts or PARTS:
        print(f'## {part}, {asked.rounds} rounds, {os.cpu_count()} cores{", A DRY RUN: NO SPEEDS" * asked.dry}', flush=True)
        for row in asked.rows: dict(overhead=show_overhead, torch=race, start=starts)[part](row, asked)


if __name__ == '__main__':
    main()
