"Reading, looking at, splitting and storing images: the fault pack, every reader, and a pixel store that survives being killed."
import os
import random
import shutil
import signal
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
from helpers import Child, image_folder, noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aaai_lt.core import ConfigError, DataError, StorageError
from aaai_lt.data import pixels, scan, split
from aaai_lt.data import table as table_module
from aaai_lt.data.boxes import with_boxes
from aaai_lt.data.decode import BadImage, decode
from aaai_lt.data.longtail import cut_tail
from aaai_lt.data.table import ImageTable, read_images
from aaai_lt.data.unlabelled import read_unlabelled
from aaai_lt.hardware.export import export_run
from aaai_lt.training.config import make_config
from aaai_lt.training.evaluate import evaluate
from aaai_lt.training.loop import train
from aaai_lt.training.metrics import per_class
from aaai_lt.training.prepare import choose_input_size, make_table, prepare
from aaai_lt.training.run import Run

FAULT_COLUMNS = {'path': 'file', 'label': 'expect'}


# -- the 46 odd or broken files of the pack `tiny`

def check_faults(tiny, stores):
    "Each file of the fault pack is used, or listed with a reason, as faults.csv expects."
    listed = pd.read_csv(tiny/'faults.csv')
    read = read_images(tiny/'faults.csv', columns=FAULT_COLUMNS)
    store, kept = pixels.build_store(scan.scan(read, progress=False), 32, folder=stores, progress=False)
    used = set(kept.frame.path) - set(store.bad)
    left_out = kept.problems[kept.problems.action == 'left out'].set_index('path')
    for row in listed.itertuples():
        path = f'faults/{row.file}'
        if row.expect in ('ok', 'convert'):
            assert path in used and path not in left_out.index, f'{path} should have been used'
            if 'strip' not in path and 'one_pixel' not in path: assert store[store.row[path]].std() > 0 or 'constant' in path
        elif row.expect == 'skip_or_ok': assert (path in used) != (path in left_out.index)
        else:
            assert path not in used and left_out.reason[path], f'{path} should have been left out, with a reason'
            if row.expect in ('refuse', 'limit'): assert left_out.reason[path] == 'too large'
    assert len(used) + len(left_out) == len(listed) == 46


def test_fault_pack(pack, tmp_path): check_faults(pack('tiny'), tmp_path)


def test_bad_images_fail_lists_them(pack):
    with pytest.raises(DataError, match=r"15 images cannot be used.*truncated_half.jpg \(truncated\)"):
        scan.scan(read_images(pack('tiny')/'faults.csv', columns=FAULT_COLUMNS), bad_images='fail', progress=False)


def look(tiny, name): return np.asarray(decode((tiny/'faults'/name).read_bytes())).astype(float)


@pytest.mark.parametrize('name, turned', [('exif_rotated_6.jpg', lambda a: np.rot90(a, -1)), ('exif_mirrored_5.jpg', lambda a: a.transpose(1, 0, 2))])
def test_exif_orientation(pack, name, turned):
    picture = look(pack('tiny'), name)
    assert picture.shape == (90, 60, 3)
    assert np.abs(picture - turned(look(pack('tiny'), 'ok.jpg'))).mean() < 1  # the same JPEG data, turned


def test_sixteen_bit_grey(pack):
    assert np.abs(look(pack('tiny'), 'gray16.png') - look(pack('tiny'), 'gray8.png')).max() <= 1


@pytest.mark.parametrize('name, tolerance', [('cmyk.jpg', 4), ('rgb16.png', 4), ('palette.png', 9), ('palette_transparent.png', 10), ('animated.gif', 9), ('animated.webp', 6), ('multipage.tif', 4), ('progressive.jpg', 1), ('exif_broken.jpg', 0)])
def test_colour_modes(pack, name, tolerance):
    "Mean distance to the plain JPEG in grey levels; what is left is the loss of JPEG and palettes."
    assert np.abs(look(pack('tiny'), name) - look(pack('tiny'), 'ok.jpg')).mean() <= tolerance


@pytest.mark.parametrize('name', ['rgba.png', 'gray_alpha.png'])
def test_alpha_is_laid_over_white(pack, name):
    raw = np.asarray(Image.open(pack('tiny')/'faults'/name)).astype(float)
    alpha = raw[..., -1:] / 255
    assert np.abs(look(pack('tiny'), name) - (raw[..., :-1] * alpha + 255 * (1 - alpha))).max() <= 1.5


@pytest.mark.parametrize('damage', [b'', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'\xff\xd8\xff', b'BM', b'II*\x00\x08\x00\x00\x00', b'RIFF\x00\x00\x00\x00WEBP', b'P6\n1 1\n'])
def test_headers_without_a_picture(damage):
    with pytest.raises(BadImage): decode(damage)


@given(st.binary(max_size=200), st.integers(0, 2 ** 31), st.sampled_from(['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM']))
def test_damaged_files_are_only_ever_bad_images(junk, seed, kind):
    "Whatever is overwritten in a picture: it decodes, or it is a BadImage, never another error."
    import io
    file = io.BytesIO()
    Image.linear_gradient('L').resize((24, 16)).convert('RGB').save(file, kind)
    data = bytearray(file.getvalue())
    at = random.Random(seed).randrange(len(data))
    data[at:at + len(junk)] = junk
    try: image = decode(bytes(data), max_pixels=1_000_000)
    except BadImage as error: assert error.reason
    else: assert image.mode == 'RGB'


# -- the same images, kept in five ways

@pytest.fixture
def little(tmp_path):
    "Two classes with numbers as names, `2` before `10`; images in train and in val."
    folder = tmp_path/'nested'
    for split_name, count in (('train', 3), ('val', 2)): image_folder(folder/split_name, {'2': count, '10': count}, size=(12 + count, 9))
    return folder


def rows_of(read): return sorted((r.sha1, read.classes[r.label], r.split) for r in scan.scan(read, progress=False).frame.itertuples())


