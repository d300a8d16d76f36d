"""The benchmarks of issue 6 where nothing can be timed: what they ask, keep, take up again and report, and dry runs on a CPU.

Most tests give accelerator.py a contender that only talks (`ACTOR`), so that every turn takes as long as the test says.
"""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'benchmarks' / 'accelerator.py'
IMPORT = f'import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import accelerator;'
ACTOR = """
import json, os, sys, time
job, play = json.loads(sys.argv[2]), json.loads(os.environ['PLAY'])
def say(**words): print(json.dumps(words), flush=True)
with open(play['log'], 'a') as log: print(job['who'], job.get('name'), job.get('batch'), file=log)
if job['who'] == 'nobody':
    say(kind=play.get('device', 'NVIDIA H100 80GB HBM3'), platform='gpu', memory=80 * 2**30, versions=dict(jax='0.11.2'))
    sys.exit()
if job['who'] in play.get('crashes', ()): sys.exit(f"{job['who']} cannot")
if job['batch'] > play.get('room', 10**9): say(error='RESOURCE_EXHAUSTED: Out of memory', memory=True); sys.exit(1)
time.sleep(play.get('start', {}).get(job['name'], 0))
say(**dict(flops=10**9) if job['who'] == 'ours' else dict(versions=dict(timm='1', torch='2')))
for line in sys.stdin:
    kind = json.loads(line)['kind']
    if kind == 'memory': say(peak_bytes=play.get('memory', {}).get(job['who'])); continue
    time.sleep(play.get('turn', {}).get(job['name'], 0))
    seconds = play.get('seconds', {})
    say(seconds=seconds.get(kind, seconds.get(job['who'], 0.1)))
"""


