"""Which ratios fall short of what is to be reached."""

from collections.abc import Iterable
from typing import Any

LEVELS = 1.3  # the dearest level of an attention may take so many times the cheapest


def shortfalls(records: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each record that misses its mark."""
    lines = []
    for record in records:
        name = " ".join(
            str(record[key]) for key in ("work", "n", "rows", "layout", "backend", "batch") if key in record
        )
        name += f" against {record['against']}" if "against" in record else ""
        if record.get("reach") is not None and record["faster"] < record["reach"]:
            lines.append(f"{name}: {record['faster']:.3g} times as fast, to reach {record['reach']:.3g}")
        if record.get("dearest_to_cheapest", 0) > LEVELS:
            lines.append(f"{name}: a level takes {record['dearest_to_cheapest']} times the cheapest, at most {LEVELS}")
        if "below" in record and record["copies_of_qkv"] >= record["below"]:
            lines.append(f"{name}: holds {record['copies_of_qkv']} copies of q, k, v, to stay below {record['below']}")
        if record.get("beaten_by"):
            lines.append(f"{name}: {', '.join(record['beaten_by'])} as accurate and as fast")
    return lines
