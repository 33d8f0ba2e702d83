"""Members of an ensemble in fp32, bf16 and (on a GPU) fp16: seconds, images a second, mAP, and how both differ; rows to results/precision.csv.

  python benchmarks/precision.py run-1 run-2 run-3 [--split val] [--rounds 5]

The first run by itself, then all runs blended. Images are decoded and weights loaded beforehand; each precision is timed once in every
round, and the median of the rounds is written. On a GPU it is time by the clock; on a CPU it is processor time of one thread, which other
jobs on the machine hardly touch. Half precision is torch's autocast: products in 16 bits, sums and normalisations in 32."""
import argparse
import time

import torch
from common import machine, write_rows

from aaai_lt.ensemble.inference import compare_precisions, relative_changes
from aaai_lt.training.run import load_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('runs', nargs='+')
parser.add_argument('--split', default='val')
parser.add_argument('--rounds', type=int, default=5)
args = parser.parse_args()

gpu = torch.cuda.is_available()
if not gpu: torch.set_num_threads(1)
runs, rows = [load_run(name) for name in args.runs], []
for own in [runs[:1], runs] if len(runs) > 1 else [runs]:
    table = compare_precisions(own, args.split, ('fp32', 'bf16', 'fp16') if gpu else ('fp32', 'bf16'), 'mAP', 'cuda' if gpu else 'cpu', args.rounds, time.perf_counter if gpu else time.process_time)
    change = 100 * relative_changes(table)
    for precision, row in table.iterrows():
        rows.append({'members': len(own), 'precision': precision, 'images': len(own[0].predictions(args.split)), 'seconds': round(row.seconds, 3), 'images_per_second': round(row.images_per_second, 1), 'mAP': round(row['mAP'], 6),
                     'faster_pct': round(change.images_per_second[precision], 2), 'mAP_change_pct': round(change['mAP'][precision], 4), 'runs': ' '.join(run.name for run in own), 'models': ' '.join(dict.fromkeys(run.config.model for run in own)),
                     'input_size': own[0].data['input_size'], 'threads': torch.get_num_threads(), 'rounds': args.rounds, 'machine': machine()})
print(write_rows('precision.csv', rows, ['machine', 'members', 'runs', 'precision']).drop(columns=['machine', 'runs']).to_string(index=False))
