"""Folders in the layouts of detection and person-search sets, made up from a seed, with what is in them as plain lists.

A truth is a list of frames, each `(path, rows)`; a row is `(left, top, width, height, ignored, name)`, the name a
person's or None.
"""
import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def pictures(folder, *names, size=(64, 48)):
    "Small black frames."
    held = BytesIO()
    Image.new("RGB", size).save(held, "JPEG")
    for name in names:
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(held.getvalue())


def random_box(rng): return [int(v) for v in (*rng.integers(-4, 50, 2), *rng.integers(1, 30, 2))]


def rows_of(table):
    "A scenes table's frames as a truth has them, without names."
    frames = {}
    for row in table.itertuples():
        frames.setdefault(row.path, []).append((row.x, row.y, row.w, row.h, bool(row.ignored)))
    return [*frames.items()]


def expected(truth):
    "The same of a truth: a frame without a row has one that is empty."
    return [(path, [tuple(row[:5]) for row in rows] or [(0, 0, 0, 0, True)]) for path, rows in truth]


# ---- detection -----------------------------------------------------------------

def write_coco(root, seed, n=12):
    "instances.json and images/; returns the truth."
    rng = np.random.default_rng(seed)
    person, ids = int(rng.integers(1, 9)), rng.permutation(900)[:n].tolist()
    names = [f"{k:06d}.jpg" for k in rng.permutation(n)]
    images = [dict(id=i, file_name=name, width=64, height=48) for i, name in zip(ids, names)]
    annotations = [dict(id=k, image_id=int(rng.choice(ids)), category_id=int(rng.choice([person, person, 77])),
                        bbox=random_box(rng), iscrowd=int(rng.random() < .3)) for k in range(2 * n)]
    categories = [dict(id=77, name="dog"), dict(id=person, name="person")]
    pictures(root / "images", *names)
    lists = dict(images=images, annotations=annotations, categories=categories)
    (root / "instances.json").write_text(json.dumps(lists))
    truth = []
    for i, name in zip(ids, names):
        rows = []
        for a in annotations:
            if a["image_id"] == i and a["category_id"] == person: rows.append((*a["bbox"], a["iscrowd"] == 1, None))
        truth.append((name, rows))
    return truth


def write_crowdhuman(root, seed, n=8):
    "annotation_train.odgt and Images/; returns the truth."
    rng, truth, lines = np.random.default_rng(seed), [], []
    for k in rng.permutation(n):
        boxes, rows = [], []
        for _ in range(rng.integers(0, 5)):
            tag, extra = str(rng.choice(["person", "mask"])), rng.choice([None, 0, 1])
            box = dict(fbox=random_box(rng), vbox=[0, 0, 1, 1], tag=tag)
            if extra is not None: box["extra"] = dict(ignore=int(extra), box_id=1)
            boxes.append(box)
            rows.append((*box["fbox"], tag == "mask" or extra == 1, None))
        lines.append(json.dumps(dict(ID=f"273,{k:04x}", gtboxes=boxes)))
        truth.append((f"Images/273,{k:04x}.jpg", rows))
    pictures(root, *(path for path, _ in truth))
    (root / "annotation_train.odgt").write_text("\n".join(lines) + "\n")
    return truth


def write_mot(root, seed, names=("MOT17-02", "MOT17-04"), frames=6):
    "Sequences with gt of all classes; returns the truth, names (sequence, id), boxes in the file's order of a frame."
    rng, truth = np.random.default_rng(seed), []
    for name in names:
        lines, rows = [], {f: [] for f in range(1, frames + 1)}
        for number in rng.permutation(12)[:8].tolist():
            kind, flag = int(rng.choice([1, 1, 1, 2, 3, 7, 8, 9, 12])), int(rng.random() < .8)
            for f in range(1, frames + 1):
                if rng.random() < .5: continue
                box = random_box(rng)
                lines.append(f"{f},{number},{','.join(map(str, box))},{flag},{kind},1.0")
                is_person = kind == 1 and flag == 1
                if kind in (1, 2, 7, 8, 12):
                    rows[f].append((*box, not is_person, (name, number) if is_person else None))
        write_sequence(root / name, lines, frames)
        truth += [(f"{name}/img1/{f:06d}.jpg", rows[f]) for f in rows]
    return truth


def write_sequence(folder, lines, frames=3, size=(64, 48)):
    pictures(folder / "img1", *(f"{f:06d}.jpg" for f in range(1, frames + 1)), size=size)
    (folder / "gt").mkdir(exist_ok=True)
    (folder / "gt" / "gt.txt").write_text("\n".join(lines))
    told = f"[Sequence]\nname={folder.name}\nimDir=img1\nframeRate=30\nseqLength={frames}\n"
    (folder / "seqinfo.ini").write_text(told)
    return folder


# ---- person search: MATLAB's cells and structs as the official files nest them -----

def cells(values):
    column = np.empty((len(values), 1), object)
    for i, value in enumerate(values): column[i, 0] = value
    return column


def structs(names, rows):
    table = np.zeros((1, len(rows)), [(name, object) for name in names])
    for i, row in enumerate(rows):
        for name, value in zip(names, row, strict=True): table[0, i][name] = value
    return table


