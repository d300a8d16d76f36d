"""Weights of other people: names held against real files, errors that change nothing, files of our own, and the hub's client.

That checkpoints of the authors load into the networks they belong to, and that these give the authors' answers, is in
test_parity_authors.py; the same for timm in test_parity_timm.py.
"""
import functools
import hashlib
import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from goldens import checkpoints, recipe

from resnet_rs import __version__
from resnet_rs.config import DEPTHS, DIALECTS, Config
from resnet_rs.hub import HUB
from resnet_rs.registry import create_model, from_config, list_models
from resnet_rs.resnet import ResNet
from resnet_rs.tf_checkpoint import TFCheckpoint
from resnet_rs.weights import (About, export_weights, load_garden, load_tf1, load_timm, load_weights, names, pretrained,
                               read_notes, save_weights)

GOLDENS = Path(__file__).parent / 'goldens'
SMALL = dict(blocks=DEPTHS[14], num_classes=3, width=0.125)


@functools.cache
def abstract(name, **options): return nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **options))


def drawn(seed, name, **options):
    "A network whose values, all of them, NumPy draws: nothing has to be compiled."
    graph, state = nnx.split(abstract(name, **options))
    draw = np.random.default_rng(seed)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(draw.uniform(0.1, 0.9, x.shape), x.dtype), state))


def small(seed=0, name='resnet_rs_50', **changes): return drawn(seed, name, **SMALL | changes)


def values(model):
    "Path -> array, of everything in the network."
    return {'.'.join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def same(one, two):
    one, two = values(one), values(two)
    return one.keys() == two.keys() and all(one[k].dtype == two[k].dtype and (one[k] == two[k]).all() for k in one)


def refused(load, model, *words):
    "The message of the ValueError that `load` raises, having changed nothing."
    before = values(model)
    with pytest.raises(ValueError) as error: load()
    after = values(model)
    assert all((before[k] == after[k]).all() for k in before), 'something was loaded'
    for word in words: assert word in str(error.value), (word, str(error.value))
    return str(error.value)


# --- names -----------------------------------------------------------------------------------------------------------------

KINDS = {'timm': ('resnet_', 'efficientnet_'), 'tf1': ('resnet_', 'efficientnet_'), 'garden': ('resnet_', 'resnet3d_')}


def deep(name):
    "Tracing the initial values of a deep network takes long."
    return pytest.mark.slow if int(re.findall(r'\d+', name)[-1]) > 101 or name[-2:] in ('b5', 'b6', 'b7') else ()


@pytest.mark.parametrize('name', [pytest.param(name, marks=deep(name)) for name in list_models()])
def test_each_variable_of_each_network_has_one_name_and_no_two_the_same(name):
    model = abstract(name)
    ours = {'.'.join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(model))}
    for source, kinds in KINDS.items():
        if not name.startswith(kinds):
            with pytest.raises(ValueError, match='unknown kind of network'): names(model, source)
            continue
        found = names(model, source)
        assert found.keys() == ours.keys() and len({entry.name for entry in found.values()}) == len(ours)
        assert all(np.prod(entry.shape) == np.prod(ours[path]) for path, entry in found.items())
        assert ours.keys() - names(model, source, head=False).keys() == {'head.kernel', 'head.bias'}


def of_timm(stem):
    "Our network for a golden of timm's."
    name = stem.split('_', 1)[1].rsplit('_', 1)[0]
    if name.startswith('tf_'): return abstract(name.removeprefix('tf_'))
    if name.endswith('d'): return abstract(f'resnet_{name[6:-1]}', stem='deep', shortcut='avg')
    return abstract(name.replace('resnetrs', 'resnet_rs_') if 'rs' in name else f'resnet_{name[6:]}')


TIMM = sorted(path.stem for path in GOLDENS.glob('timm_*[0-9].npz'))


@pytest.mark.parametrize('stem', [pytest.param(stem, marks=deep(stem.rpartition('_')[0])) for stem in TIMM])
def test_names_and_shapes_are_those_of_timm(stem):
    entries = {entry['name']: tuple(entry['shape']) for entry in recipe.load_spec(GOLDENS / f'{stem}.npz')['params']}
    assert {entry.name: entry.shape for entry in names(of_timm(stem), 'timm').values()} == entries


