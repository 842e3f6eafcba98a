"""The report: what it says, that it is honest about what is missing, and that it stands alone."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plotly.graph_objects
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd import formats as show
from edgekd.benchmarks import report
from edgekd.benchmarks.report.pareto import points
from edgekd.benchmarks.report.sections import page as page_of
from edgekd.benchmarks.report.tables import artifact_tables, cost_table
from edgekd.benchmarks.report.words import seed_words, summary
from edgekd.errors import EdgekdError
from edgekd.files import write_sealed
from edgekd.proof import Quality
from edgekd.results import MadeArtifact, Results
from edgekd.runs.results import read_results


def _figure(value: float, *samples: float) -> dict[str, Any]:
    return {"value": value, "source": "measured:clock", "samples": list(samples or (value,))}


CONTRACT = {"context_length": 512, "vocab_size": 8192, "bos_id": None, "eos_ids": [0], "add_bos": False}


def _artifact(recipe: str, size: float, kl: float, speed: float, failures: list[str] | None = None) -> dict[str, Any]:
    return {
        "folder": f"runs/quickstart/artifacts/gguf-{recipe}",
        "size_bytes": int(size),
        "manifest": {
            "name": "quickstart",
            "target": "gguf",
            "target_title": "GGUF",
            "recipe": recipe,
            "runtime": "llama.cpp",
            "main_file": "model.gguf",
            "files": {"model.gguf": "0" * 64},
            "student_digest": "0" * 64,
            "parameters": 6_030_000,
            "bits_per_weight": size * 8 / 6.03e6,
            "contract": CONTRACT | {"chat_template": None},
            "versions": {},
            "parity": {
                "windows": 32,
                "window_tokens": 256,
                "unusable_positions": 0,
                "kl_mean": kl,
                "kl_p99": 11 * kl,
                "kl_max": 40 * kl,
                "kl_mean_ci95": [0.9 * kl, 1.12 * kl],
                "top1_agreement": max(0.0, 1 - 2 * kl**0.8),
                "perplexity_reference": 6.9312,
                "perplexity_artifact": 6.9312 + kl,
                "perplexity_ratio": (6.9312 + kl) / 6.9312,
                "first_diverging_token": None if kl < 1e-3 else 11,
                "tokens": {
                    "strings": 231,
                    "strings_identical": 231,
                    "chats": 12,
                    "chats_identical": 12,
                    "round_trips": 200,
                    "round_trips_identical": 200,
                },
                "failures": failures or [],
            },
            "benchmark": {
                "load_s": _figure(0.021, 0.019, 0.021, 0.024),
                "ttft_s": {"32": _figure(0.0093, 0.0091, 0.0093, 0.0102), "256": _figure(0.0612, 0.06, 0.0612, 0.071)},
                "prefill_tokens_per_s": {"32": _figure(3441, 3137, 3441, 3516), "256": _figure(4183, 3605, 4183, 4266)},
                "decode_tokens_per_s": _figure(speed, 0.97 * speed, speed, 1.02 * speed),
                "inter_token_p50_s": _figure(1 / speed),
                "inter_token_p95_s": _figure(1.4 / speed),
                "peak_rss_bytes": _figure(9.1e7 + size),
                "decode_roofline_fraction": _figure(speed * size / 2.9e10),
                "bandwidth_bytes_per_s": _figure(2.9e10),
                "bytes_per_token": _figure(size),
                "memory": {"decode": {"anonymous_bytes": _figure(8.1e7 + size), "file_backed_bytes": _figure(size)}},
                "kv_bytes_per_1000_tokens": _figure(2.1e6),
                "machine": {"cpu": "Intel(R) Xeon(R)", "cores": 2, "ram_bytes": 25 * 10**9, "os": "Linux 6.1"},
            },
        },
    }


def _model(perplexity: float, accuracy: float = 0.6) -> dict[str, Any]:
    return {
        "parameters": 6_030_000,
        "loss": math.log(perplexity),
        "perplexity": perplexity,
        "next_token_accuracy": accuracy,
        "tokens": 262144,
    }


def results() -> dict[str, Any]:
    """A run as ``runs.results`` tells it."""
    steps = range(100, 1300, 100)
    return {
        "name": "quickstart",
        "created": "2026-11-24T08:00:00+00:00",
        "spec": {"name": "quickstart", "distill": {"steps": 1200}},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "llama-cpp-python": "0.3.36"},
        "quality": {
            "teacher": {
                "parameters": 15_900_000,
                "loss": 1.633,
                "perplexity": 5.12,
                "next_token_accuracy": 0.6411,
                "tokens": 262144,
            },
            "student": {
                "parameters": 6_030_000,
                "loss": 1.936,
                "perplexity": 6.93,
                "next_token_accuracy": 0.5969,
                "tokens": 262144,
                "kl_to_teacher": 0.291,
                "top1_agreement_with_teacher": 0.742,
            },
            "baseline": {
                "parameters": 6_030_000,
                "loss": 2.043,
                "perplexity": 7.71,
                "next_token_accuracy": 0.5783,
                "tokens": 262144,
                "kl_to_teacher": 0.402,
                "top1_agreement_with_teacher": 0.706,
            },
        },
        "seeds": [
            {
                "seed": seed,
                "student": _model(6.93 + d, 0.5969 - d / 40),
                "baseline": _model(7.71 - d, 0.5783 + d / 40),
            }
            for seed, d in enumerate((0.0, 0.04, -0.03))
        ],
        "training": {
            "student": [{"step": s, "loss": 0.9, "validation_perplexity": 6.8 + 2400 / s} for s in steps],
            "baseline": [{"step": s, "loss": 2.0, "validation_perplexity": 7.5 + 3100 / s} for s in steps],
        },
        "ledger": [
            {
                "from": "teacher",
                "to": "student",
                "kl_mean": 0.291,
                "kl_ci95": None,
                "top1": 0.742,
                "perplexity_from": 5.12,
                "perplexity_to": 6.93,
            },
            *(
                {
                    "from": "student",
                    "to": f"gguf-{n}",
                    "kl_mean": kl,
                    "kl_ci95": [0.9 * kl, 1.12 * kl],
                    "top1": 1 - kl,
                    "perplexity_from": 6.9312,
                    "perplexity_to": 6.9312 + kl,
                }
                for n, kl in (("f16", 3.1e-7), ("q8_0", 2.4e-4), ("q4_k_m", 0.0094), ("q4_0", 0.0217))
            ),
        ],
        "artifacts": [
            _artifact("f16", 12.4e6, 3.1e-7, 611),
            _artifact("q8_0", 6.71e6, 2.4e-4, 903),
            _artifact("q4_k_m", 4.9e6, 0.0094, 861),
            _artifact("q4_0", 4.62e6, 0.0217, 1012),
        ],
        "stages": [
            {"name": "data", "seconds": 14.2},
            {"name": "student", "seconds": 244.0},
            {"name": "baseline", "seconds": 181.0},
            {"name": "export gguf-q4_0", "seconds": 0.8},
        ],
        "commands": [
            "edgekd run quickstart --out runs/quickstart",
            "edgekd export runs/quickstart/student OUT --target gguf --recipe q4_0 --quantized quantized",
        ],
    }


def _made(artifacts: list[dict[str, Any]]) -> list[MadeArtifact]:
    return [MadeArtifact.model_validate(artifact) for artifact in artifacts]


class _Page(HTMLParser):
    """Visible text, tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._hidden = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self._hidden = tag if tag in ("script", "style", "title") else self._hidden

    def handle_endtag(self, tag: str) -> None:
        self._hidden = "" if tag == self._hidden else self._hidden

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "made" / "report.html"
    assert report.build(Results.model_validate(results()), out) == out
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return out.read_text("utf-8")


