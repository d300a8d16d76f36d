"""The plans that were compiled for a TPUv3 and not run: the committed table is sound, and the script that makes it works."""
import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_rs.paper import table
from resnet_rs.plans import PASSES, Memory, Plan, Record, largest, paper_plans, read_plans, step_seconds

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, TABLE = ROOT / 'benchmarks' / 'plans.py', ROOT / 'results' / 'plans_tpu_v3.csv'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('plans_script', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def records(): return read_plans(TABLE)


# --- the committed table ---------------------------------------------------------------------------------------------------

def test_plans_of_the_paper_have_a_record_or_a_reason(records):
    missing = [str(plan) for plan in paper_plans() if plan not in records]
    assert not missing, 'python benchmarks/plans.py makes them'
    silent = [str(plan) for plan, record in records.items() if record.status != 'compiled' and not record.reason]
    assert not silent


def test_records_say_what_they_are_of(records):
    for plan, record in records.items():
        about = record.about
        assert about['topology'] == 'v3:2x2' and about['cores'] == '8' and about['jax'] and about['flax'], plan
        assert len(about['date']) == 10, plan
        if record.status != 'failed': assert about['device'] == 'TPU v3' and about['libtpu'] and len(about['program']) == 16, plan


def test_records_are_sound(records):
    for plan, record in records.items():
        assert record.status in ('compiled', 'too large', 'failed') and plan.images in (2**k for k in range(8)), plan
        if record.status != 'compiled': continue
        assert record.needed == record.memory.peak > record.memory.temporaries > 0 and math.isfinite(record.cost.flops), plan
        assert record.needed < 2**34, f'{plan}: more than a core has'
        passes = {when for (_, when), cycles in record.cycles.items() if cycles > 0}
        if plan.kind == 'predict': assert 'backward' not in passes, plan
        else: assert passes == set(PASSES) and record.memory.aliased > 0.9 * record.memory.outputs, f'{plan}: is it donated?'


def test_records_are_of_these_networks(records):
    "The compiler's FLOPs are those of Table 7, three times in training, four where much is run twice to save memory."
    flops = {(row.model, row.image_size): row.flops_B * 1e9 for row in table('table7')}
    for plan, record in records.items():
        if (plan.model, plan.image_size) not in flops or record.cost is None: continue
        times = record.cost.flops / plan.images / flops[plan.model, plan.image_size]
        low, high = (2.7, 3.9 + (record.remade > 100)) if plan.kind == 'train' else (0.9, 1.3)
        assert low < times < high, f'{plan}: {times:.2f} times the FLOPs of Table 7'


def test_estimates_are_of_the_paper_s_size(records):
    "Within a factor of three of Table 7: no unit is wrong, and no pass is missing."
    ours = {row.model: step_seconds(found) / row.tpu_ms * 1000 for row in table('table7')
            if (found := largest(records, row.model, row.image_size))}
    assert ours and all(1 / 3 < ratio < 3 for ratio in ours.values()), ours


# --- the script ------------------------------------------------------------------------------------------------------------

def test_order_and_halving(script):
    "Each network with 32 images; then as many as fit, and half of that where the compiler says no."
    plans, made = script.ordered(), {}
    assert sorted(map(str, plans)) == sorted(map(str, paper_plans())) and plans[0].kind == 'train' and plans[-1].kind == 'predict'
    first = plans[0]
    assert list(script.wanted(lambda: made)) == plans, 'nothing is known yet'
    gigabytes = {32: 3.0, 64: 6.0}
    made[first] = Record(first, 'compiled', needed=int(gigabytes[32] * 2**30))
    more = [plan for plan in script.wanted(lambda: made) if plan not in plans]
    assert more == [replace(first, images=128)], '12 GiB for 128 would fit'
    made[more[0]] = Record(more[0], 'too large', 'no')
    more = [plan for plan in script.wanted(lambda: made) if plan not in plans]
    assert [plan.images for plan in more] == [128, 64]
    made[first] = Record(first, 'compiled', needed=20 * 2**30)
    assert [plan.images for plan in script.wanted(lambda: made) if plan not in plans][0] == 16


def test_it_goes_on_where_it_stopped(script, tmp_path, monkeypatch):
    out, asked = tmp_path / 'plans.csv', []

    def compiled(plan, minutes, on_cpu):
        asked.append(plan)
        return Record(plan, 'compiled', '', Memory(1, 1, 1, 1), 2)
    monkeypatch.setattr(script, 'compile_in_a_process', compiled)
    script.work(out, 1, limit=2)
    script.work(out, 1, limit=1)
    assert asked == script.ordered()[:3] == list(read_plans(out))


def test_a_plan_compiles_in_a_process_of_its_own(script):
    "On this machine's CPU; also when that takes too long, and when the process dies."
    plan = Plan('predict', 'resnet_rs_26', 32, 2)
    record = script.compile_in_a_process(plan, 10, on_cpu=True)
    assert record.status == 'compiled' and record.needed > 0 and record.about['device'] == 'cpu' and record.seconds is None
    late = script.compile_in_a_process(plan, 0.001, on_cpu=True)
    assert (late.status, late.reason) == ('failed', 'not compiled within 0.001 minutes')
    dead = script.compile_in_a_process(replace(plan, model='resnet_rs_51'), 5, on_cpu=True)
    assert dead.status == 'failed' and "did you mean 'resnet_rs_50'" in dead.reason


def test_without_the_compiler_it_says_so():
    if importlib.util.find_spec('libtpu'): pytest.skip('libtpu is installed here')
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and 'no TPU compiler' in done.stdout


@pytest.mark.slow
def test_one_plan_is_made_again(records, tmp_path):
    "The smallest plan compiles to what is recorded, with the recorded versions; where libtpu is installed."
    if not importlib.util.find_spec('libtpu'): pytest.skip("needs libtpu: pip install 'jax[tpu]'")
    done = subprocess.run([sys.executable, SCRIPT, '--limit', '1', '--out', tmp_path / 'plans.csv'], timeout=3000)
    (plan, record), = read_plans(tmp_path / 'plans.csv').items()
    before = records[plan]
    if record.about['libtpu'] != before.about['libtpu']: pytest.skip(f'recorded with libtpu {before.about["libtpu"]}')
    assert done.returncode == 0 and record.status == 'compiled'
    assert (record.memory, record.cycles) == (before.memory, before.cycles)