def test_readers_agree(little, tmp_path):
    files = sorted(little.rglob('*.png'))
    frame = pd.DataFrame({'path': [f.relative_to(little).as_posix() for f in files], 'label': [f.parent.name for f in files], 'split': [f.parent.parent.name for f in files]})
    shutil.copytree(little, tmp_path/'csv'/'images')
    frame.to_csv(tmp_path/'csv'/'labels.csv', index=False)
    (tmp_path/'zip').mkdir()
    with zipfile.ZipFile(tmp_path/'zip'/'all.zip', 'w') as archive:
        for file, path in zip(files, frame.path): archive.write(file, path)
    frame.rename(columns={'path': 'Filename', 'label': 'ClassId', 'split': 'subset'}).to_csv(tmp_path/'zip'/'list.csv', index=False)
    shutil.copytree(little, tmp_path/'text')
    (tmp_path/'text'/'all.txt').write_text('# two classes\n' + ''.join(f'{r.path} {int(r.label):04}\n' for r in frame.itertuples()))
    for name in ('2', '10'): shutil.copytree(little/'train'/name, tmp_path/'flat'/name)

    nested = rows_of(read_images(little))
    assert len(nested) == 10 and {r[1:] for r in nested} == {('2', 'train'), ('2', 'val'), ('10', 'train'), ('10', 'val')}
    assert rows_of(read_images(tmp_path/'csv')) == nested
    assert rows_of(read_images(tmp_path/'zip'/'list.csv', columns={'path': 'Filename', 'label': 'ClassId'})) == nested
    assert [read_images(tmp_path/place).name for place in ('csv', 'zip/list.csv', 'text/all.txt')] == ['csv', 'zip-list', 'text-all']  # a folder may hold several lists
    assert rows_of(read_images(tmp_path/'text'/'all.txt')) == sorted((sha1, name, '') for sha1, name, _ in nested)  # a list has no splits
    assert rows_of(read_images(tmp_path/'flat')) == sorted((sha1, name, '') for sha1, name, split_name in nested if split_name == 'train')
    for place in (little, tmp_path/'csv', tmp_path/'flat'): assert read_images(place).classes == ('2', '10')  # not '10', '2'


def linked_parts(place, whole):
    "A data set put together from links: to a class folder, to a folder inside one, to single images."
    (place/'train'/'b').mkdir(parents=True)
    (place/'train'/'a').symlink_to(whole/'a')
    (place/'train'/'b'/'more').symlink_to(whole/'b')
    (place/'val').symlink_to(whole)
    (place/'train'/'b'/'one.png').symlink_to(whole/'a'/'001.png')
    return place


def test_links_are_followed(tmp_path):
    whole = image_folder(tmp_path/'whole', {'a': 3, 'b': 2})
    read = scanned(linked_parts(tmp_path/'parts', whole))
    assert read.counts('train').tolist() == [3, 3] and read.counts('val').tolist() == [3, 2] and not len(read.problems)
    assert set(read.split('train').path) == {'train/a/000.png', 'train/a/001.png', 'train/a/002.png', 'train/b/more/000.png', 'train/b/more/001.png', 'train/b/one.png'}


def test_links_that_lead_back_or_nowhere_are_listed(tmp_path):
    "Up, to itself, in a circle of two, to a class beside it: whatever there is, the walk ends, and each class has its own images."
    folder = image_folder(tmp_path/'set', {'a': 2, 'b': 2})
    image_folder(tmp_path/'far', {'x': 1})
    for place, target in (('a/up', folder), ('a/higher', tmp_path), ('a/self', folder/'a'/'self'), ('a/gone.png', 'nowhere.png'), ('gone', tmp_path/'nowhere'), ('b/far', tmp_path/'far'), ('b/here', folder/'b')): (folder/place).symlink_to(target)
    (tmp_path/'far'/'x'/'back').symlink_to(tmp_path/'far')
    read = read_images(folder)
    assert list(read.frame.path) == ['a/000.png', 'a/001.png', 'b/000.png', 'b/001.png', 'b/far/x/000.png'] and read.classes == ('a', 'b')
    assert dict(zip(read.problems.path, read.problems.reason)) == {'a/up': 'not a file', 'a/higher': 'not a file', 'a/self': 'missing', 'a/gone.png': 'missing', 'gone': 'missing', 'b/here': 'not a file', 'b/far/x/back': 'not a file'}
    with pytest.raises(DataError, match='3 images cannot be used'): scan.scan(read, bad_images='fail', progress=False)


def test_images_without_labels_are_looked_for_as_classes_are(tmp_path):
    "Links followed but not in circles, hidden folders left alone, and what is not used is listed."
    folder = image_folder(tmp_path/'set', {'a': 2})
    image_folder(tmp_path/'far', {'x': 1})
    for place, target in (('a/up', folder), ('gone.png', 'nowhere.png'), ('far', tmp_path/'far')): (folder/place).symlink_to(target)
    noise(folder/'.ipynb_checkpoints'/'0.png', 9)
    (folder/'notes.txt').write_text('')
    read = read_unlabelled(folder)
    assert list(read.frame.path) == ['a/000.png', 'a/001.png', 'far/x/000.png'] and set(read.frame.split) == {'new'}
    assert dict(zip(read.problems.path, read.problems.reason)) == {'.ipynb_checkpoints': 'hidden folder', 'a/up': 'not a file', 'gone.png': 'missing', 'notes.txt': 'not an image name'}
    assert dict(zip(read.problems.path, read.problems.action))['gone.png'] == 'left out'


