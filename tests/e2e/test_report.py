"""python -m dsft.report, as a user types it, and its page in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsft.reporting.curves import RUN_COLORS
from dsft.reporting.report import CHARTS
from tests.browser import WHY_NONE, columns_of, find_browser, open_page
from tests.helpers import ROOT, Done, contents, flags, metrics

needs_browser = pytest.mark.skipif(find_browser() is None, reason=WHY_NONE)
EVIL = "<script>alert(1)</script><img src='http://example.com/x.png' onerror=alert(2)>`| \\ **bold** </pre>"


def report(commands, *words: object) -> Done:
    done = commands.run("dsft.report", words)
    assert "Traceback" not in done.err
    return done


def eval_report(path: Path, model: str, answers: list[str], **more: object) -> None:
    """A report of dsft.validate on dialogues, and the answers beside it."""
    figures = {"rows": 2, "val/loss": 1.25, "val/perplexity": 3.4903, "answers": len(answers)}
    shares = {"well_formed_rate": 0.5, "well_formed_interval": [0.0945, 0.9055]}
    shares |= {"repeated_question_rate": None, "repeated_question_interval": [0.0, 1.0]}
    settings = {"env": None, "data": "no/such.parquet", "prompt_key": "prompt", "response_key": "response", "seed": 0}
    values = {"model": model, "adapter": None, **figures, **shares, "settings": settings, "versions": {}} | more
    path.write_text(json.dumps(values))
    rows = [{"row": i, "answer": answer} for i, answer in enumerate(answers)]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def longer(run: Path, factor: float, steps: int = 80) -> Path:
    """More steps for a run's curves, and validations, as a longer training would have written them."""
    [first, *_], validation = metrics(run), metrics(run, "val/loss")[0]
    lines = []
    for step in range(1, steps + 1):
        values = {
            "train/loss": 3 * factor / step,
            "train/grad_norm": factor + step % 3,
            "train/lr": 1e-4 * factor * step,
        }
        lines.append(first | values | {"step": step, "train/effective_tokens_per_second": 1000 * factor + step % 5})
        if step % 20 == 0:
            lines.append(validation | {"step": step, "val/loss": 4 * factor / step})
    (run / "metrics.jsonl").unlink()  # a link to a run that other tests share
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def out(trained_runs, tmp_path) -> Path:
    return trained_runs.copy("lora", tmp_path / "run")


@pytest.fixture
def other(trained_runs, tmp_path) -> Path:
    return trained_runs.copy("other seed", tmp_path / "other_run")


