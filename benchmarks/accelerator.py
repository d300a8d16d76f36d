"""The training engine on an accelerator: ratios against timm on the same card, in slices of less than nine minutes.

    python benchmarks/accelerator.py steps --out speed.jsonl [--timm PYTHON]
    python benchmarks/accelerator.py randaugment forms inference --out speed.jsonl
    python benchmarks/accelerator.py ladder --out speed.jsonl
    python benchmarks/accelerator.py --report speed.jsonl

needs a checkout of the repository, jax, flax, optax and numpy; it ran with JAX 0.8.3, 0.10.2, 0.11.2 and 0.12.0 and flax 0.12.3
to 0.12.12. It installs nothing and reaches no network. PYTHON is an interpreter with torch and timm, this one if it has both;
without them our own numbers are taken and the ratios are missing. A command stops by itself after --minutes (8.5). What it
measured is in the file, a line for each network; the same command goes on with what is not there, so repeat it until it says
that all is. Where time is up in the middle of a network, three rounds are enough for a line, and of fewer nothing is kept but
what was compiled. A machine that forgets its files needs the file of the command before at the place that --out names. The first
line may want two commands, the second one, the third two. --dry goes through everything on a small scale, on a CPU too, and says
nothing of speed.

steps        a training step of ResNet-RS-50 at 160 px, -152 at 256 and EfficientNet-B4 at 380 in bfloat16, and its peak memory
inference    the forward pass of the same
randaugment  what RandAugment adds to a step: as `fit` has it, and its three forms by themselves
forms        the choices that were made on a CPU: 1x1 convolutions as matrix products, depthwise ones as sums of shifted images
ladder       a training step of the eleven ResNet-RS, beside the cost of a step in the paper's Table 7

How it is measured. Every contender is a process of its own that waits for its turn; a round gives each of them one turn of about
a second, in an order that changes. Ratios are medians over the rounds of the ratio within a round, with the middle half. Both
have their images on the card, float32, random numbers with random labels. Ours is the step of `fit`: state in float32, products
in bfloat16, averages of weights and statistics kept. timm's has autocast to bfloat16, channels_last, torch.compile, cuDNN's
search for algorithms, fused SGD, and keeps no averages: our step does more. Both have the card together, so the batch is halved
until both fit at once, and is the same for both. Memory is the peak in use (not what is held in reserve): ours since the start,
with the making of the first state, timm's since the end of its warm-up. Utilisation is FLOPs of convolutions and dense layers,
three times those of inference for a step, over the peak of the card's data sheet (dense bfloat16; --peak for cards that are not
listed). One device is used, the first.
"""
import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))   # the library, also where it is not installed; importing it loads neither JAX nor NumPy
WORKER = [__file__, '--work']
BATCH = {'resnet_rs_50': 256, 'efficientnet_b0': 256}   # the others, and all of the ladder as in the paper, 128
NETWORKS = ('resnet_rs_50@160', 'resnet_rs_152@256', 'efficientnet_b4@380')
CASES = dict(steps=NETWORKS, inference=NETWORKS, randaugment=NETWORKS[:2],
             forms=('1x1', 'depthwise', 'resnet_rs_50@160', 'efficientnet_b0@224'), ladder=None)   # of the ladder: Table 7
KINDS = dict(steps=['train'], ladder=['train'], inference=['forward'],
             randaugment=['train', 'augment and train', 'fused', 'switch', 'select'])
AGAINST_TIMM = ('steps', 'inference')
#: part of a device's name -> TFLOP/s of dense bfloat16 products in the vendor's data sheet (T4 and V100: of float16)
PEAKS = {'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989.4, 'H200 NVL': 835, 'H200': 989.4, 'A100': 312, 'A10G': 70, 'A10': 125,
         'L40S': 362, 'L4': 121, 'T4': 65, 'V100': 125, 'TPU v2': 22.5, 'TPU v3': 61.5, 'TPU v4': 275, 'TPU v5 lite': 197,
         'TPU v5': 459, 'TPU v6 lite': 918}   # a device of JAX is half a chip of TPU v2 and v3
