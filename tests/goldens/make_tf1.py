"""Golden outputs and checkpoints of the ResNet-RS authors' TF1 code, made by running it.

Source: tensorflow/tpu, models/official/resnet (resnet_model.py, resnet_main.py) and models/official/efficientnet, commit
7dc921f846c9e4071f3884b768a7ddf521272a49 (Apache 2.0); nothing of it is copied here.

Environment: Python 3.7 with

    pip install tensorflow==1.15.5 numpy==1.18.5 protobuf==3.19.6

Then, with a checkout of tensorflow/tpu in TREE, one command writes all tf1_*.npz and tf1_*.index beside this file, a few
minutes on two cores:

    python tests/goldens/make_tf1.py TREE            # or only some: make_tf1.py TREE resnet_rs_50_128 fresh

The authors' code runs in single precision because its batch norm is the fused kernel, which has no other. In double
precision the same code runs with one argument changed on the way: `fused=False`. In single precision the change makes a
difference of rounding only, which the script asserts; so the double-precision output is what the authors' network computes,
and their single precision is measured against it.

tf1_NETWORK_SIZE.npz    `logits_f64`, `logits_f32` [batch, classes] in evaluation mode; for each stage i from 0, from the
                        float64 run, `stage{i}_samples`, `stage{i}_projections`, `stage{i}_shape`. Parameters have the
                        names of the authors' graph, which are those of their checkpoints, and TF layout (H x W x I x O)
tf1_fresh.npz           what ResNet-RS-50 is before any training: mean, standard deviation and largest magnitude of each
                        variable (`moments`, in the order of `spec["variables"]`) and the drop rate of each block
tf1_train.npz, .index   the checkpoint (see checkpoints.py) that the authors' model_fn and an estimator's saver write in
                        training: ResNet-RS-50's variables, their moving averages, momentum, global_step
tf1_efficientnet_b0_train.npz, .index   the same of EfficientNet-B0, written through efficientnet/utils.py
"""
import os
import re
import sys
import tempfile
from unittest.mock import MagicMock

import checkpoints
import numpy as np
import recipe

COMMIT = "tensorflow/tpu 7dc921f846c9e4071f3884b768a7ddf521272a49"
FOLDER = os.path.dirname(os.path.abspath(__file__))
RS = dict(use_resnetd_stem=True, resnetd_shortcut=True, replace_stem_max_pool=True, se_ratio=0.25)
SKIP = dict(use_resnetd_stem=True, resnetd_shortcut=True, skip_stem_max_pool=True, se_ratio=0.25)
# name -> (settings of the authors' builder, image size, classes)
NETWORKS = {"resnet_rs_50_128": (RS, 128, 1000), "resnet_rs_50_75": (RS, 75, 10), "resnet_50_96": ({}, 96, 100),
            "resnet_50_75": ({}, 75, 10), "resnet_rs_50_skip_96": (SKIP, 96, 10), "efficientnet_b0_96": (None, 96, 1000),
            "efficientnet_b0_75": (None, 75, 10)}
SEED = 1