def test_timm_is_there_in_all_kinds():
    assert {'resnetrs50', 'resnetrs420', 'resnet50', 'resnet50d', 'tf_efficientnet_b0'} <= {
        stem.split('_', 1)[1].rsplit('_', 1)[0] for stem in TIMM}


REAL = {'tf1_train': ('tf1', 'resnet_rs_50'), 'tf1_efficientnet_b0_train': ('tf1', 'efficientnet_b0'),
        'garden_train': ('garden', 'resnet_rs_50'), 'garden_model': ('garden', 'resnet_rs_50'),
        'garden_video_model': ('garden', 'resnet3d_rs_50')}


def classes_in(places):
    ends = 'dense/bias', 'model/layer_with_weights-1/bias/.ATTRIBUTES/VARIABLE_VALUE'
    return next(place.shape[0] for name, place in places.items() if name.endswith(ends))


@pytest.mark.parametrize('file', sorted(path.stem for path in GOLDENS.glob('*.index')))
def test_names_and_shapes_are_those_in_checkpoints_written_by_the_authors_code(file):
    source, name = REAL[file]
    places = TFCheckpoint(GOLDENS / file).places
    found = names(abstract(name, num_classes=classes_in(places)), source)
    real = {key.split('/', 1)[1] if key.startswith('efficientnet') else key: place.shape for key, place in places.items()}
    if file in ('garden_model', 'garden_video_model'):
        real = {key.replace('model/layer_with_weights-0/layer', 'backbone/layer'): shape for key, shape in real.items()}
    training = ('ExponentialMovingAverage', 'Momentum', 'RMSProp', 'RMSProp_1', 'global_step', '_CHECKPOINTABLE_OBJECT_GRAPH')
    real = {key: shape for key, shape in real.items() if key.rpartition('/')[2] not in training and '/.OPTIMIZER_SLOT/' not in key
            and not key.startswith(('optimizer/', 'global_step/'))}
    assert {entry.name: entry.shape for entry in found.values()} == real


# --- loading ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('source, load, name', [
    ('timm', load_timm, 'resnet_rs_50'), ('tf1', load_tf1, 'resnet_50'), ('garden', load_garden, 'resnet_rs_50'),
    ('garden', load_garden, 'resnet3d_rs_50'), ('timm', load_timm, 'efficientnet_b0'), ('tf1', load_tf1, 'efficientnet_b0')])
def test_out_and_in_again_is_exact_also_into_a_network_that_was_never_allocated(source, load, name):
    options = dict(width=0.25, num_classes=3) if 'eff' in name else SMALL
    given, how = drawn(3, name, **options), dict(ema=False) if load is load_tf1 else {}
    for target in (drawn(4, name, **options), nnx.eval_shape(lambda: create_model(name, **options))):
        load(target, export_weights(given, source), **how)
        assert same(given, target)


def test_what_is_loaded_is_a_copy_in_the_type_of_the_network():
    given = {key: value.astype(np.float64) for key, value in export_weights(small(), 'timm').items()}
    model = small(1)
    load_timm(model, given)
    for value in given.values(): value[...] = 0
    assert same(model, small()) and values(model)['head.kernel'].dtype == np.float32
    with jax.enable_x64(True):
        double = small(1, param_dtype=jnp.float64)
        load_timm(double, export_weights(small(2), 'timm'))
        assert values(double)['head.kernel'].dtype == np.float64


class Tensor:
    "What torch shows of itself: an array that only gives itself away detached, on the CPU, and not in bfloat16."
    def __init__(self, array, dtype='torch.float32', steps=()): self.array, self.dtype, self.steps = array, dtype, steps
    def detach(self): return Tensor(self.array, self.dtype, (*self.steps, 'detach'))
    def cpu(self): return Tensor(self.array, self.dtype, (*self.steps, 'cpu'))
    def float(self): return Tensor(self.array, 'torch.float32', self.steps)

    def __array__(self, dtype=None, copy=None):
        assert self.steps == ('detach', 'cpu') and self.dtype == 'torch.float32'
        return self.array


def test_torch_tensors_are_taken():
    state = export_weights(small(), 'timm')
    model = small(1)
    load_timm(model, {key: Tensor(value, 'torch.bfloat16' if 'fc' in key else 'torch.float32') for key, value in state.items()})
    assert same(model, small())


