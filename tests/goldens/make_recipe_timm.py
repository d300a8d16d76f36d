"""Golden numbers of timm's training recipe, made by running timm: optimizers, weight decay's groups, whole steps.

Environment as for make_timm.py (Apache 2.0; nothing of timm is copied here): Python 3.11 with

    pip install torch==2.13.0 numpy pyyaml huggingface_hub safetensors
    pip install --no-deps timm==1.0.31

One command writes timm_recipe.npz and timm_steps*.npz beside this file, in a minute or two:

    python tests/goldens/make_recipe_timm.py        # or only some: make_recipe_timm.py recipe steps_small

timm_recipe.npz     of the problem in steps.py, after each step: weights under `sgd_*` (PyTorch's SGD with Nesterov), `momentum_*`
                    (without) and `rmsproptf_*` (timm's copy of TF1's RMSProp). In the spec, `decayed` and `trained`: the
                    parameters of ResNet-RS-50 and EfficientNet-B0 that timm's create_optimizer_v2 puts in the group with weight
                    decay, and all
timm_steps.npz      three steps of resnetrs50, 64 px, 16 images, in double precision, with that optimizer (SGD with Nesterov and
                    weight decay), timm's LabelSmoothingCrossEntropy, CosineLRScheduler over 10 steps and ModelEmaV3 at decay 0.1
                    (under (1 + t) / (10 + t) from the first step on), without drop path and dropout: `loss` before each
                    update, `rates`; `fingerprints` of each parameter and running statistic after the third, in the order of
                    `spec["params"]`, and of their averages, `averages`
timm_steps_small.npz    the same of a network of one block a stage, 32 px, 8 images
"""
import os
import sys

import make_timm
import numpy as np
import recipe
import steps
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

# name -> (blocks in the stages, image size, images, classes, peak of the learning rate)
NETWORKS = {"steps": ([3, 4, 6, 3], 64, 16, 1000, 2.0 ** -4), "steps_small": ([1, 1, 1, 1], 32, 8, 10, 2.0 ** -4)}
SMOOTHING, AVERAGE, WEIGHT_DECAY, TOTAL = 0.1, 0.1, 1e-3, 10


def problem(opt, **options):
    """The problem under timm's optimizer of that name: {parameter: values after each step}."""
    params = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in steps.start().items()}
    groups = [dict(params=[p], weight_decay=steps.WEIGHT_DECAY if "kernel" in n else 0.0) for n, p in params.items()]
    optimizer = create_optimizer_v2(groups, opt, lr=1.0, momentum=steps.MOMENTUM, **options)
    slopes, rows = steps.slopes(), []
    for t, rate in enumerate(steps.RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in params.items():
            p.grad = torch.from_numpy(slopes[name][t].copy())
        optimizer.step()
        rows.append([p.detach().numpy().copy() for p in params.values()])
    return {f"{opt}_{name}": np.stack([row[i] for row in rows]) for i, name in enumerate(params)}


def groups(name):
    """(names with weight decay, all names) of a network, by create_optimizer_v2."""
    model = timm.create_model(name, pretrained=False)
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4)
    decayed = [names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    return decayed, list(names.values())


def make_recipe():
    arrays = dict(problem("sgd"), **problem("momentum"), **problem("rmsproptf", alpha=steps.DECAY, eps=steps.EPSILON))
    nets = dict(resnet_rs_50=groups("resnetrs50"), efficientnet_b0=groups("tf_efficientnet_b0"))
    spec = dict(source=f"timm {timm.__version__}, torch {torch.__version__}",
                decayed={net: names for net, (names, _) in nets.items()},
                trained={net: names for net, (_, names) in nets.items()})
    recipe.save(os.path.join(make_timm.FOLDER, "timm_recipe.npz"), spec, arrays)


def make_steps(name):
    blocks, size, batch, classes, peak = NETWORKS[name]
    model = timm.create_model("resnetrs50", pretrained=False, num_classes=classes, layers=blocks)
    spec = dict(source=f"timm {timm.__version__}, torch {torch.__version__}", seed=make_timm.SEED, layout="torch",
                classes=classes, blocks=blocks, input_shape=[batch, size, size, 3], params=make_timm.entries(model),
                weight_decay=WEIGHT_DECAY, smoothing=SMOOTHING, average=AVERAGE, total_steps=TOTAL, peak=peak)
    weights = {k: torch.from_numpy(v) for k, v in recipe.state(spec).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing), (missing, unexpected)
    model = model.double().train()
    optimizer = create_optimizer_v2(model, "sgd", lr=peak, momentum=0.9, weight_decay=WEIGHT_DECAY)
    rates, averages = CosineLRScheduler(optimizer, t_initial=TOTAL, t_in_epochs=False), ModelEmaV3(model, decay=AVERAGE)
    loss_of, images = LabelSmoothingCrossEntropy(SMOOTHING), make_timm.inputs(spec, torch.float64)
    labels, losses, used = torch.from_numpy(steps.labels(spec)), [], []
    for t in range(3):
        rates.step_update(t)
        optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        averages.update(model)
        losses.append(loss.item())
        used += {group["lr"] for group in optimizer.param_groups}
    print(f"{name}: losses {losses}, rates {used}")
    kept = [dict(m.state_dict()) for m in (model, averages.module)]
    arrays = dict(loss=np.array(losses), rates=np.array(used), **{what: np.stack(
        [steps.fingerprint(e["name"], found[e["name"]].numpy()) for e in spec["params"]])
        for what, found in zip(("fingerprints", "averages"), kept, strict=True)})
    recipe.save(os.path.join(make_timm.FOLDER, f"timm_{name}.npz"), spec, arrays)


def main(*wanted):
    if not wanted or "recipe" in wanted:
        make_recipe()
    for name in NETWORKS:
        if not wanted or name in wanted:
            make_steps(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