def load_authors(tree):
    """The authors' modules: tf, resnet_model, resnet_layers, resnet_main, efficientnet_builder, utils."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path[:0] = [os.path.join(tree, "models", "official", name) for name in ("resnet", "efficientnet")]
    for name in ("common", "hyperparameters", "official", "official.resnet", "official.resnet.configs"):
        sys.modules[name] = MagicMock()                            # command line, TPU profiling and input: no part of a network
    import tensorflow.compat.v1 as tf
    tf.logging.set_verbosity(tf.logging.ERROR)
    import efficientnet_builder
    import resnet_layers
    import resnet_model
    import utils
    sys.modules["official.resnet"].resnet_model = resnet_model
    import resnet_main
    resnet_main.FLAGS(["make_tf1"])
    return tf, resnet_model, resnet_layers, resnet_main, efficientnet_builder, utils


def entries(variables):
    """How each variable, [(name, shape)] in the order of creation, is drawn; suffixes of averages may follow a name."""
    names, out, last = {name for name, _ in variables}, [], False
    first = next(name for name, _ in variables if name.endswith("kernel"))
    for name, shape in variables:
        layer, tail = name.rsplit("/", 1)
        if tail.endswith("kernel"):
            dense, depthwise, se = len(shape) == 2, tail == "depthwise_kernel", len(shape) == 4 and layer + "/bias" in names
            mobile = "blocks_" in name
            narrow = shape[-1] < shape[-2] and not se and not depthwise
            wide = shape[-1] > shape[-2] and shape[0] == 1 and not se
            gain = 4.0 if dense else 1.0 if name == first else (2.0 if mobile else 8.0) if se else \
                2.5 if not mobile else 3.5 if narrow else 2.4
            last = narrow if mobile else wide                      # the batch norm that ends a branch comes after this kernel
            fan_in = np.prod(shape[:2]) if depthwise else np.prod(shape[:-1])
            center = None if dense or depthwise or name == first else list(range(len(shape) - 1))
            out.append(recipe.entry(name, shape, "affine", 0, np.sqrt(gain / fan_in), center))
        else:
            rule = {"bias": ("affine", 0, 0.3), "gamma": ("affine", 0.5, 0.1) if last else ("affine", 1, 0.2),
                    "beta": ("affine", 0, 0.2), "moving_mean": ("affine", 0, 0.2), "moving_variance": ("exp", 0, 0.3)}[tail]
            out.append(recipe.entry(name, shape, *rule))
    return out


def build(authors, name, images, fused=True):
    """Logits and the four (or, mobile, seven) stages' outputs of a network in evaluation mode."""
    tf, resnet_model, _, _, efficientnet_builder, utils = authors
    settings, _, classes = NETWORKS[name]
    if settings is None:
        plain = utils.BatchNormalization if fused else \
            lambda name="tpu_batch_normalization", **k: tf.layers.BatchNormalization(name=name, fused=False, **k)
        model, utils.eval_batch_norm = utils.eval_batch_norm, plain
        logits, ends = efficientnet_builder.build_model(images, name.rsplit("_", 1)[0].replace("_", "-"), False,
                                                        dict(num_classes=classes))
        utils.eval_batch_norm = model
        blocks = [ends[f"block_{i}"] for i in range(16)]           # a stage ends where the next block has another shape
        return logits, [x for i, x in enumerate(blocks) if i == 15 or blocks[i + 1].shape[1:] != x.shape[1:]]
    resnet_model.tf = tf if fused else recipe.Replaced(tf, layers=recipe.Replaced(
        tf.layers, batch_normalization=lambda **k: tf.layers.batch_normalization(**dict(k, fused=False))))
    logits = resnet_model.resnet(50, classes, data_format="channels_last", bn_momentum=0.0, **settings)(images, False)
    return logits, [tf.get_default_graph().get_tensor_by_name(f"block_group{i}:0") for i in (1, 2, 3, 4)]


def fill(tf, session, values):
    """Set all variables of the default graph, in one run."""
    variables = tf.global_variables()
    session.run([v.initializer for v in variables], {v.initializer.inputs[1]: values[v.op.name] for v in variables})


def run(authors, name, spec, dtype, fused):
    """(logits, stages) of a network with its recipe's parameters, in that precision; the parameters are put in `spec`."""
    tf = authors[0]
    with tf.Graph().as_default(), tf.Session() as session:
        logits, stages = build(authors, name, tf.constant(recipe.images(spec).astype(dtype)), fused)
        assert logits.dtype.base_dtype.name == dtype
        spec["params"] = entries([(v.op.name, v.shape.as_list()) for v in tf.global_variables()])
        fill(tf, session, {e["name"]: recipe.value(e, spec["seed"]).astype(dtype) for e in spec["params"]})
        return session.run([logits, stages])


def make_network(authors, name):
    _, size, _ = NETWORKS[name]
    kind = "efficientnet/efficientnet_builder.py" if name[0] == "e" else "resnet/resnet_model.py"
    spec = dict(source=f"{COMMIT} models/official/{kind}, TensorFlow {authors[0].__version__}", seed=SEED,
                layout="tensorflow (HWIO)", settings=NETWORKS[name][0], input_shape=[2, size, size, 3])
    truth, stages = run(authors, name, spec, "float64", False)
    single, _ = run(authors, name, spec, "float32", True)
    unfused, _ = run(authors, name, spec, "float32", False)
    arrays = dict(logits_f64=truth, logits_f32=single)
    for i, x in enumerate(stages):
        key = f"stage{i}"
        arrays[key + "_samples"], arrays[key + "_projections"] = recipe.samples(key, x), recipe.projections(key, x)
        arrays[key + "_shape"] = np.array(x.shape)
    errors = [recipe.relative_error(x, truth) for x in (single, unfused)]
    print(f"{name}: error of float32 {errors[0]:.1e}, with fused=False {errors[1]:.1e}", flush=True)
    assert max(errors) < 1e-4, "the two batch norms differ by more than rounding, or the draw amplifies it"
    recipe.save(os.path.join(FOLDER, f"tf1_{name}.npz"), spec, arrays)


