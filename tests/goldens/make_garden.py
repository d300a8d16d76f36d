"""Golden outputs and checkpoints of the TF2 Model Garden's ResNet-RS and 3D ResNet-RS, made by running its code.

Source: tensorflow/models (Apache 2.0; nothing of it is copied here), official/vision/modeling/backbones/resnet.py and
resnet_3d.py, from the package tf-models-official. Environment: Python 3.11 with

    pip install tensorflow-cpu==2.21.0 numpy pyyaml gin-config scipy
    pip install --no-deps tf-keras==2.21.0 tf-models-official==2.20.0

(with its dependencies, tf-models-official asks for another TensorFlow and much that no network needs). Then one command
writes all garden_*.npz and garden_*.index beside this file, a few minutes on two cores:

    python tests/goldens/make_garden.py              # or only some: make_garden.py resnet_rs_50_swish_128 model

TensorFlow has no MaxPool3D in double precision on a CPU. For double precision the video network's pool, spatial 3x3 and in
some networks also through time, is replaced inside the running code by 2D max pools: over space with the frames folded into
the batch, then over time with space folded into one axis. A maximum of maxima is exact, and the script asserts that the
replacement gives in single precision the very bits of MaxPool3D.

garden_NETWORK_SIZE.npz     `logits_f64`, `logits_f32` [batch, classes] in evaluation mode; for each stage i from 0, from the
                            float64 run, `stage{i}_samples`, `stage{i}_projections`, `stage{i}_shape`. Parameters have the
                            names that `model.save_weights` gives them (less "/.ATTRIBUTES/VARIABLE_VALUE") and TF layout
garden_fresh.npz            what ResNet-RS-50 is before any training: mean, standard deviation and largest magnitude of each
                            variable (`moments`, in the order of `spec["variables"]`) and the drop rate of each block
garden_train.npz, .index    the checkpoint (see checkpoints.py) of a training run of ResNet-RS-50, with the items that
                            official/core/base_trainer.py saves: network, optimizer with momentum and moving averages, step
garden_model.npz, .index    tf.train.Checkpoint(model=...) of ResNet-RS-50
garden_video_model.npz, .index      the same of 3D ResNet-RS-50
"""
import os
import sys
import tempfile

import checkpoints
import numpy as np
import recipe

recipe.stub_model_garden()
import tensorflow as tf
import tf_keras
from official.modeling.optimization import optimizer_factory
from official.modeling.optimization.configs import optimization_config
from official.vision.modeling import classification_model, video_classification_model
from official.vision.modeling.backbones import resnet, resnet_3d
from official.vision.modeling.layers import nn_blocks, nn_layers

FOLDER = os.path.dirname(os.path.abspath(__file__))
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
SOURCE = "tf-models-official 2.20.0 official/vision/modeling/backbones/%s.py, TensorFlow " + tf.__version__
RS = dict(stem_type="v1", se_ratio=0.25, resnetd_shortcut=True, replace_stem_max_pool=True)
# Video settings: the released 3D ResNet-RS (k400_resnet3drs_50_tpu.yaml); the same stages on a plain stem without squeeze-and-
# excitation and gates; the Garden's own 3D ResNet-50 (k400_3d-resnet50_tpu.yaml), whose stem pools through time as well
SLOW = dict(temporal_kernel_sizes=((1,), (1,), (3,), (3,)), stem_pool_temporal_stride=1)
VIDEO_RS = dict(SLOW, stem_type="v1", se_ratio=0.25, use_self_gating=[True] * 4)
VIDEO_FULL = dict(temporal_kernel_sizes=((3,), (3, 1), (3, 1), (1, 3)), stem_pool_temporal_stride=2, use_self_gating=[True] * 4)
# name -> (depth, settings of the backbone, input shape of one example, classes)
NETWORKS = {
    "resnet_rs_50_swish_128": (50, dict(RS, activation="swish"), (128, 128), 1001),
    "resnet_rs_50_relu_128": (50, dict(RS, activation="relu"), (128, 128), 100),
    "resnet_rs_50_swish_75": (50, dict(RS, activation="swish"), (75, 75), 10),
    "resnet_rs_50_half_64": (50, dict(RS, activation="swish", depth_multiplier=0.5), (64, 64), 10),
    "resnet_rs_101_swish_96": (101, dict(RS, activation="swish"), (96, 96), 10),
    "resnet_50_75": (50, dict(activation="relu"), (75, 75), 10),
    "resnet_50_96": (50, dict(activation="relu"), (96, 96), 10),
    "resnet3d_rs_50_8x64": (50, dict(VIDEO_RS, activation="relu"), (8, 64, 64), 400),
    "resnet3d_rs_50_7x45": (50, dict(VIDEO_RS, activation="relu"), (7, 45, 45), 10),
    "resnet3d_rs_101_4x48": (101, dict(VIDEO_RS, activation="relu"), (4, 48, 48), 10),
    "resnet3d_50_8x64": (50, dict(SLOW, activation="relu"), (8, 64, 64), 10),
    "resnet3d_garden_50_8x64": (50, dict(VIDEO_FULL, activation="relu"), (8, 64, 64), 10),
}
SEED = 2