def test_all_that_does_not_fit_is_listed_and_nothing_is_loaded():
    state = export_weights(small(1), 'timm')
    wrong = {key: value for key, value in state.items() if key not in ('bn1.bias', 'layer4.0.se.fc2.weight')}
    wrong |= {'fc.bias': np.zeros(4, np.float32), 'layer1.0.bn1.weight': np.zeros(8, np.int32), 'layer9.conv.weight': np.zeros(1)}
    model = small()
    message = refused(lambda: load_timm(model, wrong), model, 'bn1.bias is missing', 'layer4.0.se.fc2.weight is missing',
                      'fc.bias is [4], not [3]', 'layer1.0.bn1.weight is int32, not floating', 'layer9.conv.weight is unknown')
    assert '5 differences' in message and '\n' not in message
    message = refused(lambda: load_timm(model, {}), model)
    assert message.count('is missing') == len(state)
    load_timm(model, state | {'bn1.num_batches_tracked': np.int64(3)})


@pytest.mark.parametrize('source, load', [('timm', load_timm), ('tf1', load_tf1), ('garden', load_garden)])
def test_without_the_classifier(source, load):
    state, how = export_weights(small(1), source), dict(ema=False) if load is load_tf1 else {}
    model = small(2, num_classes=7)
    refused(lambda: load(model, state, **how), model, '[7]')
    load(model, state, head=False, **how)
    found, trunk, start = values(model), values(small(1)), values(small(2, num_classes=7))
    assert all((found[key] == (start if key.startswith('head.') else trunk)[key]).all() for key in found)
    classifier = {names(model, source)[path].name for path in ('head.kernel', 'head.bias')}
    load(model, {key: value for key, value in state.items() if key not in classifier}, head=False, **how)
    refused(lambda: load(model, state | {'stranger': np.zeros(1)}, head=False, **how), model, 'stranger is unknown')


def test_averages_of_tf1():
    raw, averaged = small(1), small(2)
    both = export_weights(raw, 'tf1') | {f'{k}/ExponentialMovingAverage': v for k, v in export_weights(averaged, 'tf1').items()}
    both |= {'global_step': np.int64(7), 'conv2d/kernel/Momentum': np.zeros(1), 'dense/kernel/RMSProp': np.zeros(1)}
    model = small()
    load_tf1(model, both)
    assert same(model, averaged)
    load_tf1(model, both, ema=False)
    assert same(model, raw)
    del both['batch_normalization_3/moving_mean/ExponentialMovingAverage']
    refused(lambda: load_tf1(model, both), model, '1 differences: batch_normalization_3/moving_mean is missing')


def test_a_stranger_among_the_raw_weights_is_told_also_where_averages_are_loaded():
    state = export_weights(small(1), 'tf1')
    both = state | {f'{name}/ExponentialMovingAverage': value for name, value in state.items()}
    model = small()
    refused(lambda: load_tf1(model, both | {'stranger/kernel': np.zeros(1)}), model, '1 differences: stranger/kernel is unknown')
    refused(lambda: load_tf1(model, state), model, 'has no moving averages; ema=False')


def test_averages_of_the_garden():
    raw, averaged = small(1), small(2)
    slot = '/.OPTIMIZER_SLOT/optimizer/average/.ATTR'
    both = export_weights(raw, 'garden') | {k.replace('/.ATTR', slot): v for k, v in export_weights(averaged, 'garden').items()}
    both |= {'optimizer/iter/.ATTRIBUTES/VARIABLE_VALUE': np.int64(1), 'save_counter/.ATTRIBUTES/VARIABLE_VALUE': np.int64(1)}
    model = small()
    load_garden(model, both)
    assert same(model, averaged)
    load_garden(model, both, ema=False)
    assert same(model, raw)
    weights_only = {key: value for key, value in both.items() if slot not in key or '/moving_' not in key}
    load_garden(model, weights_only)
    found, means, weights = values(model), values(raw), values(averaged)
    assert all((found[k] == (means if k.endswith(('norm.mean', 'norm.var')) else weights)[k]).all() for k in found)
    one_less = {key: value for key, value in both.items() if not key.startswith(f'backbone/layer_with_weights-0/kernel{slot}')}
    refused(lambda: load_garden(model, one_less), model, '1 weights of the checkpoint have no moving average')