class Page(HTMLParser):
    """What a page would load or run, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_one_run(commands, out, trained_runs):
    before = contents(out)
    done = report(commands, out)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [f"report   {out}/report.html", f"report   {out}/report.md"]
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"report.html", "report.md"}
    text = (out / "report.md").read_text(encoding="utf-8")
    losses = [line["train/loss"] for line in metrics(out)]
    assert "finished after 2 steps" in text
    assert f"Training loss (per target token): run: {losses[0]:.6g} at step 1, {losses[1]:.6g} at step 2" in text
    assert re.search(r"\| `checkpoint-000002` \| 2 +\| .* \| best, latest \|", text)
    assert re.search(r"\| `--lora_rank` +\| `4` +\|", text)
    assert re.search(r"\| rows +\| 10 in the files as they are now +\|", text)
    assert re.search(r"\| torch +\| \d", text)
    [command] = re.findall(r"```bash\npython -m (.*)\n```", text)
    assert f"--output_dir {trained_runs.folder('lora')}.tmp" in command


def test_the_printed_command_trains_the_same_run_again(commands, out, trained_runs, tmp_path):
    assert report(commands, out).status == 0
    [command] = re.findall(r"```bash\npython -m (.*)\n```", (out / "report.md").read_text(encoding="utf-8"))
    module, *words = command.split()
    words[words.index("--output_dir") + 1] = str(tmp_path / "again")
    assert commands.run(module, words).status == 0
    assert metrics(tmp_path / "again")[-1]["train/loss"] == metrics(out)[-1]["train/loss"]


def test_the_page_loads_nothing_and_answers_stay_text(commands, out, tiny_model, trained_runs):
    eval_report(out / "base.json", str(trained_runs.flags("lora")["model"]), [EVIL, "old"])
    eval_report(out / "tuned.json", str(out / "merged"), ["new " + EVIL, "newer"])
    assert report(commands, out).status == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base", "a"}
    assert page.handlers == []
    assert all(link.startswith("#") for link in page.links)
    assert re.findall(r"url\((?!#)|@import|https?://(?!example\.com)", text) == []
    assert f"new {EVIL}" in page.text
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert f"base model:\n\n```\n{EVIL}\n```\n\nfine-tuned model:\n\n```\nnew {EVIL}\n```" in markdown
    assert re.search(
        r"\| fine-tuned model \| 1\.250000 \| 3\.4903 +\| 50\.0% \(9\.4% to 90\.5%\) +\| no question", markdown
    )


def test_several_runs(commands, out, other, tmp_path):
    done = report(commands, out, other, "--output", tmp_path / "new" / "both.html")
    assert (done.status, done.err) == (0, "")
    assert not (out / "report.html").exists()
    text = (tmp_path / "new" / "both.md").read_text(encoding="utf-8")
    assert re.search(r"\| flag +\| run +\| other_run +\|", text)
    assert re.search(r"\| `--seed` +\| `1` +\| `2` +\|", text)
    differing = text.partition("## Configuration")[2].partition("**Flags that are the same**")[0]
    assert set(re.findall(r"`--(\w+)`", differing)) == {"seed", "output_dir"}


def test_eval_reports_from_elsewhere(commands, out, tmp_path, trained_runs):
    eval_report(tmp_path / "before.json", str(trained_runs.flags("lora")["model"]), ["old"])
    eval_report(tmp_path / "after.json", "anything", ["new"], adapter=str(out))
    given = f"{tmp_path}/before.json,{tmp_path}/after.json"
    assert report(commands, out, "--eval_reports", given).status == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "base model:\n\n```\nold\n```\n\nfine-tuned model:\n\n```\nnew\n```" in text
    refused = report(commands, out, "--eval_reports", out / "config.yaml")
    assert refused.errors == [
        f"error: --eval_reports {out}/config.yaml is not a report of dsft.validate; name the .json file that it wrote"
    ]


@pytest.mark.parametrize("what", ["no validation", "one step", "no checkpoint", "damaged metrics", "damaged config"])
def test_a_run_that_lacks_something(commands, out, what):
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    told = ""
    if what == "no validation":
        lines = [line for line in lines if "val/loss" not in line]
        told = "No values: validation loss."
    elif what == "one step":
        lines = lines[:1]
    elif what == "no checkpoint":  # the run still goes on, and writes its last line
        for path in [*out.glob("checkpoint-*"), out / "best", out / "latest"]:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        lines[-1] = lines[-1][:20]
        told = "step 2 of 2: still running, or stopped"
    elif what == "damaged metrics":
        lines[1] = '{"step": 1, "val/lo\n'
        told = "1 line is damaged and left out."
    else:
        (out / "config.yaml").unlink()
        (out / "config.yaml").write_text("a: [")
        told = f"Note: {out}/config.yaml cannot be read"
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").write_text("".join(lines))
    done = report(commands, out)
    assert (done.status, done.err) == (0, "")
    assert told in (out / "report.md").read_text(encoding="utf-8").replace("\\", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--runs is required: Output folders of runs or pipelines"),
        (["/no/such"], "/no/such: no such folder; name the output folder of a run or a pipeline"),
        ([ROOT / "docs"], "docs is not a dsft run; name the output folder of a run or a pipeline"),
        (["{out}/latest"], "is a checkpoint; name its run's folder, {out}"),
        (["{out}", "{out}/../run"], "{out}/../run and {out} are the same run; name each run once"),
        (["{out}", "--samples", "-1"], "samples must be 0 or more, got -1"),
        (["{out}", "--output", "a.txt"], "output must be a .html file, got a.txt"),
        (["{out}", "--output", "/proc/no/a.html"], "cannot write /proc/no"),
        (["--run", "{out}"], "unknown flag --run (did you mean 'runs'?)"),
    ],
)
def test_wrong_use_is_one_line(commands, out, words, told):
    done = report(commands, *[str(word).format(out=out) for word in words])
    assert (done.status, done.out) == (1, "")
    assert told.format(out=out) in done.errors[0]
    assert all(line.startswith("error: ") for line in done.err.splitlines())
    assert not list(out.glob("*report*"))


def test_it_needs_no_torch(out):
    import subprocess
    import sys

    code = (
        "import sys; from dsft.config import ReportConfig; from dsft.reporting.report import write_report\n"
        "write_report(ReportConfig(runs=[sys.argv[1]])); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# In a browser


def only_chart(page: Path, number: int, target: Path) -> Path:
    """The page with one chart shown and everything else hidden."""
    style = (
        "<style>body > *, figure { display: none !important } .charts { display: block !important } "
        f"figure:nth-of-type({number}) {{ display: block !important }} body {{ padding: 0; margin: 0 }}</style></head>"
    )
    target.write_text(page.read_text(encoding="utf-8").replace("</head>", style), encoding="utf-8")
    return target


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_every_run_is_drawn_in_every_chart(commands, out, other, tmp_path, dark):
    longer(out, 1.0), longer(other, 2.0)
    page = tmp_path / "both.html"
    assert report(commands, out, other, "--output", page).status == 0
    theme = "dark" if dark else "light"
    whole = open_page(page, tmp_path, dark=dark, height=2500)
    assert whole.console == []
    assert (whole.pixels[0, 0] < 128).all() == dark
    for number, (_, title, _, _) in enumerate(CHARTS, 1):
        shown = open_page(only_chart(page, number, tmp_path / "one.html"), tmp_path, dark=dark, height=600)
        assert shown.console == []
        for color in RUN_COLORS[:2]:  # along the whole chart, and not only beside its name
            share = columns_of(color[theme], shown.pixels).mean()
            assert share > 0.5, (title, color, share)
        assert not columns_of(RUN_COLORS[2][theme], shown.pixels).any(), title


@needs_browser
def test_a_page_full_of_foul_answers_opens_without_a_complaint(commands, out, tmp_path, trained_runs):
    eval_report(out / "base.json", str(trained_runs.flags("lora")["model"]), [EVIL])
    eval_report(out / "tuned.json", str(out / "merged"), [EVIL])
    assert report(commands, out).status == 0
    assert open_page(out / "report.html", tmp_path).console == []


@pytest.mark.slow
@needs_browser
def test_the_browser_does_complain_of_what_is_wrong(commands, out, tmp_path):
    """Of an error in a script, of a file that does not come, and on our page of anything it might load at all."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<script>nothing()</script><img src='http://127.0.0.1:1/x.png'>")
    assert any("nothing is not defined" in line for line in open_page(wrong, tmp_path).console)
    assert report(commands, out).status == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    wrong.write_text(text.replace("</body>", "<script>1</script><img src='http://127.0.0.1:1/x.png'></body>"))
    console = open_page(wrong, tmp_path).console
    assert len(console) == 2
    assert all("Content Security Policy" in line for line in console)


def test_flags_of_the_report_come_from_yaml_too(commands, out, tmp_path):
    file = tmp_path / "report.yaml"
    file.write_text(json.dumps({"runs": [str(out)], "output": str(tmp_path / "r.html")}))
    assert report(commands, *flags(config=file)).status == 0
    assert (tmp_path / "r.html").is_file()
