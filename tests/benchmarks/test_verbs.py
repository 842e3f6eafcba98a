"""The verbs as people type them, on a real GGUF of two layers."""

from __future__ import annotations

import json

import pytest

from edgekd.proof import BenchRecord
from typed import edgekd


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, export_gguf):
    folder = tmp_path_factory.mktemp("run")
    out = folder / "artifacts" / "gguf-int8"
    return export_gguf(folder / "student", out, "tiny", "Llama", max_position_embeddings=8192)


QUICK = ("--runs", "3", "--cold-runs", "1", "--decode-tokens", "8", "--prompt-tokens", "8", "--prompt-tokens", "24")


@pytest.fixture(scope="module")
def benched(artifact, tmp_path_factory):
    history = tmp_path_factory.mktemp("history") / "bench.jsonl"
    code, out, err = edgekd("bench", artifact.folder, *QUICK, "--history", history, "--json")
    assert code == 0, err
    return json.loads(out), history


def test_bench(artifact, benched):
    told, history = benched
    assert told["settings"]["ttft_from"] == "text" and told["settings"]["context_length"] == 4096
    for key in ("cold_ttft_s", "first_ttft_s", "itl_s", "load_s"):
        assert told[key]["value"] > 0, key
    assert told["cold_ttft_s"]["value"] > told["ttft_s"]["8"]["value"]
    assert list(told["ttft_curve_s"]) == ["32", "128", "512", "2048", "4080"]
    assert len(told["ttft_s"]["24"]["ci95"]) == 2
    for phase in ("load", "prefill", "decode"):
        assert told["memory"][phase]["anonymous_bytes"]["value"] > 0
    assert "llama-cpp-python" in told["machine"]["runtime_build"]
    # 2 layers, one head of 32, fp16, keys and values
    assert told["kv_bytes_per_1000_tokens"]["value"] == 1000 * 2 * 2 * 32 * 2
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    assert manifest["benchmark"]["load_s"] == told["load_s"]
    (line,) = history.read_text().splitlines()
    assert json.loads(line)["benchmark"]["load_s"] == told["load_s"]


def test_the_record_is_what_the_schema_says(benched):
    code, out, _ = edgekd("schema", "--bench")
    schema, record = json.loads(out), json.loads(benched[1].read_text().splitlines()[0])
    assert code == 0 and set(schema["properties"]) == set(record) >= set(schema["required"])
    assert set(schema["$defs"]["Benchmark"]["properties"]) == set(record["benchmark"])
    assert BenchRecord.model_validate(record).benchmark.settings.runs == 3


def test_bench_held_to_a_device_leaves_the_manifest_alone(artifact, benched, tmp_path):
    before = (artifact.folder / "manifest.json").read_bytes()
    profile = tmp_path / "tiny.yaml"
    words = 'basis: made up, source: "this test", date: "2026-11"'
    profile.write_text(
        'title: "A tiny phone"\nkind: phone\nclass: cpu\nchip: x\n'
        f"app_memory: {{value: 0.01, unit: GB, {words}}}\nthreads: {{value: 1, unit: threads, {words}}}\n"
    )
    code, out, err = edgekd("bench", artifact.folder, *QUICK, "--profile", profile)
    assert code == 2 and "was killed: it held" in err and "A tiny phone gives an app 10.0 MB" in err and out == ""
    assert (artifact.folder / "manifest.json").read_bytes() == before


def test_predict_pick_cost_and_report(artifact, benched, tmp_path):
    code, out, _ = edgekd("predict", artifact.folder, "--profile", "raspberry-pi-5", "--json")
    assert code == 0 and json.loads(out)["decode_tokens_per_s"]["source"] == "predicted:class cpu"
    code, out, _ = edgekd("predict", artifact.folder, "--history", benched[1])
    assert code == 0 and "0 other artifacts" in out
    code, out, _ = edgekd("pick", artifact.folder.parent.parent, "--memory", "4GB", "--json")
    assert code == 0 and json.loads(out)["taken"]["name"] == "gguf-int8"
    code, out, err = edgekd("pick", artifact.folder.parent, "--quality", "0.5")
    assert code == 1 and "quality is unknown: not verified" in out and "no artifact is within the limits" in err
    code, out, _ = edgekd("cost", artifact.folder, "--profile", "laptop", "--json")
    assert code == 0 and json.loads(out)["student"]["source"].startswith("estimated:")
    code, out, _ = edgekd("report", "--history", benched[1], "--out", tmp_path / "history.html")
    assert code == 0 and "gguf-int8" in (tmp_path / "history.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("predict", "ARTIFACT"), "either --profile or --history"),
        (("predict", "ARTIFACT", "--profile", "pixel9"), "did you mean 'pixel-9'"),
        (("predict", "nowhere", "--profile", "pixel-9"), "nowhere is not an artifact"),
        (("bench", "ARTIFACT", "--profile", "galaxy-s25"), "neither threads nor app_memory"),
        (("bench", "nowhere"), "nowhere is not an artifact"),
        (("bench", "ARTIFACT", "--prompt-tokens", "9000"), "exceed the context of tiny, 4096"),
        (("compare", "ARTIFACT", "nowhere"), "nowhere is not an artifact"),
        (("compare", "ARTIFACT", "ARTIFACT", "--prompt-tokens", "5000"), "exceed the context"),
        (("pick", "nowhere"), "no artifacts in it"),
        (("pick", "ARTIFACT", "--memory", "much"), "not a number with a unit"),
        (("cost", "ARTIFACT", "--prompt-tokens", "5000"), "exceed the context of 4096"),
        (("report",), "give either RUN or --history"),
        (("report", "--history", "nowhere"), "nowhere: cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(artifact, words, said):
    code, out, err = edgekd(*(artifact.folder if word == "ARTIFACT" else word for word in words))
    assert code == 2 and said in err and "Traceback" not in err and out == ""
    assert err.splitlines()[-1].startswith("error: ")
