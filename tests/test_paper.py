"""The paper as data: every value has a source, nothing missing is filled, released configurations are those of the tables."""
import csv
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from resnet_rs import paper
from resnet_rs.claims import FURTHER_CLAIMS, paper_top1
from resnet_rs.config import SCALES, Config, check_trainable, ladder, scaled
from resnet_rs.effective import effective
from resnet_rs.paper import CLAIMS, CONFIDENCE, origin, recipe, table, tables
from resnet_rs.provenance import content_key

FOLDER = Path(paper.__file__).parent / 'tables'
NAMES = sorted(path.stem for path in FOLDER.glob('*.csv') if path.stem != 'contents')
REPOSITORY = re.compile(r'\b[\w-]+/[\w.-]+:[\w./-]+\.\w+')      # owner/repository:path.ending
UNNAMED = ('a Chinese translation', 'a post in a Korean blog')   # read, but nobody knows in which repository
every_table = pytest.mark.parametrize('name', NAMES)


def raw(name):
    "The file's rows as text, without the code under test."
    with (FOLDER / f'{name}.csv').open(encoding='utf-8', newline='') as file: return list(csv.DictReader(file))


# --- every value has a source ------------------------------------------------------------------------------------------------

def test_the_list_of_tables_is_whole():
    assert sorted(tables()) == NAMES
    printed = ' '.join(about.where for about in tables().values())
    for item in [f'Table {i}' for i in range(1, 13)] + [f'Figure {i}' for i in (2, 3, 5)] + ['Figures 1 and 4', 'Appendix E']:
        assert re.search(rf'\b{item}\b', printed), f'no table holds {item}'


@every_table
def test_every_value_has_a_source(name):
    "A value has a confidence and a source that a stranger can open; what is missing has neither; no source is a machine's path."
    about = tables()[name]
    columns = re.sub(r'\w+:', '', about.columns.replace(';', ' ')).split()
    assert columns and len(table(name)) == len(raw(name))
    for row, text in zip(table(name), raw(name), strict=True):
        for column in columns:
            value, (source, confidence) = getattr(row, column), origin(row, column)
            assert (value is None) == (text[column] == ''), 'a cell is what the file says, and an empty one stays empty'
            assert (value is None) == (confidence == 'missing') and confidence in CONFIDENCE
            assert not re.search(r'(?<![\w.])/(root|home|tmp|work)\b|shared', source)
            if confidence == 'primary': assert REPOSITORY.search(source), (row[:3], column, source)
            if confidence == 'secondary': assert REPOSITORY.search(source) or source.startswith(UNNAMED), source
            if confidence in ('recalled', 'assumed'): assert not source.startswith(('primary', 'Mycenae')), source


@every_table
def test_numbers_are_numbers(name):
    for column in table(name)[0]._fields:
        kinds = {type(getattr(row, column)) for row in table(name)} - {type(None)}
        assert len(kinds) <= 1, f'{column} mixes {kinds}'
    for column in {'top1', 'top5', 'image_size', 'params_M', 'flops_B', 'tpu_s', 'v100_s'} & set(table(name)[0]._fields):
        assert all(isinstance(getattr(row, column), int | float | None) for row in table(name)), column


def test_what_was_not_found_stays_missing():
    assert all(value is None for row in table('table5') for value in row[3:8])
    assert [row.row for row in table('table6') if row.top1 is not None] == ['baseline', 'scale_jittering', 'resnet_d']
    assert [row.row for row in table('figure3') if row.top1 is None] == [f'e{e}_i320_r400_w1' for e in (10, 100, 350)]
    assert all(row.model is None and row.test_top1 is None for row in table('table9'))
    assert {row.confidence for row in table('table12')} == {'recalled'}
    assert sum(row.depth is None for row in table('figure2')) == 3


def test_what_is_not_the_papers_says_whose_it_is():
    peers = [name for name, about in tables().items() if about.where == 'peers']
    assert peers == [name for name in tables() if name.startswith('peer_')] and len(peers) == 3
    assert not any('timm' in source or 'keras' in source for name in ('table3', 'table7', 'table8')
                   for source in (row.source for row in table(name)))


@pytest.mark.parametrize('column, value, told', [
    ('source', '', "needs a value and a source, or neither and 'missing'"),
    ('confidence', 'missing', "needs a value and a source, or neither and 'missing'"),
    ('confidence', 'certain', "unknown confidence in table3 'certain'")])
def test_a_row_that_breaks_the_rule_is_refused(tmp_path, monkeypatch, column, value, told):
    shutil.copytree(FOLDER, tmp_path / 'tables')
    rows = raw('table3')
    rows[1][column] = value
    with (tmp_path / 'tables' / 'table3.csv').open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(paper, 'files', lambda package: tmp_path)
    with pytest.raises(ValueError, match=told): paper.table.__wrapped__('table3')