def _words(found: dict[str, Any]) -> str:
    return _Page(report.render(Results.model_validate(found))).words


def test_it_begins_with_the_run_in_words(page: str) -> None:
    words = _Page(page).words
    assert (
        "The student has 6.0M of the teacher's 15.9M parameters and keeps 93.1 % of its next-token accuracy." in words
    )
    assert "Trained on labels alone, the same student keeps 90.2 %." in words
    assert "All 4 artifacts passed the gate. The smallest, GGUF q4_0, takes 4.62 MB" in words
    assert words.index("keeps 93.1 %") < words.index("Student, baseline and teacher")


def test_it_needs_nothing_but_itself(page: str) -> None:
    parsed = _Page(page)
    assert parsed.links == []
    assert "link" not in parsed.tags and "img" not in parsed.tags and "iframe" not in parsed.tags
    assert "default-src 'none'" in page
    assert page.count("plotly.js v") == 1
    assert len(page) < 6_000_000


def test_every_chart_has_its_place_and_is_a_figure_plotly_accepts(page: str) -> None:
    match = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert match
    charts = json.loads(re.sub(r"var\(--[a-z]+\)", "#123456", match[1]))
    assert set(charts) == {"accuracy", "perplexity", "validation", "ledger", "pareto"}
    for name, chart in charts.items():
        assert f'id="{name}"' in page
        figure = plotly.graph_objects.Figure(chart)  # raises on an unknown property or a wrong value
        assert len(figure.data) > 0