#: in the words of XLA, CUDA, cuDNN and torch
NO_ROOM = ('RESOURCE_EXHAUSTED', 'OUT_OF_MEMORY', 'ALLOC_FAILED', 'out of memory', 'Out of memory', 'Failed to allocate')


class OutOfTime(Exception): "The slice is over."
class NoRoom(Exception): "The memory of the device does not suffice."
class Broken(Exception): "A contender did not do its work."


# The side that asks; it never touches the device.

class Contender:
    "A process that makes the turns it is asked for."
    def __init__(self, python, job, deadline):
        self.who, self.deadline, self.log = job['who'], deadline, tempfile.TemporaryFile()
        cache = os.environ.get('RESNET_RS_CACHE') or os.path.expanduser('~/.cache/resnet_rs/xla')
        env = dict(JAX_COMPILATION_CACHE_DIR=cache, XLA_PYTHON_CLIENT_PREALLOCATE='false', XLA_PYTHON_CLIENT_MEM_FRACTION='0.95',
                   PYTHONUNBUFFERED='1') | os.environ
        begin = time.monotonic()
        self.process = subprocess.Popen([python, *WORKER, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, env=env)
        self.timer = threading.Timer(max(deadline - begin, 0), self.process.kill)
        self.timer.start()
        try: self.about = self.answer()
        except BaseException: self.end(); raise
        self.about['start_seconds'] = round(time.monotonic() - begin, 1)

    def answer(self):
        line = self.process.stdout.readline()
        if not line and time.monotonic() >= self.deadline: raise OutOfTime
        if not line: raise Broken(f'{self.who}: it ended with status {self.process.wait()}: {self.last_words()}')
        said = json.loads(line)
        if 'error' in said: raise (NoRoom if said['memory'] else Broken)(f"{self.who}: {said['error']}")
        return said

    def ask(self, **words):
        try: print(json.dumps(words), file=self.process.stdin, flush=True)
        except OSError: pass   # it is gone, and `answer` says why
        return self.answer()

    def last_words(self):
        self.log.seek(0)
        return ' / '.join(self.log.read().decode(errors='replace').strip().splitlines()[-3:])[-500:]

    def end(self):
        self.timer.cancel()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close(), self.process.stdout.close(), self.log.close()


def race(pythons, job, rounds, deadline):
    "Seconds of a step, {who: {kind: [one a round]}}, and {who: what it says of itself}; fewer rounds, at least 3, if time is up."
    running, seconds = {}, {who: {kind: [] for kind in job['kinds']} for who in pythons}
    try:
        for who, python in pythons.items():   # one after another: they search for the fastest algorithms
            running[who] = Contender(python, job | dict(who=who), deadline)
        turns = [(who, kind) for kind in job['kinds'] for who in pythons]
        try:
            for r in range(rounds):
                for who, kind in turns[r % len(turns):] + turns[:r % len(turns)]:
                    seconds[who][kind].append(running[who].ask(kind=kind)['seconds'])
                if r == 0:
                    for contender in running.values(): contender.about |= contender.ask(kind='memory')
        except OutOfTime:
            whole = min(len(given) for kinds in seconds.values() for given in kinds.values())
            if whole < 3: raise
            seconds = {who: {kind: given[:whole] for kind, given in kinds.items()} for who, kinds in seconds.items()}
    finally:
        for contender in running.values(): contender.end()
    return seconds, {who: contender.about for who, contender in running.items()}


def measure(slice, case, asked, pythons, device, deadline):
    "The line of a case: everything that was measured of it."
    name, _, size = case.partition('@')
    kinds, batch = KINDS.get(slice, []), asked.batch or (4 if asked.dry else 128 if slice == 'ladder' else BATCH.get(name, 128))
    size, missing = int(size or 0), {}
    pythons = {who: python for who, python in pythons.items() if who == 'ours' or slice in AGAINST_TIMM}
    if slice in AGAINST_TIMM and 'timm' not in pythons: missing['timm'] = device['no_timm']
    if slice == 'forms': kinds = [f'{label}: {way}' for label, *ways in pairs(case) for way in ways]
    while True:
        job = dict(slice=slice, name=name, size=size and (32 if asked.dry else size), batch=batch, kinds=kinds, dry=asked.dry)
        try:
            seconds, about = race(pythons, job, asked.rounds, deadline)
            break
        except NoRoom:
            if batch == 1: raise
            batch //= 2
            print(f'{slice} {case}: not enough memory for {2 * batch} images, {batch} are tried', flush=True)
        except Broken as error:
            if not str(error).startswith('timm: '): raise
            print(f'{slice} {case}: tried without timm, because of {error}', flush=True)
            pythons, missing = {'ours': pythons['ours']}, dict(timm=str(error))
    return dict(batch=batch, rounds=len(seconds['ours'][kinds[0]]), seconds=seconds, about=about, missing=missing)


def commit_of(asked):
    from resnet_rs.provenance import provenance
    git = provenance(ROOT)['git']
    return asked.commit or (git['commit'] and git['commit'] + '+' * bool(git['dirty']))


def cases_of(slice):
    if slice != 'ladder': return CASES[slice]
    from resnet_rs.paper import table
    return [f'{row.model}@{row.image_size}' for row in table('table7') if row.model.startswith('resnet_rs')]


def read(*paths):
    "The lines of the files; one that was cut off is no line."
    for path in paths:
        for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
            try: yield json.loads(line)
            except ValueError: pass


def append(path, line):
    "One line more, whole or not at all for whoever reads: what an interruption left of one before is closed first."
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.read_bytes()[-1:] not in (b'', b'\n')
    with path.open('a') as out:
        out.write('\n' * torn + json.dumps(line) + '\n')
        out.flush()
        os.fsync(out.fileno())


def run(asked):
    "Measure what the file has not; how many cases went wrong."
    deadline, wrong, left = time.monotonic() + 60 * asked.minutes, 0, []
    device = describe(asked)
    if device['platform'] == 'cpu' and not asked.dry:
        message = 'JAX finds no accelerator here, so nothing is timed; --dry goes through the motions on a CPU'
        sys.exit(message if asked.slices else print(message))
    pythons = dict(ours=sys.executable) | ({} if device['no_timm'] else dict(timm=asked.timm))
    commit = commit_of(asked)
    settings = dict(dry=asked.dry, batch=asked.batch, device=device['kind'], jax=device['versions']['jax'],
                    commit=commit and commit.rstrip('+'))
    there = {line['key'] for line in read(asked.out)} if not asked.again else ()
    print(f"{device['kind']}, jax {device['versions']['jax']}" + f"; {device['no_timm']}" * bool(device['no_timm']), flush=True)
    for slice in asked.slices or CASES:
        for case in asked.cases or cases_of(slice):
            def key(with_timm, what=(slice, case)): return json.dumps([*what, with_timm, settings], sort_keys=True)
            if key(slice in AGAINST_TIMM and 'timm' in pythons) in there:
                print(f'{slice} {case}: is there')
                continue
            try:
                if left: raise OutOfTime
                found = measure(slice, case, asked, pythons, device, deadline)
                line = dict(slice=slice, case=case, precision='bfloat16', dry=asked.dry, device=device['kind'],
                            memory_of_device=device['memory'], peak_tflops=asked.peak or peak_of(device['kind']), **found,
                            versions=device['versions'], commit=commit, key=key('timm' in found['seconds']),
                            time=time.strftime('%Y-%m-%dT%H:%M:%S+00:00', time.gmtime()))
                append(asked.out, line)
                for label, (middle, low, high) in ratios(line).items():
                    print(f'{slice} {case}: {label} {middle:.3f} ({low:.3f} to {high:.3f})', flush=True)
                print(f"{slice} {case}: done, {line['batch']} images, {line['rounds']} rounds", flush=True)
            except OutOfTime: left.append(f'{slice} {case}')
            except (Broken, NoRoom) as error:
                wrong += 1
                print(f'{slice} {case}: FAILED: {error}', flush=True)
    if left: print(f'out of time, the same command goes on with: {", ".join(left)}')
    elif not wrong: print('all that was asked for is there')
    return wrong


def describe(asked):
    "The device and the versions, from a process that ends before the first contender starts; and why there is no timm."
    try: found = Contender(sys.executable, dict(who='nobody'), time.monotonic() + 120)
    except (OutOfTime, Broken) as error: sys.exit(f'JAX finds no device: {error}')
    found.end()
    missing = None
    if asked.timm == 'no': missing = 'timm was not asked for'
    elif asked.timm == sys.executable and not all(importlib.util.find_spec(name) for name in ('torch', 'timm')):
        missing = 'no torch and timm here: the ratios against them are missing (--timm PYTHON)'
    return found.about | dict(no_timm=missing)


def peak_of(kind): return next((peak for part, peak in PEAKS.items() if part in kind), None)


# What follows from a line.

def spread(over, under):
    "Median and middle half of the ratios within a round."
    values = sorted(a / b for a, b in zip(over, under, strict=True))
    quarters = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
    return statistics.median(values), quarters[0], quarters[2]


def ratios(line):
    "{what: (median, low, high)} of a line."
    ours, timm = line['seconds']['ours'], line['seconds'].get('timm')
    if line['slice'] == 'randaugment':
        shares = {f'{kind} / step': spread(ours[kind], ours['train']) for kind in ('fused', 'switch', 'select')}
        more = tuple(value - 1 for value in spread(ours['augment and train'], ours['train']))
        return {'longer with it, as fit has it': more} | shares
    if line['slice'] == 'forms':
        return {f'{label}: {other} / {chosen}': spread(ours[f'{label}: {other}'], ours[f'{label}: {chosen}'])
                for label, other, chosen in pairs(line['case'])}
    if not timm: return {}
    kind = next(iter(ours))
    found = {'speed / timm': spread(timm[kind], ours[kind])}
    peaks = [line['about'][who].get('peak_bytes') for who in ('ours', 'timm')]
    return found | ({'memory / timm': (peaks[0] / peaks[1],) * 3} if all(peaks) else {})


def use(line, who):
    "Milliseconds a step, images a second, peak GiB, share of the card's peak; None for what is not known."
    kind, about = next(iter(line['seconds'][who])), line['about'][who]
    seconds, flops = statistics.median(line['seconds'][who][kind]), line['about']['ours'].get('flops')
    flops = flops and flops * line['batch'] * (1 if kind == 'forward' else 3)
    memory = about.get('peak_bytes')
    return (1000 * seconds, line['batch'] / seconds, memory and memory / 2**30,
            line['peak_tflops'] and flops and flops / seconds / line['peak_tflops'] / 1e12)


def report(paths):
    "Tables, in Markdown, of the newest line of every case."
    lines = {line['key']: line for line in read(*paths)}.values()
    groups = {}
    for line in lines:
        made = (line['device'], line['versions']['jax'], (line['commit'] or 'commit unknown').rstrip('+'), line['dry'])
        groups.setdefault(made, {}).setdefault(line['slice'], []).append(line)
    for (device, jax, commit, dry), slices in groups.items():
        day = max(line['time'] for lines in slices.values() for line in lines)[:10]
        changed = ' and changes' * any((line['commit'] or '').endswith('+') for lines in slices.values() for line in lines)
        print(f"## {device}, JAX {jax}, {commit[:12]}{changed}, {day}{', A DRY RUN: NO SPEEDS' * dry}\n")
        for slice in CASES:
            if slice in slices: show(slice, slices[slice])
    if not groups: print('nothing was measured yet')


def show(slice, lines):
    print(f'### {slice}\n')
    if slice == 'ladder': return show_ladder(lines)
    if slice in AGAINST_TIMM: return show_against_timm(slice, lines)
    if slice == 'randaugment': print('Goal: 3% of a step or less.\n')
    else: print('Above 1: what the library does on an accelerator is the faster way.\n')
    def written(found): return ' '.join(percent(value) for value in found) if slice == 'randaugment' else as_ratio(found)
    rows = [[line['case'], line['batch'], label, written(found)] for line in lines for label, found in ratios(line).items()]
    print_table(['case', 'images', 'what', 'median, middle half'], rows)


def show_against_timm(slice, lines):
    goals = (' (goal: 1.00 or more)', ' (goal: 1.00 or less)') if slice == 'steps' else ('', '')
    rows = []
    for line in lines:
        mine, theirs = use(line, 'ours'), use(line, 'timm') if 'timm' in line['seconds'] else (None,) * 4
        made = line['about'].get('timm', {}).get('versions', {})
        rows.append([line['case'], line['batch'], *(as_ratio(ratios(line).get(f'{what} / timm')) for what in ('speed', 'memory')),
                     number(mine[0], 1), number(theirs[0], 1), number(mine[1], 0), number(mine[2], 2), number(theirs[2], 2),
                     percent(mine[3]), percent(theirs[3]),
                     line['missing'].get('timm') or ', '.join(f'{name} {version}' for name, version in made.items())])
    print_table(['network', 'images', 'speed / timm' + goals[0], 'memory / timm' + goals[1], 'ms', "timm's", 'images/s', 'GiB',
                 "timm's", 'utilisation', "timm's", 'timm'], rows)


def show_ladder(lines):
    "Cost of an image relative to the first rung, here and in the paper."
    from resnet_rs.paper import table
    paper = {f'{row.model}@{row.image_size}': row for row in table('table7')}
    order = {case: i for i, case in enumerate(paper)}
    lines = sorted(lines, key=lambda line: order.get(line['case'], len(order)))
    first = next((line for line in lines if line['case'] == next(iter(paper))), None)
    base, rows = paper[next(iter(paper))], []
    for line in lines:
        milliseconds, speed, memory, share = use(line, 'ours')
        theirs = paper.get(line['case'])
        cost = first and use(first, 'ours')[1] / speed
        rows.append([line['case'], line['batch'], number(milliseconds, 1), number(speed, 0), number(memory, 2), percent(share),
                     number(cost, 1), number(theirs and theirs.tpu_ms / base.tpu_ms, 1),
                     number(theirs and theirs.v100_s / base.v100_s, 1)])
    heads = ('images', 'ms', 'images/s', 'GiB', 'utilisation', 'cost of an image', 'in the paper, TPUv3', 'V100')
    print_table(['network', *heads], rows)


def number(value, digits): return '-' if value is None else f'{value:.{digits}f}'
def percent(value): return '-' if value is None else f'{100 * value:.1f}%'


def as_ratio(found):
    if not found: return '-'
    middle, low, high = found
    return f'{middle:.2f}' if low == high else f'{middle:.2f} ({low:.2f} to {high:.2f})'


def print_table(heads, rows):
    for row in (heads, ['--'] * len(heads), *rows): print('| ' + ' | '.join(map(str, row)) + ' |')
    print()


# The side that works: a process for each contender.

def work(job):
    "Warm up, then make the turns asked for, a line of JSON each; what goes wrong is an answer too."
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)   # what libraries print is no answer
    def say(**words): print(json.dumps(words), file=answers, flush=True)
    try:
        about, turns, peak = dict(nobody=nobody, ours=ours, timm=timms)[job['who']](job)
        steps = {}
        for kind, turn in turns.items():
            turn(1)
            steps[kind] = max(1, min(200, round((not job['dry']) / turn(1))))
        say(**about, steps_in_a_turn=steps)
        for line in sys.stdin:
            kind = json.loads(line)['kind']
            say(**dict(peak_bytes=peak()) if kind == 'memory' else dict(seconds=float(f'{turns[kind](steps[kind]):.6g}')))
    except Exception as error:
        text = f'{type(error).__name__}: {error}'
        say(error=text[:1000], memory=any(words in text for words in NO_ROOM))
        raise