def test_the_background_class_is_left_out_on_request_only():
    wide, model = small(1, num_classes=4), small()
    state = export_weights(wide, 'garden')
    refused(lambda: load_garden(model, state), model, 'drop_background=True')
    load_garden(model, state, drop_background=True)
    assert (values(model)['head.kernel'] == values(wide)['head.kernel'][:, 1:]).all()


# --- TensorFlow's files ----------------------------------------------------------------------------------------------------

def test_a_path_is_as_good_as_a_mapping(tmp_path):
    prefix = checkpoints.redraw('tf1_efficientnet_b0_train', tmp_path)
    opened = TFCheckpoint(prefix)
    by_path, by_mapping = (drawn(seed, 'efficientnet_b0') for seed in (0, 1))
    load_tf1(by_path, prefix)
    load_tf1(by_mapping, {name: np.asarray(opened[name]) for name in opened})
    assert same(by_path, by_mapping)
    for name, (kind, shape, offset, size) in checkpoints.tensors(f'{prefix}.index').items():   # another reader says the same
        place = opened.places[name]
        assert (list(place.shape), place.offset, place.size) == (list(shape), offset, size)
        assert (place.type == 1) == (kind == 'float32')


def test_a_cut_data_file_loads_nothing(tmp_path):
    prefix = checkpoints.redraw('tf1_efficientnet_b0_train', tmp_path, check=False)
    os.truncate(f'{prefix}.data-00000-of-00001', 50_000_000)
    model = drawn(0, 'efficientnet_b0')
    refused(lambda: load_tf1(model, prefix), model, 'is damaged')


def test_every_flipped_byte_of_an_index_is_noticed(tmp_path):
    sound = (GOLDENS / 'garden_model.index').read_bytes()
    for at in [*range(0, len(sound) - 48, 997), len(sound) - 1]:
        (tmp_path / 'flipped.index').write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1:])
        with pytest.raises(ValueError, match='is not the index of a TensorFlow checkpoint'): TFCheckpoint(tmp_path / 'flipped')


@pytest.mark.slow
def test_tensorflow_reads_the_same_bytes(tmp_path):
    "In an environment of its own, because TensorFlow is no requirement of ours."
    prefix, env = checkpoints.redraw('tf1_efficientnet_b0_train', tmp_path), tmp_path / 'env'
    uv = Path(sys.executable).with_name('uv')
    python = env / 'bin/python'
    subprocess.run([uv, 'venv', '--quiet', '--python', sys.executable, env], check=True, timeout=120)
    subprocess.run([uv, 'pip', 'install', '--quiet', '--python', python, 'tensorflow-cpu==2.21.0'], check=True, timeout=900)
    code = ('import sys, json, hashlib, tensorflow as tf; r = tf.train.load_checkpoint(sys.argv[1])\n'
            'sha = lambda name: hashlib.sha256(r.get_tensor(name).tobytes()).hexdigest()\n'
            'print(json.dumps({name: sha(name) for name in r.get_variable_to_shape_map()}))')
    done = subprocess.run([python, '-c', code, prefix], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    theirs, ours = json.loads(done.stdout.splitlines()[-1]), TFCheckpoint(prefix)
    assert theirs == {name: hashlib.sha256(np.asarray(ours[name]).tobytes()).hexdigest() for name in ours} and len(theirs) > 1000


# --- files of our own ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, options', [('resnet_rs_50', {}), ('resnet3d_rs_50', dict(dialect='garden')),
                                           ('resnet_50', dict(param_dtype=jnp.bfloat16))])
def test_saved_weights_come_back_to_the_bit(name, options, tmp_path):
    model = small(1, name, **options)
    save_weights(model, tmp_path / 'deep' / 'w.safetensors', notes={'seed': '1'})
    other = small(2, name, **options)
    load_weights(other, tmp_path / 'deep' / 'w.safetensors')
    assert same(model, other)
    notes = read_notes(tmp_path / 'deep' / 'w.safetensors')
    assert notes['name'] == name and notes['version'] == __version__ and notes['classes'] == '3' and notes['seed'] == '1'
    assert notes['dialect'] == options.get('dialect', 'paper')
    assert json.loads(notes['options']) == {'blocks': [1, 1, 1, 1], 'width': 0.125}, 'types and rates do not matter here'
    built = nnx.eval_shape(lambda: create_model(
        notes['name'], int(notes['classes']), dialect=notes['dialect'], **json.loads(notes['options']),
        param_dtype=options.get('param_dtype', jnp.float32)))
    load_weights(built, tmp_path / 'deep' / 'w.safetensors')
    assert same(model, built), 'the notes are enough to make the network'


