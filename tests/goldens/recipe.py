"""The recipe behind the golden outputs of networks: weights and images drawn from names, outputs kept as a few numbers.

A golden file holds no weights. Each is drawn from its own name, so that the script that runs the authors' code and the
test that runs ours get the same float32 values, and neither needs the other's packages:

    z     = default_rng(crc32(name) + seed).standard_normal(shape)
    z    -= z.mean(over the axes in "center", keepdims)              where an entry has "center"
    value = a + b * z  (rule "affine")   or   exp(b * z)  (rule "exp")

Batch norms get statistics, scales and shifts that all differ from one another; kernels of hidden layers sum to zero over
their inputs, which keeps the activations of very deep networks from drifting; no weight is zero, so nothing is untested.

An `.npz` file holds `spec` (JSON in UTF-8: source, seed, input_shape, layout, params: a list of `entry`) and arrays. Logits
are kept whole. Of a large tensor NAME, channels last, are kept `NAME_samples`, its values at 256 places drawn from the name,
and `NAME_projections`, its inner products with 8 random directions drawn from the name, to which every value contributes.

Python 3.7 and numpy 1.18 are enough, because the authors' first code needs those.
"""
import json
import os
import sys
import types
import zlib
from unittest.mock import MagicMock

import numpy as np


def generator(name, seed=0):
    """numpy's generator for that name."""
    return np.random.default_rng(zlib.crc32(name.encode()) + int(seed))


def draw(name, shape, seed):
    """Standard normal float64 of that shape."""
    return generator(name, seed).standard_normal(tuple(shape))


def entry(name, shape, rule, a, b, center=None):
    """How one parameter is drawn, as JSON can hold it."""
    e = dict(name=name, shape=[int(s) for s in shape], rule=rule, a=float(a), b=float(b))
    return dict(e, center=center) if center else e


def norm_entries(name, channels, last, tails):
    """Scale, shift, mean and variance of one batch norm; `last` of a residual branch: smaller scale."""
    rules = [("affine", 0.5, 0.1) if last else ("affine", 1.0, 0.2), ("affine", 0, 0.2), ("affine", 0, 0.2), ("exp", 0, 0.3)]
    return [entry(name + "." + tail, [channels], *rule) for tail, rule in zip(tails, rules)]    # noqa: B905 (Python 3.7)


def value(entry, seed):
    """The float32 parameter of an `entry`."""
    z = draw(entry["name"], entry["shape"], seed)
    if entry.get("center"):
        z = z - z.mean(axis=tuple(entry["center"]), keepdims=True)
    out = np.exp(entry["b"] * z) if entry["rule"] == "exp" else entry["a"] + entry["b"] * z
    return out.astype(np.float32)


def state(spec):
    """{name: float32 array} of all parameters of a spec."""
    return {e["name"]: value(e, spec["seed"]) for e in spec["params"]}


def images(spec):
    """The input batch float32 [N, *T, H, W, 3]: 8 x 8 coarse blocks and fine noise."""
    shape, seed = tuple(spec["input_shape"]), spec["seed"]
    coarse = draw("input/coarse", shape[:-3] + (8, 8, 3), seed)
    rows, columns = (8 * np.arange(n) // n for n in shape[-3:-1])
    return (coarse[..., rows, :, :][..., columns, :] + 0.5 * draw("input/fine", shape, seed)).astype(np.float32)


def samples(name, x, count=256):
    """The values of `x`, channels last, at `count` places that its name determines: float64 [count]."""
    return np.asarray(x, np.float64).reshape(-1)[generator("samples/" + name).integers(np.size(x), size=count)]


def projections(name, x, count=8):
    """Inner products of `x`, channels last, with `count` directions that its name determines: float64 [count].

    Directions have length 1 on average, so each product is about the root of the mean square of `x`.
    """
    x, random = np.asarray(x, np.float64).reshape(-1), generator("projections/" + name)
    return np.array([random.standard_normal(x.size) @ x for _ in range(count)]) / np.sqrt(x.size)


def relative_error(x, truth):
    """max |x - truth| / max |truth|"""
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    assert x.shape == truth.shape and np.isfinite(x).all(), (x.shape, truth.shape)
    return float(np.abs(x - truth).max() / np.abs(truth).max())


def load_spec(path):
    """The spec of a golden file."""
    with np.load(path) as f:
        return json.loads(f["spec"].tobytes().decode())


def load_arrays(path):
    """The arrays of a golden file."""
    with np.load(path) as f:
        return {name: f[name] for name in f.files if name != "spec"}


def save(path, spec, arrays):
    """Write a golden file and say what is in it."""
    text = np.frombuffer(json.dumps(spec, separators=(",", ":")).encode(), np.uint8)
    np.savez_compressed(path, **dict(arrays, spec=text))
    print(f"{os.path.basename(path)}: {len(arrays)} arrays, {os.path.getsize(path) / 1024:.0f} kB", flush=True)


# What lets the peers' code run here: with parts of it replaced, without the packages that it imports and never calls

class Replaced:
    """A module as the peer's code sees it, with some attributes replaced."""

    def __init__(self, module, **attributes):
        self.__dict__.update(attributes)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


class Hollow(types.ModuleType):
    """A module all of whose names are mocks."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=name))
        return self.__dict__[name]


def stub_torchvision():
    """timm imports torchvision when loaded; no network calls it."""
    for tail in ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional",
                 ".transforms._presets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".datasets"):
        sys.modules.setdefault("torchvision" + tail, Hollow("torchvision" + tail))


def stub_model_garden():
    """Lets single `official.*` modules be imported without the __init__ files of their packages, which import them all."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    roots = [os.path.join(p, "official") for p in sys.path if os.path.isdir(os.path.join(p, "official", "vision"))]
    if not roots:
        raise SystemExit("tf-models-official is not installed in this environment")
    for name in ("official", "official.vision", "official.vision.modeling", "official.vision.modeling.backbones",
                 "official.vision.ops", "official.vision.configs", "official.vision.dataloaders", "official.modeling",
                 "official.modeling.optimization", "official.core"):
        module = types.ModuleType(name)
        module.__path__ = [os.path.join(roots[0], *name.split(".")[1:])]
        sys.modules[name] = module
    factory = MagicMock()
    factory.register_backbone_builder = lambda *a, **k: (lambda f: f)
    sys.modules["official.vision.modeling.backbones.factory"] = factory
    sys.modules["tensorflow_model_optimization"] = MagicMock()
