import platform

from dimmix.processor import processor

TWO_CORES = """\
processor\t: {core}
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu vme

"""


def test_names_generation_of_the_first_core(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(TWO_CORES.format(core=0, family=25) + TWO_CORES.format(core=1, family=26))
    assert processor(path) == "AMD EPYC (family 25, model 17)"


def test_name_alone_without_family(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("model name\t: Some: processor\n")
    assert processor(path) == "Some: processor"


def test_what_python_knows_without_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert processor(tmp_path / "missing") == "riscv64"
    (tmp_path / "cpuinfo").write_text("hart\t: 0\nisa\t: rv64gc\n")
    assert processor(tmp_path / "cpuinfo") == "riscv64"
