"""Why dropout in the scaling study goes by the width that is trained: the laptop's network of width 2, half as wide as ResNet-RS,
in long training with the 0.75 that was recalled for width 2, and with 0.25.

Writes width_dropout.csv beside this file; about 5 minutes on two cores, resumable:

    python benchmarks/tuning/width_dropout.py
"""
import csv
from pathlib import Path

from resnet_rs.experiment import Experiment, run
from resnet_rs.papermill import runs_dir
from resnet_rs.studies import scaling_rows


def main():
    rows = {f'{row}, dropout {dropout}': config for dropout in (0.75, 0.25)
            for row, config in scaling_rows('laptop', ['r101_w2'], [160, 224], [350], dropout=dropout).items()}
    records = run(Experiment('width_dropout', rows, scale='laptop', seeds=2, results_dir=runs_dir('width_dropout')))
    with open(Path(__file__).with_suffix('.csv'), 'w', newline='') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(['image_size', 'width', 'dropout', 'seed', 'top1', 'train_loss'])
        for record in records:
            config, metrics = record['config'], record['metrics']
            shape = [config[name] for name in ('image_size', 'width', 'dropout')]
            table.writerow([*shape, record['seed'], metrics['top1'], round(metrics['loss'], 2)])


if __name__ == '__main__':
    main()
