"""The paper's networks compiled for the paper's TPU, without one: what each needs of memory and of time. Made once, committed.

    pip install 'jax[tpu]'                      # with the locked versions; in an environment of its own, it is large
    python benchmarks/plans.py                  # hours on two cores; goes on where it was stopped
    python benchmarks/plans.py --check          # which records are of a program that the code no longer makes; needs no libtpu
    python benchmarks/plans.py --list           # what is there and what is missing

Writes results/plans_tpu_v3.csv, a line for each plan (`resnet_rs.plans.Plan`), for notebook 36. Each plan is compiled by a
process of its own, which is ended after --minutes, for eight cores of a TPUv3 that is described to the compiler and not there.
Every network of `paper_plans` comes first with 32 images a core, the number in the paper's Table 3, the small ones before the
large; then with the largest of 128, 64, ... that fits, the paper's "halved until it fits". Where libtpu is not installed it says
so and does nothing.
"""
import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # of this machine; the TPU is only described

TOPOLOGY, CORES = 'v3:2x2', 8
CAPACITY = 15.75 * 2**30  # bytes of a core that a program may use, as the compiler's own messages say
OUT = Path(__file__).resolve().parents[1] / 'results' / 'plans_tpu_v3.csv'


def ordered():
    "The plans of the paper: training in Table 7, other training, inference; in each the networks with few blocks first."
    from resnet_rs.config import DEPTHS
    from resnet_rs.efficientnet import COMPOUNDS, STAGES, round_blocks
    from resnet_rs.paper import table
    from resnet_rs.plans import paper_plans

    def blocks(model):
        family, _, size = model.rpartition('_')
        if family != 'efficientnet': return sum(DEPTHS[int(size)])
        return sum(round_blocks(stage.blocks, COMPOUNDS[size].depth_factor) for stage in STAGES)
    released = {(row.model, row.image_size) for row in table('table7')}
    return sorted(paper_plans(), key=lambda plan: (plan.kind == 'predict', (plan.model, plan.image_size) not in released,
                                                   blocks(plan.model), plan.image_size))


def wanted(records):
    "What to compile: every plan, then each training step with as many images as fit, halved again if it was too large."
    from resnet_rs.plans import images_that_fit
    first = ordered()
    yield from (plan for plan in first if plan.kind == 'train')
    for plan in first:
        record = records().get(plan)
        if plan.kind != 'train' or record is None or record.needed is None: continue
        images = images_that_fit(plan, record.needed, CAPACITY)
        while images > 0 and images != plan.images:
            larger = replace(plan, images=images)
            yield larger
            found = records().get(larger)
            if found is None or found.status == 'compiled': break
            images //= 2
    yield from (plan for plan in first if plan.kind == 'predict')


def digest(lowered):
    "Of the program as the compiler gets it; the same on every machine with the same versions."
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def about(lowered, topology, devices):
    from resnet_rs.provenance import provenance
    found = provenance()
    versions = {name: metadata.version(name) for name in ('jax', 'flax')}
    libtpu = metadata.version('libtpu') if importlib.util.find_spec('libtpu') else ''
    return versions | dict(
        device=devices[0].device_kind, cores=str(len(devices)), topology=topology, libtpu=libtpu, date=found['time'][:10],
        commit=found['git']['commit'] or '', dirty=str(found['git']['dirty']), program=digest(lowered))


def compile_one(plan, out, on_cpu):
    "Compile `plan` and write a table of one line."
    import jax

    from resnet_rs.plans import Record, compile_plan, described_devices, trace_plan, write_plans
    topology, devices = ('none', jax.devices()[:1]) if on_cpu else (TOPOLOGY, described_devices(TOPOLOGY))
    lowered = trace_plan(plan, devices).lower()
    try: record = compile_plan(plan, lowered)
    except jax.errors.JaxRuntimeError as error: record = Record(plan, 'failed', str(error).strip().splitlines()[0][:300])
    write_plans(out, [replace(record, about=about(lowered, topology, devices))])