def test_what_is_left_out_is_said(home, tmp_path):
    "By a run's lines, which need no notebook: how many files, why, and where they are listed."
    folder, lines = image_folder(tmp_path/'set', {'a': 12, 'b': 12}), []
    (folder/'a'/'000.png').write_bytes(b'')
    (folder/'b'/'notes.txt').write_text('')
    run = train(make_config(data=str(folder), model='test_resnet', input_size=16, epochs=1, warmup_epochs=0.5, select='last', name='said', device='cpu'), say=lines.append)
    said, = (line for line in lines if 'left out' in line)
    assert said == 'of the files 1 ignored (1 not an image name), 1 left out (1 empty file): see said/problems.csv' and set(run.problems.path) == {'b/notes.txt', 'a/000.png'}


def test_the_last_line_says_what_is_not_held_out(home, tmp_path):
    lines = []
    run = train(make_config(data=str(image_folder(tmp_path/'set', {'a': 30, 'b': 30, 'c': 3})), model='test_resnet', input_size=16, epochs=1, warmup_epochs=0.5, tiny_classes='both', device='cpu'), say=lines.append)
    assert 'over 3 of 3 classes, 1 of them not held out' in lines[-1] and run.summary['val']['not_held_out'] == 1 and run.data['not_held_out'] == {'val': ['c']}


def test_images_in_no_class_folder_are_counted(tmp_path):
    for i in range(3): noise(tmp_path/'set'/f'{i}.png', i)
    with pytest.raises(DataError, match='only 3 that lie in no class folder'): read_images(tmp_path/'set')


def test_boxes_of_which_none_fits(tmp_path):
    image_folder(tmp_path/'set', {'a': 2, 'b': 2})
    pd.DataFrame({'path': ['a/000.png', 'a/001.png', 'b/000.png', 'b/001.png'], 'label': list('aabb'), 'x1': 9, 'y1': 0, 'x2': 3, 'y2': 8}).to_csv(tmp_path/'set'/'boxes.csv', index=False)
    table = read_images(tmp_path/'set'/'boxes.csv')
    with pytest.raises(DataError, match='box: none of the 4 images.*a/000.png'): with_boxes(table, ['x1', 'y1', 'x2', 'y2'])
    assert len(with_boxes(table, ['x2', 'y1', 'x1', 'y2'])) == 4


def test_hidden_folders_are_no_classes(tmp_path):
    "Neither beside the class folders, nor inside them, with splits and without; and each is listed."
    flat, nested = image_folder(tmp_path/'flat', {'a': 2, 'b': 2}), tmp_path/'nested'
    shutil.copytree(flat, nested/'train')
    for folder in (flat, flat/'a', nested, nested/'train', nested/'train'/'b'):
        for name in ('.ipynb_checkpoints', '__MACOSX'): noise(folder/name/'0.png', 9)
    for folder, hidden in ((flat, 4), (nested, 6)):
        read = read_images(folder)
        assert read.classes == ('a', 'b') and len(read) == 4 and list(read.problems.reason) == ['hidden folder'] * hidden


def test_loose_images_are_listed(tmp_path):
    folder = image_folder(tmp_path/'set', {'a': 2, 'b': 2})
    for place in ('loose.png', 'README.md'): noise(folder/'loose.png', 1).rename(folder/place)
    noise(folder/'loose.png', 1)
    assert list(zip(read_images(folder).problems.path, read_images(folder).problems.reason)) == [('loose.png', 'outside a class folder')]


def test_class_folders_without_images_are_not_trained_without(tmp_path):
    "A class that would vanish is an error for a training, and a row of the list for who only reads; `.jfif` is a JPEG."
    folder = image_folder(tmp_path/'set', {'a': 2, 'b': 2, 'c': 2})
    for file in (folder/'c').iterdir(): file.rename(file.with_suffix('.heic'))
    (folder/'d').mkdir()
    noise(folder/'e'/'0.jpg', 1).rename(folder/'e'/'0.JFIF')
    read = read_images(folder)
    assert read.classes == ('a', 'b', 'e') and list(read.problems.path[read.problems.reason == 'class without images']) == ['c', 'd']
    assert not len(scan.scan(read, progress=False).problems.query("reason == 'misnamed'"))
    with pytest.raises(DataError, match='no image in 2 class folders: c, d .c holds 2 other files, such as c/000.heic'): make_table(make_config(data=str(folder)), progress=False)
    shutil.copytree(folder, tmp_path/'parts'/'train'), shutil.copytree(folder/'a', tmp_path/'parts'/'val'/'a')
    (tmp_path/'parts'/'val'/'b').mkdir()
    assert list(read_images(tmp_path/'parts').problems.query("reason == 'class without images'").path) == ['train/c', 'train/d']  # b has images in train


def test_one_class_is_refused_with_the_folder_that_was_meant(tmp_path):
    "A folder too high gives one class; a pre-training needs no more, and data of several labels may have one."
    wrapper = image_folder(tmp_path/'wrapper'/'pets', {'a': 12, 'b': 12}).parent
    noise(wrapper/'__MACOSX'/'x'/'0.png', 1)
    with pytest.raises(DataError, match="wrapper has one class, 'pets': a classifier needs two. Did you mean .*wrapper/pets?"): make_table(make_config(data=str(wrapper)), progress=False)
    assert make_table(make_config(data=str(wrapper/'pets')), progress=False).classes == ('a', 'b')
    with pytest.raises(DataError, match="one class, 'a': a classifier needs two$"): make_table(make_config(data=str(wrapper/'pets'), where='label == 0'), progress=False)
    write_csv(tmp_path/'sets', 'path,water\na.png,1\nb.png,0\nc.png,1\n')
    assert make_table(make_config(data=str(tmp_path/'sets'), columns={'labels': ['water']}, loss='asl', select='last'), progress=False).classes == ('water',)
    for options in ({}, {'unlabelled': True}): assert len(make_table(make_config(data=str(wrapper), pretrain='mae', model='vit_tiny_patch16_224', select='last', pretrain_options=options), progress=False)) >= 24


class Backwards(list):
    "What os.scandir gives, in another order."
    def __enter__(self): return self
    def __exit__(self, *error): pass


