"""Golden numbers of the TF2 Model Garden's training recipe: optimizer, averages, schedule, loss, decay, drop rates, whole steps.

Source: tensorflow/models (Apache 2.0; nothing of it is copied here), from the package tf-models-official, and the Keras that it
uses. Environment as for make_garden.py: Python 3.11 with

    pip install tensorflow-cpu==2.21.0 numpy pyyaml gin-config scipy
    pip install --no-deps tf-keras==2.21.0 tf-models-official==2.20.0

One command writes garden_recipe.npz and garden_steps_small.npz beside this file, in a minute or two:

    python tests/goldens/make_recipe_keras.py        # or only one: make_recipe_keras.py recipe

Schedules and the decay of averages are in single precision in the Garden; `double` below runs the same code in double:
`tf.float32`, as two of its modules read it, means tf.float64. Keras's batch norm in double precision is not the fused kernel and
keeps the biased variance; `double` makes it the unbiased one, which the script holds against single precision.

garden_recipe.npz   of the problem in steps.py, after each step: `KIND_NESTEROV_*`, weights and slot `momentum` of the optimizer
                    that the Garden's factory builds, KIND `legacy` (which its trainers use) or `new`, NESTEROV 0 or 1;
                    `average_*`, averages of its ExponentialMovingAverage around the first, and the weights they follow.
                    `cosine_*`: steps and rates of the paper's run, in double and as they run. `loss_*`: label-smoothed loss of
                    steps.classified(). `drop_*`: drop rate of every block. In the spec, `decayed` and `trained`: the
                    variables that the regularizer of the Garden's tasks reaches, and all that are trained
garden_steps_small.npz  three steps, in double, of a ResNet-RS with Swish and one block a stage, 32 px, 8 images, with the loss,
                    regularizer and optimizer of the Garden's image classification task (SGD without Nesterov, cosine with
                    warm-up, averages of everything), from step 1 of a warm-up of 4, without drop path and dropout: `loss`
                    (cross-entropy alone) and `total` (with L2), before each update; `fingerprints` of each variable of
                    `spec["variables"]` after the third, averages and momenta among them
"""
import contextlib
import os
import sys
from functools import partial

import make_garden
import numpy as np
import recipe
import steps
import tensorflow as tf
import tf_keras
from official.modeling.optimization import ema_optimizer, lr_schedule, optimizer_factory
from official.modeling.optimization.configs import optimization_config
from official.vision.modeling.layers import nn_blocks

RUN = dict(peak=1.6, total=350 * 312, warmup=5 * 312)    # resnet_rs_imagenet


class Rates(tf_keras.optimizers.schedules.LearningRateSchedule):
    """The rates of the problem, exactly."""

    def __call__(self, step):
        return tf.gather(tf.constant(steps.RATES), tf.cast(step, tf.int64))


@contextlib.contextmanager
def double():
    """The Garden's schedules, averages and batch norm in double precision."""
    modules, norm = (lr_schedule, ema_optimizer), tf_keras.layers.BatchNormalization
    moments, assign = norm._moments, norm._assign_moving_average

    def counted(self, inputs, axes, *rest, **options):
        self._count = float(np.prod([inputs.shape[i] for i in axes]))
        return moments(self, inputs, axes, *rest, **options)

    def unbiased(self, variable, value, *rest):
        factor = self._count / (self._count - 1) if variable is self.moving_variance else 1.0
        return assign(self, variable, value * factor, *rest)

    norm._moments, norm._assign_moving_average = counted, unbiased
    for module in modules:
        module.tf = recipe.Replaced(tf, float32=tf.float64)
    tf_keras.backend.set_floatx("float64")
    try:
        yield
    finally:
        norm._moments, norm._assign_moving_average = moments, assign
        for module in modules:
            module.tf = tf
        tf_keras.backend.set_floatx("float32")


def problem(legacy, nesterov, average=False):
    """The problem under the optimizer of the Garden's factory: arrays of weights and slots after each step."""
    config = {"optimizer": {"type": "sgd", "sgd": {"momentum": steps.MOMENTUM, "nesterov": nesterov}},
              "learning_rate": {"type": "constant", "constant": {"learning_rate": 0.0}}}
    if not legacy:
        config["optimizer"] = {"type": "sgd_experimental",
                               "sgd_experimental": {"momentum": steps.MOMENTUM, "nesterov": nesterov}}
    if average:
        config["ema"] = {"average_decay": steps.AVERAGE, "trainable_weights_only": False}
    variables = {name: tf.Variable(value, name=name) for name, value in steps.start().items()}
    factory = optimizer_factory.OptimizerFactory(optimization_config.OptimizationConfig(config))
    optimizer = factory.build_optimizer(Rates())
    if average:
        model = tf.Module()
        model.variables_, type(model).variables = list(variables.values()), property(lambda self: self.variables_)
        optimizer.shadow_copy(model)
        optimizer._average_decay = np.float64(steps.AVERAGE)      # a Python float would become a single one
    regularizer, slopes, rows = tf_keras.regularizers.l2(steps.WEIGHT_DECAY / 2), steps.slopes(), []
    for t in range(len(steps.RATES)):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * slopes[n][t]) for n, v in variables.items()])
            loss += regularizer(variables["dense/kernel"])
        optimizer.apply_gradients(list(zip(tape.gradient(loss, list(variables.values())), variables.values(), strict=True)))
        row = {name: v.numpy() for name, v in variables.items()}
        if average:
            row.update({f"{name}/average": optimizer.get_slot(v, "average").numpy() for name, v in variables.items()})
        elif legacy:
            row.update({f"{name}/momentum": optimizer.get_slot(v, "momentum").numpy() for name, v in variables.items()})
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def optimizers():
    runs = {f"{'legacy' if legacy else 'new'}_{int(nesterov)}": problem(legacy, nesterov)
            for legacy in (True, False) for nesterov in (False, True)}
    with double():
        runs["average"] = problem(True, False, average=True)
    return {f"{run}_{name}": x for run, found in runs.items() for name, x in found.items()}


