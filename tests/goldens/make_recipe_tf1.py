"""Golden numbers of the authors' TF1 training recipe: optimizers, schedules, averages, loss, drop rates, decay, whole steps.

Source: tensorflow/tpu, models/official/resnet (resnet_main.py) and models/official/efficientnet (main.py, utils.py), commit
7dc921f846c9e4071f3884b768a7ddf521272a49 (Apache 2.0); nothing of it is copied here. Environment and TREE as for make_tf1.py:
Python 3.7 with tensorflow==1.15.5 numpy==1.18.5 protobuf==3.19.6. One command writes the tf1_recipe and tf1_steps files beside
this one, in a few minutes on two cores:

    python tests/goldens/make_recipe_tf1.py TREE     # or only some: make_recipe_tf1.py TREE recipe steps_small

TF1 computes rates, averages' decays and mean losses in single precision also where weights are double. `double` below runs the
same code in double: `tf.float32`, as a few modules read it, means tf.float64. The networks have one batch norm for another, as
make_tf1.py says; in training the fused kernel keeps the unbiased variance, and so does its stand-in. In single precision the
stand-in and the authors' own agree to rounding, which the script asserts.

tf1_recipe.npz      of the problem in steps.py, after each step: `momentum_*` and `nesterov_*`, weights and velocity of
                    MomentumOptimizer; `rmsprop_*`, weights, mean square and momentum of build_optimizer in utils.py;
                    `average_*`, averages of the Nesterov run by ExponentialMovingAverage, from step 0 and (`late_*`) from
                    step 89,980, where the decay comes to its end; `single_*`: the decays as TF1 has them.
                    `step_*`, `efficientnet_*`: steps and rates of the two schedules. `loss_*`: loss of steps.classified()
                    and its gradient. `drop_*`: drop rate of every block. In the spec, `decayed` and `trained`: names of the
                    variables that the L2 term of the authors' model functions takes, and of all that are trained.
tf1_steps_50.npz    three steps of resnet_model_fn on ResNet-RS-50, 64 px, 16 images, from step 1 of a warm-up of 4, with weight
                    decay, label smoothing and averages, without drop path and dropout: `loss` (cross-entropy alone) and
                    `total` (with L2), before each update, in double; `loss_f32`; `fingerprints` of each variable of
                    `spec["variables"]` in double after the third, averages and momenta among them
tf1_steps_small.npz     the same of a network of one block a stage, 32 px, 8 images
tf1_steps_efficientnet.npz      the same of the model_fn in EfficientNet's main.py: RMSProp, stairs of 2.4 steps after a warm-up
                    of 5, from step 4; B0 with half its blocks, 64 px, 8 images. Its batch norm in training is not the fused one
"""
import contextlib
import functools
import importlib
import os
import sys
from unittest.mock import MagicMock

import make_tf1
import numpy as np
import recipe
import steps

FOLDER = make_tf1.FOLDER
PIXELS = dict(num_train_images=1281167)
# name -> (blocks in the stages, image size, images, classes, base learning rate)
NETWORKS = {"steps_50": ([3, 4, 6, 3], 64, 16, 1000, 2.0), "steps_small": ([1, 1, 1, 1], 32, 8, 10, 2.0)}


@contextlib.contextmanager
def replaced(*changes):
    """Attributes of modules, (module, name, value), for a while."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def double(authors):
    """The authors' recipe in double precision."""
    from tensorflow.python.ops.losses import losses_impl
    from tensorflow.python.training import moving_averages
    tf, _, _, resnet_main, _, utils = authors
    wide = recipe.Replaced(tf, float32=tf.float64)
    return replaced((resnet_main, "tf", wide), (utils, "tf", wide),
                    *((m, "dtypes", recipe.Replaced(tf, float32=tf.float64)) for m in (losses_impl, moving_averages)))


# The small problem

