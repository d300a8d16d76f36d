"""The scaling study: its rows, what it costs, verdicts of records with a known answer, and the notebook at the smallest scale."""
import csv
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from planned import refused

from resnet_rs.config import SCALES
from resnet_rs.evidence import ours_label
from resnet_rs.paper import table
from resnet_rs.power_laws import find_break, resnet_flops
from resnet_rs.scaling_points import falls, network_flops, paper_points, rule_of, rule_weights
from resnet_rs.scaling_report import depth_width_figure, power_law_figure, scaling_verdicts, scaling_words
from resnet_rs.studies import FIRST_ROWS, FOUR_DEPTHS, FOUR_SIZES, scaling_rows, scaling_study

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = str(Path(sys.executable).parent / 'papermill')
ROWS = list(scaling_study().rows)
TOP1 = scaling_study().top1()


# --- rows ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale', SCALES)
def test_every_scale_has_all_rows_of_the_figure(scale):
    rows = scaling_rows(scale)
    assert list(rows) == ROWS == [p.row for p in table('figure3')] and len(set(rows.values())) == 72
    thin = SCALES[scale].settings.get('width', 1)
    for p in table('figure3'):
        config = rows[p.row]
        assert config.epochs == p.epochs and math.isclose(config.width, thin * p.width)
        assert config.depth == FOUR_DEPTHS[scale][(101, 200, 300, 400).index(p.depth)]
        assert config.image_size == FOUR_SIZES[scale][(128, 160, 224, 320).index(p.image_size)]
        assert (config.image_size * 128 == p.image_size * FOUR_SIZES[scale][0]), 'sizes keep their proportions'
    assert set(scaling_rows(scale, *FIRST_ROWS[scale])) <= set(rows)


def test_regularisation_is_that_of_the_appendix():
    rows, dropout = scaling_rows('paper'), {row.width: row.dropout for row in table('table12')}
    for p in table('figure3'):
        c = rows[p.row]
        strength = (c.randaug_prob, c.label_smoothing, c.drop_path, c.dropout)
        if p.epochs < 350: assert strength == (0, 0, 0, 0), 'mirror images and crops only'
        else:
            assert strength == (1, .1, .2 if p.image_size >= 224 else 0, dropout[p.width])
            assert c.randaug_magnitude == (15 if p.image_size >= 224 else 10)
        assert c.weight_decay == 4e-5 and (c.stem, c.stem_pool, c.shortcut, c.se_ratio) == ('deep', 'max', 'avg', .25)


@pytest.mark.parametrize('scale, dropout', [('laptop', {1.0: 0, 1.5: 0.05, 2.0: 0.1}), ('paper', {1.0: .25, 1.5: .6, 2.0: .75})])
def test_dropout_goes_by_the_width_that_is_trained(scale, dropout):
    long = [(p, scaling_rows(scale)[p.row]) for p in table('figure3') if p.epochs == 350]
    assert {p.width: c.dropout for p, c in long} == dropout and all(c.dropout == dropout[p.width] for p, c in long)


def test_changes_reach_every_row_and_parts_are_parts():
    part = scaling_rows('gpu', ['r101_w1.5'], [224, 128], [100], dataset='cifar100', batch_size=None)
    assert list(part) == ['e100_i128_r101_w1.5', 'e100_i224_r101_w1.5'] and {c.dataset for c in part.values()} == {'cifar100'}
    for wrong in (dict(networks=['r152_w1']), dict(sizes=[448]), dict(epochs=[200]), dict(depht=50)):
        with pytest.raises(ValueError, match='unknown|parameter'): scaling_rows('laptop', **wrong)
    with pytest.raises(ValueError, match='laptops'): scaling_rows('laptops')


def test_flops_without_jax_are_those_of_the_program():
    """The closed form of 14_power_laws against the count of 15_scaling_rules, which traces the network."""
    from resnet_rs.scaling_rules import resnet_cost
    configs = [*scaling_rows('laptop', epochs=[350]).values(), *scaling_rows('paper', sizes=[160], epochs=[350]).values()]
    configs += scaling_rows('smoke', sizes=[128], epochs=[350]).values()
    shapes = {(c.depth, c.image_size, c.width): c for c in configs}
    assert len(shapes) == 36
    for shape, config in shapes.items():
        assert resnet_flops(config) == resnet_cost(*shape, 'max').flops, shape
    for stem_pool in ('conv', 'none'):
        assert resnet_flops(config.replace(stem_pool=stem_pool)) == resnet_cost(*shape, stem_pool).flops