def schedules():
    """The cosine with warm-up, as the factory builds it, and in double."""
    config = {"optimizer": {"type": "sgd"},
              "learning_rate": {"type": "cosine", "cosine": {"initial_learning_rate": RUN["peak"], "decay_steps": RUN["total"]}},
              "warmup": {"type": "linear", "linear": {"warmup_steps": RUN["warmup"], "warmup_learning_rate": 0}}}
    at = [np.arange(0, RUN["total"], 499), RUN["warmup"] + np.arange(-2, 3), RUN["total"] - np.arange(4)]
    at = np.unique(np.concatenate(at))
    single = optimizer_factory.OptimizerFactory(optimization_config.OptimizationConfig(config)).build_learning_rate()
    found = dict(cosine_at=at, cosine_rates_f32=np.array([single(tf.constant(t)) for t in at]))
    with double():
        cosine = lr_schedule.CosineDecayWithOffset(initial_learning_rate=np.float64(RUN["peak"]), decay_steps=RUN["total"])
        wide = lr_schedule.LinearWarmup(cosine, RUN["warmup"], 0)
        found["cosine_rates"] = np.array([wide(tf.constant(t)) for t in at])
    assert found["cosine_rates"].dtype == np.float64 and np.allclose(found["cosine_rates"], found["cosine_rates_f32"], atol=1e-6)
    return found


def losses():
    """The loss of the Garden's image_classification task."""
    logits, classes = steps.classified()
    hot = np.eye(logits.shape[1])[classes]
    loss = partial(tf_keras.losses.categorical_crossentropy, hot, logits, from_logits=True)
    return {f"loss_{smoothing}": loss(label_smoothing=smoothing) for smoothing in (0.0, 0.1, 0.3)}


def reached(name, weight_decay=0.25):
    """(variables that the regularizer of the Garden's tasks reaches, all that are trained), by the gradient of its losses."""
    regularizer = tf_keras.regularizers.l2(weight_decay / 2)       # half: as the tasks say, to match tf.nn.l2_loss
    g, originals = make_garden, (make_garden.resnet, make_garden.resnet_3d, make_garden.classification_model,
                                 make_garden.video_classification_model)
    with_it = lambda module, name: recipe.Replaced(
        module, **{name: partial(getattr(module, name), kernel_regularizer=regularizer)})
    g.resnet, g.resnet_3d = with_it(g.resnet, "ResNet"), with_it(g.resnet_3d, "ResNet3D")
    g.classification_model = with_it(g.classification_model, "ClassificationModel")
    g.video_classification_model = with_it(g.video_classification_model, "VideoClassificationModel")
    try:
        tf_keras.backend.clear_session()
        model, _ = g.build(name)
    finally:
        g.resnet, g.resnet_3d, g.classification_model, g.video_classification_model = originals
    with tf.GradientTape() as tape:
        loss = tf.add_n(model.losses)
    trained = {v.ref() for v in model.trainable_variables}
    names = [n for n in g.save_weights(model) if g.variable(model, n).ref() in trained]
    gradients = tape.gradient(loss, [g.variable(model, n) for n in names])
    for n, gradient in zip(names, gradients, strict=True):
        assert gradient is None or np.allclose(gradient, weight_decay * g.variable(model, n)), n
    return [n for n, gradient in zip(names, gradients, strict=True) if gradient is not None], names


def drop_rates():
    """Drop rate of every block, as it arrives at the Garden's StochasticDepth."""
    original, found = nn_blocks.nn_layers.StochasticDepth, {}
    init = original.__init__
    for depth in (50, 101, 152, 200):
        rates = []
        original.__init__ = lambda self, rate, *a, rates=rates, **k: rates.append(rate) or init(self, rate, *a, **k)
        spec = tf_keras.layers.InputSpec(shape=[None, 32, 32, 3])
        make_garden.resnet.ResNet(depth, spec, init_stochastic_depth_rate=0.1, **make_garden.RS)
        found[f"drop_{depth}"] = np.array(rates)
    original.__init__ = init
    return found


