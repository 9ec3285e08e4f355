"""Markdown of what was measured: the tables of docs/gpu.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab import PARTS, Results, grid
from scaling import aim


def report(out: Path) -> str:
    """All parts that are in the folder."""
    parts = {
        "Agreement": (agreement_table, "agreement"),
        "Checkpoints": (checkpoints_table, "checkpoints"),
        "Scaling": (scaling_table, "scaling"),
        "Kills": (kills_table, "kills"),
    }
    text = ""
    for title, (table, name) in parts.items():
        rows = Results(out / f"{name}.json").rows
        if rows:
            text += f"## {title}\n\n{table(rows)}\n\n"
    return text


def agreement_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| layout | recipe | first loss | worst later loss | first gradient | agrees |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        start = f"| {row['layout']} | {row['recipe']} |"
        if "failed" in row:
            lines.append(f"{start} {_why(row)} | | | no |")
        else:
            told = " | ".join(f"{row[key]:.1e}" for key in ("first", "later", "gradient"))
            lines.append(f"{start} {told} | {_yes(row['agrees'])} |")
    return "\n".join(lines)


def checkpoints_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| checkpoint | there, bit for bit | and back |", "|---|---|---|"]
    for key, row in rows.items():
        found = (
            f"{_why(row)} |" if "failed" in row else f"{_yes(row['there'])} | {_yes(row['back'])}"
        )
        lines.append(f"| {key} | {found} |")
    return "\n".join(lines)


def scaling_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | recipe | layout | batch | tokens/s | of one GPU | aim | MFU | communication | hidden | "
        "exposed | idle | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows.values(), key=lambda one: (one["model"], one["recipe"])):
        start = f"| {row['model']} | {row['recipe']} | {row['layout']} |"
        if "failed" in row:
            lines.append(f"{start} {row['kind']} | {_why(row)} |" + " |" * 8)
            continue
        alone = rows.get(f"{row['model']}, {row['recipe']}, {grid.ONE}, strong", {})
        speed = alone.get("tokens_per_second")
        ratio = f"{row['tokens_per_second'] / speed:.2f}" if speed else ""
        aimed = aim(row["model"], row["layout"], row["kind"])
        told = row.get("communication_ms", 0.0)
        times = [
            f"{told:.0f} ms" if told else "",
            f"{row['hidden_ms'] / told:.0%}" if told else "",
            f"{row['exposed_ms']:.0f} ms" if told else "",
            f"{row['idle_ms']:.0f} ms" if "idle_ms" in row else "",
        ]
        lines.append(
            f"{start} {row['batch']} | {row['tokens_per_second']:,.0f} | {ratio} | "
            f"{f'{aimed:.2f}' if aimed else ''} | {row['mfu']:.1%} | {' | '.join(times)} | "
            f"{row['memory_gib']:.1f} |"
        )
    return "\n".join(lines)


def kills_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| run | same rows | same weights and optimizer | what was killed |",
        "|---|---|---|---|",
    ]
    for key, row in rows.items():
        if "failed" in row:
            lines.append(f"| {key} | no | no | {_why(row)} |")
        else:
            same = f"{_yes(row['same_rows'])} | {_yes(row['same_state'])}"
            lines.append(f"| {key} | {same} | {row['kills']} |")
    return "\n".join(lines)


def holds(out: Path) -> bool:
    """Whether nothing failed and everything that should be equal is."""
    rows = [row for name in PARTS for row in Results(out / f"{name}.json").rows.values()]
    laws = ("agrees", "there", "back", "same_rows", "same_state")
    return not any("failed" in row or not all(row.get(law, True) for law in laws) for row in rows)


def _why(row: dict[str, Any]) -> str:
    """The last line of what a rank said, for a cell."""
    lines = [line for line in row["failed"].splitlines() if line.strip()]
    return f"failed: {lines[-1][:100] if lines else ''}".replace("|", "/")


def _yes(true: bool) -> str:
    return "yes" if true else "NO"
