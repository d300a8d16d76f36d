"""How the laptop scale's two free constants were chosen: learning-rate factor and weight-decay factor.

Each candidate trains three rows of Table 1 (baseline, dropout, weight_decay) on digits that no table uses: both the training
subset and the images it is judged on come from the split 'tune', with seeds of their own. Prints one line a candidate.

The committed search, benchmarks/tuning/tuning_laptop.csv, is the union of these (about 15 minutes on two cores):

    python benchmarks/tuning/tune_scale.py --lr 2 --wd 600 1200
    python benchmarks/tuning/tune_scale.py --lr 4 --wd 300 600 1200
    python benchmarks/tuning/tune_scale.py --lr 8 --wd 150 300 600

With --constants it measures instead what the paper's constants do, as they are and scaled, in the row weight_decay
(benchmarks/tuning/paper_constants.csv).
"""
import argparse
import csv
import dataclasses
import sys

import numpy as np

from resnet_rs.config import SCALES, ladder, scaled
from resnet_rs.effective import effective
from resnet_rs.experiment import use_compilation_cache
from resnet_rs.images import load, subset
from resnet_rs.run_data import Data
from resnet_rs.runs import train_run
from resnet_rs.training import Diverged

FIRST_SEED = 1000  # tables count seeds from 0


def tuning_data(config, seed):
    "A training subset of 'tune', and the rest of 'tune' to be judged on."
    tune = load(config.dataset, 'tune', config.image_size)
    train = subset(tune, config.train_examples, seed)
    seen = {image.tobytes() for image in train.images}
    rest = np.array([image.tobytes() not in seen for image in tune.images])
    return Data(train, dataclasses.replace(tune, images=tune.images[rest], labels=tune.labels[rest], fingerprint='tune'))


def measured(config, values, seeds):
    "Mean top-1 and norm of the final weights over the tuning seeds; a run that diverges counts as 0."
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        try: metrics = train_run(config, values, seed, tuning_data(config, seed))[1]['metrics']
        except Diverged: metrics = dict(top1=0.0, weight_norm=np.nan)
        found.append((metrics['top1'], metrics['weight_norm']))
    return [round(float(v), 2) for v in np.mean(found, axis=0)]


def constants(scale, seeds):
    "A line for each constant that is used as in the paper while the others are scaled, and for the scaled ones."
    config = scaled(ladder()['weight_decay'], scale)
    declared, factor = effective(config, scale, config.train_examples), SCALES[scale].weight_decay_factor
    arms = {'no weight decay': dict(weight_decay=0.0),
            'weight decay 4e-5 as it is': dict(weight_decay=4e-5), 'weight decay 1e-4 as it is': dict(weight_decay=1e-4),
            'weight decay 4e-5 scaled': {}, 'weight decay 1e-4 scaled': dict(weight_decay=1e-4 * factor),
            'EMA 0.9999 as it is': dict(ema_decay=config.ema_decay),
            'RandAugment 100 and 40 px as they are': dict(translate_px=100.0, cutout_px=40.0),
            'RandAugment magnitude 15': dict(randaug_magnitude=15.0)}
    for arm, changes in arms.items():
        top1, norm = measured(config, dataclasses.replace(declared, **changes), seeds)
        line = dict(constant=arm, seeds=seeds, top1=top1, weight_norm=norm)
        print(*(f'{k}={v}' for k, v in line.items()), flush=True)
        yield line


def search(scale, rows, seeds, factors):
    "A line for each pair of factors on learning rate and weight decay."
    rule = SCALES[scale]
    for lr, wd in factors:
        line = dict(scale=scale, lr_factor=lr, weight_decay_factor=wd, seeds=seeds)
        for row in rows:
            config = scaled(ladder()[row], scale)
            values = effective(config, scale, config.train_examples)
            values = dataclasses.replace(values, peak_lr=values.peak_lr / rule.lr_factor * lr,
                                         weight_decay=values.weight_decay / rule.weight_decay_factor * wd)
            line[f'top1_{row}'] = measured(config, values, seeds)[0]
            line[f'e_foldings_{row}'] = round(values.decay_times(), 2)
        print(*(f'{k}={v}' for k, v in line.items()), flush=True)
        yield line


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--lr', type=float, nargs='+', default=[8])
    ap.add_argument('--wd', type=float, nargs='+', default=[150])
    ap.add_argument('--rows', nargs='+', default=['baseline', 'dropout', 'weight_decay'])
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--scale', default='laptop')
    ap.add_argument('--constants', action='store_true')
    ap.add_argument('--out')
    a = ap.parse_args()
    use_compilation_cache()
    lines = list(constants(a.scale, a.seeds) if a.constants else
                 search(a.scale, a.rows, a.seeds, [(lr, wd) for lr in a.lr for wd in a.wd]))
    if a.out:
        with open(a.out, 'w', newline='') as file:
            writer = csv.DictWriter(file, lines[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(lines)
    return 0


if __name__ == '__main__':
    sys.exit(main())