def test_a_network_of_another_dialect_is_refused_although_all_shapes_fit(tmp_path):
    path, garden = tmp_path / 'w.safetensors', small(2, dialect='garden')
    save_weights(small(1), path)
    refused(lambda: load_weights(garden, path), garden, 'dialect is paper, not garden', 'strict=False')
    load_weights(garden, path, strict=False)
    assert same(garden, small(1))
    wide, more = small(2, width=0.25), small(2, num_classes=4)
    refused(lambda: load_weights(wide, path), wide, 'options is')
    refused(lambda: load_weights(wide, path, strict=False), wide, 'not [3, 3, 3, 8]')
    refused(lambda: load_weights(more, path), more, 'head.bias is [3], not [4]')
    load_weights(more, path, head=False)


def test_files_that_are_none_of_ours(tmp_path):
    model, path = small(), tmp_path / 'f'
    path.write_bytes(safetensors.numpy.save(export_weights(small(1))))
    refused(lambda: load_weights(model, path), model, 'was not written by save_weights', 'load_timm')
    load_timm(model, str(path))
    assert same(model, small(1))
    path.write_bytes(path.read_bytes()[:-4])
    refused(lambda: load_timm(model, path), model, 'is not a safetensors file')
    path.write_bytes(pickle.dumps({'fc.weight': 1}, protocol=2))
    refused(lambda: load_timm(model, path), model, 'pickles are never read')
    with pytest.raises(FileNotFoundError): load_timm(model, tmp_path / 'nothing.safetensors')
    path.write_bytes(safetensors.numpy.save({'fc.weight': np.zeros(2, np.uint8)}))
    refused(lambda: load_timm(model, path), model, 'fc.weight is U8')
    bare = ResNet(DEPTHS[14], 3, rngs=nnx.Rngs(0), width=0.125)
    with pytest.raises(ValueError, match='what is this network'): save_weights(bare, path)
    save_weights(bare, path, About('resnet_14', 'paper'))
    assert read_notes(path)['name'] == 'resnet_14'
    refused(lambda: load_weights(bare, path), bare, 'what is this network', 'strict=False')
    load_weights(bare, path, strict=False)
    with pytest.raises(ValueError, match='only described'): save_weights(abstract('resnet_rs_50'), path)


@pytest.mark.parametrize('same_thing', [dict(width=1), dict(activation='relu'), dict(se_ratio=0.25), dict(blocks=[3, 4, 6, 3]),
                                        dict(stem='deep', drop_path=0.1, remat=True), dict(activation=None)])
def test_what_is_said_again_changes_nothing(same_thing):
    assert create_abstract('resnet_rs_50', **same_thing).about == About('resnet_rs_50', 'paper')
    assert create_abstract('resnet_rs_50', width=2).about == create_abstract('resnet_rs_50', width=2.0).about


def create_abstract(name, **options): return nnx.eval_shape(lambda: create_model(name, **options))


@pytest.mark.parametrize('config, about', [
    (Config.paper('resnet_rs_50'), About('resnet_rs_50', 'paper')),
    (Config.paper('efficientnet_b3'), About('efficientnet_b3', 'paper')),
    (Config(depth=26, width=0.5, se_ratio=0.25, dialect='garden'),
     About('resnet_26', 'garden', '{"se_ratio": 0.25, "width": 0.5}')),
    (Config(depth=14), About('resnet_50', 'paper', '{"blocks": [1, 1, 1, 1]}'))])
def test_the_network_of_a_configuration_knows_what_it_is(config, about):
    made = nnx.eval_shape(lambda: from_config(config, 1000, nnx.Rngs(0)))
    named = create_abstract(about.name, dialect=about.dialect, **json.loads(about.options))
    assert made.about == named.about == about
    assert {k: v.shape for k, v in flat(made).items()} == {k: v.shape for k, v in flat(named).items()}


def flat(model): return dict(nnx.to_flat_state(nnx.state(model)))