def timed(once, wait, check=lambda: None):
    "A turn: (n) -> seconds a step of n steps, after one that wakes the device up."
    def turn(n):
        once(), wait()
        start = time.perf_counter()
        for _ in range(n): once()
        wait()
        seconds = (time.perf_counter() - start) / n
        check()
        return seconds
    return turn


def nobody(job):
    from importlib import metadata

    import jax
    device, names = jax.devices()[0], ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
    versions = dict(python=sys.version.split()[0]) | {name: metadata.version(name) for name in names}
    memory = (device.memory_stats() or {}).get('bytes_limit')
    versions['runtime'] = getattr(device.client, 'platform_version', '').partition('<')[0].strip()
    return dict(kind=device.device_kind, platform=device.platform, memory=memory, versions=versions), {}, None


def inputs(batch, size, classes):
    import numpy as np
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, size, size, 3), dtype=np.float32), rng.integers(0, classes, batch, dtype=np.int32)


def small(name, dry):
    "Options of a dry run's network."
    if not dry: return {}
    sizes = dict(width=0.25, depth_factor=0.1) if 'efficient' in name else dict(width=0.125, blocks=(1, 1, 1, 1))
    return dict(num_classes=10, **sizes)


def ours(job):
    import jax

    if job['slice'] == 'forms' and not job['size']: turns, flops = operations(job), None
    else: turns, flops = {}, flops_of(job)
    if job['size']:
        from resnet_rs import blocks
        chosen = blocks._pointwise
        for kind in job['kinds']:
            if kind in ('fused', 'switch', 'select'): turns[kind] = our_randaugment(job, kind)
            elif kind == 'forward': turns[kind] = our_forward(job)
            else:
                if 'convolution' in kind: blocks._pointwise = as_convolution
                turns[kind] = our_step(job, augmented='augment' in kind)
                turns[kind](1)      # traced here and now, with the form in place
                blocks._pointwise = chosen
    def peak(): return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
    return dict(flops=flops), turns, peak