def test_listing_order_does_not_matter(little, monkeypatch):
    forwards, expected = os.scandir, read_images(little).frame
    monkeypatch.setattr(os, 'scandir', lambda *folder: Backwards(reversed(list(forwards(*folder)))))
    assert [e.name for e in os.scandir(little)] == [e.name for e in forwards(little)][::-1]
    pd.testing.assert_frame_equal(read_images(little).frame, expected)


def write_csv(folder, text, images=('a.png', 'b.png', 'c.png')):
    for i, name in enumerate(images): noise(folder/name, i)
    (folder/'labels.csv').write_text(text)
    return folder


def test_padded_numbers_are_one_class(tmp_path):
    assert read_images(write_csv(tmp_path, 'path,label\na.png,0012\nb.png,12\nc.png,3\n')).classes == ('3', '12')


def test_names_that_pandas_takes_for_nothing(tmp_path):
    "Classes called NA and None, from the list to the table of results; a blank number there stays blank."
    read = read_images(write_csv(tmp_path, 'path,label\na.png,NA\nb.png,None\nc.png,nan\n'))
    assert read.classes == ('NA', 'None', 'nan')
    per_class(np.diag([3, 1, 0]), read.classes, [30, 5, 2]).to_csv(tmp_path/'per_class.csv', index=False)
    found = Run(tmp_path).per_class.set_index('class')
    assert list(found.index) == ['NA', 'None', 'nan'] and found.precision.isna().tolist() == [False, False, True] and found.precision.dtype == float


def test_missing_and_repeated_rows_are_listed(tmp_path):
    read = read_images(write_csv(tmp_path, 'path,label\na.png,x\nb.png,y\nnone.png,x\na.png,x\n'))
    assert list(read.frame.path) == ['a.png', 'b.png']
    assert list(zip(read.problems.path, read.problems.reason)) == [('none.png', 'missing'), ('a.png', 'listed twice')]


def test_an_image_listed_in_two_splits_is_not_trained_on(tmp_path):
    "Given in train (or nowhere) and in val or test: the training row leaves. In val and test: both stay. All are listed, with the other label if there is one."
    write_csv(tmp_path, 'path,label,split\na.png,x,train\na.png,y,val\nb.png,x,\nb.png,x,test\nc.png,y,val\nc.png,y,test\nd.png,x,train\ne.png,y,train\n', [f'{c}.png' for c in 'abcde'])
    table = make_table(make_config(data=str(tmp_path)), progress=False)
    assert {name: list(table.split(name).path) for name in ('train', 'val', 'test')} == {'train': ['d.png', 'e.png'], 'val': ['a.png', 'c.png'], 'test': ['b.png', 'c.png']}
    assert table.problems[['path', 'split', 'reason', 'detail', 'action']].values.tolist() == [
        ['a.png', 'train', 'listed in two splits', 'also in val as y', 'left out'], ['b.png', '', 'listed in two splits', 'also in test', 'left out'], ['c.png', 'test', 'listed in two splits', 'also in val', 'kept']]


def test_a_second_row_with_another_label_names_it(tmp_path):
    "In training and without a split is one place: the second row would else be held out, and leak."
    read = read_images(write_csv(tmp_path, 'path,label,split\na.png,x,train\na.png,y,\nb.png,y,train\nb.png,y,train\n'))
    assert list(read.frame.path) == ['a.png', 'b.png'] and read.label_text(read.frame.label[0]) == 'x'
    assert list(zip(read.problems.reason, read.problems.detail)) == [('listed twice', 'also as x'), ('listed twice', '')]


def test_tiny_classes_stay_in_both_splits(tmp_path):
    "What `tiny_classes` copies itself is there on purpose."
    names = [f'{i}.png' for i in range(12)]
    write_csv(tmp_path, 'path,label\n' + ''.join(f'{name},{"few" if i < 2 else "many"}\n' for i, name in enumerate(names)), names)
    table = make_table(make_config(data=str(tmp_path), tiny_classes='both'), progress=False)
    assert table.counts('train').tolist() == [2, 9] and table.counts('val').tolist() == [2, 1] and not len(table.problems)


def zipped(folder, names=('a.png', 'b.png', 'c.png'), archive='all.zip'):
    "Images of noise in a stored zip, of classes x and y in turn, and a list of them."
    noises = {name: noise(folder/'loose'/name, i).read_bytes() for i, name in enumerate(names)}
    with zipfile.ZipFile(folder/archive, 'w') as file:
        for name, data in noises.items(): file.writestr(name, data)
    shutil.rmtree(folder/'loose')
    (folder/'labels.csv').write_text('path,label\n' + ''.join(f'{name},{"xy"[i % 2]}\n' for i, name in enumerate(names)))
    return folder/archive


def test_a_zip_that_cannot_be_read_is_named(tmp_path):
    "Half a zip beside a whole one is no matter until an image is nowhere else."
    (tmp_path/'half.zip').write_bytes(zipped(tmp_path).read_bytes()[:-30])
    (tmp_path/'._all.zip').write_bytes(b'what macOS writes beside a file')
    assert len(read_images(tmp_path)) == 3
    with open(tmp_path/'labels.csv', 'a') as file: file.write('d.png,x\n')
    with pytest.raises(DataError, match=r"'d.png' is in no file there.*half.zip .File is not a zip file.. Copy") as error: read_images(tmp_path)
    assert '._all.zip' not in str(error.value)


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2], ids=['stored', 'deflated', 'bzip2'])
def test_a_damaged_member_of_a_zip_is_listed(tmp_path, compression):
    "Wherever the bytes of a member are damaged: it is listed, and the others are used."
    archive, seeds = zipped(tmp_path), random.Random(0)
    with zipfile.ZipFile(archive) as file: members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(archive, 'w', compression) as file:
        for name, data in members.items(): file.writestr(name, data)
        first, last = (file.getinfo(name).header_offset for name in ('b.png', 'c.png'))
    whole = archive.read_bytes()
    reasons = []
    for at in [first, first + 26, first + 36, *(seeds.randrange(first + 35, last - 6) for _ in range(5))]:
        archive.write_bytes(whole[:at] + bytes(255 - b for b in whole[at:at + 6]) + whole[at + 6:])
        table_module.open_zip.cache_clear()
        looked = scan.scan(read_images(tmp_path), progress=False)
        assert set(looked.frame.path) | set(looked.problems.path) == {*members} and set(looked.problems.path) <= {'b.png'}
        reasons += list(looked.problems.reason)
    assert reasons == ['unreadable'] * 8


