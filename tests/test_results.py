"""The scoreboard: every claim once per scale, from nothing but records; its faults; the front page and results.ipynb."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planned import refused

from resnet_rs import scoreboard
from resnet_rs.clip_runs import VIDEO_LADDER, video_rows
from resnet_rs.config import SCALES, Config, ladder, scaled
from resnet_rs.cost_studies import cost_key, efficientnet_rs_rows, pareto_rows, write_cost
from resnet_rs.effective import effective
from resnet_rs.entries import ENTRIES, contrast_table, evidence
from resnet_rs.joint_training import joint_rows
from resnet_rs.paper import table
from resnet_rs.pretraining import target_study, transfer_rows, transfer_sets
from resnet_rs.provenance import content_key, provenance
from resnet_rs.records import read_packed
from resnet_rs.scoreboard import BLIND, UNSEEN, experiment_table, sentences, verdict_table
from resnet_rs.studies import regularization_rows, scaling_rows
from resnet_rs.transfer_report import table5_study

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
CLAIMS = [claim.id for claim in table('claims')]
PLAIN = scaled(Config(), 'laptop')
ORIGIN = provenance() | dict(git=dict(commit='0' * 40, dirty=False))
ON_TASKS = ('semi_supervised', 'transfer', 'video')   # whose rows are known by their names, others by what was run


def record(experiment, row, top1, seed, config=PLAIN, scale='laptop', task=None, **more):
    "A whole record of a run that never was; the keys of two differ if what they ran does."
    values = asdict(effective(config, scale, 100))
    task = task or (dict(kind='made up', row=row) if experiment in ON_TASKS else None)
    key = content_key(config=asdict(config), effective=values, data=f'made-up-{seed}', seed=seed, result_version=1, task=task)
    metrics = dict.fromkeys(('top5', 'top5_raw', 'loss', 'eval_loss', 'weight_norm'), 1.) | dict(top1=top1, top1_raw=top1)
    return dict(
        key=key, experiment=experiment, row=row, seed=seed, scale=scale, result_version=1, status='done', error=None, task=task,
        config=asdict(config), effective=values, metrics=metrics | dict(top1_ema=None, top5_ema=None, predicted_classes=10),
        curve=dict(step=[], train_loss=[], eval_step=[], top1=[]), weights_sha256='0' * 64, steps=1, seconds=36.,
        images_per_second=1., device=dict(kind='none', count=1),
        data=dict(name='made-up', source='made up', fingerprint=f'made-up-{seed}', train_examples=100, eval_examples=9),
        **ORIGIN, **more)


def write(folder, records):
    "As `make record` packs them."
    folder.mkdir(exist_ok=True)
    for name in {r['experiment'] for r in records}:
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records if r['experiment'] == name))
    return folder


def made_up(experiment, rows, **more):
    "Eight seeds of rows, with accuracies in the order of the rows or as {row: accuracy}."
    rows = rows if isinstance(rows, dict) else {row: 50. + i for i, row in enumerate(rows)}
    rng = np.random.default_rng(0)
    return [record(experiment, row, top1 + rng.normal(0, .1), seed, **more) for row, top1 in rows.items() for seed in range(8)]


def clip_runs(**worth): return made_up('video', dict.fromkeys(VIDEO_LADDER, 70.) | worth)


# --- claims and scales -------------------------------------------------------------------------------------------------------

def test_every_claim_belongs_to_one_experiment_that_has_a_notebook():
    assert sorted(claim for entry in ENTRIES.values() for claim in entry.claims) == sorted(CLAIMS)
    for name, entry in ENTRIES.items(): assert (ROOT / 'nbs' / f'{name}.ipynb').is_file() and entry.verdicts and entry.words


@pytest.mark.parametrize('scales', [[], ['laptop'], ['gpu', 'laptop'], ['smoke', 'paper']])
def test_every_claim_stands_once_for_each_scale(scales, tmp_path):
    write(tmp_path, [record('video', 'baseline', 50., 0, scale=scale) for scale in scales])
    found = verdict_table(tmp_path)
    told = [scale for scale in SCALES if scale in scales] or ['']
    assert list(zip(found['scale'], found['claim'], strict=True)) == [(scale, claim) for scale in told for claim in CLAIMS]
    assert set(found['verdict']) == {'not run'}


def test_of_the_committed_runs():
    found, scales = verdict_table(RESULTS), {scale for _, scale in evidence(RESULTS).runs}
    assert found.groupby('scale')['claim'].apply(list).tolist() == [CLAIMS] * len(scales)


def lower_decay():
    "Records of Table 2 in which lowering weight decay costs a point alone and gains one with the other regularizers."
    rows, rng = regularization_rows('laptop'), np.random.default_rng(0)
    return [record('regularization', row, 50. + (('none' in row) == row.endswith('1e-4')) + rng.normal(0, .1), seed, config)
            for row, config in rows.items() for seed in range(8)]


def depth_pays_late():
    "Records of Figure 3 in which the deeper networks win by a point after 350 epochs, and the wider ones after 10."
    rows, rng = scaling_rows('laptop', ('r300_w1', 'r101_w2'), epochs=(10, 350)), np.random.default_rng(0)
    return [record('scaling_study', row, 50. + (('e350' in row) == ('r300' in row)) + rng.normal(0, .1), seed, config)
            for row, config in rows.items() for seed in range(8)]


def transfer(): return made_up('transfer', {row: 60. + 3 * row.startswith('rs_') for row in transfer_rows('laptop')[0]})


@pytest.mark.parametrize('claim, records, others', [
    ('C2', lower_decay, ['C16']), ('C6', depth_pays_late, ['C7', 'C14', 'C15']), ('C12', transfer, []),
    ('C13', lambda: clip_runs(scale_jittering=75., resnet_d=76.), []),
    ('C11', lambda: made_up('semi_supervised', dict(labelled=60., joint=63., joint_hard=61.)), [])])
def test_records_change_the_verdict_on_their_claim(claim, records, others, tmp_path):
    folder = write(tmp_path / 'some', records())
    before, after = (verdict_table(place).set_index('claim') for place in (tmp_path / 'none', folder))
    assert before.loc[claim, 'verdict'] == 'not run' and after.loc[claim, 'verdict'] == 'agrees'
    assert set(after.drop(index=[claim, *others])['verdict']) == {'not run'}
    assert after.loc[claim, 'seeds'] == '8' and 'survive Holm' in after.loc[claim, 'multiplicity']
    assert f'**{claim} — agrees.**' in ''.join(sentences(folder).values())


def test_accuracies_and_costs_together_speak_of_efficientnets(tmp_path):
    "The sister studies share the compound arm; slower scaling gains two points at the same times."
    arms = efficientnet_rs_rows('laptop')
    rows, rng = arms['compound'] | arms['slower'], np.random.default_rng(0)
    seconds = {row: 1. + i for arm in arms.values() for i, row in enumerate(arm)}
    write(tmp_path, [record('pareto' if row in arms['compound'] else 'efficientnet_rs', row, top1, seed, config)
                     for row, config in rows.items() for seed in range(8)
                     for top1 in [60. + 3 * seconds[row] + 2 * (row in arms['slower']) + rng.normal(0, .1)]])
    without = verdict_table(tmp_path).set_index('claim')['verdict']
    assert (without['C8'], without['C9'], without['C10']) == ('not run',) * 3, 'no times were measured'
    for row, config in rows.items():
        device = dict(kind='cpu', cores=2, system='none')
        write_cost(tmp_path, ORIGIN | dict(
            key=cost_key(row, 'laptop', asdict(config), device), row=row, scale='laptop', config=asdict(config), images=128,
            step_seconds=[seconds[row]] * 4, predict_seconds=[.1], memory=dict(bytes=10**9, source='compiler'), params=10**6,
            flops=10**9, activations=10**6, device=device))
    found = verdict_table(tmp_path).set_index('claim').loc['C8']
    assert (found['verdict'], found['seeds']) == ('agrees', '8') and '**C8 — agrees.**' in ''.join(sentences(tmp_path).values())
    assert len(evidence(tmp_path).runs['efficientnet_rs', 'laptop']) == 8 * len(rows), 'with the arm that pareto trained'
    assert found['reason'] == ''
    write(tmp_path, [record('pareto' if row in arms['compound'] else 'efficientnet_rs', row, 90. - 3 * seconds[row], seed, config)
                     for row, config in rows.items() for seed in range(8)])
    assert 'larger networks are not seen to be better' in verdict_table(tmp_path).set_index('claim').loc['C8', 'reason']


@pytest.mark.parametrize('claim', ['C10', 'C14'])
def test_what_a_scale_cannot_show_it_does_not_say(claim):
    part = pd.DataFrame([dict(claim=claim, contrast='made up', verdict='agrees', said='agrees', reason='')])
    assert scoreboard._verdict(part, 'laptop') == (UNSEEN, BLIND[claim, 'laptop'])
    assert scoreboard._verdict(part, 'gpu') == ('agrees', '')


def test_no_verdict_is_prettier_than_its_worst_contrast(tmp_path):
    for worth, verdict in ((dict(scale_jittering=60., se=65.), 'disagrees'), (dict(scale_jittering=75.), 'disagrees'),
                           (dict(scale_jittering=75., resnet_d=75.), 'inconclusive')):
        (tmp_path / 'video.jsonl').unlink(missing_ok=True)
        found = verdict_table(write(tmp_path, clip_runs(**worth))).set_index('claim').loc['C13']
        assert found['verdict'] == verdict, worth
    part = [r for r in clip_runs(scale_jittering=75., resnet_d=76.) if r['row'] != 'resnet_d']
    found = verdict_table(write(tmp_path, part)).set_index('claim').loc['C13']
    assert found['verdict'] == 'not run' and found['reason'].startswith('lacks architecture gain') and '+5.' in found['ours']


def test_smoke_speaks_of_no_claim(tmp_path):
    write(tmp_path, made_up('semi_supervised', dict(labelled=60., joint=63.), scale='smoke'))
    found = verdict_table(tmp_path).set_index('claim').loc['C11']
    assert found['verdict'] == UNSEEN and found['reason'] == BLIND['', 'smoke'] and '+' in found['ours']


def test_the_family_of_holm_is_all_contrasts_of_a_scale(tmp_path):
    write(tmp_path, clip_runs(scale_jittering=75., resnet_d=76.) + made_up('semi_supervised', dict(labelled=60., joint=60.05)))
    found = contrast_table(tmp_path)
    assert len(found) == 4 and found['p'].notna().all() and (found['p (Holm)'] >= found['p']).all()
    smallest = found.loc[found['p'].idxmin()]
    assert smallest['p (Holm)'] == pytest.approx(4 * smallest['p'])


# --- rows and plans ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale', SCALES)
def test_planned_rows_are_those_of_the_notebooks(scale):
    student = scaled(ladder()['resnet_d'], scale)
    joint = joint_rows(student)
    plans = dict(ablation=ladder(), regularization=regularization_rows(scale), semi_supervised=joint,
                 transfer=transfer_rows(scale)[0], video=video_rows(scale), scaling_study=scaling_rows(scale),
                 pareto=pareto_rows(scale), efficientnet_rs=[r for arm in efficientnet_rs_rows(scale).values() for r in arm])
    assert set(plans) == set(ENTRIES)
    for name, rows in plans.items(): assert ENTRIES[name].planned(scale) == len(rows), name
    plain = {row: config for row, (config, task) in joint.items() if type(task).__name__ == 'Task'}
    assert ENTRIES['semi_supervised'].plain(scale) == plain


def test_the_study_of_table_5_is_that_of_its_notebook():
    for target in transfer_sets('laptop')[1]: assert table5_study(target) == target_study(target)


def test_a_run_that_serves_two_experiments_counts_in_both(tmp_path):
    "Rows of Table 2 are rows of Table 1, whose runs are committed."
    shutil.copy(RESULTS / 'ablation.jsonl', tmp_path)
    found = {r['row'] for r in evidence(tmp_path).runs['regularization', 'laptop']}
    assert found == {'r200_none_1e-4', 'r200_ra_ls_sd_do_1e-4', 'r200_ra_ls_sd_do_4e-5'}


def test_runs_from_before_a_field_was_added_go_with_later_ones(tmp_path):
    "None says no more than nothing, in keys and so in tables."
    config = scaled(ladder()['baseline'], 'laptop')
    old, new = (record('ablation', 'baseline', 50. + seed, seed, config) for seed in (0, 1))
    old['config'] = {name: value for name, value in old['config'].items() if value is not None}
    assert old['config'].keys() < new['config'].keys()
    assert len(evidence(write(tmp_path, [old, new])).runs['ablation', 'laptop']) == 2 and set(verdict_table(tmp_path)['claim'])


def test_what_ran_and_what_the_paper_would_take(tmp_path):
    write(tmp_path, clip_runs() + [record('video', 'baseline', 50., 99) | dict(
        status='diverged', metrics=dict.fromkeys(record('video', 'se', 1., 0)['metrics']))])
    asked = []
    found = experiment_table(tmp_path, lambda *network: asked.append(network) or 1.).set_index('experiment')
    assert list(found.index) == list(ENTRIES)
    video = found.loc['video']
    assert (video['rows planned'], video['rows with runs'], video['runs'], video['lost']) == (10, 10, 80, 1)
    assert video['hours measured'] == pytest.approx(.81) and found.loc['ablation', 'scale'] == 'not run'
    hours = found['paper: hours, compiled, not run']
    images = sum(config.epochs for config in ladder().values()) * 1_281_167
    assert hours['ablation'] == pytest.approx(images / 1024 / 3600) and pd.isna(hours['video'])
    assert ('resnet_200', 256, 0.25) in asked and experiment_table(tmp_path)['paper: hours, compiled, not run'].isna().all()


# --- faults ------------------------------------------------------------------------------------------------------------------

def faulty(tmp_path, change):
    "The one line that is said of a folder with two records of videos, changed."
    path = write(tmp_path, [record('video', 'baseline', 50., seed) for seed in (0, 1)]) / 'video.jsonl'
    change(path)
    messages = []
    for function in (verdict_table, contrast_table, experiment_table, evidence, sentences):
        with pytest.raises(ValueError) as error: function(tmp_path)
        messages.append(str(error.value))
    assert len(set(messages)) == 1 and '\n' not in messages[0] and str(tmp_path) in messages[0]
    return messages[0]


@pytest.mark.parametrize('change, says', [
    (lambda path: path.rename(path.with_name('transfer.jsonl')), 'transfer.jsonl line 1: a run of video does not belong'),
    (lambda path: path.write_text(path.read_text()[:-200]), 'video.jsonl line 2: it is not JSON'),
    (lambda path: path.write_text(path.read_text().replace('"seed": 1', '"seed": 2')), 'video.jsonl line 2: key'),
    (lambda path: path.write_text(path.read_text() * 2), 'line 3: key'),
    (lambda path: path.write_text(path.read_text() + '\n'), 'line 3: it is empty')])
def test_a_fault_is_one_clear_line(change, says, tmp_path): assert says in faulty(tmp_path, change)


def test_runs_that_cannot_share_a_table_are_named(tmp_path):
    records = made_up('video', VIDEO_LADDER) + [record('video', 'se', 50., 9, PLAIN.replace(epochs=10))]
    with pytest.raises(ValueError, match=r"video, laptop scale: row 'se' was run with different epochs"):
        verdict_table(write(tmp_path, records))
    with pytest.raises(ValueError, match="did you mean 'laptop'"): verdict_table(tmp_path, 'laptops')


def test_runs_of_other_settings_are_counted_and_left_out(tmp_path):
    rows = {row: scaled(config, 'laptop') for row, config in ladder().items()}
    other = scaled(ladder(weight_decay=3e-5)['weight_decay'], 'laptop')
    records = [record('ablation', row, 50., 0, config) for row, config in rows.items()]
    trained = record('train', 'resnet_50', 50., 0, PLAIN.replace(depth=50))   # an experiment without a claim
    write(tmp_path, [*records, record('ablation', 'weight_decay', 90., 0, other), trained])
    assert len(evidence(tmp_path).runs['ablation', 'laptop']) == 11
    line = experiment_table(tmp_path).set_index('experiment').loc['ablation']
    assert (line['left out'], line['runs']) == (1, 11)


# --- pages -------------------------------------------------------------------------------------------------------------------

def test_the_front_page_says_what_the_records_say():
    verdicts = verdict_table(RESULTS).pivot(index='claim', columns='scale', values='verdict')
    lines = dict(re.findall(r'(?m)^\| (C\d+) \| (.*) \|$', (ROOT / 'README.md').read_text(encoding='utf-8')))
    assert list(lines) == CLAIMS
    for claim, line in lines.items():
        assert sorted(line.split(' | ')[:len(verdicts.columns)]) == sorted(verdicts.loc[claim]), f'{claim}: say `make readme`'


def papermill(out, **parameters):
    given = [word for name, value in parameters.items() for word in ('-p', name, str(value))]
    command = [Path(sys.executable).parent / 'papermill', '--no-progress-bar', ROOT / 'nbs' / 'results.ipynb', out, *given]
    return subprocess.run(command, cwd=out.parent, capture_output=True, text=True, timeout=300)


def test_results_runs_on_any_folder_of_records(tmp_path):
    folder = write(tmp_path / 'records', clip_runs(scale_jittering=75., resnet_d=76.) + transfer())
    before = {path: path.read_bytes() for path in RESULTS.rglob('*') if path.is_file()}
    done = papermill(tmp_path / 'out.ipynb', results_dir=folder, scale='laptop')
    assert done.returncode == 0, done.stderr[-3000:]
    assert before == {path: path.read_bytes() for path in RESULTS.rglob('*') if path.is_file()}
    found = pd.read_csv(folder / 'scoreboard.csv').set_index('claim')
    assert found.index.tolist() == CLAIMS and found['verdict'].to_dict() == dict.fromkeys(CLAIMS, 'not run') | dict(
        C12='agrees', C13='agrees')
    assert (folder / 'scoreboard_laptop.png').stat().st_size > 500 and len(pd.read_csv(folder / 'scoreboard_contrasts.csv')) == 11
    shown = (tmp_path / 'out.ipynb').read_text(encoding='utf-8')
    for words in ('**photographs**', 'Over 2 sets', 'Ours: **not run**', 'compiled, not run'): assert words in shown


@pytest.mark.parametrize('wrong, told', [
    (dict(scale='laptops', seeds=3), ["did you mean 'laptop'", "unknown parameter 'seeds'"]),
    (dict(results_dir='nowhere'), ['no such folder'])])
def test_wrong_parameters_are_one_line_each(wrong, told, tmp_path):
    assert len(refused('results', told, tmp_path / 'results', **wrong)) == len(told)


def test_what_is_saved_in_results_is_what_the_records_say():
    spec = importlib.util.spec_from_file_location('outputs', ROOT / 'docs' / 'outputs.py')
    outputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outputs)

    def said(cells):
        found = [output for cell in cells for output in cell.get('outputs', [])]
        kinds = [output.get('data', {}) | {'text': output.get('text')} for output in found]
        texts = [''.join(kind['text'] or kind.get('text/html') or kind.get('text/markdown') or '') for kind in kinds]
        return texts, sum('image/png' in kind for kind in kinds)
    texts, figures = said(json.loads(outputs.RESULTS.read_text(encoding='utf-8'))['cells'])
    assert (texts, figures) == said(outputs.executed(outputs.RESULTS).cells), 'nbs/results.ipynb is stale: python docs/outputs.py'
    assert figures >= 3 and not any(word in text for text in texts for word in ('/tmp', 'Traceback'))


def test_results_shows_every_table_and_figure_of_the_paper():
    cells = json.loads((ROOT / 'nbs' / 'results.ipynb').read_text(encoding='utf-8'))['cells']
    words = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    heads = ' '.join(re.findall(r'(?m)^## .*', words))
    found = {kind: {int(n) for part in re.findall(rf'{kind}s? ([\d, and]+)', heads) for n in re.findall(r'\d+', part)}
             for kind in ('Table', 'Figure')}
    assert found['Table'] == set(range(1, 13)) and found['Figure'] == set(range(1, 7))


def test_packed_evidence_is_read_whole():
    files = {path.stem: read_packed(path) for path in RESULTS.glob('*.jsonl')}
    known = {r['key'] for records in evidence(RESULTS).runs.values() for r in records}
    assert known <= {r['key'] for records in files.values() for r in records}