def flops_of(job):
    from flax import nnx

    from resnet_rs.registry import create_model
    from resnet_rs.scaling_rules import count_flops, resnet_cost
    family, _, depth = job['name'].rpartition('_')
    if family == 'resnet_rs' and not job['dry']: return resnet_cost(int(depth), job['size']).flops   # quick for deep ones too
    return count_flops(nnx.eval_shape(lambda: create_model(job['name'], **small(job['name'], job['dry']))), job['size'])


def our_network(job):
    import jax.numpy as jnp

    from resnet_rs.registry import create_model
    return create_model(job['name'], dtype=jnp.bfloat16, **small(job['name'], job['dry']))


def our_step(job, augmented=False):
    "The step of `fit`, or with its augmentation before it."
    import jax
    import jax.numpy as jnp
    import numpy as np

    from resnet_rs.randaugment import rand_augment
    from resnet_rs.steps import Hyper, compiled_augment, compiled_step, cross_entropy, initial_state, split

    def augment(key, images, hyper):
        images = rand_augment(key, images, 2, hyper.randaug_magnitude, 'tf1', hyper.randaug_prob, hyper.translate_px,
                              hyper.cutout_px)
        return images.astype(jnp.float32) / 127.5 - 1

    network, params, stats = split(our_network(job))
    made_anew = compiled_step.__wrapped__ if job['slice'] == 'forms' else compiled_step    # the same network in two forms
    step, prepare = made_anew(network, cross_entropy, 'paper'), compiled_augment(augment)
    hyper = Hyper(peak_lr=1e-4, total_steps=10**6, label_smoothing=0.1, dropout=0.25, weight_decay=4e-5, ema_decay=0.9999,
                  bn_momentum=0.0, randaug_prob=1.0, randaug_magnitude=10.0).traced()
    images, labels = inputs(job['batch'], job['size'], 10 if job['dry'] else 1000)
    if augmented: images = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    images, labels, key = jax.device_put(images), jax.device_put(labels), jax.random.key(0)
    held, made = [initial_state(params, stats), None], [0]
    del params, stats

    def once():
        made[0] += 1
        given = prepare(images, hyper, key, np.int32(made[0])) if augmented else images
        held[:] = step(held[0], given, labels, hyper, key)

    def check(): assert np.isfinite(held[1]), 'the loss is not finite'
    return timed(once, lambda: jax.block_until_ready(held), check)


