"""Precision and recall of each cleaning rule on planted noise (20 % symmetric, 10 % pair-wise, 3 % copies under other labels, 3 % drawn signs), by band; rows to results/noise.csv.

  python benchmarks/noise.py digits [--seeds 3]
  python benchmarks/noise.py grocery --data path/to/grocery [--seeds 3] [--epochs 20]

Both readouts on the same noise: k runs (`out_of_fold`) and a linear probe on one run's features (`probe_out_of_fold`). The rules run with their defaults, but for the digits' copies
(difference 0.2: pictures of 8 x 8 pixels). Pairs of the groceries are two kinds of the same coarse class. Runs are kept under outputs/ of $AAAI_LT_HOME: a benchmark that was stopped goes on."""
import argparse
import time

import numpy as np
import pandas as pd
from common import machine, write_rows

from aaai_lt.analysis.copies import near_copies
from aaai_lt.analysis.noise import judge_rules, suspicious
from aaai_lt.core import root
from aaai_lt.data.builtin import read_builtin
from aaai_lt.data.planted import plant_noise
from aaai_lt.data.table import read_images
from aaai_lt.training.config import make_config
from aaai_lt.training.folds import features_of, out_of_fold, probe_out_of_fold
from aaai_lt.training.loop import train
from aaai_lt.training.prepare import look_at_data, prepare

SETTINGS = {
    'digits': {'epochs': 12, 'input_size': 32, 'batch_size': 32, 'lr': 1e-3, 'augment_options': {'hflip': 0.0, 'rotate': 10.0}},
    'grocery': {'epochs': 20, 'input_size': 64, 'batch_size': 64, 'lr': 2e-3},
}
NEAR = {'digits': 0.2, 'grocery': 0.3}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('setting', choices=SETTINGS)
parser.add_argument('--data', default='digits')
parser.add_argument('--seeds', type=int, default=3)
parser.add_argument('--epochs', type=int, default=0)
parser.add_argument('--folds', type=int, default=3)
args = parser.parse_args()


def same_kind(table):
    "For each class the next one of its coarse class; the next of all where it stands alone."
    coarse = table.frame.drop_duplicates('label').set_index('label').coarse_label.sort_index().to_numpy()
    size = len(coarse)
    return np.array([next((o for o in ((c + i) % size for i in range(1, size)) if coarse[o] == coarse[c]), (c + 1) % size) for c in range(size)])


table = read_builtin('digits') if args.setting == 'digits' else read_images(args.data)
partners, rows = same_kind(table) if 'coarse_label' in table.frame else None, []
settings = SETTINGS[args.setting] | ({'epochs': args.epochs} if args.epochs else {})
for seed in range(args.seeds):
    place = root()/'data'/'planted'/f'{args.setting}-{seed}'
    truth = plant_noise(table, place, partners=partners, seed=seed) if not place.exists() else pd.read_csv(place/'truth.csv', dtype=str, keep_default_na=False)
    config = make_config(name=f'noise-{args.setting}-{settings["epochs"]}-{seed}', data=str(place), seed=seed, select='last', **settings)
    noisy, data = look_at_data(config, progress=False), prepare(config, progress=False)
    near = near_copies(noisy, difference=NEAR[args.setting], progress=False)
    began = time.process_time()
    features = features_of(train(config, data), data)
    answers = {'probe': probe_out_of_fold(features, data, near=near, seed=seed)}
    middle = time.process_time()
    answers['runs'] = out_of_fold(config, args.folds, near, data, seed)
    seconds = {'probe': middle - began, 'runs': time.process_time() - middle}
    for readout, predictions in answers.items():
        judged = judge_rules(suspicious(noisy, near, predictions, features), truth, noisy.counts(), noisy.classes).round(4)
        right = float((predictions.scores.argmax(1) == truth.set_index('path').true.loc[predictions.ids].map({c: i for i, c in enumerate(noisy.classes)})).mean())
        rows += [{'setting': args.setting, 'readout': readout, 'seed': seed, **row, 'out_of_fold_accuracy': round(right, 4), 'epochs': settings['epochs'], 'folds': args.folds if readout == 'runs' else 5, 'train_images': len(truth), 'cpu_seconds': round(seconds[readout], 1), 'machine': machine()} for row in judged.to_dict('records')]
        print(f'{args.setting}, seed {seed}, {readout}: {right:.1%} of the true labels found out of the fold, {seconds[readout]:.0f} CPU s\n{judged[judged.band == "all"].to_string(index=False)}', flush=True)
    write_rows('noise.csv', rows, ['setting', 'readout', 'seed', 'epochs', 'rule', 'band'])
