"""docs/families.md, made from the tables of the sweeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .runner import Record, Table

__all__ = ["families_page"]

# What gating at ratio 0.5 is to save at least: where half of the MACs or more are convolutions, and elsewhere.
GOAL_CONVOLUTIONS, GOAL_OTHERS = 0.35, 0.30

_HEAD = """# Families

Made from the tables in `docs/data` by `python -m gatedprune.sweep page`; change nothing here by hand. How the tables
are made stands in [CONTRIBUTING](../CONTRIBUTING.md).
"""


def families_page(data: Path) -> str:
    """The page: families, what fails, what stands in the way of savings, and how many architectures were looked at.

    Args:
        data: Folder with ``families.jsonl``, ``architectures.jsonl`` and ``timm.json``; what is missing is said to be.
    """
    families = _rows(data / "families.jsonl")
    architectures = _rows(data / "architectures.jsonl")
    known = json.loads((data / "timm.json").read_text(encoding="utf-8"))
    total = len({family for family, _ in known["models"].values()})
    sections = [_HEAD, _summary(families, total, known["timm"]), _family_table(families), _failures(families),
                _obstacles(families), _architectures(architectures, len(known["models"]))]  # fmt: skip
    return "\n".join(section for section in sections if section)


def _rows(path: Path) -> list[Record]:
    return sorted(Table(path).rows().values(), key=lambda r: (r["family"], r["model"]))


def _outcomes(row: Record) -> dict[str, list[str]]:
    """Outcome → checks."""
    found: dict[str, list[str]] = {"pass": [], "fail": [], "left out": [], "no time": []}
    for name, check in row.get("checks", {}).items():
        found[check["outcome"]].append(name)
    return found


def _late(row: Record) -> bool:
    """Whether the time limit struck."""
    error = row.get("error")
    return bool(_outcomes(row)["no time"]) if error is None else error.startswith("no result within")


def _summary(rows: list[Record], total: int, version: str) -> str:
    kinds = [_outcomes(row) for row in rows]
    gated = [r for r in rows if r.get("sites")]
    failing = [bool(k["fail"]) or ("error" in r and not _late(r)) for r, k in zip(rows, kinds, strict=True)]
    failed = sum(failing)
    unfinished = sum(_late(r) and not f for r, f in zip(rows, failing, strict=True))
    whole = sum(not f and not _late(r) and bool(k["pass"]) for r, f, k in zip(rows, failing, kinds, strict=True))
    commits = Counter(r["commit"] for r in rows if "commit" in r)
    smaller = sum(r.get("checked_input", r.get("input")) != r.get("input") for r in rows)
    lines = [
        "## The contract suite on the smallest model of each family",
        "",
        f"timm {version}: {len(rows)} of {total} families run. {len(gated)} have sites; {whole} pass every check that "
        f"was run, {failed} fail a check or break, {unfinished} ran out of time before the last check. "
        "Ratio 0.5, sites of the residual stream not counted.",
        "",
        "`checks`: passed/run; the rest was left out for models above 1.5 GMACs (float64 and training take minutes "
        "there), or there was no time. `MACs left` is arithmetic over the sites, predictors included; in brackets what "
        "the compact model was seen to execute, where that differs. Checks ran on images of that input size, but for "
        f"{smaller} models on smaller ones, where their sites are the same.",
    ]
    for row in rows:
        if "checked_with" in row:
            how = ", ".join(f"{name}={value}" for name, value in row["checked_with"].items())
            lines += ["", f"`{row['model']}` was checked with {how}: in full it does not fit into memory in float64."]
    if commits:
        made = f"Made on {', '.join(f'{commit} ({n} rows)' for commit, n in commits.most_common())}."
        lines += ["", made + (" Each row says what the code of its commit did." if len(commits) > 1 else "")]
    return "\n".join(lines) + "\n"


def _family_table(rows: list[Record]) -> str:
    lines = [
        "| family | model | input | MMACs | sites | MACs in sites | MACs left | checks | s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        kinds = _outcomes(row)
        ran = len(kinds["pass"]) + len(kinds["fail"])
        cells = [row["family"], f"`{row['model']}`", row.get("input", "–")]
        if "sites" in row:
            cells += [
                f"{row['macs'] / 1e6:,.0f}",
                row["sites"],
                f"{row['share']:.0%}",
                _left(row) if row["sites"] else "–",
            ]
        else:
            cells += ["–"] * 4
        verdict = f"{len(kinds['pass'])}/{ran}" if ran else ("error" if "error" in row else "–")
        lines.append("| " + " | ".join(str(c) for c in [*cells, verdict, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def _left(row: Record) -> str:
    check = row.get("checks", {}).get("macs_fall", {})
    seen = check.get("note", "").partition("%")[0] if check.get("outcome") == "pass" else ""
    text = f"{row['left']:.0%}"
    expected = float(row["left"] if row.get("checked_left") is None else row["checked_left"])
    return f"{text} ({float(seen):.0f}%)" if seen and abs(float(seen) / 100 - expected) > 0.01 else text


def _failures(rows: list[Record]) -> str:
    lines = []
    for row in rows:
        name = f"**{row['family']}** (`{row['model']}`)"
        if "error" in row:
            lines.append(f"- {name}: {_plain(row['error'])}")
        for check, found in row.get("checks", {}).items():
            if found["outcome"] == "fail":
                lines.append(f"- {name}, `{check}`: {_plain(found['note'])}")
        late = _outcomes(row)["no time"]
        if late and "error" in row:
            lines[-1] += f" Not reached: {', '.join(f'`{c}`' for c in late)}."
    return "### What fails or did not finish\n\n" + "\n".join(lines or ["Nothing."]) + "\n"


def _plain(text: str) -> str:
    """The first line of a message, short, without what Markdown would read."""
    line = next(iter(text.strip().splitlines()), "?")
    return line[:240].replace("|", "/").replace("<", "‹").replace(">", "›")


def _obstacles(rows: list[Record]) -> str:
    lines = []
    for row in rows:
        goal = GOAL_CONVOLUTIONS if row.get("convolutions", 0) >= 0.5 else GOAL_OTHERS
        if "left" not in row or 1 - row["left"] >= goal:
            continue
        reasons = "; ".join(f"{share:.0%} {reason}" for reason, share in row["untouched"].items() if share >= 0.01)
        saved = "nothing to gate" if not row["sites"] else f"saves {max(1 - row['left'], 0):.0%}"
        lines.append(
            f"- **{row['family']}** (`{row['model']}`) {saved}. MACs that no site narrows: {reasons or 'few'}."
        )
    text = (
        f"### What stands in the way\n\nAt ratio 0.5 these save less than {GOAL_CONVOLUTIONS:.0%} of their MACs (where "
        f"half of them or more are convolutions) or {GOAL_OTHERS:.0%} (elsewhere).\n\n"
    )
    return text + "\n".join(lines or ["None."]) + "\n"


def _architectures(rows: list[Record], total: int) -> str:
    found = [r for r in rows if "sites" in r]
    failed = [r for r in rows if "sites" not in r]
    lines = [
        "## `find_sites` on every architecture",
        "",
        f"{len(rows)} of {total} architectures looked at; find_sites succeeds on {len(found)}, of which "
        f"{sum(r['sites'] == 0 for r in found)} have no site" + (f". {_medians(found)}" if found else "") + ".",
    ]
    if failed:
        lines += ["", "It fails on:", "", *(f"- `{r['model']}`: {_plain(r['error'])}" for r in failed)]
    bare = [f"`{r['model']}`" for r in found if r["sites"] == 0]
    if bare:
        lines += ["", f"Without sites: {', '.join(bare)}."]
    return "\n".join(lines) + "\n"


def _medians(rows: list[Record]) -> str:
    def median(values: Iterable[Any]) -> float:
        ordered = sorted(values)
        return float(ordered[len(ordered) // 2])

    return (
        f"Half of them have at least {median(r['share'] for r in rows):.0%} of their MACs in sites; the median "
        f"took {median(r['seconds'] for r in rows):.1f} s"
    )
