"""Accuracy of the shipped recipes over several seeds; rows to results/accuracy.csv.

  python benchmarks/accuracy.py digits
  python benchmarks/accuracy.py gtsrb --data ../shared/data/gtsrb [--seeds 0 1 2]
  python benchmarks/accuracy.py gtsrb-bf16 --data ../shared/data/gtsrb     on a processor that has bfloat16
  python benchmarks/accuracy.py gtsrb-lt --data ../shared/data/gtsrb [--losses cross_entropy balanced_softmax]
  python benchmarks/accuracy.py gtsrb-whole --data ../shared/data/gtsrb    without the signs' boxes, RepVGG at 80 px
  python benchmarks/accuracy.py gtsrb-lt-whole --data ../shared/data/gtsrb"""
import argparse

import torch
from common import WHOLE_SIGNS, machine, write_rows

from aaai_lt.core import recipe
from aaai_lt.training.config import make_config
from aaai_lt.training.loop import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('what', choices=['digits', 'gtsrb', 'gtsrb-bf16', 'gtsrb-lt', 'gtsrb-whole', 'gtsrb-lt-whole'])
parser.add_argument('--data', default='')
parser.add_argument('--seeds', type=int, nargs='*')
parser.add_argument('--losses', nargs='*')
args = parser.parse_args()

signs, steep = recipe('gtsrb') | {'data': args.data}, {'where': "lt == 1 or split == 'val'"}
PLANS = {  # settings, losses, seeds
    'digits': ({}, ['cross_entropy', 'balanced_softmax'], range(5)),
    'gtsrb': (signs, ['cross_entropy'], range(3)),
    'gtsrb-bf16': (signs | {'precision': 'bf16'}, ['cross_entropy'], range(3)),
    'gtsrb-lt': (signs | steep, ['cross_entropy', 'balanced_softmax'], range(3)),
    'gtsrb-whole': (signs | WHOLE_SIGNS, ['cross_entropy'], range(3)),
    'gtsrb-lt-whole': (signs | WHOLE_SIGNS | steep, ['cross_entropy', 'balanced_softmax'], range(3)),
}
settings, losses, seeds = PLANS[args.what]
rows = []
for loss in args.losses or losses:
    for seed in args.seeds if args.seeds is not None else seeds:
        name = f'{args.what}-{seed}' if len(losses) == 1 else f'{args.what}-{loss}-{seed}'
        run = train(make_config(**settings | {'loss': loss, 'seed': seed, 'name': name}))
        summary, split = run.summary, 'test' if 'test' in run.summary else 'val'
        rows.append({'benchmark': args.what, 'loss': loss, 'seed': seed, 'split': split, **summary[split], 'epochs': summary['epochs'], 'seconds': summary['seconds'],
                     'model': run.config.model, 'input_size': run.data['input_size'], 'threads': torch.get_num_threads(), 'machine': machine()})
table = write_rows('accuracy.csv', rows, ['benchmark', 'loss', 'seed'])
mine = table[table.benchmark == args.what]
print(mine.groupby('loss')[['accuracy', 'balanced_accuracy', 'few', 'seconds']].agg(['mean', 'std', 'count']).to_string())
