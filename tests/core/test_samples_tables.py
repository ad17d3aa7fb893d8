"""Tables from other hands: separators, encodings, names of columns, and remedies that can be taken literally."""
import json
import warnings

import pytest
from examples import paint

from cion_nb.core.samples import read_csv
from cion_nb.data.datasets import read_cion_al

TABLES = {"windows": ("path,pid\r\nsec0\\a.jpg,1\r\n\r\nsec0\\b.jpg,2\r\n", "utf-8-sig", {}),
          "semicolon": ("path;pid;s\nsec0/a.jpg;1;0,5\nsec0/b.jpg;2;1\n;;\n", "utf-8", {}),
          "tab": ("path\tpid\nsec0/a.jpg \t1.0\nsec0/b.jpg\t2\n", "utf-8", {}),
          "bar": ("pid|path\n1|./sec0/a.jpg\n2|sec0//b.jpg", "utf-8", {}),
          "excel": ("sep=;\n path ;pid\n sec0/a.jpg;001\nsec0/b.jpg;2,0\n", "utf-8", {}),
          "quotes": ('"path";"pid"\n"sec0/a.jpg";"1"\n"sec0/b.jpg";"2"\n', "utf-8", {}),
          "drive": ("path,pid\nD:\\d\\sec0\\a.jpg,1\nd:/D\\sec0/b.jpg,2\n", "utf-8", dict(prefix="D:\\d")),
          "share": ("path,pid\n\\\\nas\\d\\sec0\\a.jpg,1\n\\\\nas\\d\\sec0\\b.jpg,2\n", "utf-8",
                    dict(prefix="\\\\nas\\d")),
          "names": ("file,id\nsec0/a.jpg,1\nsec0/b.jpg,2\n", "utf-8", dict(columns=dict(path="file", pid="id")))}


@pytest.mark.parametrize("name", TABLES)
def test_tables_from_other_hands(tmp_path, name):
    text, encoding, options = TABLES[name]
    for n in "ab": paint(tmp_path / f"sec0/{n}.jpg")
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    table = read_csv(tmp_path / "t.csv", tmp_path, **options)
    assert table.path.tolist() == ["sec0/a.jpg", "sec0/b.jpg"] and table.pid.tolist() == [1, 2]
    if "s" in table: assert table.s.tolist() == [.5, 1]


@pytest.mark.parametrize("text, words", [
    ("path,pid\nD:\\x\\sec0\\a.jpg,1\n", "prefix='D:/x' cuts off"), ("path,pid\n\\\\nas\\a.jpg,1\n", "another machine"),
    ("path,pid\nsec0/A.JPG,1\n", "on disk: 'sec0/a.jpg'"),
    ("path,pid\nimages/sec0/a.jpg,1\n", "there is sec0/a.jpg"), ("path,pid\nsec0/a.jpg,1,2\n", "line 2: 3 cells"),
    ("path,pid\nsec0/a.jpg\n", "line 2: 1 cell "), ("path,pid,pid\na,1,2\n", "'pid' appears twice"),
    ("path,pid\nsec0/a.jpg,1.23E+15\n", "not a whole number"), ("", "is empty"),
    ("img,pid\na,1\n", "columns=dict.path='img'"), ("path,split\nsec0/a.jpg,val\n", r"splits=dict.val='train'"),
    ("path,camid,tracklet\nsec0/a.jpg,1,1\nsec0/a.jpg,2,1\n", "two cameras"),
    ("path,video,tracklet\nsec0/a.jpg,u,1\nsec0/a.jpg,v,1\n", "unique over all videos")])
def test_tables_that_are_refused_are_named(tmp_path, text, words):
    paint(tmp_path / "sec0/a.jpg")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match="t.csv.*" + words): read_csv(tmp_path / "t.csv", tmp_path)


def test_other_encodings_and_files_name_their_remedy(tmp_path):
    file = tmp_path / "t.csv"
    for data, words in (("path,pid\n人.jpg,1\n".encode("gbk"), "iconv"),
                        ("path,pid\na,1\n".encode("utf-16"), "iconv -f UTF-16"), (b"PK\x03\x04", "Excel"),
                        (b"\x1f\x8b", "gzip")):
        file.write_bytes(data)
        for read in (read_csv, read_cion_al):
            with pytest.raises(ValueError, match=f"t.csv is .*{words}"): read(file)
    with pytest.raises(ValueError, match="is a folder; name one file, of t.csv"): read_csv(tmp_path)
    file.write_text("path,person\na,1\n")
    with pytest.warns(UserWarning, match="'person' could mean pid"): assert read_csv(file).pid.tolist() == [-1]


def test_remedies_for_tables_can_be_taken_literally(tmp_path):
    (tmp_path / "t.csv").write_text("path,split\na.jpg,train set\n")
    with pytest.raises(ValueError, match=r"splits=\{'train set': 'train'\}"): read_csv(tmp_path / "t.csv")
    assert read_csv(tmp_path / "t.csv", splits={"train set": "train"}).split.tolist() == ["train"]
    (tmp_path / "t.csv").write_text("path,split\na.jpg,class\n")
    # dict(class=...) is no Python
    with pytest.raises(ValueError, match=r"splits=\{'class': 'train'\}"): read_csv(tmp_path / "t.csv")
    (tmp_path / "a.json").write_text(json.dumps([dict(id=1, file_path="a.jpg", split=None)]))
    assert read_cion_al(tmp_path / "a.json").split.tolist() == [""]
    (tmp_path / "t.csv").write_text('path,pid\nb.jpg,3\n"a.jpg,1\nc.jpg,2\n')
    with pytest.raises(ValueError, match="t.csv, line 3: .*quotation mark"): read_csv(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("path,pid,group\na.jpg,1,2\n")
    # the wrong way round
    with pytest.warns(UserWarning, match="'person' could mean pid"):
        read_csv(tmp_path / "t.csv", columns=dict(person="pid"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_csv(tmp_path / "t.csv", columns=dict(team="group")).team.tolist() == [2]
