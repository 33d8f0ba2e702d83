"Latency: every case in every round, ratios of known work, and no backend that is silently missing."
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from aaai_lt.core import ConfigError
from aaai_lt.hardware import devices, latency


def spin(seconds):
    "A busy processor for so long."
    end = time.process_time() + seconds
    while time.process_time() < end: pass


@pytest.fixture
def backends(monkeypatch):
    "Backends of known cost, one that cannot run here and two that break; and a record of what was called."
    calls = []
    def works(name, cost):
        def prepare(candidate, batch, threads):
            return lambda: (calls.append((candidate.name, name, batch)), spin(cost * batch))
        return prepare
    def broken(candidate, batch, threads): raise RuntimeError('no such kernel\nand a long trace')
    def breaks_in_use(candidate, batch, threads):
        def forward(): raise ValueError('out of memory')
        return forward
    monkeypatch.setattr(latency, 'BACKENDS', {'one': ('fp32', works('one', 2e-4)), 'two': ('int8', works('two', 4e-4)), 'absent': ('fp32', lambda *case: 'no such device'), 'broken': ('fp32', broken), 'breaks in use': ('bf16', breaks_in_use)})
    return calls


def fake(name): return latency.Candidate(name, nn.Identity(), 32, Path('a'), Path('b'))


def test_every_case_once_in_each_round_in_changing_order(backends):
    latency.measure_latency([fake('repvgg_n1'), fake('repvgg_n2')], ('one', 'two'), (1, 4), rounds=6, warmup=2)
    cases = 2 * 2 * 2
    assert len(backends) == cases * (6 + 2)
    rounds = [backends[cases * 2 + cases * r:cases * 2 + cases * (r + 1)] for r in range(6)]
    assert all(len(set(r)) == cases for r in rounds) and len({tuple(r) for r in rounds}) > 1


def test_ratios_and_spread_of_known_work(backends):
    rows = latency.measure_latency([fake('repvgg_n1')], ('one', 'two'), (1, 4), rounds=15).set_index(['backend', 'batch'])
    for batch in (1, 4):
        assert rows.ratio['one', batch] == 1 and 1.6 < rows.ratio['two', batch] < 2.4
        assert rows.ratio_low['two', batch] <= rows.ratio['two', batch] <= rows.ratio_high['two', batch]
    assert (rows.low_ms <= rows.latency_ms).all() and (rows.latency_ms <= rows.high_ms).all() and (rows.cpu_ms <= rows.high_ms + 0.1).all()
    assert np.allclose(rows.images_per_second, 1000 * rows.index.get_level_values('batch') / rows.latency_ms)
    assert (rows.rounds == 15).all() and (rows.threads == 1).all() and (rows.warmup == 3).all()


def test_what_cannot_run_is_a_row_and_the_device_table_takes_it(backends, tmp_path):
    rows = latency.measure_latency([fake('repvgg_n1'), fake('repvgg_n2')], tuple(latency.BACKENDS), (1, 2), rounds=2)
    assert len(rows) == 2 * 5 * 2
    states = rows.drop_duplicates('backend').set_index('backend')
    assert states.status.to_dict() == {'one': 'ok', 'two': 'ok', 'absent': 'not_measured', 'broken': 'failure', 'breaks in use': 'failure'}
    assert states.reason['absent'] == 'no such device' and states.reason['broken'] == 'RuntimeError: no such kernel' and 'out of memory' in states.reason['breaks in use']
    latency.device_rows(rows, 'a board').to_csv(tmp_path/'mine.csv', index=False)
    table = devices.read_latency(tmp_path/'mine.csv', 32, 10)
    assert len(table) == 2 * 5 and set(table.model) == {'N1', 'N2'} and (table.macs > 0).all()
    assert table[table.status == 'ok'].latency_ms.notna().all() and table[table.status != 'ok'].latency_ms.isna().all()
    assert set(pd.concat([devices.published_latency(), table]).device) > {'a board, one', 'T4'}
    assert latency.plot_backends(rows).axes


def test_first_backend_that_cannot_run_leaves_ratios_blank(backends):
    rows = latency.measure_latency([fake('repvgg_n1')], ('absent', 'one'), (1,), rounds=2)
    assert rows.set_index('backend').latency_ms.notna().to_dict() == {'absent': False, 'one': True}
    assert 'ratio' not in rows or rows.ratio.isna().all()


def test_threads_are_put_back_and_options_checked(backends):
    before = torch.get_num_threads()
    seen = []
    latency.BACKENDS['one'] = ('fp32', lambda c, b, threads: lambda: seen.append((threads, torch.get_num_threads())))
    latency.measure_latency([fake('repvgg_n1')], ('one',), (1,), rounds=1, warmup=1, threads=2)
    assert torch.get_num_threads() == before and set(seen) == {(2, 2)}
    with pytest.raises(ConfigError, match="backend is 'onee'.*did you mean 'one'"): latency.measure_latency([fake('a')], ('onee',))
    for wrong in ({'rounds': 0}, {'threads': 1.5}, {'batch_sizes': (0,)}, {'warmup': True}):
        with pytest.raises(ConfigError, match='whole number'): latency.measure_latency([fake('a')], ('one',), **wrong)


def test_all_real_backends_on_a_small_model(tmp_path):
    "Each either measured or with its reason; the results of torch and onnxruntime in one table."
    one = latency.candidate('repvgg_n1', tmp_path, 32, 5)
    names = tuple(b for b in latency.BACKENDS if b != 'torch compiled')
    rows = latency.measure_latency([one], names, (1, 3), rounds=2, warmup=1).set_index(['backend', 'batch'])
    assert (rows.status[[b for b in names if 'cuda' not in b]] == 'ok').all()
    if not torch.cuda.is_available(): assert (rows.status[['torch cuda', 'torch cuda bf16']] == 'not_measured').all() and 'CUDA' in rows.reason['torch cuda', 1]
    assert one.int8_file.stat().st_size < one.float_file.stat().st_size / 2


@pytest.mark.slow
def test_compiled_backend_runs_or_says_why(tmp_path):
    rows = latency.measure_latency([latency.candidate('repvgg_n1', tmp_path, 32, 5)], ('torch', 'torch compiled'), (1, 2), rounds=2, warmup=1)
    assert set(rows.status) <= {'ok', 'failure'} and (rows[rows.status == 'failure'].reason != '').all()