def train(spec, count=3):
    """((cross-entropies, totals), {variable: value after the last step}), in Keras's floats; the parameters are put in `spec`."""
    tf_keras.backend.clear_session()
    kind, regularizer = np.dtype(tf_keras.backend.floatx()).type, tf_keras.regularizers.l2(spec["weight_decay"] / 2)
    make_garden.resnet.RESNET_SPECS[14] = [("bottleneck", filters, 1) for filters in (64, 128, 256, 512)]
    inputs = tf_keras.layers.InputSpec(shape=[None, *spec["input_shape"][1:]])
    backbone = make_garden.resnet.ResNet(14, inputs, activation="swish", norm_momentum=0.0, norm_epsilon=1e-5,
                                         kernel_regularizer=regularizer, **make_garden.RS)
    model = make_garden.classification_model.ClassificationModel(backbone, spec["classes"], inputs,
                                                                 kernel_regularizer=regularizer)
    spec["params"] = make_garden.entries(model, True)
    make_garden.fill(model, spec["params"])
    schedule = lr_schedule.LinearWarmup(lr_schedule.CosineDecayWithOffset(
        initial_learning_rate=kind(spec["peak"]), decay_steps=spec["total_steps"]), spec["warmup_steps"], 0)
    config = {"optimizer": {"type": "sgd", "sgd": {"momentum": steps.MOMENTUM}},
              "learning_rate": {"type": "constant", "constant": {"learning_rate": 0.0}},
              "ema": {"average_decay": steps.AVERAGE, "trainable_weights_only": False}}
    optimizer = optimizer_factory.OptimizerFactory(optimization_config.OptimizationConfig(config)).build_optimizer(schedule)
    optimizer.shadow_copy(model)
    optimizer._average_decay = kind(steps.AVERAGE)
    optimizer.iterations.assign(spec["first_step"])
    images, hot = recipe.images(spec).astype(kind), np.eye(spec["classes"], dtype=kind)[steps.labels(spec)]
    rows = []
    for _ in range(count):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf_keras.losses.categorical_crossentropy(
                hot, model(images, training=True), from_logits=True, label_smoothing=spec["smoothing"]))
            total = loss + tf.add_n(model.losses)
        gradients = tape.gradient(total, model.trainable_variables)
        optimizer.apply_gradients(list(zip(gradients, model.trainable_variables, strict=True)))
        rows.append([loss.numpy(), total.numpy()])
    found, trained = {}, {v.ref() for v in model.trainable_variables}
    for e in spec["params"]:
        v = make_garden.variable(model, e["name"])
        found[e["name"]], found[e["name"] + "/average"] = v.numpy(), optimizer.get_slot(v, "average").numpy()
        if v.ref() in trained:
            found[e["name"] + "/momentum"] = optimizer._optimizer.get_slot(v, "momentum").numpy()
    return np.array(rows).T, found


def make_steps():
    spec = dict(source=f"tf-models-official 2.20.0 official/vision and modeling/optimization, TensorFlow {tf.__version__}",
                seed=make_garden.SEED, layout="tensorflow (HWIO)", classes=10, blocks=[1, 1, 1, 1], input_shape=[8, 32, 32, 3],
                weight_decay=2.0 ** -10, smoothing=0.1, warmup_steps=4, total_steps=73, first_step=1, peak=2.0 ** -4)
    single, one = train(spec)[0][0], train(spec, 1)[1]
    with double():
        (loss, total), found = train(spec)
        wide = train(spec, 1)[1]
    assert {x.dtype.name for x in found.values()} == {"float64"}
    spec["variables"] = sorted(found)
    apart = max(recipe.relative_error(one[v], wide[v]) for v in found if "moving_" in v)
    print(f"steps_small: losses {loss}, in single {single}, totals {total}; statistics of the two batch norms {apart:.1e} apart")
    assert apart < 1e-3
    recipe.save(os.path.join(make_garden.FOLDER, "garden_steps_small.npz"), spec, dict(
        loss=loss, total=total, fingerprints=np.stack([steps.fingerprint(v, found[v]) for v in spec["variables"]])))


def make_recipe():
    arrays = dict(optimizers(), **schedules(), **losses(), **drop_rates())
    nets = {name: reached(network) for name, network in
            dict(resnet_rs_50="resnet_rs_50_swish_128", resnet_50="resnet_50_96", resnet3d_rs_50="resnet3d_rs_50_8x64").items()}
    spec = dict(source=f"tf-models-official 2.20.0 official/modeling/optimization, TensorFlow {tf.__version__}", run=RUN,
                decayed={net: names for net, (names, _) in nets.items()},
                trained={net: names for net, (_, names) in nets.items()})
    recipe.save(os.path.join(make_garden.FOLDER, "garden_recipe.npz"), spec, arrays)


def main(*wanted):
    for make in (make_recipe, make_steps):
        if not wanted or make.__name__[5:] in wanted:
            make()


if __name__ == "__main__":
    main(*sys.argv[1:])
