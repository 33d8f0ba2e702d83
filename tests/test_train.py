"The main job as its users start it: papermill, YAML, code and the command line, and all of it again after a kill."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import ROOT
from helpers import Child, launched

SHORT = ['-p', 'epochs', '2', '-p', 'warmup_epochs', '0.5']
TINY = ['-p', 'model', 'test_resnet', '-p', 'input_size', '32', '-p', 'epochs', '8']


def papermill(home, notebook, *words, wait=True):
    "Start papermill as a user does, with a home of its own."
    env = os.environ | {'AAAI_LT_HOME': str(home), 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, '-m', 'papermill', str(ROOT/'nbs'/notebook), str(home/'out.ipynb'), '--no-progress-bar', *words]
    process = subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    if not wait: return process
    output, _ = process.communicate(timeout=380)
    return process.returncode, output


def kernel_of(process):
    "The kernel that a papermill has started, as a psutil.Process."
    return next(child for child in psutil.Process(process.pid).children() if 'ipykernel_launcher' in child.cmdline())


def wait_for_checkpoint(process, folder):
    while not list((folder/'checkpoint').glob('step-*[0-9]')) and process.poll() is None: time.sleep(0.05)


def report(home):
    "All text of an executed notebook."
    cells = json.loads((home/'out.ipynb').read_text())['cells']
    return '\n'.join(''.join(o.get('text', [])) + ''.join(o.get('data', {}).get('text/plain', [])) + '\n'.join(o.get('traceback', [])) for c in cells for o in c.get('outputs', []))


def test_main_job_writes_a_run_that_can_be_read_without_torch(home):
    code, output = papermill(home, 'train.ipynb', *SHORT, '-p', 'name', 'mine')
    assert code == 0, output[-3000:]
    folder = home/'outputs'/'mine'
    assert {p.name for p in folder.iterdir()} >= {'config.yaml', 'environment.json', 'data.json', 'problems.csv', 'history.csv', 'checkpoint', 'best.safetensors', 'predictions', 'per_class.csv', 'summary.json', 'model.onnx'}
    text = report(home)
    assert 'finished: test: balanced accuracy' in text and 'agreement' in text
    script = '''
import sys
from aaai_lt.training.run import load_run
run = load_run("mine")
p = run.predictions("test")
assert len(run.history) == 2 and len(run.per_class) == 20 and p.scores.shape == (719, 10) and len(p.targets) == 719
print(run.summary["test"]["balanced_accuracy"], (p.scores.argmax(1) == p.targets).mean(), "torch" in sys.modules)
'''
    done = subprocess.run([sys.executable, '-c', script], env=os.environ | {'AAAI_LT_HOME': str(home)}, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    balanced, accuracy, torch_loaded = done.stdout.split()
    assert torch_loaded == 'False'
    table = pd.read_csv(folder/'per_class.csv')
    test = table[table.split == 'test']
    assert np.isclose(float(balanced), test.accuracy.mean()) and np.isclose(float(accuracy), test.correct.sum() / test.support.sum())


def test_a_killed_notebook_goes_on_to_the_same_weights(home, tmp_path_factory):
    "Papermill and its kernel are killed in mid-run; the same command ends with the weights of a run that nobody killed."
    process = papermill(home, 'train.ipynb', '-p', 'name', 'killed', *TINY, wait=False)
    wait_for_checkpoint(process, home/'outputs'/'killed')
    kernel = kernel_of(process)
    os.killpg(process.pid, signal.SIGKILL)
    kernel.kill()  # it has a process group of its own
    process.wait()
    done = json.loads((sorted((home/'outputs'/'killed'/'checkpoint').glob('step-*[0-9]'))[-1]/'state.json').read_text())
    assert 0 < done['step'] < 80, 'the kill came too late to show anything'
    for _ in range(50):  # until the killed kernel has let go of the lock
        code, output = papermill(home, 'train.ipynb', '-p', 'name', 'killed', *TINY)
        if 'is in use' not in output: break
        time.sleep(1)
    assert code == 0, output[-3000:]
    assert 'continuing killed' in report(home)
    other = tmp_path_factory.mktemp('whole')
    whole = Child(other, launched, 'name=whole', *(f'{name}={value}' for name, value in zip(TINY[1::3], TINY[2::3])))
    assert whole.wait() == 0, whole.text()
    assert (home/'outputs'/'killed'/'best.safetensors').read_bytes() == (other/'outputs'/'whole'/'best.safetensors').read_bytes()


@pytest.mark.slow
def test_a_killed_kernel_ends_papermill(home):
    "The kernel alone is killed, as by a machine that is out of memory: papermill does not wait for ever, what had run is kept, and the same command goes on."
    process = papermill(home, 'train.ipynb', '-p', 'name', 'mine', *TINY, wait=False)
    wait_for_checkpoint(process, home/'outputs'/'mine')
    kernel_of(process).kill()
    output, _ = process.communicate()
    assert process.returncode > 0 and 'Kernel died' in output, output[-3000:]
    assert 'balanced_softmax' in report(home) and not (home/'outputs'/'mine'/'summary.json').exists()
    code, output = papermill(home, 'train.ipynb', '-p', 'name', 'mine', *TINY)
    assert code == 0, output[-3000:]
    assert 'continuing mine' in report(home) and 'finished: test' in report(home)


def test_mistakes_under_papermill_are_exit_1_with_the_reason(home):
    from aaai_lt.core import ConfigError
    from aaai_lt.training.config import make_config
    code, output = papermill(home, 'train.ipynb', '-p', 'epoch', '3')
    assert code == 1 and "did you mean 'epochs'?" in output
    with pytest.raises(ConfigError, match='quick is'): make_config(quick='falsch')  # what the notebook calls first
    assert not (home/'outputs').exists() or not list((home/'outputs').iterdir())


def test_the_command_line_reads_a_recipe(home, capsys):
    from aaai_lt.training.launch import main
    env = os.environ | {'AAAI_LT_HOME': str(home), 'OMP_NUM_THREADS': '1'}
    def launch(*words): return subprocess.run([sys.executable, '-m', 'aaai_lt.training.launch', *words], cwd=home, env=env, capture_output=True, text=True)
    refused = launch('gtsrb')
    assert refused.returncode == 2 and 'data is not set' in refused.stderr and 'quick=True' in refused.stderr
    done = launch('gtsrb', 'quick=True', 'epochs=1', 'name=q')
    assert done.returncode == 0, done.stderr
    assert 'quick run' in done.stdout
    again = launch('gtsrb', 'quick=True', 'epochs=1', 'name=q')
    assert again.returncode == 0 and 'q is finished' in again.stdout
    assert main(['--help']) == 0 and 'settings:' in capsys.readouterr().out


def test_tiny_pack_trains_with_its_faults_listed(home, pack):
    "Real images of 25 to 130 px with a steep tail: read, scanned, trained, exported."
    from aaai_lt.hardware.export import export_run
    from aaai_lt.training.config import make_config
    from aaai_lt.training.loop import train
    from aaai_lt.training.prepare import prepare
    config = make_config(name='tiny', data=str(pack('tiny')/'labels.csv'), model='repvgg_n1', input_size=32, epochs=2, device='cpu')
    data = prepare(config, progress=False)
    assert list(data.class_counts) == [120, 80, 54, 36, 24, 16, 11, 7, 5, 3]
    run = train(config, data=data, say=lambda text: None)
    comparison = export_run(run, data.table)
    assert (comparison.agreement >= 0.999).all() and list(comparison.batch) == [1, 7]