# --- the paper's own points ------------------------------------------------------------------------------------------------

def test_the_papers_own_points_hold_its_claims():
    small, large = falls(paper_points())
    at = find_break([p.flops for p in paper_points()], [p.error for p in paper_points()])
    assert small > large > 0 and at.p < .01 and at.after > at.before, 'C7'
    done = {row: {0: TOP1[row]} if row in TOP1 else {} for row in ROWS}
    chosen = rule_of(done)
    assert set(chosen.values()) == {'r101_w2'} and sum(w * TOP1[row] for row, w in rule_weights(chosen).items()) > .5, 'C15'
    assert scaling_verdicts([])['paper: ImageNet minival']['effect'].min() > .5


# --- records with a known answer -------------------------------------------------------------------------------------------

def records(top1, seeds=4, noise=.1, rows=ROWS, scale='laptop'):
    """Made-up records: `top1` of (epochs, paper's image size, network, FLOPs), and what a seed and a run do by chance."""
    rng, configs, made = np.random.default_rng(3), scaling_rows(scale), []
    luck = rng.normal(0, 2, seeds)
    for row in rows:
        epochs, size, network = row.split('_', 2)
        flops = network_flops(config := asdict(configs[row]))
        for seed in range(seeds):
            value = np.clip(top1(int(epochs[1:]), int(size[1:]), network, flops) + luck[seed] + rng.normal(0, noise), 0, 99)
            made.append(dict(key=f'{row}-{seed}', row=row, seed=seed, scale=scale, status='done', config=config,
                             data=dict(name='made up', eval_examples=1000), metrics=dict(top1=float(value))))
    return made


def like_figure_3(epochs, size, network, flops):
    """As in the paper: width is better short, depth long; large images are nothing for small networks; errors level off."""
    rival = {'r300_w1': 2, 'r101_w2': -2}.get(network, 0) * (1 if epochs == 350 else -1)
    return 60 - 20 * (min(flops, 9e6) / 9e6) ** -.3 + rival - size / 50


def the_opposite(epochs, size, network, flops):
    rival = {'r300_w1': 4, 'r101_w2': -4}.get(network, 0)
    return 60 - 20 * (flops / 9e6) ** -(.1 if flops < 9e6 else .6) + rival + size / 30


def verdicts(made):
    shown = scaling_verdicts(made)
    return shown[ours_label(made)]


def test_known_answers_give_known_verdicts():
    agrees, disagrees = verdicts(records(like_figure_3)), verdicts(records(the_opposite))
    assert list(agrees.index) == ['C6a', 'C6b', 'C7a', 'C7b', 'C14a', 'C15a']
    assert set(agrees['claim verdict']) == {'agrees'}, agrees
    assert set(disagrees['claim verdict']) == {'disagrees'}, disagrees
    assert disagrees['effect']['C15a'] < 0 < agrees['effect']['C15a'], 'a rule that was right costs nothing, and says so'
    assert math.isclose(abs(agrees['effect']['C15a']), abs(agrees['effect']['C6a'])), 'the same rows'
    noisy = verdicts(records(like_figure_3, seeds=3, noise=15))
    assert set(noisy['claim verdict']) <= {'inconclusive', 'not run'}, noisy


def test_c7_needs_more_than_seeds():
    """Eight networks about one line, the same in every seed: sure of their means, and no break beyond chance."""
    scatter = dict(zip([(s, n) for s in (128, 160, 224, 320) for n in ('r300_w1', 'r101_w2')], (1, 0, .2, 1, -2, 2, 2, -1)))
    made = records(lambda e, s, n, flops: 60 - 20 * (flops / 9e6) ** -.3 + scatter.get((s, n), 0), noise=.01,
                   rows=[row for row in ROWS if row.endswith(('r300_w1', 'r101_w2'))])
    found = verdicts(made).loc['C7b']
    assert found['p'] < .05 and found['claim verdict'] != 'agrees'


def test_a_choice_of_short_training_is_not_a_maximum_of_the_long():
    """With no difference at all the cost of the rule is as often below zero as above."""
    costs = []
    for i in range(40):
        rng = np.random.default_rng(i)
        done = {row: dict(enumerate(rng.normal(50, 1, 3))) for row in ROWS}
        costs.append(np.mean([sum(w * done[row][s] for row, w in rule_weights(rule_of(done)).items()) for s in range(3)]))
    assert abs(np.mean(costs)) < 3 * np.std(costs) / math.sqrt(len(costs)) and min(costs) < 0 < max(costs)