def problem(tf, build, first=0, averaged=False):
    """Runs the problem with the optimizer that `build(rate)` makes; arrays of all variables after each step."""
    with tf.Graph().as_default(), tf.Session() as session:
        variables = [tf.get_variable(n, initializer=tf.constant(v)) for n, v in steps.start().items()]
        feeds = {name: tf.placeholder(tf.float64, shape) for name, shape in steps.SHAPES.items()}
        rate, counter = tf.placeholder(tf.float64, []), tf.train.create_global_step()
        loss = tf.add_n([tf.reduce_sum(v * feeds[v.op.name]) for v in variables])
        loss += steps.WEIGHT_DECAY * tf.add_n([tf.nn.l2_loss(v) for v in variables if "batch_normalization" not in v.name])
        train = build(rate).minimize(loss, counter)
        if averaged:
            averages = tf.train.ExponentialMovingAverage(decay=np.float64(steps.AVERAGE), num_updates=counter)
            with tf.control_dependencies([train]):
                train = averages.apply(variables)
        session.run(tf.global_variables_initializer())
        session.run(tf.assign(counter, first))
        kept, slopes = [v for v in tf.global_variables() if v is not counter], steps.slopes()
        rows = []
        for t, value in enumerate(steps.RATES):
            given = {feeds[n]: slopes[n][t] for n in slopes}
            given[rate] = value
            session.run(train, given)
            rows.append(session.run(kept))
        return {v.op.name: np.stack([row[i] for row in rows]) for i, v in enumerate(kept)}


def optimizers(authors):
    """The problem under the authors' three rules."""
    tf, utils = authors[0], authors[-1]
    momentum = lambda nesterov: lambda rate: tf.train.MomentumOptimizer(rate, steps.MOMENTUM, use_nesterov=nesterov)
    runs = {"momentum": problem(tf, momentum(False)), "nesterov": problem(tf, momentum(True)),
            "rmsprop": problem(tf, utils.build_optimizer)}
    with double(authors):
        runs.update(average=problem(tf, momentum(True), averaged=True),
                    late=problem(tf, momentum(True), first=89980, averaged=True))
    assert np.array_equal(runs["average"]["dense/kernel"], runs["nesterov"]["dense/kernel"])
    averages = ("average", "late")
    return {f"{run}_{name}": x for run, found in runs.items() for name, x in found.items()
            if run not in averages or name.endswith("ExponentialMovingAverage")}


def decays(authors):
    """The decays that TF1 uses, in single precision as it does, after 1 to 100 updates and around the end of their rise."""
    from tensorflow.python.training import moving_averages
    tf, seen = authors[0], []
    counts = np.concatenate([np.arange(1, 101), np.arange(89950, 90050), [109475]])
    with tf.Graph().as_default(), tf.Session() as session:
        count = tf.placeholder(tf.int64, [])
        spy = lambda variable, value, decay, zero_debias: seen.append(decay) or tf.no_op()
        with replaced((moving_averages, "assign_moving_average", spy)):
            tf.train.ExponentialMovingAverage(0.9999, num_updates=count).apply([tf.get_variable("v", [2])])
        return dict(single_counts=counts, single_decays=np.array([session.run(seen[0], {count: c}) for c in counts]))


def evaluated(tf, dtype, rate, at):
    """`rate(epoch or step)` at all of `at`."""
    with tf.Graph().as_default(), tf.Session() as session:
        place = tf.placeholder(dtype, [])
        value = rate(place)
        return np.array([session.run(value, {place: x}) for x in at])


