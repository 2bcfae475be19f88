"""The report: the same facts in the terminal, in HTML and in JSON, and a dash for what was not measured."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ArtefactError, UnknownNameError
from sparsify_compiler.planned import Option, Planned, Point
from sparsify_compiler.program import LeftOut
from sparsify_compiler.recovery import Point as Step
from sparsify_compiler.recovery import Recovery
from sparsify_compiler.report import Form, PassTime, Quality, Refusal, Report, formulas, plan_plots, plots, recovery_plot, roofline, words
from sparsify_compiler.report.console import to_text
from sparsify_compiler.report.story import explain

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def sample() -> Report:
    """A report with one of everything: a site that pays, one that stayed dense, one that nobody measured."""
    return Report(
        model="all-MiniLM-L6-v2",
        parameters=22_713_216,
        target={"name": "native", "arch": "x86_64", "mcpu": "znver4", "features": ["avx2"], "cores": 2},
        versions={"torch": "2.13.0"},
        threads=2,
        date="2026-11-22T20:00:00",
        recipe="mask_weights(structure=Block(rows=16, columns=1))",
        budget="density 0.2",
        seed=0,
        example="input_ids 8×128",
        dense=[Form("eager fp32", 41.2, 40.8, 42.0), Form("torch.compile fp32", 39.5, 39.1, 40.9)],
        compiled=Form("compiled", 19.75, 19.5, 20.4),
        dense_bytes=90_852_864,
        compiled_bytes=45_426_432,
        dense_disk_bytes=None,
        compiled_disk_bytes=46_000_000,
        quality=[Quality("Lee Pearson", 0.7312, 0.7102), Quality("cosine to dense", None, 0.9911, "64 sentences")],
        sites=[
            Decision(
                "encoder.layer.0.attention.self.query",
                "linear",
                (384, 384),
                "float32",
                "16x1",
                0.2,
                0.2,
                "bsr",
                "bsr_r16v2",
                128,
                "eager",
                0.2,
                0.05,
                0.05,
                589_824,
                140_000,
                "4 times the speed",
                flops_before=37.7e6,
                flops=7.5e6,
                moved_before=983e3,
                moved=533e3,
                predicted_ms=0.06,
                loss=0.0021,
                options=[
                    Option("dense", 0.2, 0.0, 589_824, "0.15 ms more for 0.0021 less loss"),
                    Option("16x1, 20 %", 0.06, 0.0021, 140_000),
                    Option("2:4", 0.15, 0.0007, 330_000, "0.09 ms more for 0.0014 less loss"),
                ],
            ),
            Decision(
                "encoder.layer.0.output.dense",
                "linear",
                (384, 1536),
                "float32",
                "16x1",
                0.8,
                0.2,
                "dense",
                "eager",
                128,
                "eager",
                0.5,
                0.7,
                0.5,
                2_359_296,
                2_359_296,
                "stays dense: the best kernel has 0.71 times the dense speed",
            ),
            Decision("pooler.dense", "linear", (384, 384), "float32", reason="ignored"),
        ],
        passes=[PassTime("capture", 2.125), PassTime("pack()", None, 37)],
        left_out=[LeftOut("decoder", "control flow on data")],
        misses=[Refusal("no BatchNorm here", f"conv_{i}", "fold_batchnorm") for i in range(5)],
        warnings=["kernels run on other threads"],
        plan=Planned(
            "mask_weights(structure='16x1', density=0.2, targets=('encoder.layer.0.attention.self.query',)) | pack() | lower()",
            "ms",
            "relative output error",
            20.0,
            19.8,
            0.0112,
            0.0110,
            [Point(19.1, 0.02), Point(19.8, 0.0112, True), Point(30.0, 0.001)],
            0.21,
            2,
        ),
    )


def test_json_is_the_same_report() -> None:
    report = sample()
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(Report().to_json()) == Report()


def test_json_has_no_nan_and_takes_what_is_newer() -> None:
    report = Report(compiled=Form("compiled", float("nan"), float("inf")))
    data = json.loads(report.to_json())
    assert data["compiled"]["median"] is None
    data["of_tomorrow"], data["compiled"]["of_tomorrow"] = 1, 2
    assert Report.from_json(json.dumps(data)).compiled == Form("compiled")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"schema": 99}', '{"schema": "x"}', '{"schema": 1, "sites": [1]}', '{"schema": 1, "sites": [{}]}']
)
def test_json_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ArtefactError):
        Report.from_json(text)


def test_the_yardstick_is_the_fastest_dense_form() -> None:
    report = sample()
    assert report.fastest_dense == report.dense[1]
    assert report.speedup == 2.0
    assert Report(dense=[Form("a")], compiled=Form("c", 1.0)).speedup is None
    assert [site.site for site in report.paid()] == ["encoder.layer.0.attention.self.query"]


def test_what_was_not_measured_is_a_dash() -> None:
    for text in (
        words.ms(None),
        words.plain_ms(None),
        words.size(None),
        words.count(None),
        words.ratio(None, 1.0),
        words.ratio(1.0, None),
        words.ratio(1.0, 0.0),
        words.percent(None),
        words.number(None),
        words.shape(Decision("x", "linear")),
    ):
        assert text == words.DASH
    row = next(line for line in str(sample()).splitlines() if "pooler.dense" in line)
    assert row.split()[-3:] == [words.DASH] * 3
    assert "on disk" in str(sample())
    assert f"{words.DASH} → 46 MB" in str(sample())


@pytest.mark.parametrize(("value", "text"), [(0.00456, "4.56 µs"), (0.456, "0.456 ms"), (19.75, "19.8 ms"), (2500.0, "2.5 s")])
def test_times_have_fitting_units(value: float, text: str) -> None:
    assert words.ms(value) == text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_the_terminal_is_never_too_narrow(width: int) -> None:
    text = to_text(sample(), width, colour=False)
    assert max(map(len, text.splitlines())) <= width
    assert "2.00 times the speed" in " ".join(text.replace("│", " ").split())
    assert "0.71 times the dense speed" in " ".join(text.split())
    assert "not done: fold_batchnorm: no BatchNorm here (conv_0, conv_1, conv_2 and 2 more)" in " ".join(text.split())
    assert "left out decoder: control flow on data" in " ".join(text.split())
    assert "\x1b" not in text
    assert "\x1b" in to_text(sample(), width, colour=True)


def test_the_terminal_report(golden: object) -> None:
    golden("report_console", f"{sample()}\n")  # type: ignore[operator]


def test_an_empty_report_says_so() -> None:
    assert "nothing was measured" in str(Report())
    assert "<main>" in Report().to_html()


class _Tags(HTMLParser):
    """Collects what a page would fetch, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "srcset", "data") or (name == "href" and tag in ("link", "a", "image"))
        ]


