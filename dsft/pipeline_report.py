"""What a pipeline found: the table of players, the loss curve, one solved and one failed episode."""

import json
from pathlib import Path
from typing import Any

from dsft.files import write_text

HEADER = ("player", "success rate (95 % interval)", "moves over optimum", "invalid answers")


def write_report(
    folder: Path, reports: dict[str, Path], *, generated: Path, metrics: Path, model: str, backend: str
) -> list[str]:
    """Write report.md and loss.png.

    Args:
        folder: where to.
        reports: player -> its report by dsft.validate; "fine-tuned model" among them.
        generated: generate.json of dsft.generate.
        metrics: metrics.jsonl of the training.
        model: what was trained.
        backend: what trained it.

    Returns:
        The table's lines.
    """
    found = {player: json.loads(path.read_text(encoding="utf-8")) for player, path in reports.items()}
    made = json.loads(generated.read_text(encoding="utf-8"))
    lines = _table([HEADER, *(_row(player, report) for player, report in found.items())])
    _plot(metrics, folder / "loss.png")
    tuned = found["fine-tuned model"]
    text = [
        f"# {made['flags']['env']}: {model}, before and after fine-tuning",
        "",
        f"Trained with {backend} on {made['levels']['train']} levels ({made['rows']['train']} rows); every player met "
        f"the same {tuned['episodes']} levels, none of which occurs in train.parquet or test.parquet.",
        "",
        *lines,
        "",
        "Moves over optimum: on solved levels, moves beyond the fewest possible ones.",
        "",
        "![loss](loss.png)",
        "",
    ]
    for kind in ("solved", "failed"):
        for episode in tuned["transcripts"][kind][:1]:
            text += [f"## One level that the fine-tuned model {kind} (seed {episode['seed']})", ""]
            for message in episode["messages"]:
                text += [f"{message['role']}:", "", "```", message["content"], "```", ""]
    write_text(folder / "report.md", "\n".join(text))
    return lines


def _row(player: str, report: dict[str, Any]) -> tuple[str, ...]:
    low, high = report["success_interval"]
    over = report["moves_over_optimum"]
    return (
        player,
        f"{report['success_rate']:.1%} ({low:.1%} to {high:.1%})",
        "none solved" if over is None else f"{over:.2f}",
        f"{report['invalid_answer_rate']:.1%}",
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as a Markdown table that is also readable on a console."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _plot(metrics: Path, target: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("train/loss", "-"), ("val/loss", "o--")):
        points = {line["step"]: line[key] for line in lines if key in line}
        if points:
            axes.plot(list(points), list(points.values()), style, label=key)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token")
    axes.set_yscale("log")
    axes.legend()
    unfinished = target.with_name(f".{target.name}.tmp")
    figure.savefig(unfinished, format="png", dpi=120)
    plt.close(figure)
    unfinished.replace(target)