def our_forward(job):
    import jax
    from flax import nnx
    model = our_network(job)
    model.eval()
    graph, arrays = nnx.split(model)
    predict, held = jax.jit(lambda arrays, images: nnx.merge(graph, arrays)(images)), [None]
    images = jax.device_put(inputs(job['batch'], job['size'], 10)[0])

    def once(): held[0] = predict(arrays, images)
    return timed(once, lambda: jax.block_until_ready(held))


def our_randaugment(job, form):
    import jax
    import numpy as np

    from resnet_rs.randaugment import _augment
    images = jax.device_put(np.random.default_rng(0).integers(0, 256, (job['batch'], job['size'], job['size'], 3), np.uint8))
    scalars, key, held = tuple(np.float32(value) for value in (10, 1, 100, 40)), jax.random.key(0), [None]

    def once(): held[0] = _augment(key, images, *scalars, num_layers=2, dialect='tf1', form=form)
    return timed(once, lambda: jax.block_until_ready(held))


POINTWISE = ((40, 64, 256), (40, 256, 64), (20, 512, 128), (10, 256, 1024), (5, 2048, 512))   # of RS-50 at 160 px
DEPTHWISE = ((56, 144, 3, 1), (56, 144, 5, 2), (112, 96, 3, 2), (14, 672, 5, 1), (7, 1152, 5, 1))   # side, channels, size, stride