def test_html_needs_nothing_else() -> None:
    page = sample().to_html()
    tags = _Tags()
    tags.feed(page)
    assert tags.fetched == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert tags.count["svg"] == 7
    sites, choices, steps, ops = 1 + 3, 1 + 3, 1 + 2, 1 + 2
    assert tags.count["tr"] == sites + choices + steps + ops + len(formulas.symbols(sample()))
    assert page == sample().to_html()
    assert "prefers-color-scheme: dark" in page
    assert "var(--sparse)" in page
    assert "#010101" not in page


def test_html_escapes_names() -> None:
    report = sample()
    evil = "<script>alert('x')</script>$\\frac{$"
    report.model = report.sites[0].site = report.sites[0].reason = report.warnings[0] = evil
    page = report.to_html()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 4


def test_html_of_a_thousand_sites() -> None:
    report = sample()
    report.sites = [
        Decision(f"layer.{i}.dense", "linear", (8, 8), "float32", "2:4", 0.5, 0.5, "nm", "nm", 1, "eager", 1.0, 0.5, 0.5) for i in range(1000)
    ]
    assert report.to_html().count("<tr") > 1000
    assert len(str(report).splitlines()) > 1000


def test_reports_are_written_whole(tmp_path: Path) -> None:
    report = sample()
    assert report.to_html(tmp_path / "r.html") == (tmp_path / "r.html").read_text(encoding="utf-8")
    assert report.to_json(tmp_path / "r.json") == (tmp_path / "r.json").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]
    assert "srcdoc" in report._repr_html_()