class FoldedPool(tf_keras.layers.Layer):
    """MaxPool3D with SAME padding as 2D pools, which have a double-precision kernel."""

    def __init__(self, pool_size, strides, padding):
        super().__init__()
        assert padding == "same"
        self.size, self.steps = pool_size, strides

    def call(self, x):
        (_, t, h, w, c), (st, sh, sw), (kt, kh, kw) = x.shape, self.steps, self.size
        x = tf.nn.max_pool2d(tf.reshape(x, [-1, h, w, c]), (kh, kw), (sh, sw), "SAME")
        h, w = x.shape[1:3]
        x = tf.nn.max_pool2d(tf.reshape(x, [-1, t, h * w, c]), (kt, 1), (st, 1), "SAME")
        return tf.reshape(x, [-1, x.shape[1], h, w, c])


def build(name, folded=False):
    """(model, backbone) of a network."""
    depth, settings, space, classes = NETWORKS[name]
    settings = dict(settings, norm_momentum=0.0, norm_epsilon=1e-5, init_stochastic_depth_rate=0.1)
    spec = tf_keras.layers.InputSpec(shape=[None, *space, 3])
    if len(space) == 2:
        backbone = resnet.ResNet(depth, spec, **settings)
        return classification_model.ClassificationModel(backbone, classes, spec), backbone
    repeats = [stage[-1] for stage in resnet_3d.RESNET_SPECS[depth]]
    settings["temporal_kernel_sizes"] = [(tuple(k) * n)[:n] for k, n in zip(settings["temporal_kernel_sizes"], repeats)]
    resnet_3d.layers = recipe.Replaced(tf_keras.layers, MaxPool3D=FoldedPool) if folded else tf_keras.layers
    backbone = resnet_3d.ResNet3D(depth, temporal_strides=[1] * 4, input_specs=spec, stem_conv_temporal_kernel_size=5,
                                  stem_conv_temporal_stride=2, **settings)
    return video_classification_model.VideoClassificationModel(backbone, classes, {"image": spec}), backbone


def save_weights(model):
    """{name: shape} of a model's variables, in the order in which TensorFlow writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_weights(os.path.join(folder, "w"))
        found = checkpoints.tensors(os.path.join(folder, "w.index"))
    return {key[:-len(VALUE)]: shape for key, (_, shape, _, _) in found.items() if key.endswith(VALUE)
            and key.startswith("layer_with_weights")}


def variable(model, name):
    """The variable of that name."""
    for part in name.split("/"):
        model = model._trackable_children()[part]
    return model


def entries(model, swish):
    """How each variable is drawn."""
    out = []
    for name, shape in save_weights(model).items():
        layer, tail = name.rsplit("/", 1)
        if tail == "kernel":
            first, head = layer == "layer_with_weights-0/layer_with_weights-0", len(shape) == 2
            gate = "_squeeze_excitation" in layer or "_self_gating" in layer
            gain = 1.0 if first else 4.0 if head else 8.0 if gate else 3.5 if swish else 2.5
            center = None if first or head else list(range(len(shape) - 1))
            out.append(recipe.entry(name, shape, "affine", 0, np.sqrt(gain / np.prod(shape[:-1])), center))
        else:
            last = layer.endswith(("_norm3", "_norm0"))
            rule = {"bias": ("affine", 0, 0.3), "gamma": ("affine", 0.5, 0.1) if last else ("affine", 1, 0.2),
                    "beta": ("affine", 0, 0.2), "moving_mean": ("affine", 0, 0.2), "moving_variance": ("exp", 0, 0.3)}[tail]
            out.append(recipe.entry(name, shape, *rule))
    return out


def fill(model, params):
    for e in params:
        variable(model, e["name"]).assign(recipe.value(e, SEED).astype(tf_keras.backend.floatx()))
    assert len(params) == len(model.variables), "a variable was missed"


def run(name, spec, dtype):
    """(logits, stages) with the recipe's parameters, in that precision; the parameters are put in `spec`."""
    tf_keras.backend.clear_session()
    tf_keras.backend.set_floatx(dtype)
    video = len(NETWORKS[name][2]) == 3
    model, backbone = build(name, folded=dtype == "float64")
    spec["params"] = entries(model, NETWORKS[name][1]["activation"] == "swish")
    fill(model, spec["params"])
    x = tf.constant(recipe.images(spec).astype(dtype))
    logits, stages = model({"image": x} if video else x, training=False), backbone(x, training=False)
    assert logits.dtype.name == dtype
    if video and dtype == "float32":
        same, _ = build(name, folded=True)
        fill(same, spec["params"])
        assert (same({"image": x}, training=False).numpy() == logits.numpy()).all(), "the folded pool is another function"
    return logits.numpy(), [stages[k].numpy() for k in sorted(stages)]