def test_an_image_that_goes_after_the_scan_is_listed(tmp_path):
    table = scanned(image_folder(tmp_path/'set', {'x': 3, 'y': 3}))
    (tmp_path/'set'/'x'/'001.png').unlink()
    store, kept = pixels.build_store(table, 16, folder=tmp_path/'stores', progress=False)
    assert len(kept) == 5 and list(kept.problems.path) == ['x/001.png'] and list(kept.problems.reason) == ['unreadable']
    assert store.folder.name in kept.problems.detail[0]  # what to delete to have it read again
    with pytest.raises(DataError, match='x/001.png .unreadable'): pixels.build_store(table, 16, folder=tmp_path/'stores', bad_images='fail', progress=False)


@pytest.mark.parametrize('text, message', [
    ('path,label,split\na.png,x,train\nb.png,x,trian\n', "unknown split 'trian'.*did you mean 'train'"),
    ('path,label\na.png,x\nb.png,\n', 'labels.csv: no label in row 2'),
    ('path,label\na.png,x\n,y\n" ",y\n', 'labels.csv: no path in row 2, 3'),
    ('path;label\na.png;x\n', 'labels.csv seems to be separated by semicolons'),
    ('path;label\na.png;Chair, office\n', 'labels.csv seems to be separated by semicolons'),
    ('path\tlabel\na.png\tx\n', 'labels.csv seems to be separated by tabs'),
    ('path,label,fold\na.png,x,0\nb.png,y,1\n', "unknown split '0' in column 'fold'.*columns={.split.: ..}"),
    ('path,label\nx.png,x\ny.png,y\n', "none of its 2 images exists; the first is 'x.png'"),
    ('picture,label\na.png,x\n', 'no column for path'),
    ('path,label\na.png,x,1\nb.png,y,2,3\n', 'is not a CSV'),
    ('path,label\n', 'no rows'),
    ('', 'is empty'),
])
def test_bad_csv(tmp_path, text, message):
    with pytest.raises(DataError, match=message): read_images(write_csv(tmp_path, text))


def test_a_column_that_is_no_split_stays_with_the_data(tmp_path):
    "An empty text says that there is none; the column can then be a group, or be asked for."
    read = read_images(write_csv(tmp_path, 'path,ClassID,fold\na.png,x,0\nb.png,y,1\nc.png,y,1\n'), columns={'split': ''}, where='fold == 1')
    assert list(read.frame.path) == ['b.png', 'c.png'] and list(read.frame.split) == ['', ''] and read.classes == ('y',)


def test_long_numbers_as_labels(tmp_path):
    "Ids of more than 64 bits are labels like others, padded or not."
    read = read_images(write_csv(tmp_path, f'path,label\na.png,{10 ** 24}\nb.png,00{10 ** 24}\nc.png,7\n'))
    assert read.classes == ('7', str(10 ** 24)) and list(read.frame.label) == [1, 1, 0]


def test_columns_are_refused_where_nothing_reads_them(tmp_path):
    image_folder(tmp_path/'set', {'a': 2, 'b': 2})
    (tmp_path/'all.txt').write_text('set/a/000.png 0\nset/b/000.png 1\n')
    for data in (tmp_path/'set', tmp_path/'all.txt'):
        assert len(read_images(data))
        with pytest.raises(DataError, match='columns={.label.: .kind.} says how to read a CSV'): read_images(data, columns={'label': 'kind'})


def test_folders_that_are_one_number_are_listed(tmp_path):
    "They stay two classes, for a folder is a folder; a CSV would make one of them."
    read = read_images(image_folder(tmp_path/'set', {'7': 2, '0012': 2, '12': 2, 'a12': 2}))
    assert set(read.classes) == {'7', '12', '0012', 'a12'} and len(read.problems) == 1
    row = read.problems.iloc[0]
    assert row.reason == 'same number' and {'0012', '12'} <= set(row.detail.split()) and row.path in ('0012', '12') and row.action == 'kept'


@pytest.mark.parametrize('columns, message', [({'label': 'lable'}, "no column 'lable' for label: did you mean 'label'"), ({'lable': 'label'}, "unknown role 'lable': did you mean 'label'")])
def test_bad_columns(tmp_path, columns, message):
    with pytest.raises(DataError, match=message): read_images(write_csv(tmp_path, 'path,label\na.png,x\n'), columns=columns)


@pytest.mark.parametrize('text, message', [('a.png 0\nb.png\n', "entry 2 .'b.png'."), ('a.png\nb.png 1\n', 'path label'), ('\n# nothing\n', 'no lines')])
def test_ragged_list(tmp_path, text, message):
    write_csv(tmp_path, '')
    (tmp_path/'all.txt').write_text(text)
    with pytest.raises(DataError, match=message): read_images(tmp_path/'all.txt')


def test_where(tmp_path):
    write_csv(tmp_path, 'path,label,lt\na.png,x,1\nb.png,y,0\nc.png,z,1\n')
    kept = read_images(tmp_path, where='lt == 1')
    assert kept.classes == ('x', 'z') and list(kept.frame.label) == [0, 1] and list(kept.frame.path) == ['a.png', 'c.png']
    with pytest.raises(DataError, match='leaves no image of 3'): read_images(tmp_path, where='lt == 2')
    with pytest.raises(DataError, match='cannot be used.*no column .tl.: there are: .*path'): read_images(tmp_path, where='tl == 1')