def test_nothing_here_reads_pickles():
    library = Path(__file__).parents[1] / 'resnet_rs'
    source = ''.join((library / f'{name}.py').read_text() for name in ('weights', 'hub', 'tf_checkpoint'))
    assert not any(word in source for word in ('import pickle', 'torch.load', 'allow_pickle', 'import torch', 'tensorflow as'))


# --- the hub ---------------------------------------------------------------------------------------------------------------

def test_releases_are_of_networks_that_we_have():
    for name, release in HUB['timm'].items():
        assert name in list_models() and set(release.dialects) <= set(DIALECTS)
        protocol = release.protocol
        assert 0.8 < protocol.crop <= 1 and protocol.resize >= protocol.image_size >= protocol.train_size


def test_what_cannot_fit_is_refused_before_any_download(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)   # an import would fail
    for options, word in ((dict(num_classes=10), '1000 classes, this network 10'), (dict(dialect='garden'), 'dialect'),
                          (dict(activation='swish'), '"activation": "swish"'), (dict(width=0.25), '"width": 0.25')):
        with pytest.raises(ValueError, match='resnetrs50') as error: pretrained(abstract('resnet_rs_50', **options))
        assert word in str(error.value)


CLIENT = '''
import sys
from flax import nnx
from resnet_rs.registry import create_model
from resnet_rs.weights import load_timm, pretrained
classes, head = int(sys.argv[2]), sys.argv[2] == '1000'
if head: model = create_model('efficientnet_b0', pretrained='timm')
else: pretrained(model := nnx.eval_shape(lambda: create_model('efficientnet_b0', classes)), head=False)
truth = nnx.eval_shape(lambda: create_model('efficientnet_b0', classes))
load_timm(truth, sys.argv[1], head=head)
parts = lambda m: [v for path, v in nnx.to_flat_state(nnx.state(m)) if head or path[0] != 'head']
assert all((a[...] == b[...]).all() for a, b in zip(parts(model), parts(truth)))
print('same weights;', model.protocol.resize, model.protocol.image_size)
'''


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the hub as its client asks for, to serve one file."
    file, asked = b'', []

    def do_GET(self, body=True):
        self.asked.append(f'{self.command} {self.path}')
        known = self.path.startswith('/timm/tf_efficientnet_b0.aa_in1k/resolve/main/model.safetensors')
        self.send_response(200 if known else 404)
        self.send_header('ETag', f'"{hashlib.sha256(self.file).hexdigest()}"')
        self.send_header('X-Repo-Commit', '0' * 40)
        self.send_header('Content-Length', str(len(self.file) if known else 0))
        self.end_headers()
        if body and known: self.wfile.write(self.file)

    def do_HEAD(self): self.do_GET(body=False)
    def log_message(self, *args): pass


@pytest.mark.slow
def test_the_real_client_downloads_once_shows_progress_and_then_works_offline(tmp_path):
    file = tmp_path / 'model.safetensors'
    file.write_bytes(safetensors.numpy.save(export_weights(drawn(7, 'efficientnet_b0'))))
    Hub.file, Hub.asked = file.read_bytes(), []
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {name: value for name, value in os.environ.items() if not name.startswith('HF_') and 'proxy' not in name.lower()}
    env |= {'HF_HOME': str(tmp_path / 'cache'), 'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}',
            'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_XET': '1'}

    def run(classes='1000', **more):
        return subprocess.run([sys.executable, '-c', CLIENT, str(file), classes], env=env | more, capture_output=True, text=True,
                              timeout=300)

    try:
        first = run(TQDM_POSITION='-1')   # the bar also where there is no terminal
        assert first.returncode == 0 and 'same weights; 256 224' in first.stdout, first.stderr[-3000:]
        assert 'model.safetensors' in first.stderr and '100%' in first.stderr, 'a progress bar'
        assert sum(line.startswith('GET') for line in Hub.asked) == 1
    finally: server.shutdown(), server.server_close()
    offline = run('10', HF_HUB_OFFLINE='1')
    assert offline.returncode == 0 and 'same weights' in offline.stdout, offline.stderr[-3000:]
    empty = run('10', HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'empty'))
    last = empty.stderr.strip().splitlines()[-1]
    assert empty.returncode and 'StorageError' in last and 'timm/tf_efficientnet_b0.aa_in1k' in last and 'load_timm' in last