def test_colours_of_the_charts_are_defined_for_light_dark_and_print(page: str) -> None:
    used = set(re.findall(r"var\((--[a-z]+)\)", page.partition("</style>")[2]))
    style = page.partition("<style>")[2].partition("</style>")[0]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 3 and used
    for block in blocks:
        assert used <= set(re.findall(r"(--[a-z]+):", block))


def test_what_is_missing_is_not_measured_and_never_zero() -> None:
    found = results()
    found["quality"]["baseline"] = None
    found["seeds"] = []
    found["artifacts"] = found["artifacts"][:1]
    found["artifacts"][0]["manifest"] |= {"parity": None, "benchmark": None}
    words = _words(found)
    assert "what distilling gave is unknown" in words and "Label-only" not in words.replace("label-only", "")
    assert "One seed only" in words and "Not verified: GGUF f16." in words and "Not timed: GGUF f16." in words
    assert "No artifact was verified." in words and "its speed was not measured" in words
    table = words.partition("Artifacts ")[2].partition("Limits")[0]
    assert table.count("not measured") >= 15
    assert not re.search(r"(?<![\d.])0(?:\.0+)?(?![\d.])", table)


def test_what_ran_in_place_of_a_runtime_is_named() -> None:
    given = results()
    for artifact in given["artifacts"][:2]:
        artifact["manifest"] |= {"target": "coreml", "target_title": "Core ML", "runtime": "Core ML", "benchmark": None}
        artifact["manifest"]["parity"]["stand_in"] = "the.module, an interpreter"
    given["artifacts"][3]["manifest"]["parity"] = None
    words = _Page(report.render(Results.model_validate(given))).words
    assert (
        "Core ML does not run on this machine; Core ML f16 and Core ML q8_0 were run by the.module, an interpreter: "
        "program and weights are proved, Core ML's own compiler, arithmetic and speed are not." in words
    )
    assert "Run by the.module the.module llama.cpp not measured" in words
    assert "Not timed: Core ML f16 and Core ML q8_0." in words


def test_weights_that_were_dequantized_are_said_to_be_so() -> None:
    given = results()
    words = _Page(report.render(Results.model_validate(given))).words
    assert "dequantized" not in words
    given["artifacts"][0]["manifest"]["dequantized_from"] = ["Q4_1", "Q8_0"]
    words = _Page(report.render(Results.model_validate(given))).words
    assert "The student's weights were dequantized from Q4_1 and Q8_0: a comparison of formats favours those" in words


def test_what_a_runtime_reads_otherwise_is_told_with_the_text() -> None:
    given = results()
    for artifact in given["artifacts"]:
        artifact["manifest"]["details"] = {"tokenizer": {"used": "llama.cpp", "texts": 104, "differ": 0, "first": None}}
    assert "by itself reads" not in _Page(report.render(Results.model_validate(given))).words
    for artifact in given["artifacts"][:2]:
        told = {"used": "llama.cpp", "texts": 104, "differ": 2, "first": "'a </s>': [128247] instead of [690]"}
        artifact["manifest"]["details"] = {"tokenizer": told}
    words = _Page(report.render(Results.model_validate(given))).words
    assert "by itself reads 2 of 104 texts otherwise than the student's tokenizer, first 'a </s>': [128247]" in words
    assert words.count("by itself reads") == 1


def test_a_reader_may_choose_both_axes_of_the_artifacts(page: str) -> None:
    match = re.search(r'<script type="application/json" id="choices">(.*?)</script>', page, re.DOTALL)
    assert match
    choices = {choice["key"]: choice for choice in json.loads(match[1])}
    assert set(choices) == {"kl_mean", "decode_tokens_per_s", "ttft_s", "size_bytes", "peak_rss_bytes"}
    assert choices["size_bytes"]["values"] == [12.4e6, 6.71e6, 4.9e6, 4.62e6]  # as the chart numbers them
    assert choices["ttft_s"]["values"] == [0.0612] * 4 and choices["kl_mean"]["logarithmic"]
    for axis, first in (("x", "decode_tokens_per_s"), ("y", "kl_mean")):
        select = page.partition(f'<select id="pareto-{axis}">')[2].partition("</select>")[0]
        assert re.findall(r'value="(\w+)"', select) == list(choices)
        assert re.findall(r'value="(\w+)" selected', select) == [first]