def test_nothing_is_read_at_import():
    code = 'import csv\ndef refuse(*a): raise SystemExit("read at import")\ncsv.reader = refuse\nimport resnet_rs.'
    for module in ('paper', 'config', 'claims'):
        done = subprocess.run([sys.executable, '-c', code + module], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# --- the numbers agree with each other ---------------------------------------------------------------------------------------

def test_tables_that_print_the_same_number_agree():
    seven = {(row.model, row.image_size): row for row in table('table7')}
    assert len(seven) == 19
    for row in table('table3'):
        same = seven[row.model, row.image_size]
        assert (row.top1, row.params_M, row.flops_B) == (same.top1, same.params_M, same.flops_B)
    for row in table('table4'):
        assert (row.v100_s, row.tpu_ms) == (seven[row.model, row.image_size].v100_s, seven[row.model, row.image_size].tpu_ms)
    assert {row.row: row.top1 for row in table('table1')}['resnet_d'] == seven['resnet_rs_200', 256].top1
    for row in table('table2'):
        if row.delta is not None:
            assert row.delta == pytest.approx(row.top1 - paper_top1('table2')[row.row.replace('4e-5', '1e-4')])


def test_operations_are_those_of_randaugment():
    from resnet_rs.randaugment import OPS
    assert {row.op for row in table('randaugment')} == set(OPS) and len(table('randaugment')) == 16


def test_the_baseline_of_table_1_is_the_default_configuration():
    given = {row.field: row.value for row in table('table10') if row.setup == 'resnet' and row.field}
    for name, value in given.items():
        default = getattr(Config(), name)
        assert type(default)(value) == default, name
    assert {'epochs', 'schedule', 'weight_decay', 'bn_momentum', 'shortcut'} <= set(given)


# --- released configurations -------------------------------------------------------------------------------------------------

RELEASED = [(row['model'], int(row['image_size']), row) for name in ('table8', 'efficientnet') for row in raw(name)]
released = pytest.mark.parametrize('model, size, row', RELEASED, ids=[f'{model}@{size}' for model, size, _ in RELEASED])


@released
def test_a_released_configuration_is_its_row(model, size, row):
    "Field by field against the text of the two files, and nothing in the configuration that neither file says."
    config, family = Config.paper(model, size), model.rpartition('_')[0]
    said = {r['field']: r['value'] for r in raw('table10') if r['setup'] == family and r['field']}
    said |= {name: value for name, value in row.items() if value and name in asdict(config)}
    for name, text in said.items():
        value = getattr(config, name)
        assert value == (text if isinstance(value, str) else float(text)), name
    silent = set(asdict(config)) - set(said)
    expected = asdict(Config()) | (dict(depth=None, stem=None, stem_pool=None, shortcut=None) if family == 'efficientnet' else {})
    assert all(getattr(config, name) == expected[name] for name in silent), 'unsaid fields keep their default'
    assert config.replace(image_size=size) == config and config.image_size == size


def test_there_are_eleven_and_eight():
    assert [model.rpartition('_')[0] for model, *_ in RELEASED] == ['resnet_rs'] * 11 + ['efficientnet'] * 8
    assert {(model, size) for model, size, _ in RELEASED} == {(row.model, row.image_size) for row in table('table7')}
    assert len({Config.paper(model, size) for model, size, _ in RELEASED}) == 19


@released
def test_a_released_run_is_as_long_as_the_authors(model, size, row):
    steps = {r.setup: int(r.value) for r in table('table10') if r.item == 'steps'}
    config = Config.paper(model, size)
    assert round(config.epochs * 1_281_167 / config.batch_size) == steps[model.rpartition('_')[0]]
    if config.network is None:
        values = effective(config, 'paper', 1_281_167)
        assert (values.steps, values.peak_lr, values.schedule) == (109_475, pytest.approx(1.6), 'cosine')
        assert (values.weight_decay, values.ema_decay) == (4e-5, pytest.approx(0.9999))


def test_the_ladder_ends_in_a_released_model():
    assert ladder()['resnet_d'].replace(precision='bfloat16') == Config.paper('resnet_rs_200')


@pytest.mark.parametrize('model, size', [('resnet_rs_50', 160), ('resnet_rs_101', 192), *(
    pytest.param(model, size, marks=pytest.mark.slow) for model, size in (('resnet_rs_270', 256), ('resnet_rs_420', 320)))])
def test_a_released_configuration_makes_the_network_of_the_table(model, size):
    import math

    import jax
    from flax import nnx

    from resnet_rs.registry import from_config
    network = nnx.eval_shape(lambda: from_config(Config.paper(model, size), 1000, nnx.Rngs(0)))
    sizes = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(network, kind)))
             for kind in (nnx.Param, nnx.BatchStat)]
    row = next(row for row in table('table7') if (row.model, row.image_size) == (model, size))
    assert sizes == [row.params, row.bn_statistics]