def make_network(name):
    settings, space = NETWORKS[name][1:3]
    spec = dict(source=SOURCE % ("resnet" if len(space) == 2 else "resnet_3d"), seed=SEED, layout="tensorflow (HWIO, THWIO)",
                settings=settings, input_shape=[2, *space, 3])
    truth, stages = run(name, spec, "float64")
    single, _ = run(name, spec, "float32")
    arrays = dict(logits_f64=truth, logits_f32=single)
    for i, x in enumerate(stages):
        key = f"stage{i}"
        arrays[key + "_samples"], arrays[key + "_projections"] = recipe.samples(key, x), recipe.projections(key, x)
        arrays[key + "_shape"] = np.array(x.shape)
    error = recipe.relative_error(single, truth)
    print(f"{name}: error of float32 {error:.1e}", flush=True)
    assert error < 1e-4, "this draw amplifies rounding"
    recipe.save(os.path.join(FOLDER, f"garden_{name}.npz"), spec, arrays)


def fresh_model(name):
    tf_keras.backend.clear_session()
    tf_keras.backend.set_floatx("float32")
    return build(name)


def make_fresh():
    """Initial variables and drop rates, as the Garden's code computes them."""
    tf_keras.utils.set_random_seed(1)
    model, backbone = fresh_model("resnet_rs_50_swish_128")
    names = list(save_weights(model).items())
    values = [variable(model, name).numpy() for name, _ in names]
    blocks = [x for x in backbone.layers if isinstance(x, nn_blocks.BottleneckBlock)]
    rates = [b._stochastic_depth._drop_rate for b in blocks]
    assert isinstance(blocks[0]._stochastic_depth, nn_layers.StochasticDepth)
    spec = dict(source=SOURCE % "resnet", init_drop_rate=0.1, variables=names)
    recipe.save(os.path.join(FOLDER, "garden_fresh.npz"), spec, dict(
        moments=np.array([[v.mean(), v.std(), np.abs(v).max()] for v in values]), drop_rates=np.array(rates)))


def keep(name, checkpoint, params, source):
    """Write a checkpoint and commit it as `name`."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = checkpoint.write(os.path.join(folder, "ckpt"))
        known, drawn = {e["name"] for e in params}, {}
        for key in checkpoints.tensors(prefix + ".index"):
            path = key[:-len(VALUE)].replace("/.OPTIMIZER_SLOT/optimizer/average", "/average") if key.endswith(VALUE) else key
            head, _, rest = path.partition("/")
            path = {"backbone": "layer_with_weights-0/" + rest, "model": rest}.get(head, path)
            if path in known:
                drawn[key] = path
        checkpoints.keep(name, prefix, source, SEED, params, drawn)


def make_train():
    """A training checkpoint, with the optimizer of the experiment resnet_rs_imagenet."""
    model, _ = fresh_model("resnet_rs_50_swish_128")
    steps = 1281167 // 4096
    config = optimization_config.OptimizationConfig({
        "optimizer": {"type": "sgd", "sgd": {"momentum": 0.9}}, "ema": {"average_decay": 0.9999, "trainable_weights_only": False},
        "learning_rate": {"type": "cosine", "cosine": {"initial_learning_rate": 1.6, "decay_steps": 350 * steps}},
        "warmup": {"type": "linear", "linear": {"warmup_steps": 5 * steps, "warmup_learning_rate": 0}}})
    factory = optimizer_factory.OptimizerFactory(config)
    optimizer = factory.build_optimizer(factory.build_learning_rate())
    optimizer.shadow_copy(model)
    optimizer.apply_gradients([(tf.zeros_like(v), v) for v in model.trainable_variables])     # makes the slots of momentum
    params = entries(model, True)
    fill(model, params)
    for e in [dict(e, name=e["name"] + "/average") for e in params]:
        optimizer.get_slot(variable(model, e["name"][:-8]), "average").assign(recipe.value(e, SEED))
        params.append(e)
    step = tf.Variable(1, dtype=tf.int64, name="global_step")
    checkpoint = tf.train.Checkpoint(global_step=step, model=model, optimizer=optimizer, **model.checkpoint_items)
    keep("garden_train", checkpoint, params, SOURCE % "resnet" + ", official/core/base_trainer.py's items")


def make_model(name="garden_model", network="resnet_rs_50_swish_128"):
    """A checkpoint of the network alone."""
    model, _ = fresh_model(network)
    params = entries(model, NETWORKS[network][1]["activation"] == "swish")
    fill(model, params)
    keep(name, tf.train.Checkpoint(model=model), params, SOURCE % ("resnet_3d" if "3d" in network else "resnet"))


def make_video_model():
    make_model("garden_video_model", "resnet3d_rs_50_8x64")


def main(*wanted):
    for name in NETWORKS:
        if not wanted or name in wanted:
            make_network(name)
    for make in (make_fresh, make_train, make_model, make_video_model):
        if not wanted or make.__name__[5:] in wanted:
            make()


if __name__ == "__main__":
    main(*sys.argv[1:])