_BROWSER = """
const fs = require("fs"), drawn = {}, listeners = {};
const page = JSON.parse(fs.readFileSync(0, "utf-8"));
const select = (key) => ({ value: key, dataset: {}, addEventListener: (_, call) => { listeners[key] = call; } });
const boxes = { charts: { textContent: page.charts }, choices: { textContent: page.choices },
  "pareto-x": select("decode_tokens_per_s"), "pareto-y": select("kl_mean") };
global.document = { getElementById: (id) => boxes[id] || { id, clientWidth: 600 }, querySelectorAll: () => [],
  documentElement: { clientWidth: 600 } };
global.getComputedStyle = () => ({ getPropertyValue: () => " #123456" });
global.matchMedia = () => ({ addEventListener() {} });
global.addEventListener = () => {};
global.Plotly = { react: (box, data, layout) => { drawn[box.id] = { data, layout }; } };
eval(page.script);
const first = drawn.pareto;
boxes["pareto-x"].value = "size_bytes";
listeners["decode_tokens_per_s"]();
console.log(JSON.stringify([first, drawn.pareto]));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="the page's script runs in node")
def test_the_chart_is_drawn_again_on_the_axis_that_was_chosen(page: str) -> None:
    parts = dict(re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script>', page, re.DOTALL))
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    told = json.dumps({**parts, "script": script})
    done = subprocess.run(["node", "-e", _BROWSER], input=told, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert [trace["x"] for trace in before["data"]] == [[611], [903], [861], [1012]]
    assert [trace["x"] for trace in after["data"]] == [[12.4e6], [6.71e6], [4.9e6], [4.62e6]]
    assert [trace["y"] for trace in after["data"]] == [trace["y"] for trace in before["data"]]
    assert after["layout"]["xaxis"]["title"]["text"].endswith("On disk, bytes")
    assert after["layout"]["xaxis"]["gridcolor"] == "#123456" and after["layout"]["yaxis"] == before["layout"]["yaxis"]


def test_memory_by_phase_and_the_cache_are_shown() -> None:
    words = _words(results())
    assert "Anonymous, decode 93.4 MB" in words and "File-backed, decode 12.4 MB" in words
    assert "Cache of 1,000 tokens 2.10 MB" in words
    assert "anonymous_bytes measured:clock" in words  # among the sources of figures


def test_empty_results_still_make_a_page() -> None:
    words = _words({})
    assert "The student's quality was not measured in this run." in words
    assert "No artifact was exported in this run." in words
    assert words.count("not measured") >= 6


def test_a_failed_gate_is_told_first_and_does_not_win() -> None:
    found = results()
    found["artifacts"][3]["manifest"]["parity"]["failures"] = ["kl_mean 0.0217 exceeds 0.02 by 0.0017"]
    words = _words(found)
    assert "1 of 4 verified artifacts failed the gate: GGUF q4_0." in words
    assert "Failed gates GGUF q4_0 : kl_mean 0.0217 exceeds 0.02 by 0.0017" in words
    assert "To begin with: GGUF q4_k_m" in words and "3 of 4" in words
    assert "GGUF q4_0 failed its gate, so it does not compete" in words


def test_a_baseline_that_is_better_is_said_to_be() -> None:
    found = results()
    found["quality"]["baseline"]["next_token_accuracy"] = 0.62
    assert "more than the distilled one: here distilling did not help" in _words(found)


HOSTILE = "</script><script>alert('x')</script><!-- & \" \u2028"


def test_it_says_where_the_student_holds_and_where_it_dropped() -> None:
    found = results()
    for name, accuracies in {"teacher": (0.8, 0.6), "student": (0.78, 0.45), "baseline": (0.7, 0.4)}.items():
        sources = {f"<{s}>": _model(5.0, a) for s, a in zip(("code", "law"), accuracies, strict=True)}
        found["quality"][name]["by_source"] = sources
    words = _words(found)
    assert "By source, it holds 95 % or more of the teacher's accuracy on <code>" in words.replace("\xa0", " ")
    assert "it dropped below on <law> (75.0 %)" in words.replace("\xa0", " ")
    assert "Kept by labels alone" in words and "66.7" in words
    assert "By source" not in _words(results())


def test_text_from_outside_stays_text() -> None:
    found = results()
    found["name"] = HOSTILE
    found["commands"] = [HOSTILE]
    found["stages"] = [{"name": HOSTILE, "seconds": 1.0}]
    found["versions"] = {HOSTILE: HOSTILE}
    found["ledger"][1]["to"] = HOSTILE
    found["artifacts"][0]["manifest"] |= {"recipe": HOSTILE, "target": HOSTILE}
    found["artifacts"][0]["manifest"]["parity"]["failures"] = [HOSTILE]
    found["artifacts"][0]["folder"] = HOSTILE
    page = report.render(Results.model_validate(found))
    assert _Page(page).tags.count("script") == 4
    assert "<script>alert" not in page
    assert HOSTILE[:40] in " ".join(_Page(page).text)


def test_the_front_is_what_nothing_beats() -> None:
    artifacts = [
        _artifact("a", 10e6, 0.001, 500),
        _artifact("b", 5e6, 0.01, 900),
        _artifact("c", 6e6, 0.02, 800),
        _artifact("d", 4e6, 0.5, 950, ["failed"]),
    ]
    assert [p.on_front for p in points(_made(artifacts))] == [True, True, False, False]
    artifacts[1]["manifest"]["benchmark"] = None  # an unmeasured rival beats nobody
    assert [p.on_front for p in points(_made(artifacts))] == [True, False, True, False]


@given(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=8))
def test_the_front_is_never_empty_and_covers_the_rest(values: list[tuple[int, int, int]]) -> None:
    marked = points(_made([_artifact(str(i), size, kl, speed) for i, (size, kl, speed) in enumerate(values)]))
    front = [v for v, p in zip(values, marked, strict=True) if p.on_front]
    for size, kl, speed in values:
        assert any(s <= size and k <= kl and v >= speed for s, k, v in front)


def test_seeds_that_overlap_prove_nothing() -> None:
    def words(*pairs: tuple[float, float]) -> str:
        return seed_words([Quality.model_validate({"student": _model(s), "baseline": _model(b)}) for s, b in pairs])

    apart = words((6.9, 7.5), (7.0, 7.6))
    assert "beats the best label-only one by 0.50, more than the wider spread of 0.10" in apart
    near = words((6.9, 7.5), (7.4, 7.6))
    assert "but not more than the wider spread of 0.50" in near
    assert "do not show that distilling helped" in words((6.9, 7.5), (7.5, 7.6))
    assert words((6.9, 7.5)) == ""


def test_the_summary_says_which_figure_is_missing() -> None:
    words = " ".join(summary(Quality.model_validate({"student": _model(7.0)}), []))
    assert "was not measured" in words and "0 %" not in words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (show.significant(0.0217), "0.0217"),
        (show.significant(3.1e-7), "3.1×10⁻⁷"),
        (show.significant(9.996), "10.0"),
        (show.significant(1012.4), "1012"),
        (show.significant(262144), "262\u202f144"),
        (show.significant(0), "0"),
        (show.significant(-0.5), "−0.500"),
        (show.percent(0.9312), "93.1 %"),
        (show.size(4_620_000), "4.62 MB"),
        (show.size(812), "812 B"),
        (show.duration(0.0093), "9.30 ms"),
        (show.duration(244), "4 min 4 s"),
        (show.duration(59.99), "60.0 s"),
        (show.duration(3600), "1 h 0 min"),
        (show.parameters(6_030_000), "6.0M"),
        (show.spread([0.019, 0.024], show.duration), "19.0–24.0 ms"),
        (show.spread([0.9, 1.2], show.duration), "900 ms–1.20 s"),
    ],
)
def test_figures_read_well(text: str, expected: str) -> None:
    assert text.replace("\u00a0", " ") == expected


@given(st.floats(1e-3, 1e12), st.integers(2, 6))
def test_rounding_keeps_the_digits_asked_for(x: float, digits: int) -> None:
    read = float(show.significant(x, digits).replace("\u202f", ""))
    assert abs(read - x) <= 0.5001 * 10 ** (1 - digits) * x


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "text", True, {}, {"value": None}, []])
def test_what_is_no_number_is_not_measured(value: Any) -> None:
    for text in (show.significant, show.percent, show.size, show.duration, show.count, show.parameters):
        assert text(value) == show.NOT_MEASURED


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["kl_mean", "kl_mean_ci95", "top1_agreement", "first_diverging_token"]), _JSON, _JSON)
def test_odd_figures_are_told_apart_or_refused_in_a_sentence(key: str, parity: Any, quality: Any) -> None:
    found = results()
    found["artifacts"][0]["manifest"]["parity"][key] = parity
    found["artifacts"][1]["manifest"]["benchmark"]["decode_tokens_per_s"] = parity
    found["quality"]["student"]["perplexity"] = quality
    found["training"]["student"][3]["validation_perplexity"] = quality
    found["ledger"][2]["kl_ci95"] = parity
    with TemporaryDirectory() as folder:
        write_sealed(path := Path(folder) / "results.json", found)
        try:
            read = read_results(path)
        except EdgekdError as refusal:
            sentence = refusal.cause
        else:
            sentence = str(path)
            json.dumps(page_of(read).charts.drawn(), allow_nan=False)
        assert str(path) in sentence


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgekdError, match="cannot be written"):
        report.build(Results(), tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("audit", "text"),
    [
        (None, show.NOT_MEASURED),
        ({"status": "passed", "failures": [], "not_checked": []}, "passed"),
        ({"status": "failed", "failures": ["write: ~/x", "read: /y"], "not_checked": ["z"]}, "failed: write: ~/x"),
        ({"status": "not checked", "failures": [], "not_checked": ["all: no strace"]}, "not checked: all: no strace"),
    ],
)
def test_the_privacy_audit_has_its_row(audit: Any, text: str) -> None:
    found = results()
    seen = {"opened": {}, "opened_outside": [], "written": [], "sockets": []}
    found["artifacts"][0]["manifest"]["audit"] = audit and audit | seen
    (group,) = (g for g in page_of(Results.model_validate(found)).artifacts[0].groups if g.title == "Privacy")
    (row,) = group.rows
    assert row.cells[0].text == text
    assert text in _Page(report.render(Results.model_validate(found))).text or text == show.NOT_MEASURED


def test_many_artifacts_are_split_evenly() -> None:
    def widths(count: int) -> list[int]:
        tables = artifact_tables(_made([_artifact(str(i), 5e6, 0.01, 900) for i in range(count)]))
        return [len(table.columns) for table in tables]

    assert widths(13) == [5, 5, 3] and widths(6) == [6] and widths(0) == []


# --- what a million requests cost -------------------------------------------------------------------------------------


def test_a_million_requests_are_paid_by_hand_as_the_table_says() -> None:
    counted, estimated = _artifact("q8_0", 6.71e6, 2e-4, 903), _artifact("q4_0", 4.62e6, 0.02, 1012)
    for phase, joules in (("prefill", 0.001), ("decode", 0.02)):
        energy = _figure(joules) | {"source": "measured:package-0"}
        counted["manifest"]["benchmark"][f"{phase}_energy_j_per_token"] = energy
    table = cost_table(_made([counted, estimated]))
    assert table is not None and (table.prompt_tokens, table.output_tokens) == (366, 146)  # of a context of 512
    hosted, ours, guess = ([cell.text for cell in row.cells] for row in table.rows)
    usd, kwh = 366 * 0.29 + 146 * 0.60, 146 * 3.5 * 1e6 / 3.6e6
    assert hosted[:3] == [show.significant(x) for x in (usd, kwh, kwh * 0.481)]
    own = (366 * 0.001 + 146 * 0.02) * 1e6 / 3.6e6
    assert ours[:3] == [show.significant(x) for x in (own * 0.11, own, own * 0.481)]
    assert ours[3:5] == [f"{show.significant(x)} ×" for x in (usd / (own * 0.11), kwh / own)]
    assert ours[5].startswith("measured:package-0") and guess[5].startswith("estimated:")
    assert any("estimate" in words for words in table.remarks) and len(table.sources) == 5
    assert cost_table([]) is None


def test_the_page_tells_what_requests_cost() -> None:
    html = report.render(Results.model_validate(results()))
    assert "What a million requests cost" in html and "aigateway.sh" in html
    assert "What a million requests cost" not in report.render(Results())
