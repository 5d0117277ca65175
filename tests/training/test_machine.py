import platform

import pytest

from flowaug.training import runtime as host


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: avx512f avx512_bf16\n", "AMD EPYC, 3 cores"),
        ("model name\t: Xeon\nflags\t\t: avx512f amx_bf16 amx_tile\n", "Xeon with AMX, 3 cores"),
        ("Features\t: fp asimd\n", "some arm, 3 cores"),  # as ARM has it
        (None, "some arm, 3 cores"),  # no Linux
    ],
)
def test_a_machine_has_the_name_of_its_processor(monkeypatch, tmp_path, text, name):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(host.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "some arm")
    assert host.machine_name() == name