def compile_in_a_process(plan, minutes, on_cpu=False):
    "The record of `plan`, also where the compiler takes too long or dies."
    from resnet_rs.plans import Record, read_plans
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'one.csv'
        command = [sys.executable, __file__, '--one', repr(plan), '--out', out, *['--on-cpu'] * on_cpu]
        try: done = subprocess.run(command, timeout=60 * minutes, capture_output=True, text=True)
        except subprocess.TimeoutExpired: return Record(plan, 'failed', f'not compiled within {minutes:g} minutes')
        if found := read_plans(out): return found[plan]
        errors = [line for line in done.stderr.splitlines() if re.match(r'[\w.]*(Error|Exception): ', line)]
        return Record(plan, 'failed', f'the compiler ended with {done.returncode}: {(errors or ["no message"])[-1][:200]}')


def work(out, minutes, limit, on_cpu=False):
    "Compile what is missing, at most `limit` plans; the table is written after each."
    from resnet_rs.plans import read_plans, write_plans
    made = 0
    for plan in wanted(lambda: read_plans(out)):
        if plan in read_plans(out): continue
        if made == limit: return
        start, made = time.time(), made + 1
        record = compile_in_a_process(plan, minutes, on_cpu)
        if not record.about: record = replace(record, about=unfinished())
        write_plans(out, [*read_plans(out).values(), record])
        said = [record.status, record.reason[:100], f'{record.needed / 1e9:.1f} GB' if record.needed else '',
                f'{1000 * record.seconds:.1f} ms' if record.seconds else '', f'({time.time() - start:.0f} s)']
        print(f'{plan}:', *filter(None, said), flush=True)


def unfinished():
    "What is known of a plan whose process did not come back."
    from resnet_rs.provenance import provenance
    return dict(topology=TOPOLOGY, cores=str(CORES), jax=metadata.version('jax'), flax=metadata.version('flax'),
                date=provenance()['time'][:10])


def check(out):
    "Trace every recorded plan for a TPU on as many imagined devices of this machine, and compare with what was compiled."
    import jax

    from resnet_rs.plans import read_plans, trace_plan
    other = 0
    for plan, record in read_plans(out).items():
        if not record.about['program']: continue
        here = {name: metadata.version(name) for name in ('jax', 'flax')}
        if any(here[name] != record.about[name] for name in here): sys.exit(f'records are of {record.about}, here is {here}')
        same = digest(trace_plan(plan, jax.devices()[:CORES]).lower(lowering_platforms=('tpu',))) == record.about['program']
        other += not same
        print(f'{plan}: {"the same" if same else "ANOTHER PROGRAM"}', flush=True)
    sys.exit(f'{other} records are of programs that the code no longer makes' if other else 0)


def show(out):
    "What is recorded and what is missing."
    from resnet_rs.plans import read_plans
    records = read_plans(out)
    for plan in wanted(lambda: records):
        print(f'{plan}: {records[plan].status + " " + records[plan].reason[:100] if plan in records else "missing"}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=20, help='for one plan')
    parser.add_argument('--limit', type=int, default=-1, help='plans of this sitting')
    parser.add_argument('--out', type=Path, default=OUT)
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--on-cpu', action='store_true', help='for this machine, to try the script')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        from resnet_rs.plans import Plan
        return compile_one(eval(asked.one, {'Plan': Plan}), asked.out, asked.on_cpu)
    if asked.check:
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={CORES}'
        return check(asked.out)
    if asked.list: return show(asked.out)
    if not asked.on_cpu and not importlib.util.find_spec('libtpu'):
        return print("nothing compiled: there is no TPU compiler here, which comes with pip install 'jax[tpu]'")
    work(asked.out, asked.minutes, asked.limit, asked.on_cpu)


if __name__ == '__main__':
    main()
