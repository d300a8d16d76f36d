"""Corner cases of the evidence and the report: nothing run, one seed, gaps, losses, mixtures."""
import math
import subprocess
import sys

import numpy as np
import pytest

from resnet_rs.curves import curves_figure
from resnet_rs.evidence import check_records, effect, holm, interval, top1_by_seed, verdict
from resnet_rs.paper import CLAIMS, Contrast, table1, table1_top1
from resnet_rs.report import PAPER, claim_verdicts, ladder_figure, ladder_table, ours_label, style, verdict_words

ROWS = [r.row for r in table1()]


def record(row, seed, top1, status='done', **changes):
    return dict(key=f'{row}{seed}', row=row, seed=seed, scale='smoke', status=status, result_version=1, steps=4,
                config=dict(row=row, seed=seed), metrics=dict(top1=top1) if status == 'done' else None,
                data=dict(name='toy', fingerprint='f', train_examples=8, eval_examples=50),
                curve=dict(step=[1, 2, 4], train_loss=[2., None, 1.], eval_step=[4], top1=[top1])) | changes


def ladder(seeds, rows=ROWS, sign=1., noise=.3):
    """The paper's own steps times `sign`, around 50 %, with small noise of each run and a large luck of each seed."""
    rng = np.random.default_rng(3)
    luck = rng.normal(0, 3, seeds)
    return [record(row, seed, 50 + sign * 2 * (table1_top1()[row] - 79) + luck[seed] + noise * rng.normal())
            for row in rows for seed in range(seeds)]


def ours(table, records):
    return table[ours_label(records)]


def figures_hold(records):
    for figure in (ladder_figure(records), curves_figure(records)):
        figure.canvas.draw()    # would raise on what cannot be drawn
        assert len(figure.axes) == 2


def test_nothing_run():
    table = ladder_table([])
    assert list(table.index) == ROWS and list(table[PAPER]['top-1']) == [r.top1 for r in table1()]
    mine = ours(table, [])
    assert mine['verdict'].tolist() == ['—'] + ['not run'] * 10 and mine['runs'].sum() == 0 and mine['top-1'].isna().all()
    claims = ours(claim_verdicts([]), [])
    assert set(claims['verdict']) == set(claims['claim verdict']) == {'not run'} and claims['p (Holm)'].isna().all()
    words = verdict_words([])
    assert words.count('not run') >= 4 and '0 of 8 contrasts could be tested' in words and 'nan' not in words
    figures_hold([])
    for shown in (style(table), style(claim_verdicts([]))):
        assert 'nan' not in repr(shown).lower() and 'nan' not in shown._repr_html_().lower()


def test_one_seed_has_means_but_no_interval_and_no_verdict():
    records = ladder(1)
    mine = ours(ladder_table(records), records)
    assert mine['top-1'].notna().all() and mine['top-1 low'].isna().all() and mine['change low'].isna().all()
    assert set(mine['verdict'][1:]) == {'inconclusive'} and mine['p'].isna().all()
    assert set(ours(claim_verdicts(records), records)['claim verdict']) == {'inconclusive'}
    assert 'one paired seed, so no interval' in verdict_words(records) and 'nan' not in verdict_words(records)
    figures_hold(records)


@pytest.mark.parametrize('sign, word', [(1, 'agrees'), (-1, 'disagrees')])
def test_known_effects(sign, word):
    records = ladder(8, sign=sign, noise=.05)
    claims = claim_verdicts(records)
    assert set(ours(claims, records)['claim verdict']) == {word}
    assert set(ours(ladder_table(records), records)['verdict'][1:]) == {word}
    assert np.allclose(ours(claims, records)['effect'], 2 * sign * claims[PAPER]['effect'], atol=.2)
    assert verdict_words(records).count(f'— {word}.') == len(CLAIMS)


def test_a_missing_row_takes_its_two_steps_and_its_claims_with_it():
    records = ladder(4, [row for row in ROWS if row != 'se'])
    mine = ours(ladder_table(records), records)
    assert [row for row in ROWS if mine.loc[row, 'verdict'] == 'not run'] == ['se', 'resnet_d']
    assert mine.loc['resnet_d', 'runs'] == 4
    claims = claim_verdicts(records)
    by_claim = ours(claims, records).groupby(claims['Table 1']['claim'])['claim verdict'].first()
    assert by_claim['C5'] == 'not run' and 'not run' not in by_claim.drop('C5').tolist()
    assert 'no finished run of se' in verdict_words(records)
    assert list(ladder_table(records, rows=['se', 'cosine']).index) == ['se', 'cosine']
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        ladder_table(records, rows=['cosin'])
    figures_hold(records)