def test_where_must_be_a_condition(tmp_path):
    "A column of 0 and 1 is not a condition: pandas would take its values for row numbers."
    write_csv(tmp_path, 'path,label,lt\na.png,x,1\nb.png,y,0\nc.png,z,1\n')
    with pytest.raises(DataError, match='lt'): read_images(tmp_path, where='lt')


def test_copy_of_a_held_out_image_leaves_train(pack, tmp_path):
    tiny = pack('tiny')
    frame = pd.read_csv(tiny/'labels.csv', dtype=str).query("label in ['0', '1'] and split == 'train'")[['path', 'label', 'split']]
    copy = pd.DataFrame({'path': ['faults/duplicate_of_train.jpg'], 'label': ['0'], 'split': ['val']})
    for path in [*frame.path, *copy.path]:
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny/path, tmp_path/path)
    pd.concat([frame, copy]).to_csv(tmp_path/'labels.csv', index=False)
    clean = make_table(make_config(data=str(tmp_path)), progress=False)
    original = 'train/0_speed_50/00000_00016.jpg'
    assert original in set(frame.path) and original not in set(clean.frame.path) and 'faults/duplicate_of_train.jpg' in set(clean.split('val').path)
    assert set(clean.problems.path[clean.problems.action == 'left out']) >= {original}


def test_class_without_training_image(tmp_path):
    write_csv(tmp_path, 'path,label,split\na.png,owl,train\nb.png,owl,val\nc.png,lynx,val\n')
    with pytest.raises(DataError, match='no training image for 1 of 2 classes: lynx'): make_table(make_config(data=str(tmp_path)), progress=False)


def test_bad_image_that_empties_a_class(tmp_path):
    write_csv(tmp_path, 'path,label,split\na.png,owl,train\nb.png,owl,val\nc.png,lynx,train\n')
    (tmp_path/'c.png').write_bytes((tmp_path/'c.png').read_bytes()[:-40])
    with pytest.raises(DataError, match='lynx.*Unusable images: c.png'): make_table(make_config(data=str(tmp_path)), progress=False)


def test_gtsrb(pack):
    read = read_images(pack('gtsrb'))
    assert len(read.classes) == 43 and (read.counts('train').sum(), read.counts('val').sum()) == (10_420, 2_640)
    assert (read.counts('train').max(), read.counts('train').min()) == (600, 50) and not len(read.problems)
    assert read_images(pack('gtsrb'), where="lt == 1 or split == 'val'").counts('train').sum() == 6_045


# -- splits

def plain_table(counts, groups=None):
    labels = np.repeat(np.arange(len(counts)), counts)
    frame = pd.DataFrame({'path': [f'{c}/{i:04}.png' for c, n in enumerate(counts) for i in range(n)], 'archive': '', 'label': labels, 'split': ''})
    if groups is not None: frame['group'] = groups
    return ImageTable(frame, tuple(map(str, range(len(counts)))), root='.')


def shuffled(whole, seed=1): return whole.with_frame(whole.frame.sample(frac=1, random_state=seed))
def members(parts): return {name: set(parts.split(name).path) for name in ('train', 'val', 'test')}


COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(COUNTS, st.integers(0, 45), st.integers(0, 45), st.integers(0, 99), st.sampled_from(['train', 'both']))
def test_split_sizes(counts, val, test, seed, tiny):
    "Held-out images of each class by the floor rule, in whole per cent so that the rule is integer arithmetic here."
    whole = plain_table(counts)
    parts = split.split_table(whole, val / 100, test / 100, seed, tiny_classes=tiny)
    n, by_split = np.array(counts), members(parts)
    wanted_val = n * val // 100
    both = (wanted_val == 0) & (wanted_val.sum() > 0) & (tiny == 'both')
    assert parts.counts('test').tolist() == (n * test // 100).tolist()
    assert parts.counts('train').tolist() == (n - n * test // 100 - wanted_val).tolist()
    assert parts.counts('val').tolist() == np.where(both, parts.counts('train'), wanted_val).tolist()
    assert set.union(*by_split.values()) == set(whole.frame.path)
    shared = by_split['train'] & by_split['val']
    assert not (by_split['test'] & (by_split['train'] | by_split['val'])) and {int(p.split('/')[0]) for p in shared} == set(np.flatnonzero(both))
    assert set(split.not_held_out(parts)) == {str(c) for c in np.flatnonzero(wanted_val == 0)}
    assert members(split.split_table(shuffled(whole), val / 100, test / 100, seed, tiny_classes=tiny)) == by_split  # the order of the rows is no matter


def test_split_seed_matters():
    assert members(split.split_table(plain_table([60, 30]), seed=0)) != members(split.split_table(plain_table([60, 30]), seed=1))


def test_given_splits_are_kept():
    frame = plain_table([20, 20]).frame
    frame['split'] = ['val' if i % 4 == 0 else 'train' for i in range(40)]
    parts = split.split_table(plain_table([20, 20]).with_frame(frame), val_fraction=0.5, test_fraction=0.2)
    assert set(parts.split('val').path) == set(frame.path[frame.split == 'val'])
    assert parts.counts('test').tolist() == [3, 3]  # a fifth of the 15 that were free


@given(COUNTS, st.integers(5, 45), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_groups_are_never_torn(counts, val, size, seed, across):
    "Groups of `size` images, inside a class or across neighbouring classes."
    labels = np.repeat(np.arange(len(counts)), counts)
    inside = np.concatenate([np.arange(n) // size for n in counts])
    groups = [f'g{i // size}' for i in range(len(labels))] if across else [f'g{c}-{i}' for c, i in zip(labels, inside)]
    whole = plain_table(counts, groups)
    parts = split.split_table(whole, val / 100, 0, seed, group='group')
    assert (parts.frame.groupby('group').split.nunique() == 1).all()
    assert (parts.counts('train') > 0).all(), 'a class has lost all its groups'
    assert members(split.split_table(shuffled(whole), val / 100, 0, seed, group='group')) == members(parts)


@given(COUNTS, st.floats(1, 200), st.integers(0, 99))
def test_cut_tail(counts, factor, seed):
    whole = plain_table(counts)
    whole = split.split_table(whole, 0.2, 0)
    cut = cut_tail(whole, factor, seed)
    before, after, last = whole.counts(), cut.counts(), len(counts) - 1
    order = np.argsort(-before, kind='stable')
    for place, c in enumerate(order):
        ideal = after[order[0]] * factor ** (-place / max(last, 1))
        assert after[c] <= before[c] and (after[c] == before[c] or abs(after[c] - max(ideal, 1)) < 1 + 1e-6)
        assert after[c] <= max(ideal, 1) + 1e-6
    assert after[order[0]] == before[order[0]] or factor * before.min() - 1 < after[order[0]] <= factor * before.min()  # the head pays only where the tail is too steep
    assert after.max() <= factor * (after.min() + 1) and (after > 0).all() and (np.diff(after[order]) <= 0).all()
    assert members(cut)['val'] == members(whole)['val'] and members(cut)['train'] <= members(whole)['train']
    assert members(cut_tail(whole, factor, seed)) == members(cut)


# -- the pixel store

def scanned(folder): return scan.scan(read_images(folder), progress=False)
def built(folder, stores, size=16, how='squash', **options): return pixels.build_store(scanned(folder), size, how, folder=stores, progress=False, **options)[0]


def test_store_key(tmp_path):
    "The key tells apart all that changes the pixels, and nothing else."
    folder, stores = image_folder(tmp_path/'a', {'x': 3, 'y': 2}), tmp_path/'stores'
    first = built(folder, stores).folder
    shutil.copytree(folder, tmp_path/'elsewhere')
    assert built(tmp_path/'elsewhere', stores).folder == first  # the same images in another place
    assert len({built(folder, stores, **change).folder for change in ({}, {'size': 17}, {'how': 'crop'}, {'max_pixels': 10_000})}) == 4
    other_order = scanned(folder)
    other_order = other_order.with_frame(other_order.frame[::-1])
    reversed_store, _ = pixels.build_store(other_order, 16, folder=stores, progress=False)
    assert reversed_store.folder != first and np.array_equal(reversed_store[reversed_store.rows(other_order.frame.path)][::-1], built(folder, stores).pixels)
    noise(folder/'x'/'000.png', 99)
    assert built(folder, stores).folder != first


def build_in_child(folder, stores, size):
    from aaai_lt.data import pixels, scan
    from aaai_lt.data.table import read_images
    pixels.build_store(scan.scan(read_images(folder), progress=False), size, folder=stores, workers=1, progress=False)


def check_killed_store(tmp_path, kills, images=300):
    "Killed while it writes, however often: then built right, and nothing half done stays."
    folder, stores, random_times = image_folder(tmp_path/'set', {'x': images // 2, 'y': images // 2}, (160, 120), '.jpg'), tmp_path/'stores', random.Random(7)
    hit = 0
    for _ in range(kills):
        child = Child(tmp_path, build_in_child, folder, stores, 48)
        child.wait_for(lambda: list(stores.glob('*.tmp/pixels.npy')))
        time.sleep(random_times.random() * 0.15)
        hit += child.kill() < 0 and not any(p.suffix != '.tmp' for p in stores.iterdir())
        for whole in (p for p in stores.iterdir() if p.suffix != '.tmp'): pixels.open_store(whole)
    assert hit, 'no kill came in time: the test shows nothing'
    store = built(folder, stores, 48)
    assert not list(stores.glob('*.tmp')), 'the halves of killed processes are still there'
    assert np.array_equal(store.pixels, built(folder, tmp_path/'clean', 48).pixels)


def test_killed_while_storing(tmp_path): check_killed_store(tmp_path, kills=3)


@pytest.mark.slow
def test_killed_while_storing_often(tmp_path): check_killed_store(tmp_path, kills=40)


def test_two_processes_store_at_once(tmp_path):
    folder, stores = image_folder(tmp_path/'set', {'x': 60, 'y': 60}, (120, 90), '.jpg'), tmp_path/'stores'
    children = [Child(tmp_path, build_in_child, folder, stores, 40) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0], children[0].text() + children[1].text()
    assert len(list(stores.iterdir())) == 1
    assert np.array_equal(built(folder, stores, 40).pixels, built(folder, tmp_path/'clean', 40).pixels)


def shorten(file): file.write_bytes(file.read_bytes()[:-10])
def blank(file): file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize('name', ['pixels.npy', 'meta.json'])
@pytest.mark.parametrize('damage', [shorten, blank, lambda file: file.unlink(), lambda file: file.write_bytes(b'{}')], ids=['shortened', 'zeros', 'deleted', 'emptied'])
def test_damaged_store(tmp_path, name, damage):
    folder = image_folder(tmp_path/'set', {'x': 3})
    place = built(folder, tmp_path/'stores').folder
    damage(place/name)
    with pytest.raises(StorageError, match=place.name): built(folder, tmp_path/'stores')


@pytest.mark.parametrize(('error', 'tell'), [(ValueError, None), (KeyboardInterrupt, lambda: os.kill(os.getpid(), signal.SIGINT))])
def test_work_that_is_broken_off(error, tell):
    "An error, or a person who presses stop: the threads end what they have in hand and begin nothing more."
    done = []
    def work(item):
        if item == 20: tell() if tell else int('x')
        time.sleep(0.02)
        done.append(item)
        return item
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it to be ignored
    try:
        with pytest.raises(error): scan.in_parallel(work, list(range(1000)), workers=3, progress=False)
    finally: signal.signal(signal.SIGINT, before)
    ended = len(done)
    assert 17 <= ended < 200
    time.sleep(0.1)
    assert len(done) == ended and scan.in_parallel(lambda item: -item, [3, 1, 2], workers=3, progress=False) == [-3, -1, -2] and scan.in_parallel(work, [], progress=False) == []


def test_store_needs_room(tmp_path):
    with pytest.raises(StorageError, match='free'): built(image_folder(tmp_path/'set', {'x': 3}), tmp_path/'stores', size=10_000_000)


# -- boxes

SIDES = ['left', 'top', 'right', 'bottom']


def boxed_folder(folder, count, turned=()):
    "Pictures of noise with a plain square somewhere: dark for one class, bright for the other; EXIF turns some."
    draw, lines = np.random.default_rng(0), ['file,label,' + ','.join(SIDES)]
    (folder/'images').mkdir(parents=True)
    for i in range(count):
        pixels = draw.integers(0, 255, (60, 90, 3), dtype='uint8')
        x, y, side = draw.integers(0, 60), draw.integers(0, 30), draw.integers(12, 30)
        pixels[y:y + side, x:x + side] = 30 + 190 * (i % 2)
        exif = Image.Exif()
        if i in turned: exif[0x0112] = 6  # kept lying on its side
        Image.fromarray(np.rot90(pixels) if i in turned else pixels).save(folder/'images'/f'{i:02}.png', exif=exif)
        lines.append(f'images/{i:02}.png,{("dark", "bright")[i % 2]},{x},{y},{x + side},{y + side}')
    (folder/'labels.csv').write_text('\n'.join(lines) + '\n')
    return folder


def test_only_the_box_of_a_picture_is_used(home, tmp_path):
    data = prepare(make_config(data=str(boxed_folder(tmp_path/'data', 20, turned=(3, 4))), box=SIDES, input_size=16, model='repvgg_s0'), progress=False)
    assert len(data.store) == 20
    for part in data.splits.values():
        kept = data.store[part.rows]
        assert not np.ptp(kept.reshape(len(kept), -1), 1).any()  # one colour each
        assert set(kept[:, 0, 0, 0].tolist()) <= {30, 220} and np.array_equal(kept[:, 0, 0, 0] == 30, np.array([data.table.classes[i] == 'dark' for i in part.labels]))


def test_boxes_are_a_part_of_what_a_store_and_a_run_are_made_of(home, tmp_path):
    folder = boxed_folder(tmp_path/'data', 12)
    settings = {'data': str(folder), 'input_size': 16, 'model': 'repvgg_s0', 'select': 'last'}
    whole, boxed, wider = (prepare(make_config(**settings | more), progress=False) for more in ({}, {'box': SIDES}, {'box': SIDES, 'box_margin': 0.5}))
    assert len({data.hash for data in (whole, boxed, wider)}) == len({data.store.folder for data in (whole, boxed, wider)}) == 3
    assert not np.ptp(boxed.store[0]) and np.ptp(wider.store[0])  # the square, and what is around it
    sizes = [choose_input_size(make_config(data=str(folder), model='repvgg_s0', **more), data.table) for more, data in (({}, whole), ({'box': SIDES}, boxed))]
    assert sizes == [64, 32]  # of 60 pixels, and of 12 to 30


def test_bad_boxes(home, tmp_path):
    "Empty and outside: left out and listed, or refused; no box at all: the whole picture; no such column: the nearest."
    folder = boxed_folder(tmp_path/'data', 12)
    rows = pd.read_csv(folder/'labels.csv', dtype=object)
    rows.loc[2, 'right'] = rows.left[2]
    rows.loc[3, SIDES] = ['200', '10', '240', '50']
    rows.loc[4, SIDES] = None
    rows.to_csv(folder/'labels.csv', index=False)
    settings = {'data': str(folder), 'box': SIDES, 'input_size': 16, 'model': 'repvgg_s0', 'select': 'last'}
    data = prepare(make_config(**settings), progress=False)
    left_out = data.table.problems[data.table.problems.action == 'left out']
    assert sorted(left_out.path) == ['images/02.png', 'images/03.png'] and set(left_out.reason) == {'bad box'}
    at = data.store.row['images/04.png']
    assert np.array_equal(data.store[at], pixels.to_square(Image.open(folder/'images'/'04.png'), 16))
    with pytest.raises(DataError, match='1 images cannot be used.*02.png .bad box'): prepare(make_config(**settings, bad_images='fail'), progress=False)
    with pytest.raises(DataError, match="no column 'lift'.*left"): prepare(make_config(**settings | {'box': ['lift', *SIDES[1:]]}), progress=False)
    with pytest.raises(ConfigError, match='four columns'): make_config(**settings | {'box': SIDES[:3]})


def test_other_images_need_the_same_boxes(home, tmp_path):
    run = train(make_config(data=str(boxed_folder(tmp_path/'data', 40)), box=SIDES, input_size=16, model='repvgg_s0', augment='none', epochs=15, batch_size=8, name='boxed'), say=lambda text: None)
    new = boxed_folder(tmp_path/'new', 10, turned=(2,))
    found = evaluate(run, data=new)
    assert (found.scores.argmax(1) == found.targets).all()
    unlabelled = pd.read_csv(new/'labels.csv').drop(columns='label').to_csv(new/'unlabelled.csv', index=False) or new/'unlabelled.csv'
    np.testing.assert_array_equal(evaluate(run, data=unlabelled, unlabelled=True).scores, found.scores)
    export_run(run, make_table(run.config, False))  # compares the file's answers with the model's on the boxes of validation images
    image_folder(tmp_path/'plain', {'dark': 2, 'bright': 2})
    with pytest.raises(DataError, match="no column 'left'"): evaluate(run, data=tmp_path/'plain')
