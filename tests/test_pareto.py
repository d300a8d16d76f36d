"""Time against accuracy: known answers both ways, the paper's own numbers, the two notebooks as users run them."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from planned import refused

from resnet_rs.cost_studies import ACTIVATIONS_M, TIMED, efficientnet_rs_rows, pareto_rows, read_costs, timed_rows, write_cost
from resnet_rs.equal_accuracy import (accuracy_gain, column, cost_at, cost_ratio, cost_table, device_costs, family_ratio,
                                      figure5_points, paper_points, points_of, resampled, time_correlations)
from resnet_rs.evidence import ours_label
from resnet_rs.pareto_report import (efficientnet_figure, efficientnet_verdicts, efficientnet_words, pareto_figure,
                                     pareto_verdicts, pareto_words)
from resnet_rs.paper import table
from resnet_rs.report import claim_verdicts

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = str(Path(sys.executable).parent / 'papermill')
ROWS = list(pareto_rows('laptop'))
ARMS = {arm: list(rows) for arm, rows in efficientnet_rs_rows('laptop').items()}
LINES = ['C9a', 'C9b', 'C9c', 'C9d', 'C10a']


def runs(top1, scale='laptop', seeds=8, noise=.2, experiment='pareto'):
    """Finished records with these accuracies; seeds differ by what they share and by a noise of their own."""
    rng = np.random.default_rng(3)
    luck = rng.normal(0, 2, seeds)
    return [dict(experiment=experiment, row=row, seed=seed, scale=scale, status='done', key=f'{row}{seed}', config={},
                 result_version=1, metrics=dict(top1=value + luck[seed] + rng.normal(0, noise)),
                 data=dict(name='digits', eval_examples=1000)) for row, value in top1.items() for seed in range(seeds)]


def costs(seconds, scale='laptop', images=128, rounds=4, kind='cpu', **more):
    """Measured costs with these seconds of a step on 128 images; `more`: row -> value, of memory, params or flops."""
    drift = 1 + .05 * np.arange(rounds)
    made = []
    for row, value in seconds.items():
        own = {name: given[row] for name, given in more.items()}
        memory = dict(bytes=own.pop('memory', 10**9), fixed=0, source='compiler')
        made.append(dict(row=row, scale=scale, key='k', config={}, images=images, step_seconds=list(value * images / 128 * drift),
                         predict_seconds=[value / 4], memory=memory, params=10**6, flops=10**9, activations=10**6,
                         device=dict(kind=kind, count=1, cores=2), versions={}, git={}, time='') | own)
    return made


def by_row(values, rows=ROWS): return dict(zip(rows, values, strict=True))


SAME = by_row([80, 84, 88, 90] * 2)     # both families reach the same accuracies
ONCE, TWICE = [1, 2, 3, 5], [2, 4, 6, 10]


def ours(frame): return frame[frame.columns.get_level_values(0)[-1]]


# --- the paper's own numbers -----------------------------------------------------------------------------------------------

def test_the_paper_is_as_much_faster_as_it_says():
    top1, ms = paper_points()
    told = [row for row in table('table7') if row.tpu_times]
    assert len(told) == 5
    between = {}
    for row in told:
        theirs = next(key for key in ms if key.startswith(row.against))
        assert ms[theirs] / row.tpu_ms == pytest.approx(row.tpu_times, abs=.06)
        other_top1, other_ms = points_of(top1, ms, 'EfficientNet')
        between[row.model, row.image_size] = float(cost_at(other_ms, other_top1, row.top1) / row.tpu_ms)
    assert 1.7 < min(between.values()) and max(between.values()) < 2.75
    assert between['resnet_rs_350', 256] == pytest.approx(2.7, abs=.05), 'B6 has exactly its accuracy'
    assert 1.7 < family_ratio(top1, ms) < 2.7
    assert family_ratio(*paper_points('v100_s')) > family_ratio(top1, ms) > 1 > family_ratio(*paper_points('flops_B'))
    assert family_ratio(*paper_points('params_M')) < 1 < family_ratio(*paper_points('tpu_memory_GB', 'table3'))


def test_the_paper_agrees_with_itself_line_by_line():
    frame = pareto_verdicts([], [])
    assert list(frame.index) == LINES and (frame['paper: ImageNet val, TPUv3']['effect'] > 0).all()
    assert (efficientnet_verdicts([], [])['paper: ImageNet val, TPUv3']['effect'] > 0).all()


def test_every_point_of_figure_5_gains():
    top1, seconds, arms = figure5_points()
    gains = [accuracy_gain(top1, seconds, arms['compound'], [row]) for row in arms['slower']]
    assert len(gains) == 8 and 0 < min(gains) and max(gains) < 1


def test_flops_mislead_and_activations_less():
    found = time_correlations().set_index(['times of', 'count'])['off by']
    for device in ("paper's TPUv3", "paper's V100"):
        assert found[device, 'activations'] < found[device, 'FLOPs'] < found[device, 'parameters']


@pytest.mark.slow
def test_activations_are_counted():
    from resnet_rs.costs import counts
    for row in ('resnet_rs_152_224', 'efficientnet_b4_380'):
        assert counts(pareto_rows('paper')[row]).activations / 1e6 == pytest.approx(ACTIVATIONS_M[row], abs=.051)


# --- between points --------------------------------------------------------------------------------------------------------

def test_nothing_is_extrapolated():
    for wanted in (69.9, 80.1, [75, 81]):
        with pytest.raises(ValueError, match='outside of 70.00 to 80.00'): cost_at([1, 2], [70, 80], wanted)
    with pytest.raises(ValueError, match='no accuracy is shared'): cost_ratio([90, 91], [1, 2], [80, 81], [1, 2])
    with pytest.raises(ValueError, match='no network'): family_ratio({}, {})
    for late in (.5, 9):    # beyond the fastest and the slowest of the compound ones
        with pytest.raises(ValueError, match='no network with slower'):
            accuracy_gain(dict(a=70, b=80, c=75), dict(a=1, b=8, c=late), 'ab', 'c')
    points = dict(a=70, b=80, c=76, d=99), dict(a=1, b=4, c=2, d=9)
    assert accuracy_gain(*points, 'ab', 'cd') == pytest.approx(1), 'a point beyond does not count'


def test_ratios_with_known_answers():
    for times in (.4, 1.0, 2.3):
        assert cost_ratio([70, 75, 80], [1, 2, 8], [70, 75, 80], np.multiply([1, 2, 8], times)) == pytest.approx(times)
    assert cost_ratio([70, 80], [1, 4], [70, 75, 74, 80], [3, 6, 60, 12]) == pytest.approx(3), 'a beaten one counts for nothing'
    assert cost_ratio([70, 80], [1, 4], [75], [6]) == pytest.approx(3), 'one accuracy is enough'


def test_bootstrap_intervals_cover():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(60):
        values = rng.normal(1, 1, 6)
        found = resampled(lambda chosen, values=values: values[chosen].mean(), 6, 199)
        inside += found['low'] < 1 < found['high']
    assert inside >= 52, 'about 95 in 100'
    def refused(chosen):
        if len(set(chosen)) < 4: raise ValueError('too few')
        return 1.0 + chosen[0]
    assert math.isnan(resampled(refused, 4)['low']), 'not defined in many worlds: no interval'


# --- verdicts on made-up records ------------------------------------------------------------------------------------------

def test_verdicts_both_ways():
    memory, flops, params = (by_row(ONCE + TWICE), by_row(TWICE + ONCE), by_row(TWICE + ONCE))
    more = dict(memory={row: 10**8 * v for row, v in memory.items()}, params={row: 10**5 * v for row, v in params.items()},
                flops={row: 10**8 * v for row, v in flops.items()})
    for seconds, word, effect in ((ONCE + TWICE, 'agrees', 100), (TWICE + ONCE, 'disagrees', -50)):
        frame = ours(pareto_verdicts(runs(SAME), costs(by_row(seconds), **more)))
        assert frame.loc['C9a', 'verdict'] == word and frame.loc['C9a', 'effect'] == pytest.approx(effect, abs=12)
        assert frame.loc['C9a', 'effect low'] < frame.loc['C9a', 'effect'] < frame.loc['C9a', 'effect high']
        assert frame.loc['C9a', 'pairs'] == 8 and frame.loc['C9a', 'p (Holm)'] >= frame.loc['C9a', 'p']
        assert list(frame['verdict'][['C9c', 'C9d', 'C10a']]) == ['agrees'] * 3
        assert frame.loc['C9b', 'verdict'] == 'not run' and frame.loc['C10a', 'claim verdict'] == 'agrees'


def test_the_papers_networks_on_this_device():
    rows = TIMED['laptop']
    seconds = dict(zip(rows, [2., 3., 6.], strict=True))
    frame = ours(pareto_verdicts([], costs(seconds, 'paper')))
    assert frame.loc['C9b', 'pairs'] == 4 and frame.loc['C9b', 'effect'] > 100
    assert frame.loc['C9b', 'verdict'] == 'inconclusive', 'rounds that drift together leave the ratio as it is: no interval'
    noisy = [cost | dict(step_seconds=[s * (1 + .01 * ((7 * i + len(cost['row'])) % 5))
                                       for i, s in enumerate(cost['step_seconds'])]) for cost in costs(seconds, 'paper')]
    assert ours(pareto_verdicts([], noisy)).loc['C9b', 'verdict'] == 'agrees'
    slow = [cost | dict(step_seconds=[s * (9 if 'resnet' in cost['row'] else 1) for s in cost['step_seconds']]) for cost in noisy]
    assert ours(pareto_verdicts([], slow)).loc['C9b', 'verdict'] == 'disagrees'
    lines = cost_table(noisy)['measured: cpu (2 cores)']
    assert (lines['step s'] == 'not measured').sum() == 19 - len(rows)


def test_slower_scaling_both_ways():
    seconds = dict(zip(ARMS['compound'] + ARMS['slower'], [1, 2, 4, 8, 2, 3, 4, 6], strict=True))
    line = {row: 80 + math.log2(value) for row, value in seconds.items()}
    for shift, word in ((2, 'agrees'), (-2, 'disagrees'), (0, 'inconclusive')):
        top1 = {row: value + shift * (row in ARMS['slower']) for row, value in line.items()}
        frame = ours(efficientnet_verdicts(runs(top1, noise=.4), costs(seconds)))
        assert frame.loc['C8a', 'verdict'] == word and frame.loc['C8a', 'effect'] == pytest.approx(shift, abs=.5)
    half = runs({row: line[row] for row in ARMS['compound']})
    assert ours(efficientnet_verdicts(half, costs(seconds))).loc['C8a', 'verdict'] == 'not run'


def test_nothing_known_is_nothing_said():
    for verdicts, words, figure in ((pareto_verdicts, pareto_words, pareto_figure),
                                    (efficientnet_verdicts, efficientnet_words, efficientnet_figure)):
        frame = verdicts([], [])
        assert set(ours(frame)['verdict']) == {'not run'} and 'not run' in words([], []) and figure([], []).axes
        assert list(frame.columns.get_level_values(1)) == list(claim_verdicts([]).columns.get_level_values(1))
    assert set(ours(pareto_verdicts(runs(SAME), []))['verdict']) == {'not run'}, 'accuracies without times'
    assert set(ours(pareto_verdicts([], costs(by_row(ONCE + TWICE))))['verdict']) == {'not run'}, 'times without accuracies'
    one = ours(pareto_verdicts(runs(SAME, seeds=1), costs(by_row(ONCE + TWICE))))
    assert one.loc['C9a', 'verdict'] == 'inconclusive' and one.loc['C9a', 'effect'] > 0 and math.isnan(one.loc['C9a', 'p'])
    apart = runs(by_row([90, 91, 92, 93, 60, 61, 62, 63]))
    assert ours(pareto_verdicts(apart, costs(by_row(ONCE + TWICE)))).loc['C9a', 'verdict'] == 'inconclusive'
    assert 'share no range' in pareto_words(apart, costs(by_row(ONCE + TWICE)))


def test_records_of_the_sister_notebook_and_of_others():
    sister = runs({row: 85. for row in ARMS['slower']}, experiment='efficientnet_rs')
    alone, joined = (ours(pareto_verdicts(records, costs(by_row(ONCE + TWICE)))) for records in (runs(SAME), runs(SAME) + sister))
    assert alone['effect'].equals(joined['effect']) and ours_label(runs(SAME)) == ours_label(runs(SAME) + sister)
    with pytest.raises(ValueError, match='unknown row'): pareto_verdicts(runs({'cosine': 80.}), [])
    with pytest.raises(ValueError, match='scale'): pareto_verdicts(runs(SAME) + runs(SAME, scale='gpu'), [])


def test_devices_are_not_mixed():
    many, few = costs(by_row(ONCE + TWICE)), costs(by_row(TWICE + ONCE), kind='H100')[:3]
    device, found = device_costs(many + few, 'laptop', ROWS)
    assert device == 'cpu (2 cores)' and len(found) == 8
    halved = device_costs(costs(by_row(ONCE + TWICE), images=16), 'laptop', ROWS)[1]
    assert column(halved, 'seconds') == pytest.approx(column(found, 'seconds')), 'times are for 128 images'


# --- rows and files --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale', ['smoke', 'laptop', 'gpu', 'paper'])
def test_rows_of_a_scale(scale):
    rows, arms = pareto_rows(scale), efficientnet_rs_rows(scale)
    families = [sum(row.startswith(name) for row in rows) for name in ('resnet_rs', 'efficientnet')]
    assert min(families) >= (2 if scale == 'smoke' else 4)
    assert arms['compound'].items() <= rows.items() and not arms['slower'].keys() & rows.keys()
    for row, config in (rows | arms['slower']).items():
        assert row.endswith(f'_{config.image_size}') and (config.optimizer == 'rmsprop') == row.startswith('efficientnet')
    assert len({json.dumps(vars(config)) for config in (rows | arms['slower']).values()}) == len(rows | arms['slower'])


def test_costs_are_kept_whole(tmp_path):
    cost, = costs({ROWS[0]: 1.})
    write_cost(tmp_path, cost)
    assert read_costs(tmp_path) == [cost] and read_costs(tmp_path / 'none') == []
    with pytest.raises(ValueError, match='flops = None should be int'): write_cost(tmp_path, cost | dict(flops=None))
    (tmp_path / 'costs' / 'x.json').write_text('{"row":')
    with pytest.raises(ValueError, match='x.json is not a whole record'): read_costs(tmp_path)
    with pytest.raises(ValueError, match='unknown network'): timed_rows(['resnet_50'], 'laptop')


# --- the notebooks ---------------------------------------------------------------------------------------------------------

def papermill(notebook, out, **parameters):
    """Through pipes; the completed process, its two outputs joined."""
    given = [word for name, value in parameters.items() for word in ('-p', name, str(value))]
    return subprocess.run([PAPERMILL, f'nbs/{notebook}.ipynb', str(out), *given], cwd=ROOT, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)


@pytest.mark.parametrize('notebook, wrong, told', [
    ('pareto', dict(rows='efficientnet_b0'), "did you mean 'efficientnet_b0_24'"),
    ('pareto', dict(networks='resnet_rs_50'), "did you mean 'resnet_rs_50_160'"), ('pareto', dict(rounds=-1), 'rounds'),
    ('efficientnet_rs', dict(scale='laptops'), "'laptop'"), ('efficientnet_rs', dict(seed=3), "unknown parameter 'seed'")])
def test_wrong_parameters_stop_at_once(notebook, wrong, told, tmp_path):
    refused(notebook, [told], tmp_path / 'results', **wrong)


@pytest.mark.slow
@pytest.mark.parametrize('notebook, rows, claims', [
    ('pareto', list(pareto_rows('smoke')), ('C9', 'C10')),
    ('efficientnet_rs', [row for arm in efficientnet_rs_rows('smoke').values() for row in arm], ('C8',))])
def test_smoke(notebook, rows, claims, tmp_path):
    folder = tmp_path / 'results'
    done = papermill(notebook, tmp_path / 'out.ipynb', scale='smoke', seeds=1, rounds=1, results_dir=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    found = {record['row']: record for record in (json.loads(path.read_text()) for path in folder.glob('*.json'))}
    assert sorted(found) == sorted(rows)
    for row, record in found.items():
        m = record['metrics']
        assert record['status'] == 'done' and math.isfinite(m['loss']) and m['predicted_classes'] > 1, (row, m)
    assert len({record['weights_sha256'] for record in found.values()}) == len(rows)
    measured = read_costs(folder)
    assert sorted(cost['row'] for cost in measured) == sorted(rows) and all(cost['step_seconds'] for cost in measured)
    shown = (tmp_path / 'out.ipynb').read_text()
    assert all(f'**{claim} — ' in shown for claim in claims)
    assert (folder / f'{notebook}_smoke.png').stat().st_size > 5000 and (folder / f'{notebook}_smoke.csv').stat().st_size > 200
    again = papermill(notebook, tmp_path / 'again.ipynb', scale='smoke', seeds=1, rounds=1, results_dir=folder)
    assert again.returncode == 0 and '0 runs to do' in (tmp_path / 'again.ipynb').read_text(), again.stdout[-2000:]
    assert read_costs(folder) == measured, 'what was measured is not measured again'
