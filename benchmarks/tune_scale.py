"""How the laptop scale's two free constants were chosen: learning-rate factor and weight-decay factor.

Each candidate trains three rows of Table 1 (baseline, dropout, weight_decay) on digits that no table uses: both the training
subset and the images it is judged on come from the split 'tune', with seeds of their own. Prints one line a candidate.

The committed search, benchmarks/tuning_laptop.csv, is the union of these (about 15 minutes on two cores):

    python benchmarks/tune_scale.py --lr 2 --wd 600 1200
    python benchmarks/tune_scale.py --lr 4 --wd 300 600 1200
    python benchmarks/tune_scale.py --lr 8 --wd 150 300 600
"""
import argparse
import csv
import dataclasses
import sys

import numpy as np

from resnet_rs.config import SCALES, effective, ladder, scaled
from resnet_rs.experiment import Data, train_run, use_compilation_cache
from resnet_rs.images import load, subset
from resnet_rs.training import Diverged

FIRST_SEED = 1000  # tables count seeds from 0


def tuning_data(config, seed):
    "A training subset of 'tune', and the rest of 'tune' to be judged on."
    tune = load(config.dataset, 'tune', config.image_size)
    train = subset(tune, config.train_examples, seed)
    seen = {image.tobytes() for image in train.images}
    rest = np.array([image.tobytes() not in seen for image in tune.images])
    return Data(train, dataclasses.replace(tune, images=tune.images[rest], labels=tune.labels[rest], fingerprint='tune'))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--lr', type=float, nargs='+', default=[8])
    ap.add_argument('--wd', type=float, nargs='+', default=[150])
    ap.add_argument('--rows', nargs='+', default=['baseline', 'dropout', 'weight_decay'])
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--scale', default='laptop')
    ap.add_argument('--out')
    a = ap.parse_args()
    use_compilation_cache()
    names, lines = [f'top1_{row}' for row in a.rows], []
    for lr in a.lr:
        for wd in a.wd:
            line = dict(scale=a.scale, lr_factor=lr, weight_decay_factor=wd, seeds=a.seeds)
            for row, name in zip(a.rows, names, strict=True):
                config, scores = scaled(ladder()[row], a.scale), []
                values = effective(config, a.scale, config.train_examples)
                rule = SCALES[a.scale]
                values = dataclasses.replace(values, peak_lr=values.peak_lr / rule.lr_factor * lr,
                                             weight_decay=values.weight_decay / rule.weight_decay_factor * wd)
                for seed in range(FIRST_SEED, FIRST_SEED + a.seeds):
                    try: scores.append(train_run(config, values, seed, tuning_data(config, seed))[1]['metrics']['top1'])
                    except Diverged: scores.append(0.0)
                line[name], line[f'e_foldings_{row}'] = round(float(np.mean(scores)), 2), round(values.decay_times(), 2)
            lines.append(line)
            print(*(f'{k}={v}' for k, v in line.items()), flush=True)
    if a.out:
        with open(a.out, 'w', newline='') as file:
            writer = csv.DictWriter(file, lines[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(lines)
    return 0


if __name__ == '__main__':
    sys.exit(main())