@pytest.fixture(scope='module')
def accelerator():
    spec = importlib.util.spec_from_file_location('accelerator', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stage:
    "Runs accelerator.py with the actor; `play` says how it behaves."
    def __init__(self, module, folder, monkeypatch):
        self.module, self.out, self.log, self.monkeypatch = module, folder / 'out.jsonl', folder / 'log', monkeypatch
        (folder / 'actor.py').write_text(ACTOR)
        self.worker = [str(folder / 'actor.py'), '--work']
        monkeypatch.setattr(module, 'WORKER', self.worker)

    def play(self, **how): self.monkeypatch.setenv('PLAY', json.dumps(how | dict(log=str(self.log))))

    def run(self, *words, timm='python3', **how):
        "What is printed, its status, and who was started."
        self.play(**how)
        self.log.write_text('')
        timm = sys.executable if timm == 'python3' else timm
        if timm == sys.executable: self.monkeypatch.setattr(self.module.importlib.util, 'find_spec', lambda name: name)
        return self.module.run(self.module.arguments([*words, '--out', str(self.out), '--timm', timm, '--commit', 'c0ffee']))

    def started(self): return [line for line in self.log.read_text().splitlines() if not line.startswith('nobody')]
    def lines(self): return [json.loads(line) for line in self.out.read_text().splitlines()]


@pytest.fixture
def stage(accelerator, tmp_path, monkeypatch): return Stage(accelerator, tmp_path, monkeypatch)


def test_what_is_there_is_not_measured_again(stage, capsys):
    assert stage.run('steps', '--rounds', '3', '--cases', 'resnet_rs_50@160') == 0
    assert len(stage.lines()) == 1 and stage.started() == ['ours resnet_rs_50 256', 'timm resnet_rs_50 256']
    assert stage.run('steps', '--rounds', '3') == 0
    assert [line['case'] for line in stage.lines()] == ['resnet_rs_50@160', 'resnet_rs_152@256', 'efficientnet_b4@380']
    assert {line.split()[1] for line in stage.started()} == {'resnet_rs_152', 'efficientnet_b4'}
    capsys.readouterr()
    assert stage.run('steps', '--rounds', '3') == 0
    said = capsys.readouterr().out
    assert stage.started() == [] and said.count(': is there') == 3 and 'all that was asked for is there' in said
    stage.run('steps', '--rounds', '3', '--again', '--cases', 'resnet_rs_50@160')
    stage.run('steps', '--rounds', '3', device='NVIDIA A100-SXM4-80GB')     # another card: all of it
    stage.run('steps', '--rounds', '3', '--batch', '64', '--cases', 'resnet_rs_50@160')
    assert len(stage.lines()) == 3 + 1 + 3 + 1
    made = stage.lines()[0]
    assert made['commit'] == 'c0ffee' and made['versions']['jax'] == '0.11.2' and made['device'] == 'NVIDIA H100 80GB HBM3'
    assert made['rounds'] == 3 and re.fullmatch(r'2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00', made['time'])


def test_a_line_that_was_cut_off_is_measured_again_and_spoils_no_other(stage):
    stage.run('steps', '--rounds', '3', timm='no')
    text = stage.out.read_text()
    stage.out.write_text(text[:-40])
    stage.run('steps', '--rounds', '3', timm='no')
    assert stage.started() == ['ours efficientnet_b4 128']
    kept = list(stage.module.read(stage.out))
    assert [line['case'] for line in kept] == ['resnet_rs_50@160', 'resnet_rs_152@256', 'efficientnet_b4@380']


def test_the_batch_is_halved_for_both_until_it_fits(stage, capsys):
    assert stage.run('steps', '--rounds', '3', '--cases', 'resnet_rs_152@256', room=40) == 0
    assert stage.started()[-2:] == ['ours resnet_rs_152 32', 'timm resnet_rs_152 32'] and stage.lines()[0]['batch'] == 32
    assert 'not enough memory for 128 images, 64 are tried' in capsys.readouterr().out
    assert stage.run('steps', '--cases', 'efficientnet_b4@380', room=0) == 1     # one image does not fit: said, and goes on
    assert 'efficientnet_b4@380: FAILED: ours: RESOURCE_EXHAUSTED' in capsys.readouterr().out and len(stage.lines()) == 1


def test_time_up_keeps_what_is_finished(stage, capsys):
    begin = time.monotonic()
    assert stage.run('ladder', '--rounds', '3', '--minutes', '0.07', start=dict(resnet_rs_101=60)) == 0
    assert time.monotonic() - begin < 20
    said = capsys.readouterr().out
    assert [line['case'] for line in stage.lines()] == ['resnet_rs_50@160'] and 'all that was asked' not in said
    assert 'out of time, the same command goes on with: ladder resnet_rs_101@160, ladder resnet_rs_101@192, ' in said
    assert stage.run('ladder', '--rounds', '3') == 0
    assert len(stage.lines()) == 11 and not any(line.startswith('ours resnet_rs_50 ') for line in stage.started())


def test_time_up_after_three_rounds_makes_a_line_of_fewer(stage):
    stage.run('ladder', '--cases', 'resnet_rs_50@160', '--rounds', '1000', '--minutes', '0.07', turn=dict(resnet_rs_50=0.1))
    assert 3 <= stage.lines()[0]['rounds'] == len(stage.lines()[0]['seconds']['ours']['train']) < 1000


def test_without_torch_it_says_so_and_has_no_ratios(stage, monkeypatch, capsys):
    monkeypatch.setattr(stage.module.importlib.util, 'find_spec', lambda name: None)
    stage.play()
    asked = stage.module.arguments(['steps', '--rounds', '3', '--cases', 'resnet_rs_50@160', '--out', str(stage.out)])
    assert stage.module.run(asked) == 0
    assert 'no torch and timm here: the ratios against them are missing' in capsys.readouterr().out
    stage.module.report([stage.out])
    said = capsys.readouterr().out
    assert '| resnet_rs_50@160 | 256 | - | - | 100.0 | - | 2560 |' in said and 'no torch and timm here' in said
    assert stage.run('steps', '--rounds', '3', '--cases', 'resnet_rs_50@160') == 0      # now there is timm
    assert [sorted(line['seconds']) for line in stage.lines()] == [['ours'], ['ours', 'timm']]


def test_a_contender_that_breaks(stage, capsys):
    assert stage.run('steps', '--rounds', '3', '--cases', 'resnet_rs_50@160', crashes=['timm']) == 0
    assert 'timm cannot' in stage.lines()[0]['missing']['timm'] and 'tried without timm' in capsys.readouterr().out
    assert stage.run('steps', '--rounds', '3', crashes=['ours']) == 3
    assert len(stage.lines()) == 1 and stage.started() == [f'ours {name}' for name in (
        'resnet_rs_50 256', 'resnet_rs_152 128', 'efficientnet_b4 128')]
    assert capsys.readouterr().out.count('FAILED: ours: it ended with status 1: ours cannot') == 3


def test_ratios_and_report(stage, capsys):
    gib = 2**30
    stage.run('steps', '--rounds', '4', '--cases', 'resnet_rs_50@160', seconds=dict(ours=0.05, timm=0.06),
              memory=dict(ours=3 * gib, timm=4 * gib))
    stage.run('randaugment', '--rounds', '4', '--cases', 'resnet_rs_50@160',
              seconds={'train': 0.1, 'augment and train': 0.102, 'fused': 0.002, 'switch': 0.5, 'select': 0.01})
    stage.run('forms', '--rounds', '4', '--cases', '1x1', 'resnet_rs_50@160',
              seconds={'step: 1x1 as convolution': 0.12, '40 64 256 forward: convolution': 0.3})
    stage.run('ladder', '--rounds', '4', '--cases', 'resnet_rs_50@160', 'resnet_rs_420@320', 'resnet_26@64', '--batch', '64')
    capsys.readouterr()
    stage.module.report([stage.out])
    said = capsys.readouterr().out
    assert '## NVIDIA H100 80GB HBM3, JAX 0.11.2, c0ffee, ' in said and 'DRY' not in said
    use = 3 * 10**9 * 256 / 0.05 / 989.4e12     # three times the FLOPs of inference
    assert f'| resnet_rs_50@160 | 256 | 1.20 | 0.75 | 50.0 | 60.0 | 5120 | 3.00 | 4.00 | {100 * use:.1f}% |' in said
    assert '| longer with it, as fit has it | 2.0% 2.0% 2.0% |' in said and '| fused / step | 2.0% 2.0% 2.0% |' in said
    assert '| switch / step | 500.0% 500.0% 500.0% |' in said
    assert '| resnet_rs_50@160 | 256 | step: 1x1 as convolution / as it is | 1.20 |' in said
    assert '| 1x1 | 128 | 40 64 256 forward: convolution / matrix product | 3.00 |' in said
    assert '| 5 2048 512 gradients: convolution / matrix product | 1.00 |' in said
    assert re.search(r'\| resnet_rs_420@320 \| 64 \| 100\.0 \| 640 \| - \| .*% \| 1\.0 \| 29\.9 \| 32\.8 \|', said)
    assert re.search(r'\| resnet_26@64 \| 64 .* \| 1\.0 \| - \| - \|', said)
    stage.module.report([stage.out.with_name('nothing')])
    assert 'nothing was measured yet' in capsys.readouterr().out


def test_ratios_are_of_rounds(accelerator):
    "A machine that is slow in one round is slow for both."
    assert accelerator.spread([2, 4, 20], [1, 2, 10]) == (2, 2, 2)
    assert accelerator.spread([1, 2, 3, 4, 5], [1] * 5) == (3, 2, 4) and accelerator.spread([3], [2]) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize('kind, peak', [('NVIDIA H100 80GB HBM3', 989.4), ('NVIDIA H100 PCIe', 756), ('NVIDIA H200', 989.4), (
    'NVIDIA A100-SXM4-80GB', 312), ('NVIDIA A10G', 70), ('NVIDIA L40S', 362), ('NVIDIA L4', 121), ('Tesla T4', 65), (
    'TPU v3', 61.5), ('TPU v5 lite', 197), ('TPU v5p', 459), ('cpu', None)])
def test_peaks(accelerator, kind, peak): assert accelerator.peak_of(kind) == peak


def test_stopped_it_leaves_whole_lines_and_no_process(stage, tmp_path):
    stage.play(turn=dict(resnet_rs_101=60))
    code = f'{IMPORT} accelerator.WORKER = {stage.worker!r}; accelerator.main()'
    words = ['ladder', '--rounds', '3', '--timm', 'no', '--out', str(stage.out)]
    process = subprocess.Popen([sys.executable, '-c', code, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 30
    while not (stage.log.exists() and 'ours resnet_rs_101' in stage.log.read_text()) and time.monotonic() < end: time.sleep(0.05)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and 'what is in the file stays' in said and len(children) == 1, said
    assert [line['case'] for line in stage.lines()] == ['resnet_rs_50@160']
    assert not Path(f'/proc/{children[0]}').exists()


def test_bad_words(accelerator, capsys):
    with pytest.raises(SystemExit): accelerator.arguments(['step'])
    assert "no slice is called 'step'; there are steps, inference, randaugment, forms, ladder" in capsys.readouterr().err


# With JAX itself

GUARD = """
import importlib.abc, runpy, sys
class Guard(importlib.abc.MetaPathFinder):
    refused = set({refused!r})
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in self.refused: raise ImportError(f'{{name}} is more than jax, flax, optax and numpy bring')
sys.meta_path.insert(0, Guard())
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name='__main__')
"""


def beyond(*allowed):
    "Top-level modules of what is installed here, less what these packages bring with them."
    brought, queue = set(), [(name, '') for name in allowed]
    while queue:
        name, extra = queue.pop()
        try: needs = metadata.requires(name) or ()
        except metadata.PackageNotFoundError: continue
        brought.add(_plain(name))
        for need in map(Requirement, needs):
            if not need.marker or need.marker.evaluate(dict(extra=extra)):
                wanted = [(need.name, extra) for extra in ('', *need.extras)]
                queue += [each for each in wanted if each not in queue and (_plain(each[0]) not in brought or each[1])]
    assert {'scipy', 'jaxlib'} <= brought and not {'pandas', 'grain', 'pytest'} & brought
    return sorted(module for module, owners in metadata.packages_distributions().items()
                  if not {_plain(owner) for owner in owners} & (brought | {'resnet-rs'}) and module != 'resnet_rs')


def _plain(name): return re.sub('[-_.]+', '-', name).lower()


def on_cpu(*words, script=SCRIPT, timeout=900, **env):
    done = subprocess.run([sys.executable, script, *map(str, words)], env=os.environ | dict(JAX_PLATFORMS='cpu') | env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def test_it_needs_jax_flax_optax_and_numpy_alone(accelerator, tmp_path, monkeypatch, capsys):
    "A dry run in which every contender may import only these, what they bring, and the standard library."
    refused = beyond('jax', 'flax', 'optax', 'numpy')
    assert {'pandas', 'PIL', 'tensorflow_datasets', 'grain', 'simplejpeg', 'sklearn'} <= set(refused)
    guard = tmp_path / 'guarded.py'
    guard.write_text(GUARD.format(refused=refused, script=str(SCRIPT)))
    monkeypatch.setattr(accelerator, 'WORKER', [str(guard), '--work'])
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    words = ['inference', '--dry', '--rounds', '2', '--timm', 'no', '--cases', 'resnet_rs_50@160', '--out', str(tmp_path / 'o')]
    assert accelerator.run(accelerator.arguments(words)) == 0, capsys.readouterr().out
    line, = accelerator.read(tmp_path / 'o')
    assert line['dry'] and line['device'] == 'cpu' and all(seconds > 0 for seconds in line['seconds']['ours']['forward'])
    assert line['about']['ours']['flops'] > 10**6 and line['batch'] == 4 and line['rounds'] == 2


def test_the_asking_side_imports_no_jax():
    code = f"{IMPORT} accelerator.main(); print({{'jax', 'numpy', 'torch'}} & {{*sys.modules}}, accelerator.cases_of('ladder'))"
    done = subprocess.run([sys.executable, '-c', code, '--report', 'nothing'], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("set() ['resnet_rs_50@160', "), done


@pytest.mark.slow
def test_every_slice_dry_with_the_guard(accelerator, tmp_path, monkeypatch, capsys):
    guard, out = tmp_path / 'guarded.py', tmp_path / 'out.jsonl'
    guard.write_text(GUARD.format(refused=beyond('jax', 'flax', 'optax', 'numpy'), script=str(SCRIPT)))
    monkeypatch.setattr(accelerator, 'WORKER', [str(guard), '--work'])
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    common = ['--dry', '--rounds', '2', '--timm', 'no', '--out', str(out), '--minutes', '30']
    for slice, cases in dict(steps=['resnet_rs_50@160', 'efficientnet_b4@380'], inference=['efficientnet_b4@380'],
                             randaugment=['resnet_rs_50@160'], forms=['1x1', 'depthwise', 'resnet_rs_50@160'],
                             ladder=['resnet_rs_50@160']).items():
        assert accelerator.run(accelerator.arguments([slice, '--cases', *cases, *common])) == 0, capsys.readouterr().out
    assert len(list(accelerator.read(out))) == 2 + 1 + 1 + 3 + 1
    accelerator.report([out])
    said = capsys.readouterr().out
    assert 'A DRY RUN: NO SPEEDS' in said and all(f'### {slice}' in said for slice in accelerator.CASES)
    assert all(seconds > 0 for line in accelerator.read(out) for given in line['seconds']['ours'].values() for seconds in given)


def test_without_an_accelerator_nothing_is_timed(tmp_path):
    status, said = on_cpu('steps', '--out', tmp_path / 'o')
    assert status == 1 and 'JAX finds no accelerator here, so nothing is timed' in said and not (tmp_path / 'o').exists()
    status, said = on_cpu('--out', tmp_path / 'o')      # as `make bench` calls it
    assert status == 0 and 'JAX finds no accelerator here' in said


@pytest.mark.slow
def test_laptop_dry():
    status, said = on_cpu('--dry', '--rounds', '1', '--rows', 'resnet_d', script=ROOT / 'benchmarks' / 'laptop.py')
    assert status == 0, said
    assert re.search(r'main thread, of a step: flat [\d.]+% .*, nnx\.jit [\d.]+%', said), said
    assert re.search(r'with nothing to compute, of a step: [\d.]+% .* in all \(goal: 5% or less\)', said), said
    assert '175,054 parameters, 1.3 MFLOPs an image' in said, said
    assert re.search(r'ours, flag +[\d.]+ ms +speed / ours: [\d.]+', said), said
    assert re.search(r'second start: imports [\d.]+ s, plan and data [\d.]+ s, network [\d.]+ s, first step [\d.]+ s', said), said
    assert re.search(r'second / first: [\d.]+% .*\(goal: 25% or less\)', said), said
    status, said = on_cpu('stort', script=ROOT / 'benchmarks' / 'laptop.py')
    assert status == 2 and "no part is called 'stort'" in said