def test_missing_and_lost_runs_are_said():
    made = records(like_figure_3, rows=[row for row in ROWS if '_i160_' in row])
    shown, words = verdicts(made), scaling_words(made)
    assert shown['verdict']['C6a'] == shown['verdict']['C14a'] == 'not run' and shown['verdict']['C15a'] == 'agrees'
    assert 'r101_w2 at 160 px' in words and '**C6 — not run.**' in words
    made[0]['status'] = 'failed'
    assert f'{made[0]["row"]} (seed 0 failed)' in scaling_words(made)
    empty = scaling_words([])
    assert all(f'**{claim} — not run.**' in empty for claim in ('C6', 'C7', 'C14', 'C15')) and 'cannot speak' not in empty
    with pytest.raises(ValueError, match='unknown row'): scaling_verdicts([made[0] | dict(row='r50')])
    with pytest.raises(ValueError, match='different scale'): scaling_verdicts([made[0], made[1] | dict(scale='gpu')])


def test_figures_are_there_with_and_without_records():
    for draw, panels in ((power_law_figure, (2, 2)), (depth_width_figure, (3, 6))):
        for made, n in zip(([], records(like_figure_3)), panels):
            figure = draw(made)
            assert len(figure.axes) == n and ('not run' in figure.get_suptitle()) == (not made)
            assert ('agrees' in figure.get_suptitle()) == bool(made)


# --- the notebook ----------------------------------------------------------------------------------------------------------

def papermill(out, timeout=600, **parameters):
    given = [word for name, value in parameters.items() for word in ('-p', name, str(value))]
    return subprocess.run([PAPERMILL, 'nbs/scaling_study.ipynb', str(out), *given], cwd=ROOT, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)


def sound(folder, rows):
    """Every planned row left a record of its own, a finite loss, and after more than a step guesses that differ."""
    found = {record['row']: record for record in (json.loads(path.read_text()) for path in folder.glob('*.json'))}
    assert sorted(found) == sorted(rows)
    for row, record in found.items():
        metrics = record['metrics']
        assert record['status'] == 'done' and math.isfinite(metrics['loss']), (row, metrics)
        assert metrics['predicted_classes'] > 1 or record['steps'] == 1, (row, metrics)
    assert len({record['weights_sha256'] for record in found.values()}) == len(rows), 'each row does something'


@pytest.mark.slow
def test_two_rows_leave_records_and_a_report_and_are_not_made_again(tmp_path):
    from resnet_rs.experiment import Experiment
    rows, folder = ['e10_i160_r101_w1', 'e350_i160_r101_w1'], tmp_path / 'results'
    given = dict(scale='smoke', seeds=1, results_dir=folder)
    done = papermill(tmp_path / 'out.ipynb', networks='r101_w1', sizes=160, epochs='10,350', **given)
    assert done.returncode == 0, done.stdout[-3000:]
    sound(folder, rows)
    shown = (tmp_path / 'out.ipynb').read_text()
    assert 'C6 \\u2014 not run' in shown or 'C6 — not run' in shown
    with open(folder / 'scaling_study_smoke.csv') as file: assert len(list(csv.reader(file))) == 2 + 72
    more = Experiment('scaling_study', scaling_rows('smoke', ['r101_w1'], [160]), scale='smoke', seeds=1, results_dir=folder)
    assert [run.row for run in more.pending()] == ['e100_i160_r101_w1'], 'those of another command count'
    for name in ('depth_width', 'power_law'): assert (folder / f'scaling_study_smoke_{name}.png').stat().st_size > 500


@pytest.mark.parametrize('wrong, told', [
    (dict(networks='r101_w3', sizes=448, epochs='10,90', rows='e10_i128'),
     ["did you mean 'r101_w", '128, 160, 224, 320', '10, 100, 350', 'rows = ', 'None leaves it to the scale']),
    (dict(network='r101_w1'), ["unknown parameter 'network'; did you mean 'networks'"])])
def test_wrong_parameters_stop_before_any_training(wrong, told, tmp_path):
    refused('scaling_study', told, tmp_path / 'results', **wrong)


@pytest.mark.slow
def test_the_rows_to_begin_with(tmp_path):
    done = papermill(tmp_path / 'out.ipynb', scale='smoke', seeds=1, results_dir=tmp_path / 'results')
    assert done.returncode == 0, done.stdout[-3000:]
    sound(tmp_path / 'results', scaling_rows('smoke', *FIRST_ROWS['smoke']))
