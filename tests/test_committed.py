"""The committed evidence: whole, of committed code, of the plan that the code makes today, and repeatable."""
import math
from pathlib import Path

import pytest

from resnet_rs.config import ladder, scaled
from resnet_rs.experiment import Experiment
from resnet_rs.runs import train_run
from resnet_rs.records import read_packed
from resnet_rs.report import claim_verdicts, ours_label

RESULTS = Path(__file__).resolve().parent.parent / 'results'
SEEDS = 8


@pytest.fixture(scope='module')
def committed(): return {record['key']: record for record in read_packed(RESULTS / 'ablation.jsonl')}


@pytest.fixture(scope='module')
def plan(tmp_path_factory):
    "Table 1 at laptop scale, as the ablation notebook plans it by default, but with the seeds that are committed."
    rows = {row: scaled(config, 'laptop') for row, config in ladder().items()}
    return Experiment('ablation', rows, scale='laptop', seeds=SEEDS, results_dir=tmp_path_factory.mktemp('results'))


def test_every_run_of_the_plan_is_committed(committed, plan):
    "If this fails after a change of configuration or data, the evidence has to be made again (CONTRIBUTING.md)."
    missing = [(run.row, run.seed) for run in plan.runs if run.key not in committed]
    assert not missing, f'{len(missing)} of {len(plan.runs)} planned runs have no committed record, such as {missing[:3]}'


def test_runs_are_sound_and_of_committed_code(committed):
    assert len({r['weights_sha256'] for r in committed.values()}) == len(committed)
    for record in committed.values():
        m, where = record['metrics'], (record['row'], record['seed'])
        assert record['status'] == 'done' and math.isfinite(m['loss']) and m['predicted_classes'] > 1, where
        assert record['git']['dirty'] is False and len(record['git']['commit']) == 40, where
        assert record['data']['eval_examples'] == 1000 and record['data']['train_examples'] == 100, where


@pytest.mark.parametrize('packed', sorted(RESULTS.glob('*.jsonl')), ids=lambda path: path.stem)
def test_all_evidence_is_of_committed_code(packed):
    "And a run that was lost says why."
    for record in read_packed(packed):
        where = (record['row'], record['seed'])
        assert record['git']['dirty'] is False and len(record['git']['commit']) == 40, where
        assert record['status'] == 'done' and record['metrics']['predicted_classes'] > 1 or record['error'], where
        assert record['scale'] == 'laptop' and record['data']['train_examples'] >= 20, where


def test_each_seed_has_its_own_training_subset_shared_by_all_rows(committed):
    prints = {seed: {r['data']['fingerprint'] for r in committed.values() if r['seed'] == seed} for seed in range(SEEDS)}
    assert all(len(p) == 1 for p in prints.values()) and len(set.union(*prints.values())) == SEEDS


def test_training_methods_gain_at_this_scale(committed, plan):
    "C1's interval excludes zero: a scale that cannot show even this is of no use."
    records = [committed[run.key] for run in plan.runs]
    found = claim_verdicts(records)[ours_label(records)]
    assert (found.loc[[i for i in found.index if i.startswith('C1')], 'effect low'] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('row', ['baseline', 'weight_decay'])
def test_a_run_repeats(committed, plan, row):
    "The same bits where machine and versions are the same, and nearly the same accuracy anywhere else."
    run = next(r for r in plan.runs if (r.row, r.seed) == (row, 0))
    _, again = train_run(run.config, run.effective, run.seed, plan.data(run))
    assert again['metrics']['top1'] == pytest.approx(committed[run.key]['metrics']['top1'], abs=4)
    _, twice = train_run(run.config, run.effective, run.seed, plan.data(run))
    assert twice['weights_sha256'] == again['weights_sha256']
