"""The whole ladder on real images with planted noise, half of the test images as unlabelled set A and half as B: what each rung gained on B, whose
labels no stage has seen. Rows to results/ladder.csv, the figure to results/ladder-<data>.png. Resumable: the same command goes on.

  python benchmarks/ladder.py climb grocery --data ../shared/data/grocery [--seeds 3]
  python benchmarks/ladder.py climb tinyimagenet-lt --data ../shared/data/tinyimagenet-lt [--seeds 3]
  python benchmarks/ladder.py figure grocery

grocery: 81 fine-grained classes with a natural tail; a RepVGG and a small ViT, pre-trained by MAE on all its images, the unlabelled ones too.
tinyimagenet-lt: 100 classes, 500 to 5 images before the noise, a balanced test set; two RepVGGs (a ViT would take too long on a CPU).
Planted into the training images: 20 % of the labels to any other class, 10 % to the next class, 3 % copies under other labels, 3 % pictures of something else."""
import argparse
import time

import pandas as pd
from common import RESULTS, machine, write_rows

from aaai_lt.challenge.ladder import climb, ladder_settings, over_seeds, plot_rungs, prefix_of, pseudo_rounds, rung_table
from aaai_lt.core import root
from aaai_lt.data.planted import plant_noise
from aaai_lt.data.table import read_images

ROUNDS = [{'part': 'a', 'rule': 'quantile', 'threshold': 0.5}, {'part': 'b', 'rule': 'quantile', 'threshold': 0.5}]
SHARED = {'clean': {'by': 'probe', 'folds': 5, 'rules': ['leak', 'conflict', 'copy', 'disagreement']}, 'rounds': ROUNDS, 'tta': 'flip', 'blend': 'learned', 'measure': 'accuracy', 'redistribute': {'method': 'transport', 'when': 'balanced'}}
COMMON = {'device': 'cpu', 'augment': 'standard', 'select': 'last', 'batch_size': 64, 'warmup_epochs': 2, 'workers': 1}
LADDERS = {
    'grocery': {'common': COMMON | {'loss': 'balanced_softmax'}, 'soup': {'repvgg': 3, 'vit': 3},
        'members': {'repvgg': {'model': 'repvgg_s0', 'input_size': 64, 'epochs': 25, 'lr': 2e-3},
                    'vit': {'model': 'vit_tiny_patch16_224', 'model_options': {'patch_size': 6, 'embed_dim': 96, 'depth': 4, 'num_heads': 3}, 'input_size': 48, 'epochs': 20, 'lr': 1e-3}},
        'pretrain': {'vit': {'pretrain': 'mae', 'pretrain_options': {'unlabelled': True, 'width': 64, 'depth': 1, 'heads': 4}, 'augment': 'none', 'augment_options': {'scale': [0.3, 1.0], 'hflip': 0.5}, 'epochs': 30, 'lr': 2e-3}}},
    'tinyimagenet-lt': {'common': COMMON | {'loss': 'balanced_softmax', 'input_size': 48, 'epochs': 15, 'lr': 3e-3}, 'soup': {'small': 3, 'wide': 3},
        'members': {'small': {'model': 'repvgg_m0', 'model_options': {'widths': [0.25, 0.25, 0.25, 0.25]}}, 'wide': {'model': 'repvgg_s0'}}},
}


def planted(name, data):
    "The data with noise in its training images; the same for all seeds."
    folder = root()/'data'/'planted'/name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        plant_noise(read_images(data), folder)
    return folder


def settings_of(name, data, seeds, smoke):
    settings = SHARED | LADDERS[name] | {'name': f'bench-ladder-{name}{"-smoke" if smoke else ""}', 'data': str(planted(name, data)), 'seeds': list(range(seeds))}
    if smoke:
        short = {'epochs': 1, 'warmup_epochs': 0.5}
        settings |= {'common': settings['common'] | {'input_size': 24, 'store_size': 24} | short, 'members': {m: {k: v for k, v in own.items() if k != 'input_size'} | short for m, own in settings['members'].items()}, 'pretrain': {m: own | short for m, own in settings.get('pretrain', {}).items()}, 'soup': {}}
    return ladder_settings(**settings)


def judged_cleaning(name, fixes):
    "What cleaning took away beside what was planted: images, the share of them that were faults, the share of the faults that were found."
    truth = pd.read_csv(root()/'data'/'planted'/name/'truth.csv', dtype=str, keep_default_na=False)
    dropped = pd.read_csv(fixes, dtype=str, keep_default_na=False).query("action == 'drop'").path
    hit, faulty = truth.path.isin(dropped), truth.kind != ''
    return {'dropped': int(hit.sum()), 'precision': round(faulty[hit].mean(), 5), 'recall': round(hit[faulty].mean(), 5)}


def measure(name, settings, smoke):
    "Climb with each seed, and write what each rung reached."
    tables = {}
    for seed in settings['seeds']:
        began = time.process_time()
        ladder = climb(settings, seed, say=lambda text: None if text.startswith('epoch') else print(f'{(time.process_time() - began) / 60:5.1f} min  {text}', flush=True))
        tables[seed] = rung_table(ladder)
        rounds = pseudo_rounds(ladder).set_index('name')[['chosen', 'purity', 'gini before', 'gini after']]
        print(tables[seed].round(4).to_string(), rounds.round(3).to_string(), f'seed {seed}: {(time.process_time() - began) / 60:.1f} CPU minutes in this call', sep='\n', flush=True)
        rows = tables[seed].assign(data=name, seed=seed, test_images=len(ladder.rungs[-1]['test']), machine=machine())
        for round_name, row in rounds.iterrows(): rows.loc[rows.rung == f'+ pseudo-labels {round_name}', ['chosen', 'purity']] = row.chosen, row.purity
        for column, value in judged_cleaning(name, root()/'outputs'/f'{prefix_of(settings, seed)}-clean'/'fixes.csv').items(): rows.loc[rows.rung == '+ cleaning', column] = value
        if not smoke: write_rows('ladder.csv', rows[['data', 'rung', 'member', 'seed', *[c for c in rows if c not in ('data', 'rung', 'member', 'seed')]]].round(5), ['data', 'seed', 'rung', 'member'])
    print(over_seeds(tables).round(4).to_string())


def saved_tables(name):
    "The rows of results/ladder.csv as frames by seed, in the order of the climb."
    rows = pd.read_csv(RESULTS/'ladder.csv').query('data == @name')
    order = ['trained', '+ cleaning', *[f"+ pseudo-labels {one['part']}1" for one in ROUNDS], '+ flip', '+ soup', '+ blend', '+ redistribution']
    return {seed: own.sort_values('rung', key=lambda r: r.map(order.index), kind='stable') for seed, own in rows.groupby('seed')}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['climb', 'figure'])
    parser.add_argument('name', choices=list(LADDERS))
    parser.add_argument('--data', help='for climb: the folder of the images')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--smoke', action='store_true', help='one epoch at 24 px, nothing written: does it run')
    args = parser.parse_args()
    if args.what == 'figure': plot_rungs(saved_tables(args.name)).savefig(RESULTS/f'ladder-{args.name}.png', dpi=110)
    elif not args.data: parser.error('climb needs --data')
    else: measure(args.name, settings_of(args.name, args.data, 1 if args.smoke else args.seeds, args.smoke), args.smoke)