def _chromium(tmp_path: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_it_on_a_phone_and_sorts(tmp_path: Path) -> None:
    probe = """<script>
      const frame = document.querySelector("iframe");
      frame.addEventListener("load", () => {
        const page = frame.contentDocument, first = () => page.querySelector("#sites tbody td code").textContent;
        const found = [page.documentElement.scrollWidth];
        page.querySelectorAll("#sites th")[5].click(); found.push(first());
        page.querySelectorAll("#sites th")[5].click(); found.push(first());
        const search = page.getElementById("search"); search.value = "POOLER"; search.dispatchEvent(new Event("input"));
        found.push([...page.querySelectorAll("#sites tbody tr")].filter(row => !row.hidden).length);
        document.body.dataset.found = JSON.stringify(found);
      });
    </script>"""
    frame = sample()._repr_html_().replace("width:100%", "width:360px")
    (tmp_path / "phone.html").write_text(f"<!doctype html><body>{frame}{probe}</body>", encoding="utf-8")
    dumped = _chromium(tmp_path, "--dump-dom", "--virtual-time-budget=3000", f"file://{tmp_path}/phone.html")
    found = re.search(r'data-found="([^"]*)"', dumped)
    assert found is not None
    width, fastest, slowest, shown = json.loads(found[1].replace("&quot;", '"'))
    assert width <= 360
    assert (fastest, slowest, shown) == ("encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense", 1)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_follows_dark_mode(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    sample().to_html(tmp_path / "r.html")
    corners = {}
    for mode, value in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{mode}.png"
        _chromium(
            tmp_path, f"--blink-settings=preferredColorScheme={value}", "--window-size=900,1200", f"--screenshot={shot}", f"file://{tmp_path}/r.html"
        )
        corners[mode] = float(image.imread(shot)[2, 2, :3].mean())
    assert corners["dark"] < 0.2
    assert corners["light"] > 0.9


def test_a_plan_is_drawn_only_where_there_is_one() -> None:
    report = sample()
    assert plan_plots.front(report)
    assert plan_plots.sensitivity(report)
    report.plan = None
    report.sites[0].options = []
    assert plan_plots.front(report) is None
    assert plan_plots.sensitivity(report) is None
    assert "certificate" not in str(report)


def test_the_heat_map_frames_what_was_taken_and_is_darker_where_more_is_lost() -> None:
    strength = plan_plots._strengths([0.0, 1e-4, 1e-3, 1e-2, None])
    assert strength[0.0] == strength[1e-4] == plan_plots.FAINTEST
    assert strength[1e-2] == plan_plots.STRONGEST
    assert strength[1e-3] == pytest.approx((plan_plots.FAINTEST + plan_plots.STRONGEST) / 2), "by orders of magnitude"
    drawn = plan_plots.sensitivity(sample())
    assert drawn is not None
    assert len(re.findall(r"fill: none; stroke: var\(--ink\); stroke-width: 1\.4", drawn)) == 1


def test_a_site_stands_where_its_operations_and_time_say() -> None:
    assert roofline._place(2e9, 1e9, 1.0) == (2.0, 2000.0)  # 2 G operations on 1 GB in a millisecond
    assert roofline._place(2e9, 1e9, None) is roofline._place(2e9, 0.0, 1.0) is None


def test_predictions_are_off_whichever_way_they_err() -> None:
    def site(predicted: float | None, measured: float | None) -> Decision:
        return Decision("a", "linear", predicted_ms=predicted, compiled_ms=measured)

    assert words.misjudged([site(0.5, 1.0), site(1.5, 1.0), site(1.0, 1.0)]) == pytest.approx(0.5)
    assert words.misjudged([site(None, 1.0), site(1.0, None)]) is None


def test_the_waterfall_adds_up() -> None:
    """From 39.5 to 19.75 ms: the site saved 0.15, the rest is not accounted for by sites."""
    drawn = plots.waterfall(sample())
    assert drawn is not None
    with_attention = sample()
    with_attention.sites.append(Decision("encoder.layer.0.attention", "attention", dense_ms=37.0, compiled_ms=30.0, rows=2048))
    assert plots.waterfall(with_attention) == drawn, "attention is timed at a length of its own"
    shown = re.findall(r">([−+]?[0-9.]+ [mµ]s)<", drawn)
    assert shown == ["39.5 ms", "−0.15 ms", "−19.6 ms", "19.8 ms"]


def test_who_reads_of_attention_reads_what_it_was_timed_with() -> None:
    report = sample()
    said = "timed with one text of 2048 tokens, not with the example's inputs"
    assert said not in str(report)
    report.sites += [Decision(f"encoder.layer.{i}.attention", "attention", dense_ms=37.0, compiled_ms=30.0, rows=2048) for i in range(2)]
    report.sites.append(Decision("encoder.layer.2.attention", "attention"))
    assert f"{said} (encoder.layer.0.attention, encoder.layer.1.attention)" in " ".join(str(report).split())
    assert unescape(report.to_html()).count(said) == 1
    assert explain(report, "encoder.layer.1.attention").startswith("encoder.layer.1.attention: attention, timed with one text of 2048 tokens\n")
    assert explain(report, "encoder.layer.2.attention").startswith("encoder.layer.2.attention: attention\n")


def test_the_roofline_needs_operations_and_times() -> None:
    report = sample()
    assert "now, sparse" in (roofline.roofline(report) or "")
    for site in report.sites:
        site.flops_before = None
    assert roofline.roofline(report) is None


MACHINE = {"cores": 2, "numbers": {"vector": {"value": 1e11}, "matrix": {"value": 1e12}},
           "memory": [{"bytes": 1e5, "one": 2e11, "all": 4e11}, {"bytes": 1e9, "one": 2e10, "all": 3e10}]}


@pytest.mark.parametrize(("dtype", "peak"), [("float32", 2e11), ("bfloat16", 2e12)])
def test_roofs_are_those_of_all_cores(dtype: str, peak: float) -> None:
    assert roofline.roofs_of(MACHINE, dtype) == [("memory", peak, 3e10), ("first cache", peak, 4e11)]
    assert roofline.roofs_of(None, dtype) == []
    report = sample()
    report.machine = MACHINE
    drawn = roofline.roofline(report)
    assert drawn is not None
    assert "first cache" in drawn
    assert Report.from_json(report.to_json()).machine == MACHINE


def test_formulas_are_typeset_once_for_each_op() -> None:
    assert [row.op for row in formulas.formulas(sample())] == ["linear", "linear_bsr"]
    assert all(row.flops.startswith("<math>") for row in formulas.formulas(sample()))
    assert dict(formulas.symbols(sample()))["<math><mi>N</mi></math>"] == "outputs of a linear layer or convolution"


@pytest.mark.parametrize("plan", [Planned("x", loss=0.0, bound=0.0), Planned("x", loss=2.0, bound=1.0), Planned("x", loss=1.0, bound=1.1)])
def test_the_gap_is_a_share_of_the_loss(plan: Planned) -> None:
    assert plan.gap == (0.5 if plan.loss == 2.0 else 0.0)
    assert Planned("x").gap is None


@pytest.mark.parametrize("name", ["encoder.layer.0.attention.self.query", "query", "self.query"])
def test_the_story_of_a_site(name: str) -> None:
    told = explain(sample(), name)
    assert "0.2 ms as eager; 37.7 M operations on 983 kB, 38.4 for each byte" in told
    assert "16x1, 20 % kept; runs bsr, bsr_r16v2; 50 µs, 4.00× the dense speed; 140 kB" in told
    assert "planned 60 µs, measured 50 µs; loss 0.0021 relative output error, 19 % of the plan's" in told
    rows = [line.split() for line in told.splitlines() if line.startswith(" ") and ("2:4" in line or "taken" in line)]
    assert [row[0] for row in rows] == ["16x1,", "2:4"]  # what was taken first


def test_the_story_of_a_site_that_stayed_dense() -> None:
    told = explain(sample(), "output.dense")
    assert "the best sparse kernel took 0.7 ms" in told
    assert "0.71 times the dense speed" in told
    assert "it could have been" not in told
    assert explain(sample(), "pooler.dense").splitlines()[0].startswith("pooler.dense: linear")


@pytest.mark.parametrize(("name", "near"), [("dense", r"several.*encoder.layer.0.output.dense, pooler.dense"), ("quary", "query"), ("", "pooler")])
def test_the_story_of_no_site(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"(?s){near}"):
        explain(sample(), name)


def test_a_recovery_is_drawn_and_comes_back() -> None:
    report = sample()
    assert recovery_plot.recovery(report) is None
    points = [Step(step, 0.1 * step, 1 / (step + 1), 1e-4, 0.5 + 0.01 * step if step % 4 == 0 else None) for step in range(12)]
    report.recovery = Recovery(["squarehead", "outputs"], points, 12, 1.2, "all steps are done", 0.4, 0.58, 8)
    drawn = recovery_plot.recovery(report)
    assert drawn is not None
    assert all(text in drawn for text in ("squarehead + outputs", "step; all steps are done", "quality"))
    assert Report.from_json(report.to_json()).recovery == report.recovery
    assert "How it was recovered" in report.to_html()


def test_csv_has_a_row_for_each_site(tmp_path: Path) -> None:
    report = sample()
    text = report.to_csv(tmp_path / "r.csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["site"] for row in rows] == [site.site for site in report.sites]
    assert rows[0]["shape"] == "384x384"
    assert rows[0]["compiled_ms"] == "0.05"
    assert rows[2]["dense_ms"] == ""
    assert "options" not in rows[0]
    assert (tmp_path / "r.csv").read_text(encoding="utf-8").splitlines() == text.splitlines()
