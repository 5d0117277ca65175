import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from flowaug.files import (
    cache_folder,
    leftovers,
    markdown_table,
    markdown_text,
    pack,
    printable,
    write_atomic,
    write_json,
    write_text,
)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device.*free some space"):
        write_atomic(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("own", "shared", "folder"),
    [("/a", "/b", "/a"), (None, "/b", "/b/flowaug"), ("", "", "/home/me/.cache/flowaug"), ("~/c", None, "/home/me/c")],
)
def test_the_cache_folder_is_chosen_by_the_environment(monkeypatch, own, shared, folder):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("FLOWAUG_CACHE", own), ("XDG_CACHE_HOME", shared)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert str(cache_folder()) == folder


def test_write_creates_parent_folders_and_replaces_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_json_round_trip(tmp_path):
    value = {"names": ["Käfer", "α"], "nested": {"x": 1.5, "none": None}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "Käfer" in text
    assert text.endswith("}\n")


def test_names_that_are_not_utf8_survive_in_json_and_can_be_drawn(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "value.json", {"names": [name, "Käfer"]})
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == {"names": [name, "Käfer"]}
    write_text(tmp_path / "README.md", f"# {name}")
    assert (tmp_path / "README.md").read_bytes() == rb"# caf\udce9"
    assert printable(name) == r"caf\udce9"
    assert printable("Käfer") == "Käfer"


def test_pack_round_trip(tmp_path):
    x = torch.arange(6.0, requires_grad=True).view(2, 3).T  # not contiguous, with a gradient
    data = pack({"x": x}, {"key": "value"})
    assert torch.equal(load(data)["x"], x.detach())
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": "value"}


def test_markdown_table():
    lines = markdown_table(["name", "value"], [["a", 1], ("b", 0.5)]).split("\n")
    assert lines == ["| name | value |", "| --- | --- |", "| a | 1 |", "| b | 0.5 |"]


CELLS = [
    ("<img src=x onerror=y>", "&lt;img src=x onerror=y&gt;"),
    ("a & b", "a &amp; b"),
    ("&lt;", "&amp;lt;"),
    ("a|b", "a\\|b"),
    ("two\nlines", "two lines"),
    ("two\r\nlines", "two lines"),
    ('"quoted"', '"quoted"'),
    ("a\\|b", "a\\\\\\|b"),
    ("`code`", "`code`"),
    ("![x](http://a/b.png)", "!\\[x\\](http://a/b.png)"),
    ("a\u2028# b\x0bc", "a # b c"),
    ("\x1b[2J", " \\[2J"),
    ("caf\udce9", "caf "),
]


@pytest.mark.parametrize(("cell", "escaped"), CELLS)
def test_markdown_table_escapes_cells(cell, escaped):
    lines = markdown_table([cell], [[cell]]).split("\n")
    assert lines == [f"| {escaped} |", "| --- |", f"| {escaped} |"]


def test_text_that_needs_no_escape_is_unchanged():
    assert markdown_text("Käfer 3 (α_1)*") == "Käfer 3 (α_1)*"


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)  # as if the attacker had guessed it
    for name in (".file.tmp", f".file.{'0' * 16}.tmp"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match=r"could not write .*file \(File exists\)"):
        write_atomic(tmp_path / "file", b"attack")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "file").exists()


def test_a_planted_link_at_the_target_is_replaced(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "file").symlink_to(victim)
    write_atomic(tmp_path / "file", b"data")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "file").is_symlink()


def test_temporary_names_differ_and_are_removed_after_any_error(tmp_path, monkeypatch):
    names = []

    def interrupted(*_):
        names.extend(path.name for path in leftovers(tmp_path / "file"))
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_atomic(tmp_path / "file", b"data")
    assert len(set(names)) == 2
    assert not list(tmp_path.iterdir())


def test_new_files_have_the_permissions_of_the_umask(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"could not write .*choose another folder"):
        write_atomic(tmp_path / "file" / "below", b"")
