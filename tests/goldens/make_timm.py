"""Golden outputs of timm's networks, made by running timm (Apache 2.0; nothing of it is copied here).

Environment: Python 3.11 with

    pip install torch==2.13.0 numpy pyyaml huggingface_hub safetensors
    pip install --no-deps timm==1.0.31

(timm imports torchvision, no network calls it, and recipe.py puts mocks in its place). Then one command writes all
timm_*.npz beside this file, some minutes on two cores, and prints how far single precision is off, which should be little:

    python tests/goldens/make_timm.py               # or only some: make_timm.py resnetrs50_128 training

In each file, weights and images drawn as recipe.py says, with parameters named and laid out as timm's (torch: O x I x H x W):

timm_MODEL_SIZE.npz     `logits_f64`, `logits_f32` [batch, 1000] of that network in eval mode, in double and single precision;
                        for each stage i, from the float64 run, `stage{i}_samples`, `stage{i}_projections`, `stage{i}_shape`
timm_training.npz       one training-mode step of resnetrs50 (batch statistics, no drop path, no dropout, label smoothing 0.1)
                        in both precisions: `loss_f64`, `loss_f32`, 256 samples of the logits, `statistics`, and in double
                        `gradients_f64`: a `fingerprint` of each running statistic after the step and of the gradient of each
                        trainable parameter, in the order of `spec["params"]`. (In single precision gradients are 3% off:
                        hundreds of inputs of a ReLU round to the other side of its kink. None does in double.)
timm_fresh.npz          what timm's resnetrs50 is before any training, its drop path rate set to 0.1: mean, standard deviation
                        and largest magnitude of each of `spec["params"]` (`moments`), drop rate of each block (`drop_rates`)
"""
import os
import sys

import numpy as np
import recipe

recipe.stub_torchvision()
import timm
import torch
from torch import nn

FOLDER = os.path.dirname(os.path.abspath(__file__))
SMOOTHING = 0.1
SEED = 1
NETWORKS = {"resnetrs50": [128, 75], "resnetrs101": [96], "resnetrs152": [96], "resnetrs200": [96], "resnetrs270": [64],
            "resnetrs350": [64], "resnetrs420": [64], "resnet50": [96, 75], "resnet50d": [75], "tf_efficientnet_b0": [96, 75],
            "tf_efficientnet_b1": [96], "tf_efficientnet_b2": [96], "tf_efficientnet_b3": [96], "tf_efficientnet_b4": [96],
            "tf_efficientnet_b5": [96], "tf_efficientnet_b6": [64], "tf_efficientnet_b7": [64]}    # name: sizes, pixels


def entries(model):
    """How each parameter of a network is drawn, such that activations keep their size through the deepest network.

    The gains make up for what ReLU and swish take away, and the branches of a network of many blocks add less each: with
    equal branches ResNet-RS-420 would multiply a rounding error by ten thousand, and its single precision would say nothing.
    """
    out, first = [], True
    blocks = sum(hasattr(module, "conv3") or hasattr(module, "conv_pwl") for module in model.modules())
    branch = min(1.0, np.sqrt(16 / max(blocks, 1)))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            last = name.endswith("bn3") or "downsample" in name
            new = recipe.norm_entries(name, module.num_features, last, ("weight", "bias", "running_mean", "running_var"))
            if name.endswith("bn3"):
                new[0].update(a=branch * new[0]["a"], b=branch * new[0]["b"])
            out += new
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            shape, mobile, head = tuple(module.weight.shape), name.startswith("blocks."), isinstance(module, nn.Linear)
            if head or first:
                gain = 4.0 if head else 1.0
            elif ".se." in name:
                gain = 2.0 if mobile else 8.0
            else:
                gain = 3.5 if "conv_pwl" in name else 2.4 if mobile else 2.5
            center = None if head or first or module.groups > 1 else [1, 2, 3]
            out.append(recipe.entry(name + ".weight", shape, "affine", 0, np.sqrt(gain / np.prod(shape[1:])), center))
            if module.bias is not None:
                out.append(recipe.entry(name + ".bias", module.bias.shape, "affine", 0, 0.3))
            first = False
    return out


def prepare(name, size, images):
    """timm's network with the recipe's weights, and its spec."""
    model = timm.create_model(name, pretrained=False, num_classes=1000)
    spec = dict(source=f"timm {timm.__version__}, torch {torch.__version__}", model=name, seed=SEED,
                layout="torch", input_shape=[images, size, size, 3], params=entries(model))
    weights = {k: torch.from_numpy(v) for k, v in recipe.state(spec).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing), (missing, unexpected)
    return model, spec