@pytest.mark.parametrize('arguments, told', [
    (('resnet_rs_51',), "unknown model of the paper 'resnet_rs_51'; did you mean 'resnet_rs_50'"),
    (('resnet_200',), 'Choices: resnet_rs_50, resnet_rs_101'),
    ((50,), 'unknown model of the paper 50'),
    (('resnet_rs_101',), 'released at 160, 192 pixels: say which'),
    (('resnet_rs_50', 224), 'unknown image_size of resnet_rs_50 224. Choices: 160'),
    (('efficientnet_b0', '224'), 'Choices: 224')])
def test_a_model_that_was_not_released_is_refused_in_one_line(arguments, told):
    for ask in (Config.paper, recipe):
        with pytest.raises(ValueError, match=re.escape(told)) as error: ask(*arguments)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes', [
    dict(depth=None), dict(depth_factor=1.0), dict(network='efficientnet'), dict(schedule='exponential'), dict(rms_decay=0.9),
    dict(optimizer='rmsprop', rms_decay=0.9), dict(lr_decay_epochs=2.4), dict(schedule='exponential', lr_decay_factor=0.97)])
def test_fields_that_contradict_each_other_are_refused(changes):
    with pytest.raises(ValueError, match='does not go with'): Config().replace(**changes)


@pytest.mark.parametrize('number', range(8))
def test_every_scale_keeps_the_augmentation_of_a_released_efficientnet(number, tmp_path):
    from resnet_rs.experiment import Experiment
    config = Config.paper(f'efficientnet_b{number}')
    learned = number not in (5, 7)   # the paper takes the RandAugment checkpoints of these two
    assert (config.augmentation, config.randaug_prob) == (('autoaugment', 0) if learned else (None, 1))
    released = effective(config, 'paper', 1_281_167)
    assert (released.translate_px, released.cutout_px) == ((250, 100) if learned else (100, 40))
    for scale in ('smoke', 'laptop', 'gpu'):
        small = scaled(config, scale)
        assert small.augmentation == config.augmentation and small.depth_factor == config.depth_factor
        assert small.width == SCALES[scale].settings['width'] * config.width
        values = effective(small, scale, 100)
        assert (values.translate_px, values.cutout_px) == (released.translate_px / 8, released.cutout_px / 8), '32 of 256 pixels'
        assert (values.optimizer, values.rms_decay, values.schedule) == ('rmsprop', 0.9, 'exponential')
        assert values.lr_decay_steps > 0
    other = config.replace(dataset='digits', image_size=32, dialect='timm')
    for attempt in (lambda: check_trainable(other), lambda: scaled(other, 'laptop'), lambda: effective(other, 'paper', 1_281_167),
                    lambda: Experiment('try', {'b': other}, scale='laptop', seeds=1, results_dir=tmp_path)):
        with pytest.raises(ValueError, match='cannot be trained yet: the (Auto|Rand)Augment of dialect timm') as error: attempt()
        assert '\n' not in str(error.value)


def test_an_image_gets_one_augmentation():
    config = Config.paper('efficientnet_b0')
    told = "randaug_prob = 1.0 does not go with augmentation = 'autoaugment', which takes the place of RandAugment"
    for wrong in (lambda: config.replace(randaug_prob=1), lambda: Config(randaug_prob=1, augmentation='autoaugment')):
        with pytest.raises(ValueError, match=told): wrong()
    assert config.replace(randaug_prob=1, augmentation=None).randaug_prob == 1


def test_fields_of_efficientnet_leave_the_keys_alone():
    "Committed evidence was made before these fields; None must count as absent."
    old = {name: value for name, value in asdict(Config()).items() if value is not None}
    new = {f.name for f in fields(Config) if f.default is None}
    keys = [content_key(config=c, effective={}, data='d', seed=0, result_version=1) for c in (old, asdict(Config()))]
    assert keys[0] == keys[1] and len(new) == 10 and not new & set(old)


# --- claims ------------------------------------------------------------------------------------------------------------------

def test_claims_of_table_1_are_what_the_front_page_shows():
    assert list(CLAIMS) == ['C1', 'C3', 'C4', 'C5'] and list(FURTHER_CLAIMS) == ['C2', 'C6', 'C11', 'C13']
    rows = set(paper_top1('table1'))
    assert all(set(contrast.rows) <= rows for claim in CLAIMS.values() for contrast in claim.contrasts)


def test_the_papers_numbers_pass_its_further_claims():
    labelled = next(row.top1 for row in table('table7') if (row.model, row.image_size) == ('resnet_rs_152', 224))
    numbers = paper_top1('table2', 'table4', 'table6', 'figure3') | {'labelled': labelled}
    found = {claim.id: [round(c.value(numbers), 2) for c in claim.contrasts] for claim in FURTHER_CLAIMS.values()}
    assert found == {'C2': [1.0, 0.5, 1.5, 0.8, 0.2, 1.0], 'C6': [0.92, 0.89], 'C11': [3.4], 'C13': [4.0, 0.8, 3.2]}