def test_lost_runs_are_counted_and_only_shared_seeds_pair():
    records = [r for r in ladder(5) if not (r['row'] == 'ema' and r['seed'] < 3)]
    records += [record('ema', 0, 0., 'failed'), record('ema', 1, 0., 'diverged'), record('ema', 2, math.nan)]
    mine = ours(ladder_table(records), records)
    assert mine.loc['ema', ['runs', 'lost', 'pairs']].tolist() == [2, '2 diverged, 1 failed', 2]
    assert mine.loc['label_smoothing', ['runs', 'lost', 'pairs']].tolist() == [5, '0', 2]
    ema = {r['seed']: r['metrics']['top1'] for r in records if r['row'] == 'ema' and r['seed'] > 2}
    epochs = {r['seed']: r['metrics']['top1'] for r in records if r['row'] == 'epochs'}
    assert math.isclose(mine.loc['ema', 'change'], np.mean([ema[s] - epochs[s] for s in (3, 4)]))
    assert 'ema (seed 0 failed), ema (seed 1 diverged), ema (seed 2 diverged)' in verdict_words(records)
    figures_hold(records)
    only_lost = [record('baseline', 0, 0., 'failed', data=None, curve=None, metrics={})]
    assert ours(ladder_table(only_lost), only_lost).loc['baseline', ['runs', 'lost']].tolist() == [0, '1 failed']
    figures_hold(only_lost)


def test_a_retried_run_is_no_loss_and_a_second_result_is_refused():
    records = ladder(2)
    done, lost = top1_by_seed([record('se', 0, 0., 'failed')] + records + records[:3], ROWS)
    assert lost['se'] == {} and len(done['se']) == 2
    with pytest.raises(ValueError, match="'baseline' has two finished runs of seed 0: baseline0 and other"):
        ladder_table(records + [record('baseline', 0, 12., key='other')])


@pytest.mark.parametrize('changes, message', [
    (dict(scale='laptop'), 'different scale .*laptop, smoke'),
    (dict(result_version=2), 'different result_version .*1, 2'),
    (dict(data=dict(name='other')), 'different data.name .*other, toy'),
    (dict(seed=1, data=dict(name='toy', fingerprint='g')), 'different data.fingerprint at seed 1 .*f, g'),
    (dict(data=dict(name='toy', eval_examples=51)), 'different data.eval_examples .*50, 51'),
    (dict(config=dict(row='se', seed=9, dropout=.4)), r"row 'se' was run with different dropout \(None and 0.4\)"),
    (dict(row='squeeze'), "unknown row 'squeeze'"),
    (dict(status='running'), "unknown status 'running'"),
    (dict(seed=None), 'needs a seed'),
    (dict(metrics=dict(top1=101.)), 'top-1 in percent'),
])
def test_mixtures_and_bad_records_are_refused_by_every_door(changes, message):
    records = ladder(2) + [record('se', 9, 60.) | changes]
    for door in (ladder_table, claim_verdicts, verdict_words, ladder_figure, curves_figure):
        with pytest.raises(ValueError, match=message):
            door(records)


def test_a_setting_that_came_later_and_is_not_used_is_no_difference():
    old, new = record('baseline', 0, 40.), record('baseline', 1, 41.)
    new['config'] = old['config'] | dict(accumulate=None)
    assert check_records([old, new], ROWS) == [old, new]


def test_seeds_alike_to_the_last_digit_are_no_evidence():
    records = [record(row, seed, 40. + i) for i, row in enumerate(ROWS) for seed in range(4)]
    mine = ours(ladder_table(records), records)
    assert set(mine['verdict'][1:]) == {'inconclusive'} and mine['p'].isna().all()
    assert np.allclose(mine['change'][1:].astype(float), 1)
    assert 'paired seeds all alike' in verdict_words(records)
    figures_hold(records)


def test_interval_verdict_and_holm_at_their_edges():
    assert np.isnan(interval([])).all() and interval([1.])[0] == 1 and np.isnan(interval([1.])[1:]).all()
    for bad in ([math.nan, 1.], [math.inf, 1.]):
        with pytest.raises(ValueError, match='finite'):
            interval(bad)
    assert verdict(0, 1) == verdict(-1, 0) == 'inconclusive' and verdict(math.nan, math.nan) == 'inconclusive'
    assert np.isnan(holm([math.nan])).all() and holm([]).size == 0 and holm([.9, .8]).tolist() == [1, 1]
    assert holm([.04]).tolist() == [.04]
    assert effect(Contrast('x', '', {'a': 1, 'b': -1}), {'a': {0: 1.}, 'b': {1: 1.}})['verdict'] == 'inconclusive'
    assert check_records(iter([]), ROWS) == []


def test_tables_read_as_text_and_as_html():
    records = ladder(3)
    shown = style(ladder_table(records))
    text = repr(shown).splitlines()
    assert len(text) == 13 and len(set(map(len, text[1:]))) == 1       # a label, a heading, eleven rows of one width
    assert PAPER in text[0] and ours_label(records) in text[0] and max(map(len, text)) < 170
    html = shown._repr_html_()
    assert html.count('<tr>') == 13 and '<style' not in html and PAPER in html
    assert style(claim_verdicts(records)).frame.shape[0] == 8


def test_import_is_light():
    code = "import sys, resnet_rs.report; print(sorted({'jax', 'flax', 'tensorflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