def scenes(rows): return structs(("imname", "idlocate", "ishard"),
                                 [(name, np.array([box if box else []], float), 0) for name, box in rows])


class Sysu:
    "A made-up CUHK-SYSU: what is in its lists; `write` puts it on the disk."
    def __init__(self, seed, n_train=5, n_test=7, people=3, size=100):
        rng = np.random.default_rng(seed)
        names = [f"s{k}.jpg" for k in rng.permutation(50)[:n_train + n_test]]
        boxes = {}
        for name in names:                                                 # no two boxes of a frame are one
            own = {tuple(random_box(rng)) for _ in range(rng.integers(1, 6))}
            boxes[name] = [list(b) for b in own]
        self.images, self.size = [(name, boxes[name]) for name in names], size
        self.pool = names[n_train:]
        def seen(frames, least):
            "Frames of a person, and a box in each that nobody has."
            out = []
            for name in rng.permutation(frames):
                free = [b for b in boxes[name] if (name, tuple(b)) not in self.taken]
                if free and len(out) < least + rng.integers(0, 2):
                    self.taken.add((name, tuple(free[0])))
                    out.append((str(name), free[0]))
            return out
        self.taken = set()
        self.train = [s for _ in range(people) if (s := seen(names[:n_train], 1))]
        walks = [s for _ in range(people) if len(s := seen(self.pool, 2)) > 1]
        self.queries = []
        for first, *others in walks:
            with_her = {name for name, _ in (first, *others)}
            rest = [(str(name), None) for name in rng.permutation([n for n in self.pool if n not in with_her])[:3]]
            self.queries.append((first, [*others, *rest]))

    def write(self, root):
        home, test = root / "CUHK-SYSU", f"TestG{self.size}"
        notes = home / "annotation"
        (notes / "test/train_test").mkdir(parents=True, exist_ok=True)
        def own(boxes): return structs(("idlocate", "ishard"), [(np.array([b], float), 0) for b in boxes])
        def person(k, rows): return structs(("idname", "nAppear", "scene"), [(f"p{k}", len(rows), scenes(rows))])
        def query(k, row): return structs(("imname", "idlocate", "ishard", "idname"),
                                          [(row[0], np.array([row[1]], float), 0, f"p{k}")])
        images = structs(("imname", "nAppear", "box"), [(name, len(b), own(b)) for name, b in self.images])
        tests = structs(("Query", "Gallery"), [(query(k, q), scenes(g)) for k, (q, g) in enumerate(self.queries)])
        savemat(notes / "Images.mat", dict(Img=images))
        savemat(notes / "pool.mat", dict(pool=cells(self.pool)))
        train = cells([person(k, rows) for k, rows in enumerate(self.train)])
        savemat(notes / "test/train_test/Train.mat", dict(Train=train))
        savemat(notes / f"test/train_test/{test}.mat", {test: tests})
        pictures(home / "Image/SSM", *(name for name, _ in self.images))
        return root

    def named(self):
        "(frame, box) -> pid, as the lists have it."
        found = {}
        for k, rows in enumerate(self.train):
            for name, box in rows: found[name, tuple(box)] = k + 1
        for k, (asked, gallery) in enumerate(self.queries):
            for name, box in (asked, *gallery):
                if box: found[name, tuple(box)] = len(self.train) + 1 + k
        return found


class Prw:
    "A made-up PRW."
    def __init__(self, seed, n_train=4, n_test=6):
        rng = np.random.default_rng(seed)
        self.frames, numbers = {}, rng.permutation(90)[:n_train + n_test]
        for k, number in enumerate(numbers):
            name = f"c{rng.integers(1, 4)}s{rng.integers(1, 3)}_{number:06d}"
            ids = rng.choice(np.arange(1, 4) if k < n_train else np.arange(3, 9), rng.integers(0, 4), replace=False)
            ids = [-2 if rng.random() < .3 else int(i) for i in ids]
            key = str(rng.choice(["box_new", "anno_file", "anno_previous"]))
            self.frames[name] = (key, [[i, *(float(v) for v in random_box(rng))] for i in ids])
        self.train, self.test = list(self.frames)[:n_train], list(self.frames)[n_train:]
        known = [(rows[k][0], name) for name in self.test for rows in [self.frames[name][1]] for k in range(len(rows))]
        self.queries = [(i, random_box(rng), name) for i, name in known if i > 3][:3]
        self.listed = [1, 2, 3]

    def write(self, root):
        home = root / "PRW-v16.04.20"
        (home / "annotations").mkdir(parents=True, exist_ok=True)
        for name, (key, rows) in self.frames.items():
            savemat(home / f"annotations/{name}.jpg.mat", {key: np.array(rows, float).reshape(-1, 5)})
        savemat(home / "frame_train.mat", dict(img_index_train=cells(self.train)))
        savemat(home / "frame_test.mat", dict(img_index_test=cells(self.test)))
        savemat(home / "ID_train.mat", dict(ID_train=np.array([self.listed])))
        lines = [f"{pid} {' '.join(f'{v:.4f}' for v in box)} {name}" for pid, box, name in self.queries]
        (home / "query_info.txt").write_text("\r\n".join(lines) + "\r\n")
        pictures(home / "frames", *(f"{name}.jpg" for name in self.frames))
        return root