def pairs(case):
    "(what, another way, the way of the library on accelerators) of a case of `forms`."
    if '@' in case: return [('step', '1x1 as convolution', 'as it is')]
    shapes, ways = (POINTWISE, ('convolution', 'matrix product')) if case == '1x1' else (DEPTHWISE, ('shifted', 'grouped'))
    return [(f'{" ".join(map(str, shape))} {what}', *ways) for shape in shapes for what in ('forward', 'gradients')]


def as_convolution(x, w):
    import jax
    return jax.lax.conv_general_dilated(x, w[None, None], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def operations(job):
    "{kind: turn} of single operations."
    import jax
    import jax.numpy as jnp

    from resnet_rs.blocks import _pointwise
    from resnet_rs.efficientnet import _grouped, _shifted, _shifted_bwd

    def turn(f, *shapes):
        arrays = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
        compiled, held = jax.jit(f), [None]
        def once(): held[0] = compiled(*arrays)
        return timed(once, lambda: jax.block_until_ready(held))

    def gradients(f): return lambda x, w, dy: jax.vjp(f, x, w)[1](dy)
    found, n, less = [], job['batch'], 8 if job['dry'] else 1
    if job['name'] == '1x1':
        for side, c_in, c_out in POINTWISE:
            x, w, dy = (n, side, side, c_in // less), (c_in // less, c_out // less), (n, side, side, c_out // less)
            found += [turn(f, x, w) for f in (as_convolution, _pointwise)]
            found += [turn(gradients(f), x, w, dy) for f in (as_convolution, _pointwise)]
        return dict(zip(job['kinds'], found, strict=True))
    for side, channels, size, stride in DEPTHWISE:
        side, channels = side // less or 1, channels // less
        pads = tuple(map(tuple, jax.lax.padtype_to_pads((side, side), (size, size), (stride, stride), 'SAME')))
        out, at = -(-side // stride), dict(stride=(stride, stride), pads=pads)
        x, w, dy = (n, side, side, channels), (size, size, 1, channels), (n, out, out, channels)
        found += [turn(lambda x, w, f=f, at=at: f(x, w, **at), x, w) for f in (_shifted, _grouped)]
        found += [turn(lambda x, w, dy, at=at: _shifted_bwd(x, w, dy, **at), x, w, dy),
                  turn(gradients(lambda x, w, at=at: _grouped(x, w, **at)), x, w, dy)]
    return dict(zip(job['kinds'], found, strict=True))


def timms(job):
    "The same network of timm's: autocast, channels_last and torch.compile on a card; on a CPU, in a dry run, not compiled."
    import importlib.abc
    import importlib.machinery
    from unittest.mock import MagicMock

    class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        "Stands in for torchvision where it is missing: timm imports it and this does not use it."
        def find_spec(self, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split('.')[0] == 'torchvision' else None

        def create_module(self, spec): return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)
        def exec_module(self, module): pass

    sys.meta_path.append(Absent())
    import timm
    import torch

    if not job['dry'] and not torch.cuda.is_available(): raise RuntimeError('torch finds no CUDA device')
    device, efficient = torch.device('cpu' if job['dry'] else 'cuda'), 'efficient' in job['name']
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision('high')
    options = {} if not job['dry'] else dict(num_classes=10) if efficient else dict(num_classes=10, layers=(1, 1, 1, 1))
    name = job['name'].replace('_', '') if not efficient else 'tf_efficientnet_b0' if job['dry'] else f'tf_{job["name"]}'
    drops = dict(drop_rate=0.4, drop_path_rate=0.2) if efficient else dict(drop_rate=0.25)
    model = timm.create_model(name, pretrained=False, **drops, **options).to(device, memory_format=torch.channels_last)
    images, labels = (torch.from_numpy(array) for array in inputs(job['batch'], job['size'], options.get('num_classes', 1000)))
    images = images.permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    labels, losses = labels.long().to(device), [None]
    compiled = model if job['dry'] else torch.compile(model)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True, weight_decay=4e-5, fused=not job['dry'])
    model.train(job['kinds'] == ['train'])
    def wait(): return torch.cuda.synchronize() if not job['dry'] else None

    def train():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16): loss = loss_of(compiled(images), labels)
        loss.backward()
        optimizer.step()
        losses[0] = loss.detach()

    def forward():
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16): compiled(images)

    def check(): assert losses[0] is None or torch.isfinite(losses[0]), 'the loss is not finite'
    turn = timed(dict(train=train, forward=forward)[job['kinds'][0]], wait, check)
    turn(3)
    if not job['dry']:
        torch.cuda.empty_cache()    # what the search for algorithms took
        torch.cuda.reset_peak_memory_stats()
    def peak(): return None if job['dry'] else torch.cuda.max_memory_allocated()
    return dict(versions=dict(timm=timm.__version__, torch=torch.__version__)), {job['kinds'][0]: turn}, peak


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('slices', nargs='*', metavar='slice', help=f'of {", ".join(CASES)}; all if none is named')
    parser.add_argument('--out', type=Path, default=ROOT / 'runs' / 'accelerator.jsonl', help='lines are appended (%(default)s)')
    parser.add_argument('--timm', metavar='PYTHON', default=sys.executable, help="an interpreter with torch and timm, or 'no'")
    parser.add_argument('--cases', nargs='+', metavar='NETWORK@SIZE', help='others than those of the slice')
    parser.add_argument('--batch', type=int, help='images a step, halved until they fit')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--minutes', type=float, default=8.5)
    parser.add_argument('--peak', type=float, metavar='TFLOPS', help="of the card, instead of its data sheet's")
    parser.add_argument('--commit', help='of the checkout, where git cannot say')
    parser.add_argument('--again', action='store_true', help='measure also what the file has')
    parser.add_argument('--dry', action='store_true', help='tiny networks, one step a turn, on a CPU too')
    parser.add_argument('--report', type=Path, nargs='+', metavar='FILE', help='tables of what the files have')
    parser.add_argument('--work', type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    for name in asked.slices:
        if name not in CASES: parser.error(f'no slice is called {name!r}; there are {", ".join(CASES)}')
    return asked


def main():
    asked = arguments()
    if asked.work: return work(asked.work)
    if asked.report: return report(asked.report)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped; what is in the file stays'))
    sys.exit(1 if run(asked) else 0)


if __name__ == '__main__':
    main()
