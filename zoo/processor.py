"""What the processor is called, for cards and benchmarks: times mean nothing without it."""

import platform
from pathlib import Path


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """For example "AMD EPYC (family 25, model 17)".

    A virtual machine often hides which EPYC or Xeon it has, while family and model still tell the generations apart:
    one may have twice the vector units of another of the same name. Where there is no such file, or it does not name
    the processor, what Python knows.
    """
    try:
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    if not {"cpu family", "model"} <= facts.keys():
        return facts["model name"]
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