def inputs(spec, dtype):
    return torch.from_numpy(recipe.images(spec).transpose(0, 3, 1, 2).copy()).to(dtype)


def channels_last(tensor):
    return tensor.detach().double().numpy().transpose(0, 2, 3, 1)


def make_network(name, size):
    """Logits and the outputs of all stages in eval mode."""
    model, spec = prepare(name, size, 2)
    stages = [getattr(model, f"layer{i}") for i in (1, 2, 3, 4)] if hasattr(model, "layer1") else list(model.blocks)
    seen, arrays = {}, {}
    for i, stage in enumerate(stages):
        stage.register_forward_hook(lambda module, args, out, i=i: seen.update({i: channels_last(out)}))
    for dtype, tail in ((torch.float32, "f32"), (torch.float64, "f64")):
        with torch.no_grad():
            arrays["logits_" + tail] = model.eval().to(dtype)(inputs(spec, dtype)).numpy()
    for i, out in seen.items():
        arrays[f"stage{i}_samples"] = recipe.samples(f"stage{i}", out)
        arrays[f"stage{i}_projections"] = recipe.projections(f"stage{i}", out)
        arrays[f"stage{i}_shape"] = np.array(out.shape)
    logits = arrays["logits_f64"]
    print(f"{name} {size}: single precision is {recipe.relative_error(arrays['logits_f32'], logits):.1e} off,",
          f"|logits| {np.abs(logits).mean():.2g}, images differ by {np.abs(logits[0] - logits[1]).mean():.2g},",
          "stages", " ".join(f"{np.sqrt((out**2).mean()):.2g}" for out in seen.values()), flush=True)
    recipe.save(os.path.join(FOLDER, f"timm_{name}_{size}.npz"), spec, arrays)


def fingerprint(name, tensor):
    """[7]: root mean square, 2 projections and 4 samples of a gradient or a statistic, in timm's layout."""
    x = tensor.detach().double().numpy()
    return np.concatenate([[np.sqrt((x**2).mean())], recipe.projections(name, x, 2), recipe.samples(name, x, 4)])


def make_training():
    """Loss, gradients and running statistics of one step in training mode."""
    arrays = {}
    for dtype, tail in ((torch.float64, "f64"), (torch.float32, "f32")):
        model, spec = prepare("resnetrs50", 64, 16)
        labels = recipe.generator("labels", spec["seed"]).integers(1000, size=16)
        model = model.to(dtype).train()
        logits = model(inputs(spec, dtype))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels), label_smoothing=SMOOTHING)
        loss.backward()
        trained, kept = dict(model.named_parameters()), dict(model.named_buffers())
        names = [e["name"] for e in spec["params"]]
        found = dict(loss=loss.detach().numpy(), logits=recipe.samples("logits", logits.detach().numpy()),
                     gradients=np.stack([fingerprint(k, trained[k].grad) for k in names if k in trained]),
                     statistics=np.stack([fingerprint(k, kept[k]) for k in names if k in kept]))
        arrays.update({f"{key}_{tail}": x for key, x in found.items()})
    for key in found:
        print(f"training {key}: single precision is {recipe.relative_error(arrays[key + '_f32'], arrays[key + '_f64']):.1e} off")
    del arrays["gradients_f32"]
    spec = dict(spec, labels=labels.tolist(), smoothing=SMOOTHING)
    recipe.save(os.path.join(FOLDER, "timm_training.npz"), spec, arrays)


def make_fresh():
    """Initial values and drop rates."""
    torch.manual_seed(0)
    model = timm.create_model("resnetrs50", pretrained=False, num_classes=1000, drop_path_rate=0.1)
    values = {k: p.double() for k, p in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for i in (1, 2, 3, 4) for block in getattr(model, f"layer{i}")]
    spec = dict(source=f"timm {timm.__version__}, torch {torch.__version__}", model="resnetrs50", drop_path=0.1,
                params=[dict(name=k, shape=list(p.shape)) for k, p in values.items()])
    moments = [(p.mean().item(), p.std().item(), p.abs().max().item()) for p in values.values()]
    recipe.save(os.path.join(FOLDER, "timm_fresh.npz"), spec, dict(moments=np.array(moments), drop_rates=np.array(rates)))


def main(wanted):
    makers = {f"{name}_{size}": (make_network, name, size) for name, sizes in NETWORKS.items() for size in sizes}
    makers.update(training=(make_training,), fresh=(make_fresh,))
    if not set(wanted) <= set(makers):
        sys.exit(f"choose from: {' '.join(makers)}")
    for key, (make, *arguments) in makers.items():
        if not wanted or key in wanted:
            make(*arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
