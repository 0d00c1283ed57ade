"""The listing of a package, on a small one."""

from pathlib import Path

import house


def test_what_stands_out_is_listed(tmp_path: Path, capsys, monkeypatch) -> None:
    files = {
        "__init__.py": '"""The root."""\n',
        "errors.py": "x = 1\n",
        "inner/__init__.py": '"""One sentence.\n\nMore."""\n',
        "inner/long.py": "class A:\n    def f(self, a, b, c, *, d, e, f): ...\n    def g(self, a, b, c, /, d, e, f, g): ...\n",
        "cli/__init__.py": '"""Thin."""\n',
        "cli/verbs.py": "def verb(a, b, c, d, e, f, g, h): ...\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert house.packages(tmp_path)[1:] == [("cli", "Thin.", 2, 2), ("inner", "One sentence.", 2, 6)]
    assert house.long_signatures(tmp_path) == (["inner/long.py: g (7)"], ["cli/verbs.py: verb (8)"])
    monkeypatch.setattr("sys.argv", ["house.py", str(tmp_path)])
    house.main()
    said = capsys.readouterr().out
    for phrase in ("6 files, 10 lines", "the longest is inner/", "modules at the root: 1 (errors.py)", "parameters: 1\n"):
        assert phrase in said