def schedules(authors):
    """Rates of resnet_main.py and of EfficientNet's utils.py, in double and as they run, in single."""
    tf, _, _, resnet_main, _, utils = authors
    found, images = {}, PIXELS["num_train_images"]
    # the released yaml; the ResNet baseline of 90 epochs; and one in which 312 steps are an epoch to the last image
    for name, (total, examples) in dict(released=(109475, images), baseline=(28080, images), exact=(28080, 312 * 4096)).items():
        params = dict(base_learning_rate=0.1, train_batch_size=4096, train_steps=total, num_train_images=examples)
        drops = [epoch * examples / 4096 for _, epoch in resnet_main.get_lr_schedule(total, examples, 4096)]
        at = np.unique(np.concatenate([np.arange(0, total, total // 60)] + [int(d) + np.arange(-2, 4) for d in drops]))
        for tail, kind in (("", tf.float64), ("_f32", tf.float32)):
            rate = lambda step, params=params, kind=kind, examples=examples: resnet_main.learning_rate_schedule(
                params, tf.cast(step, kind) / (examples / 4096))
            found[f"step_{name}_rates{tail}"] = evaluated(tf, tf.int64, rate, at)
        found.update({f"step_{name}_at": at, f"step_{name}_drops": np.array(drops)})
    per_epoch, total = images / 2048, 218949
    stairs = 2.4 * per_epoch * np.array([1, 2, 3, 4, 10, 50, 100, 145])
    at = np.unique(np.concatenate([np.arange(0, total, total // 60), 3127 + np.arange(-2, 3)]
                                  + [int(s) + np.arange(-1, 3) for s in stairs]))
    build = lambda peak: lambda step: utils.build_learning_rate(peak, step, per_epoch)
    found.update(efficientnet_at=at, efficientnet_rates_f32=evaluated(tf, tf.int64, build(0.128), at))
    with double(authors):
        found["efficientnet_rates"] = evaluated(tf, tf.int64, lambda s: build(tf.constant(0.128, tf.float64))(s), at)
    return found


def losses(authors):
    """The label-smoothed loss and its gradient."""
    tf, found = authors[0], {}
    logits, classes = steps.classified()
    for smoothing in (0.0, 0.1, 0.3):
        with double(authors), tf.Graph().as_default(), tf.Session() as session:
            x = tf.constant(logits)
            loss = tf.losses.softmax_cross_entropy(logits=x, onehot_labels=tf.one_hot(classes, logits.shape[1]),
                                                   label_smoothing=smoothing)
            found[f"loss_{smoothing}"], found[f"loss_{smoothing}_gradient"] = session.run([loss, tf.gradients(loss, x)[0]])
    return found


# Networks

def model_params(batch, classes, base, weight_decay=4e-5, kind=float):
    """What resnet_model_fn asks for, in the constants of steps.py; `kind`: of the numbers that become tensors."""
    return dict(make_tf1.RS, resnet_depth=50, num_label_classes=classes, batch_size=batch, data_format="channels_last",
                transpose_input=False, dropblock_groups="", dropblock_size=7, pre_activation=False, norm_act_layer="bn_relu",
                drop_connect_rate=None, dropout_rate=None, bn_momentum=0.0, moving_average_decay=kind(steps.AVERAGE),
                precision="float32", label_smoothing=0.1, weight_decay=weight_decay, enable_lars=False, base_learning_rate=base,
                train_batch_size=batch, momentum=kind(steps.MOMENTUM), num_train_images=batch, train_steps=73, poly_rate=0.0,
                use_tpu=False, skip_host_call=True)


def drop_rates(authors):
    """Drop rate of every block, as it arrives at the authors' drop_connect."""
    tf, resnet_model, resnet_layers, _, efficientnet_builder, utils = authors
    found = {}
    for depth in (50, 101, 152, 200, 270, 350, 420):
        rates = []
        with tf.Graph().as_default(), replaced(
                (resnet_layers, "drop_connect", lambda x, training, rate, rates=rates: rates.append(rate) or x)):
            resnet_model.resnet(depth, 10, data_format="channels_last", bn_momentum=0.0, drop_connect_rate=0.1, **make_tf1.RS)(
                tf.zeros([2, 32, 32, 3]), True)
        found[f"drop_{depth}"] = np.array(rates)
    rates = []
    plain = lambda name="tpu_batch_normalization", **k: tf.layers.BatchNormalization(name=name, fused=False, **k)
    with tf.Graph().as_default(), replaced(
            (utils, "drop_connect", lambda x, training, survival: rates.append(1 - survival) or x),
            (utils, "train_batch_norm", plain)):
        efficientnet_builder.build_model(tf.zeros([2, 32, 32, 3]), "efficientnet-b0", True)
    found["drop_efficientnet_b0"] = np.array(rates)
    return found


@functools.lru_cache(None)
def load_efficientnet():
    """EfficientNet's main.py, which takes the place of resnet_main.py: both programs define some of the same flags."""
    flags = sys.modules["absl.flags"].FLAGS
    for flag in list(flags.flags_by_module_dict()["resnet_main"]):
        delattr(flags, flag.name)
    for name in ("imagenet_input", "condconv", "edgetpu", "lite", "tpu"):
        sys.modules[name] = MagicMock()
    main = importlib.import_module("main")
    flags(["make_recipe_tf1", "--model_name=efficientnet-b0", "--use_tpu=False", "--skip_host_call", "--notranspose_input",
           "--input_image_size=64"])
    return main


def moments_of_115(tf):
    """The authors' batch norm hands TensorFlow's a mask that 1.15 has not."""
    moments = tf.layers.BatchNormalization._moments
    return replaced((tf.layers.BatchNormalization, "_moments",
                     lambda self, x, axes, keep_dims, mask=None: moments(self, x, axes, keep_dims)))


def reached(authors):
    """{network: (variables in the L2 term, all that are trained)}: what the authors' model functions give to tf.nn.l2_loss."""
    tf, resnet_model, _, resnet_main, _, _ = authors
    found, heard = {}, []
    ear = recipe.Replaced(tf, nn=recipe.Replaced(tf.nn, l2_loss=lambda v: heard.append(v.op.name) or tf.nn.l2_loss(v)))
    trained = lambda: [v.op.name for v in tf.trainable_variables()]
    with tf.Graph().as_default(), replaced((resnet_main, "tf", ear), (resnet_model, "tf", tf)):
        tf.train.create_global_step()
        resnet_main.resnet_model_fn(tf.zeros([2, 32, 32, 3]), tf.zeros([2], tf.int32), "train",
                                    model_params(2, 1000, 0.1))
        found["resnet_rs_50"] = list(heard), trained()
    main = load_efficientnet()
    del heard[:]
    with tf.Graph().as_default(), moments_of_115(tf), replaced((main, "tf", ear)):
        tf.train.create_global_step()
        main.model_fn(tf.zeros([2, 32, 32, 3]), tf.zeros([2, 1000]), "train",
                      dict(use_bfloat16=False, batch_size=2, steps_per_epoch=625.5))
        found["efficientnet_b0"] = list(heard), trained()
    return found


def make_recipe(authors):
    arrays = dict(optimizers(authors), **decays(authors))
    for make in (schedules, losses, drop_rates):
        arrays.update(make(authors))
    nets = reached(authors)
    spec = dict(source=f"{make_tf1.COMMIT} models/official/resnet and efficientnet, TensorFlow {authors[0].__version__}",
                decayed={net: names for net, (names, _) in nets.items()},
                trained={net: names for net, (_, names) in nets.items()})
    recipe.save(os.path.join(FOLDER, "tf1_recipe.npz"), spec, arrays)


def unfused(tf):
    """tf.layers.batch_normalization without the fused kernel, which has no double precision, but with its unbiased variance."""
    class BatchNormalization(tf.layers.BatchNormalization):         # the class gives the variables their names
        def _moments(self, inputs, axes, keep_dims):
            self.count = float(np.prod([inputs.shape[i].value for i in axes]))
            return super()._moments(inputs, axes, keep_dims)

        def _assign_moving_average(self, variable, value, momentum, inputs_size):
            if variable is self.moving_variance:
                value *= self.count / (self.count - 1)
            return super()._assign_moving_average(variable, value, momentum, inputs_size)

    def batch_normalization(inputs, training, **options):
        return BatchNormalization(**dict(options, fused=False)).apply(inputs, training=training)
    return recipe.Replaced(tf, layers=recipe.Replaced(tf.layers, batch_normalization=batch_normalization))


def train(authors, name, spec, dtype, fused, count=3):
    """(cross-entropies, totals, {variable: value after the last step}); the parameters are put in `spec`."""
    tf, resnet_model, _, resnet_main, _, _ = authors
    blocks, size, batch, classes, base = NETWORKS[name]
    network = lambda resnet_depth, num_classes, **k: resnet_model.resnet_generator(
        resnet_model.bottleneck_block, blocks, num_classes, **k)
    pixels = recipe.images(spec).astype(np.float64) * resnet_main.STDDEV_RGB + resnet_main.MEAN_RGB
    with tf.Graph().as_default(), tf.Session() as session, replaced(
            (resnet_model, "tf", tf if fused else unfused(tf)), (resnet_model, "resnet", network)):
        counter = tf.train.create_global_step()
        made = resnet_main.resnet_model_fn(tf.constant(pixels.astype(dtype)), tf.constant(steps.labels(spec)), "train",
                                           model_params(batch, classes, base, spec["weight_decay"],
                                                        float if dtype == "float32" else np.float64))
        variables = [v for v in tf.global_variables() if v is not counter]
        assert {v.dtype.base_dtype.name for v in variables} == {dtype}
        suffix = "/ExponentialMovingAverage"
        spec["params"] = make_tf1.entries([(v.op.name, v.shape.as_list()) for v in variables
                                           if not v.op.name.endswith((suffix, "/Momentum"))])
        values = {e["name"]: recipe.value(e, spec["seed"]).astype(dtype) for e in spec["params"]}
        values.update({n + suffix: v for n, v in values.items()})
        values.update({v.op.name: np.zeros(v.shape.as_list(), dtype) for v in variables if v.op.name.endswith("/Momentum")},
                      global_step=np.array(1, np.int64))
        make_tf1.fill(tf, session, values)
        entropy, = tf.losses.get_losses()
        rows = []
        for _ in range(count):                                     # the losses of the same run as the update, before it
            with_loss = session.run([entropy, made.loss, made.train_op])
            rows.append(with_loss[:2])
        assert session.run(counter) == 1 + count
        return np.array(rows).T, dict(zip([v.op.name for v in variables], session.run(variables)))


def make_steps(authors, name):
    blocks, size, batch, classes, base = NETWORKS[name]
    source = f"{make_tf1.COMMIT} models/official/resnet/resnet_main.py, resnet_model_fn, TensorFlow {authors[0].__version__}"
    spec = dict(source=source, seed=make_tf1.SEED, layout="tensorflow (HWIO)", classes=classes, blocks=blocks,
                input_shape=[batch, size, size, 3], weight_decay=1e-3, smoothing=0.1, warmup_steps=4, total_steps=73,
                first_step=1, peak=base * batch / 256)
    single = train(authors, name, spec, "float32", True)
    close = [train(authors, name, spec, "float32", fused, 1) for fused in (True, False)]
    with double(authors):
        (loss, total), found = train(authors, name, spec, "float64", False)
    norms = [v for v in found if v.endswith(("moving_mean", "moving_variance"))]
    apart = max(recipe.relative_error(close[1][1][v], close[0][1][v]) for v in norms)
    print(f"{name}: losses {loss}, in single {single[0][0]}, totals {total}; statistics of the two batch norms {apart:.1e} apart")
    assert apart < 1e-3 and recipe.relative_error(close[1][0], close[0][0]) < 1e-5
    spec["variables"] = sorted(found)
    arrays = dict(loss=loss, total=total, loss_f32=single[0][0],
                  fingerprints=np.stack([steps.fingerprint(v, found[v]) for v in spec["variables"]]))
    recipe.save(os.path.join(FOLDER, f"tf1_{name}.npz"), spec, arrays)


def train_efficientnet(authors, spec, dtype, count=3):
    """As `train`, of EfficientNet's main.py."""
    tf, main = authors[0], load_efficientnet()
    kind, flags = float if dtype == "float32" else np.float64, main.FLAGS
    for name, value in dict(base_learning_rate=spec["peak"] * 256 / spec["input_shape"][0], moving_average_decay=steps.AVERAGE,
                            weight_decay=spec["weight_decay"], lr_decay_factor=spec["decay_rate"], survival_prob=0.0,
                            dropout_rate=0.0, depth_coefficient=spec["depth_factor"]).items():
        setattr(flags, name, kind(value))
    flags.num_label_classes, flags.train_batch_size = spec["classes"], spec["input_shape"][0]
    builder = main.model_builder_factory.get_model_builder("efficientnet-b0")
    pixels = recipe.images(spec).astype(np.float64) * builder.STDDEV_RGB + builder.MEAN_RGB
    hot = np.eye(spec["classes"])[steps.labels(spec)].astype(dtype)
    with tf.Graph().as_default(), tf.Session() as session, moments_of_115(tf):
        counter = tf.train.create_global_step()
        made = main.model_fn(tf.constant(pixels.astype(dtype)), tf.constant(hot), "train",
                             dict(use_bfloat16=False, batch_size=len(hot), steps_per_epoch=kind(1.0)))
        variables = [v for v in tf.global_variables() if v is not counter]
        assert {v.dtype.base_dtype.name for v in variables} == {dtype}
        suffix, slots = "/ExponentialMovingAverage", ("/RMSProp", "/RMSProp_1")
        spec["params"] = make_tf1.entries([(v.op.name, v.shape.as_list()) for v in variables
                                           if not v.op.name.endswith((suffix,) + slots)])
        values = {e["name"]: recipe.value(e, spec["seed"]).astype(dtype) for e in spec["params"]}
        values.update({n + suffix: v for n, v in values.items()})
        values.update({v.op.name: np.full(v.shape.as_list(), float(v.op.name.endswith("/RMSProp")), dtype) for v in variables
                       if v.op.name.endswith(slots)}, global_step=np.array(spec["first_step"], np.int64))
        make_tf1.fill(tf, session, values)
        entropy, = tf.losses.get_losses()
        rows = [session.run([entropy, made.loss, made.train_op])[:2] for _ in range(count)]
        return np.array(rows).T, dict(zip([v.op.name for v in variables], session.run(variables)))


def make_steps_efficientnet(authors):
    spec = dict(source=f"{make_tf1.COMMIT} models/official/efficientnet/main.py, model_fn, TensorFlow {authors[0].__version__}",
                seed=make_tf1.SEED, layout="tensorflow (HWIO)", classes=10, depth_factor=0.5, input_shape=[8, 64, 64, 3],
                weight_decay=2.0 ** -10, smoothing=0.1, warmup_steps=5, total_steps=100, first_step=4, peak=2.0 ** -6,
                decay_rate=float(np.float32(0.97)), decay_steps=float(np.float32(2.4)))
    single, _ = train_efficientnet(authors, spec, "float32")
    with double(authors):
        (loss, total), found = train_efficientnet(authors, spec, "float64")
    print(f"steps_efficientnet: losses {loss}, in single {single[0]}, totals {total}")
    spec["variables"] = sorted(found)
    recipe.save(os.path.join(FOLDER, "tf1_steps_efficientnet.npz"), spec, dict(
        loss=loss, total=total, loss_f32=single[0],
        fingerprints=np.stack([steps.fingerprint(v, found[v]) for v in spec["variables"]])))


def main(tree, *wanted):
    authors = make_tf1.load_authors(tree)
    for name in NETWORKS:
        if not wanted or name in wanted:
            make_steps(authors, name)
    for make in (make_recipe, make_steps_efficientnet):            # last: they give up the flags of resnet_main.py
        if not wanted or make.__name__[5:] in wanted:
            make(authors)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