def make_fresh(authors):
    """Initial variables and drop rates, as the authors' code computes them."""
    tf, resnet_model, resnet_layers, _, _, _ = authors
    rates, original, resnet_model.tf = [], resnet_layers.drop_connect, tf
    resnet_layers.drop_connect = lambda x, training, rate: rates.append(rate) or original(x, training, rate)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        net = resnet_model.resnet(50, 1000, data_format="channels_last", bn_momentum=0.0, drop_connect_rate=0.1, **RS)
        net(tf.zeros([2, 64, 64, 3]), True)
        variables = tf.global_variables()
        session.run(tf.global_variables_initializer())
        values = session.run(variables)
    resnet_layers.drop_connect = original
    spec = dict(source=f"{COMMIT} models/official/resnet/resnet_model.py, TensorFlow {tf.__version__}",
                init_drop_rate=0.1, variables=[[v.op.name, v.shape.as_list()] for v in variables])
    recipe.save(os.path.join(FOLDER, "tf1_fresh.npz"), spec, dict(
        moments=np.array([[v.mean(), v.std(), np.abs(v).max()] for v in values]), drop_rates=np.array(rates)))


def write(authors, name, source):
    """Draw what the default graph holds, write it with an estimator's saver, and keep the checkpoint."""
    tf = authors[0]
    names = [(v.op.name, v.shape.as_list()) for v in tf.global_variables() if v.dtype.base_dtype == tf.float32]
    suffix, slots = "/ExponentialMovingAverage", re.compile("/(Momentum|RMSProp(_1)?)$")
    raw = [(n, s) for n, s in names if not n.endswith(suffix) and not slots.search(n)]
    params = entries(raw)
    shadows = {n[:-len(suffix)] for n, _ in names if n.endswith(suffix)}
    params += [dict(e, name=e["name"] + suffix) for e in params if e["name"] in shadows]
    by_name = {e["name"]: e for e in params}
    with tf.Session() as session, tempfile.TemporaryDirectory() as folder:
        zeros = {v.op.name: np.zeros(v.shape.as_list(), v.dtype.as_numpy_dtype) for v in tf.global_variables()}
        draws = {name: recipe.value(e, SEED) for name, e in by_name.items()}
        fill(tf, session, dict(dict(zeros, **draws), global_step=np.array(1234, np.int64)))
        prefix = tf.train.Scaffold().finalize().saver.save(session, os.path.join(folder, "model.ckpt"), 1234)
        checkpoints.keep(name, prefix, source, SEED, params, {n: n for n in by_name})


def make_train(authors):
    """A training checkpoint of ResNet-RS-50, from the authors' model_fn with the settings of their resnetrs50_i160.yaml."""
    tf, resnet_model, _, resnet_main, _, _ = authors
    resnet_model.tf = tf
    params = dict(RS, resnet_depth=50, num_label_classes=1000, batch_size=2, data_format="channels_last", transpose_input=False,
                  dropblock_groups="", dropblock_size=7, pre_activation=False, norm_act_layer="bn_relu", drop_connect_rate=None,
                  dropout_rate=0.25, bn_momentum=0.0, moving_average_decay=0.9999, precision="float32", label_smoothing=0.1,
                  weight_decay=4e-5, enable_lars=False, base_learning_rate=0.1, train_batch_size=4096, momentum=0.9,
                  num_train_images=1281167, train_steps=109475, poly_rate=0.0, use_tpu=False, skip_host_call=True)
    with tf.Graph().as_default():
        tf.train.create_global_step()
        resnet_main.resnet_model_fn(tf.zeros([2, 64, 64, 3]), tf.zeros([2], tf.int32), "train", params)
        write(authors, "tf1_train", COMMIT + " models/official/resnet/resnet_main.py, resnet_model_fn")


def make_efficientnet_b0_train(authors):
    """A training checkpoint of EfficientNet-B0: the authors' network and optimizer, their variables averaged."""
    tf, _, _, _, efficientnet_builder, utils = authors
    moments = tf.layers.BatchNormalization._moments                # the authors' batch norm hands it a mask that 1.15 has not
    tf.layers.BatchNormalization._moments = lambda self, x, axes, keep_dims, mask=None: moments(self, x, axes, keep_dims)
    with tf.Graph().as_default():
        step = tf.train.create_global_step()
        logits, _ = efficientnet_builder.build_model(tf.zeros([2, 64, 64, 3]), "efficientnet-b0", True)
        averages = tf.train.ExponentialMovingAverage(decay=0.9999, num_updates=step)
        averaged = utils.get_ema_vars()
        train = utils.build_optimizer(0.016).minimize(tf.reduce_mean(logits), step)
        with tf.control_dependencies([train]):
            averages.apply(averaged)
        write(authors, "tf1_efficientnet_b0_train", COMMIT + " models/official/efficientnet/efficientnet_builder.py, utils.py")


def main(tree, *wanted):
    authors = load_authors(tree)
    for name in NETWORKS:
        if not wanted or name in wanted:
            make_network(authors, name)
    for make in (make_fresh, make_train, make_efficientnet_b0_train):
        if not wanted or make.__name__[5:] in wanted:
            make(authors)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
